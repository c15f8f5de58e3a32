"""`normprop train`: one network, one data set, one method."""

import json as json_format
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from normprop.cli.options import Json, Quiet, takes_settings
from normprop.errors import ConfigError, requires

with requires("cli"):
    import typer

if TYPE_CHECKING:
    from normprop.experiments.settings import Settings
    from normprop.training.records import EpochRecord


@takes_settings
def train(
    settings: "Settings",
    context: typer.Context,
    method: Annotated[str, typer.Option(help="Name of the method.")] = "normprop",
    batch_size: Annotated[int, typer.Option(help="Samples per step.")] = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate per step.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Seed of weights, data order and augmentation.")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="File to save the training to, every epoch.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train one network with one method, and print its errors after every epoch."""
    from normprop.experiments.trial import plain
    from normprop.training.loop import fit

    if resume and checkpoint is None:
        raise ConfigError("--resume needs --checkpoint FILE, the file to go on from")
    config = replace(settings.training, batch_size=batch_size, lr=lr, seed=seed)
    dataset = settings.load()
    try:
        result = fit(
            settings.builder(dataset, method),
            dataset,
            config,
            callback=None if quiet or json else _print_epoch,
            checkpoint=checkpoint,
            resume=resume,
        )
    except KeyboardInterrupt:
        print(_stopped(checkpoint, context.obj), file=sys.stderr)
        raise typer.Exit(130) from None
    if json:
        outcome = {name: value for name, value in vars(result).items() if name not in ("model", "curve")}
        curve = [asdict(record) for record in result.curve]
        print(json_format.dumps(plain({"method": method, **outcome, "curve": curve}), indent=2))
    elif result.status == "complete":
        last = result.curve[-1]
        print(f"{method}: test error {100 * last.test_error:.2f} % after {result.steps} steps, {result.seconds:.1f} s")
    else:
        print(f"{method}: diverged, {result.reason}")


def _print_epoch(record: "EpochRecord") -> None:
    """One line per epoch."""
    loss = "" if record.train_loss is None else f"train loss {record.train_loss:.4f}, "
    print(
        f"epoch {record.epoch}: {loss}validation error {100 * record.validation_error:.2f} %, "
        f"test error {100 * record.test_error:.2f} %, lr {record.lr:.4g}, {record.seconds:.1f} s",
        flush=True,
    )


def _stopped(checkpoint: Path | None, arguments: list[str]) -> str:
    """What to say after Ctrl-C."""
    if checkpoint is None or not checkpoint.exists():
        return "Stopped; nothing is kept. With --checkpoint FILE a run can be resumed."
    resuming = [argument for argument in arguments if argument != "--resume"] + ["--resume"]
    return f"Stopped; finished epochs are kept. Resume with: {shlex.join(['normprop', *resuming])}"
