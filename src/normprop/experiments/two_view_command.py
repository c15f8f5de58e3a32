"""The command line of the two-view experiment, ``python -m normprop.experiments.two_view``."""

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from normprop.errors import ConfigError, NormPropError
from normprop.experiments.two_view import VARIANTS, TwoViewSettings, run
from normprop.files import write_content
from normprop.report import two_view as report

_PROGRAM = "python -m normprop.experiments.two_view"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment and write results.json, results.md and figure.html; print the table.

    Args:
        arguments: what follows the program's name; by default the process's own.

    Returns:
        The exit code: 0, or 2 for an error named in one line on stderr.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _run(given)
    except NormPropError as error:
        print("two_view: " + "; ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    return 0


def _run(given: list[str]) -> None:
    values = vars(_parser().parse_args(given))
    methods = [name.strip() for name in values.pop("methods").split(",")]
    seeds, out = values.pop("seeds"), values.pop("out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: cannot make the directory {out} ({error.strerror}); name another one") from error
    document = run(TwoViewSettings(**values), methods, seeds, _tell, command=shlex.join([*_PROGRAM.split(), *given]))
    text = json.dumps(document, indent=2, allow_nan=False)
    table = report.table(document)
    write_content(out / "results.json", f"{text}\n")
    write_content(out / "results.md", f"# {document['title']}\n\n{table}")
    write_content(out / "figure.html", report.page(document))
    print(table)
    print(out / "figure.html")


def _parser() -> argparse.ArgumentParser:
    """Options for every field of the settings, and for what is run."""
    parser = _Parser(_PROGRAM, description="Train two-branch networks on images with a planted confounder.")
    texts = {
        "data": "digits, mnist, fashion-mnist, cifar10, cifar100, or a path to own images",
        "data_dir": "directory of the published files",
        "train": "training images; all if not given",
        "test": "test images; all if not given",
        "correlation": "of the confounder with the label in training, 0 to 1",
        "strength": "of the confounder in the images, 0 to 1",
        "width": "factor on the network's channels",
        "epochs": "passes over the training images",
        "batch_size": "samples per update",
        "lr": "peak learning rate",
    }
    kinds: dict[str, Any] = {"data_dir": Path, "train": int, "test": int}
    for field in dataclasses.fields(TwoViewSettings):
        option, kind = "--" + field.name.replace("_", "-"), kinds.get(field.name, type(field.default))
        parser.add_argument(option, type=kind, default=field.default, help=f"{texts[field.name]} ({field.default})")
    parser.add_argument("--methods", default=",".join(VARIANTS), help="comma list (%(default)s)")
    parser.add_argument("--seeds", type=_seeds, default=[0, 1, 2], help="comma list (0,1,2)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/two-view"), help="directory of the results (%(default)s)"
    )
    return parser


def _seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


def _tell(trial: dict[str, Any]) -> None:
    """One line per trial, beside the table."""
    accuracy, readable = trial["accuracy"], trial["readable"]
    print(
        f"seed {trial['seed']} {trial['method']}: accuracy {accuracy['correlated']:.3f} correlated, "
        f"{accuracy['independent']:.3f} independent; R2 of z {readable['left']:.2f} before, "
        f"{readable['left_joined']:.2f} after",
        file=sys.stderr,
    )
