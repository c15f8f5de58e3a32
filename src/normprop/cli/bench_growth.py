"""`normprop bench-growth`: how the cost of a step, of conversion and of inspection grows."""

import json as json_format
import shlex
from pathlib import Path
from typing import Annotated

from normprop.cli.bench import Device, Threads, prepare, save, watch
from normprop.cli.options import Json, Quiet, comma_list
from normprop.errors import requires

with requires("cli"):
    import typer


def bench_growth(
    context: typer.Context,
    methods: Annotated[str, typer.Option(help="Comma list; none is added.")] = "none,batch,normprop-paper,normprop",
    seconds: Annotated[float, typer.Option(min=0, help="Time for each point; at least five rounds.")] = 5.0,
    threads: Threads = None,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="Directory of growth.json and growth.svg.")] = Path("runs/growth"),
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Time steps against width, depth and batch size, and conversion and inspection against parameters."""
    from normprop.experiments.growth import grow
    from normprop.report.growth import svg

    with watch("points", quiet=quiet or json) as progress:
        document = grow(
            comma_list("--methods", methods, str, "methods"),
            seconds=seconds,
            device=prepare(threads, device),
            progress=progress,
            command=shlex.join(["normprop", *context.obj]),
        )
    text = json_format.dumps(document, indent=2, allow_nan=False)
    save(out / "growth.json", f"{text}\n")
    save(out / "growth.svg", svg(document))
    print(text if json else out / "growth.svg")
