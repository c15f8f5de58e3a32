"""`normprop reproduce`: a paper's figure, table or claim, measured again."""

import json as json_format
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

from normprop.cli.compare import database, make_directory
from normprop.cli.options import Json, Quiet
from normprop.cli.progress import watch
from normprop.errors import ConfigError, requires
from normprop.files import write_content

with requires("cli"):
    import typer


def reproduce(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="normprop-fig1, ...; list prints them all.")],
    scale: Annotated[str, typer.Option(help="small: within minutes on two cores; paper: as printed.")] = "small",
    data_dir: Annotated[Path | None, typer.Option(help="Directory of the published files.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds; by default the protocol's.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="SQLAlchemy URL of the database; by default study.db in --out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of NAME.md, NAME.svg and NAME.json.")] = Path("runs/reproduce"),
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes; by default one per core, or one on a GPU.")
    ] = None,
    accelerator: Annotated[str, typer.Option(help="auto, cpu, gpu, cuda or mps.")] = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure a figure, a table or a claim of a paper again, and say where it agrees and where not.

    What was trained is kept in a database: the same command resumes.
    """
    from normprop.experiments.reproduce import NAMES
    from normprop.experiments.reproduce import reproduce as run
    from normprop.experiments.reproduce.context import Context
    from normprop.experiments.storage import silence
    from normprop.experiments.trial import plain
    from normprop.report.reproduction import figure, markdown

    if name == "list":
        print("\n".join(NAMES))
        return
    if scale not in ("small", "paper"):
        raise ConfigError(f"--scale must be small or paper, got {scale!r}")
    silence()
    make_directory(out)
    kind: Any = scale
    with watch(quiet=quiet or json) as progress:
        found = run(
            name,
            Context(
                scale=kind,
                storage=storage or database(out),
                data_dir=data_dir,
                accelerator=accelerator,
                workers=workers,
                seeds=seeds,
                progress=lambda line: None if quiet or json else print(line, file=sys.stderr),
                watch=progress,
            ),
        )
    command = shlex.join(["normprop", *context.obj])
    numbers = {"command": command, "scale": scale, **plain(found.numbers)}
    texts = {
        f"{name}.md": markdown(found, command, f"{name}.svg"),
        f"{name}.svg": figure(found),
        f"{name}.json": json_format.dumps(numbers, indent=2, allow_nan=False) + "\n",
    }
    for file, text in texts.items():
        write_content(out / file, text)
    print(texts[f"{name}.json"] if json else texts[f"{name}.md"])
