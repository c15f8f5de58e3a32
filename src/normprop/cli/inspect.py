"""`normprop inspect`: predicted and measured statistics of every call in a network."""

import json as json_format
from pathlib import Path
from typing import Annotated, Any

from normprop.cli import models
from normprop.cli.converted import Converted, bring
from normprop.errors import requires
from normprop.files import write_content

with requires("cli"):
    import typer


def inspect(
    model: models.Name,
    args: models.Args = "",
    input: models.Input = None,
    weights: models.Weights = None,
    converted: Converted = None,
    seed: models.Seed = 0,
    on_unknown: models.OnUnknown = "error",
    threshold: Annotated[float, typer.Option(help="Factor from which a prediction is flagged.")] = 1.5,
    evaluation: Annotated[bool, typer.Option("--eval", help="Look at evaluation instead of training.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the page to this file.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the numbers to this file.")] = None,
) -> None:
    """Print predicted and measured statistics of every call in a network."""
    from normprop.graph.inspect import inspect as look

    loaded = bring(model, args, input, weights, converted, seed)
    unknown: Any = on_unknown
    report = look(loaded.model.train(not evaluation), loaded.x, on_unknown=unknown, threshold=threshold)
    files = {}
    if html is not None:
        files[html] = report.to_html()
    if json is not None:
        files[json] = json_format.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n"
    for path, text in files.items():
        write_content(path, text)
    print(report)
