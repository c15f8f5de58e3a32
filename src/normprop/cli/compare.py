"""`normprop compare`: methods, batch sizes, learning rates and seeds at equal budget."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from normprop.cli.options import Json, Quiet, comma_list, takes_settings
from normprop.cli.output import publish
from normprop.cli.progress import watch
from normprop.errors import ConfigError, requires

with requires("cli"):
    import typer

if TYPE_CHECKING:
    from normprop.experiments.settings import Settings

_METHODS = "none,batch,group,layer,weight,normprop,normprop-paper"


@takes_settings
def compare(
    settings: "Settings",
    context: typer.Context,
    methods: Annotated[str, typer.Option(help="Comma list of methods, or all.")] = _METHODS,
    batch_sizes: Annotated[str, typer.Option("--batch-sizes", "--batch-size", help="Comma list.")] = "1,8,32",
    lrs: Annotated[str, typer.Option("--lrs", "--lr", help="Comma list of learning rates.")] = "0.003,0.01,0.03",
    seeds: Annotated[str, typer.Option("--seeds", "--seed", help="Comma list.")] = "0,1,2",
    tuning_seeds: Annotated[
        int | None, typer.Option(help="Try every rate with this many seeds only, and the other seeds at the best rate.")
    ] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study; by default data and model.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="SQLAlchemy URL of the database; by default study.db in --out.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the results; by default runs/STUDY.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes; by default one per core, or one on a GPU.")
    ] = None,
    step_time: Annotated[float, typer.Option(min=0, help="Seconds to spend on step times; 0 leaves them out.")] = 6.0,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Compare methods: every method with every batch size, learning rate and seed, at equal budget.

    Each method gets its own learning rate from the same grid, chosen by the validation error; the table gives the test
    error at that rate. The study lives in a database: the same command resumes it, with more methods, rates or seeds
    it trains what is missing, and run in several shells at once it shares the work.
    """
    from normprop.experiments.compare import compare as run
    from normprop.experiments.grid import Grid
    from normprop.experiments.storage import hide_password, silence

    silence()
    grid = Grid(
        methods=_methods(methods, own_network=":" in settings.model),
        batch_sizes=comma_list("--batch-sizes", batch_sizes, int, "whole numbers"),
        lrs=comma_list("--lrs", lrs, float, "numbers"),
        seeds=comma_list("--seeds", seeds, int, "whole numbers"),
        tuning_seeds=tuning_seeds,
    )
    name = study or f"{Path(settings.data).stem}-{settings.model.replace(':', '.')}"
    out = out or Path("runs") / name
    if storage is None:
        make_directory(out)
        storage = database(out)
    command = shlex.join(["normprop", *context.obj])
    try:
        with watch(quiet=quiet or json) as progress:
            finished = run(
                settings,
                grid,
                storage=storage,
                name=name,
                workers=workers,
                progress=progress,
                step_time_seconds=step_time,
                command=command.replace(storage, hide_password(storage)),
            )
    except KeyboardInterrupt:
        print(f"Stopped; what is finished is kept. Resume with: {command}", file=sys.stderr)
        raise typer.Exit(130) from None
    make_directory(out)
    publish(finished, out, as_json=json)


def database(out: Path) -> str:
    """Return the URL of the SQLite file in a directory of results.

    Args:
        out: the directory.

    Returns:
        An SQLAlchemy URL.

    Example:
        >>> database(Path("/runs/digits"))
        'sqlite:////runs/digits/study.db'
    """
    return f"sqlite:///{out.absolute() / 'study.db'}"


def _methods(text: str, *, own_network: bool) -> list[str]:
    """The methods of the list; a person's own network may know methods that the registry does not."""
    from normprop import norms

    names = norms.names() if text.strip() == "all" else comma_list("--methods", text, str, "methods")
    unknown = [name for name in names if name not in norms.names()]
    if unknown and not own_network:
        raise ConfigError(f"--methods: no method {unknown[0]!r}; there are all, {', '.join(norms.names())}")
    return names


def make_directory(path: Path) -> None:
    """Make the directory of --out.

    Args:
        path: the directory.

    Raises:
        ConfigError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: cannot make the directory {path} ({error.strerror}); name another one") from error
