"""`normprop diagnose`: what a network's layers do to signals and gradients, as one page."""

import json as json_format
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from normprop.cli import models
from normprop.cli.options import Quiet, comma_list
from normprop.errors import ConfigError, requires
from normprop.files import write_content

with requires("cli"):
    import typer
    from rich.console import Console

if TYPE_CHECKING:
    from normprop.diagnostics.diagnosis import Diagnosis, Subject

_METHODS = "none,batch,normprop-paper,normprop"


def diagnose(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="nin, resnet20, mlp, ..., package.module:factory, or a .pt2 file.")
    ],
    methods: Annotated[
        str | None, typer.Option(help=f"Comma list: build the network with each. Reference networks: {_METHODS}.")
    ] = None,
    checks: Annotated[str, typer.Option(help="Comma list, or default, training, all; list prints them.")] = "default",
    data: Annotated[str, typer.Option(help="Data set for inputs and labels, as in normprop train.")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="Directory of the published files.")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Training samples to look at.")] = 64,
    width: Annotated[float, typer.Option(help="Factor on a reference network's channels.")] = 1.0,
    args: models.Args = "",
    input: models.Input = None,
    weights: models.Weights = None,
    seed: models.Seed = 0,
    evaluation: Annotated[bool, typer.Option("--eval", help="Look at evaluation instead of training.")] = False,
    out: Annotated[Path, typer.Option(help="Write the page to this file.")] = Path("runs/diagnosis.html"),
    json: Annotated[Path | None, typer.Option(help="Write the numbers to this file.")] = None,
    quiet: Quiet = False,
) -> None:
    """Ask what a network's layers do to signals and gradients, and write the answers as one page.

    Inputs are training samples of a data set, normalised; with --input they are random numbers of a shape, and
    questions that need labels are left out.
    """
    from normprop.diagnostics.checks import DEFAULT, NAMES, TRAINING, ask
    from normprop.report.diagnosis import page

    if checks == "list":
        print("\n".join(NAMES))
        return
    named = {"default": DEFAULT, "training": TRAINING, "all": NAMES}
    wanted = list(named.get(checks) or comma_list("--checks", checks, str, "names"))
    if unknown := [name for name in wanted if name not in NAMES]:
        raise ConfigError(f"--checks: no diagnosis {unknown[0]!r}; there are {', '.join(NAMES)}")
    subjects = _subjects(model, methods, data, data_dir, samples, width, args, input, weights, seed, evaluation)
    console = Console(stderr=True, highlight=False, quiet=quiet)
    diagnoses: list[Diagnosis] = []
    left_out: list[str] = []
    with console.status("") as status:
        for name in wanted:
            status.update(name)
            found = ask(name, subjects)
            diagnoses += found.diagnoses
            left_out += found.left_out
    if not diagnoses:
        raise ConfigError(f"no question could be asked: {left_out[0]}")
    command = shlex.join(["normprop", *context.obj])
    shape = "x".join(map(str, subjects[0].inputs.shape))
    facts = {
        "Network": model if width == 1 else f"{model} at {width:g} of its width",
        "Input": f"{shape}, {'random numbers' if input else data}",
        "Mode": "evaluation" if evaluation else "training",
        "Command": command,
    }
    files = {out: page(f"Diagnosis of {model}", diagnoses, [subject.name for subject in subjects], facts, left_out)}
    if json is not None:
        numbers = {"command": command, "left_out": left_out} | {d.name: dict(d.numbers) for d in diagnoses}
        files[json] = json_format.dumps(numbers, indent=2, allow_nan=False) + "\n"
    for path, text in files.items():
        write_content(path, text)
    for diagnosis in diagnoses:
        print(f"{diagnosis.title}\n{diagnosis.found}\n")
    for line in left_out:
        print(f"Left out: {line}")
    print(out)


def _subjects(
    model: str,
    methods: str | None,
    data: str,
    data_dir: Path | None,
    samples: int,
    width: float,
    args: str,
    input: list[str] | None,
    weights: Path | None,
    seed: int,
    evaluation: bool,
) -> list["Subject"]:
    """Build the networks and take their inputs."""
    import torch

    from normprop import models as reference
    from normprop.cli.inputs import example
    from normprop.cli.weights import load_weights
    from normprop.data import batches, load
    from normprop.diagnostics.diagnosis import Subject
    from normprop.nn import DataNorm

    own = ":" in model or model.endswith(".pt2")
    names = comma_list("--methods", methods or ("" if own else _METHODS), str, "names")
    if weights is not None and len(names) > 1:
        raise ConfigError("--weights are those of one network; give one method")
    labels = None
    if input:
        torch.manual_seed(seed)
        inputs = example(input)
        classes = 10
        if not isinstance(inputs, torch.Tensor):
            raise ConfigError("--input: a diagnosis takes networks of a single input tensor")
    else:
        dataset = load(data, data_dir)
        norm = DataNorm(dataset.shape).fit(batches(dataset.train, 4096, shuffle=False))
        order = torch.Generator().manual_seed(seed)
        images, labels = next(batches(dataset.train, samples, shuffle=True, generator=order))
        inputs, classes = norm(images), dataset.num_classes
    subjects = []
    for name in names or [model]:
        torch.manual_seed(seed)
        if names:
            network = reference.create(model, tuple(inputs.shape[1:]), classes, norm=name, width=width)
            if weights is not None:
                load_weights(network, weights)
        else:
            network = models.load(model, args, input or [_shape(inputs)], weights, seed).model
        subjects.append(Subject(name, network.train(not evaluation), inputs, labels))
    return subjects


def _shape(inputs: "torch.Tensor") -> str:  # type: ignore[name-defined]  # noqa: F821
    """A shape as --input has it."""
    return "x".join(map(str, inputs.shape))
