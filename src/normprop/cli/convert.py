"""`normprop convert`: a network without batch norm."""

import json
from pathlib import Path
from typing import Annotated, Any

from normprop.cli import converted, models
from normprop.cli.weights import FORMATS, packed
from normprop.errors import ConfigError, requires
from normprop.files import write_content

with requires("cli"):
    import typer


def _option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Conversion")


_DEFAULTS = {"to": "normprop", "weights": "fresh", "moments": "live", "calibrate": "noise", "on_unknown": "error"}


def convert(
    model: models.Name,
    args: models.Args = "",
    input: models.Input = None,
    weights: models.Weights = None,
    seed: models.Seed = 0,
    to: Annotated[str, _option("normprop, or a method of normprop methods.")] = "normprop",
    mode: Annotated[
        str,
        _option("fresh: to train from scratch; exact: the same function as in evaluation; rescale: keep the filters."),
    ] = "fresh",
    moments: Annotated[str, _option("Predict in every forward pass, live, or once, fixed.")] = "live",
    center: Annotated[bool | None, _option("Subtract the mean of absorbed filters; by default if fresh.")] = None,
    calibrate: Annotated[str, _option("Correct the predictions on noise, on the example input, or none.")] = "noise",
    include: Annotated[list[str] | None, _option("Convert only these paths, such as 'layer1.*'. Repeatable.")] = None,
    exclude: Annotated[list[str] | None, _option("Leave these paths. Repeatable.")] = None,
    on_unknown: models.OnUnknown = "error",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for report.html, report.json, report.txt, weights.")] = None,
    format: Annotated[str, typer.Option(help="Of the weights: safetensors or state-dict.")] = "safetensors",
) -> None:
    """Replace every batch norm of a network by a normaliser that needs no batch."""
    from normprop.graph.plan import analyze, refuse

    if format not in FORMATS:
        raise ConfigError(f"--format must be one of {', '.join(FORMATS)}, got {format!r}")
    if dry_run and out is not None:
        raise ConfigError("--dry-run writes nothing; leave out --out")
    asked: dict[str, Any] = {
        "to": to,
        "weights": mode,
        "moments": moments,
        "calibrate": None if calibrate == "none" else calibrate,
    }
    asked |= {"on_unknown": on_unknown, "center": center, "include": include or None, "exclude": exclude or None}
    options = {name: value for name, value in asked.items() if value != _DEFAULTS.get(name)}
    loaded = models.load(model, args, input, weights, seed)
    plan = analyze(loaded.model, loaded.x, **options)
    if dry_run:
        print(plan)
        refuse(plan)
        return
    net, report = plan.apply(), plan.report
    if out is None:
        print(f"{report}\nNothing was written; --out FOLDER keeps report and weights.")
        return
    place = out / f"weights{FORMATS[format]}"
    code = models.python(loaded, [f"net = {converted.as_python(options)}"], place)
    text = f"{report}\n\nThe converted network in Python:\n\n{code}"
    document = json.dumps({**report.to_dict(), "options": options}, indent=2, allow_nan=False)
    files: dict[Path, str | bytes] = {
        out / "report.html": report.to_html(),
        out / "report.json": f"{document}\n",
        out / "report.txt": f"{text}\n",
        place: packed(net, place.suffix),
    }
    for path, content in files.items():
        write_content(path, content)
    print(f"{text}\n\n{out / 'report.html'}")
