"""`normprop report`: the results of a study, written again from its database."""

from pathlib import Path
from typing import Annotated

from normprop.cli.compare import database
from normprop.cli.options import Json
from normprop.cli.output import publish
from normprop.errors import ConfigError, requires

with requires("cli"):
    import typer


def report(
    study: Annotated[str, typer.Argument(help="Name of a study, or the directory of its results.")],
    storage: Annotated[
        str | None, typer.Option(help="SQLAlchemy URL of the database; by default study.db in the directory.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write to; by default the study's own.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables in Markdown and write nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Print a study's table and write its results and HTML report again, finished or not."""
    from normprop.experiments.storage import silence
    from normprop.experiments.study import Study, names

    silence()
    if storage is not None:
        name, directory = study, Path("runs") / study
    else:
        directory = Path(study) if Path(study, "study.db").exists() else Path("runs") / study
        if not (directory / "study.db").exists():
            raise ConfigError(
                f"no study {study!r}: expected a directory with a study.db, here or under runs, or --storage URL"
            )
        storage = database(directory)
        held = names(storage)
        if not held:
            raise ConfigError(f"{directory / 'study.db'} holds no study yet: run normprop compare first")
        name = study if study in held else held[0]
    if markdown:
        from normprop.experiments.results import document
        from normprop.report.markdown import tables

        print(tables(document(Study(storage, name))), end="")
        return
    target = out or directory
    target.mkdir(parents=True, exist_ok=True)
    publish(Study(storage, name), target, as_json=json)
