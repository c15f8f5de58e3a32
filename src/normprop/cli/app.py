"""The typer application, and how errors end it."""

import sys
from collections.abc import Sequence
from typing import Annotated

from normprop.errors import NormPropError, requires

with requires("cli"):
    import typer

from normprop.cli.bench import bench
from normprop.cli.bench_growth import bench_growth
from normprop.cli.compare import compare
from normprop.cli.convert import convert
from normprop.cli.diagnose import diagnose
from normprop.cli.fold import fold
from normprop.cli.inspect import inspect
from normprop.cli.methods import methods
from normprop.cli.report import report
from normprop.cli.reproduce import reproduce
from normprop.cli.train import train

app = typer.Typer(
    name="normprop",
    help="Normalization Propagation and other normalisers: train, compare, and convert networks of your own.",
    no_args_is_help=True,
    add_completion=False,
)
app.command()(train)
app.command()(compare)
app.command()(report)
app.command()(methods)
app.command()(inspect)
app.command()(diagnose)
app.command()(convert)
app.command()(fold)
app.command()(reproduce)
app.command()(bench)
app.command()(bench_growth)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(f"normprop {version('normprop')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: what follows the program's name; by default the process's own.

    Returns:
        The exit code: 0, 2 for an error named in one line on stderr, 130 after Ctrl-C. Unexpected exceptions pass
        through with their traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # The commands find what was given in their context, to tell how to resume.
        return typer.main.get_command(app).main(given, prog_name="normprop", standalone_mode=False, obj=given) or 0
    except typer.TyperException as error:
        return _fail(error.format_message())
    except NormPropError as error:
        return _fail(str(error))


def _fail(message: str) -> int:
    """Print an error as the one line it is to be; without a command, typer has shown the help and says nothing."""
    if message:
        print("normprop: " + "; ".join(line.strip() for line in message.splitlines() if line.strip()), file=sys.stderr)
    return 2
