r"""The norm-schedule experiment: is what weight decay and the learning-rate schedule do an effective step, and no more?

A network with batch norm is trained in five ways that share seeds, batches and everything else:

- ``decay``: learning-rate schedule and weight decay;
- ``no decay``: the same without decay of the filters that batch norm follows;
- ``corrected rate``: without decay, each filter's rate corrected for the lengths that ``decay`` had
  (:func:`normprop.training.effective_rate.mimic_decay`);
- ``norm schedule``: without decay, at the full learning rate throughout, filters rescaled so that the effective step
  :math:`\eta / \|w\|^2` is that of ``decay`` (:func:`normprop.training.effective_rate.schedule_norms`);
- ``fixed rate``: without decay, at the full learning rate throughout.

The schedule divides the rate by ten after each quarter. The last layer, which nothing normalises, decays in all five.

    python -m normprop.experiments.norm_schedule --out runs/norm-schedule

Source:
    Hoffer, Banner, Golan & Soudry 2018 (VGG-11 on CIFAR-10, 80 epochs, decay 5e-4).
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.data import Dataset, batches
from normprop.errors import ConfigError, NormPropError
from normprop.experiments.norm_curves import ARMS, Row, table, write
from normprop.experiments.settings import Settings
from normprop.training import random_state, statistics
from normprop.training.config import TrainConfig
from normprop.training.effective_rate import mimic_decay, schedule_norms
from normprop.training.filter_norms import NormRecorder, save_norms
from normprop.training.run import assemble, batch_sizes, join_single


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Args:
        data: name or path of the data set.
        data_dir: directory of the published files.
        train: number of training images, None for all.
        test: number of test images, None for all.
        model: name of a reference network.
        width: factor on its channels.
        epochs: passes over the training images.
        batch_size: samples per step.
        lr: learning rate at the start.
        momentum: of SGD.
        weight_decay: of the filters, in ``decay``.
        last_decay: of the last layer, in all arms.
        seeds: one run of each arm for each.
    """

    data: str = "digits"
    data_dir: Path | None = None
    train: int | None = None
    test: int | None = None
    model: str = "nin"
    width: float = 0.125
    epochs: int = 4
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-3
    last_decay: float = 5e-4
    seeds: tuple[int, ...] = (0, 1)


def staircase(step: int, steps: int) -> float:
    """Divide the rate by ten after each quarter of the run.

    Example:
        >>> [staircase(step, 8) for step in range(0, 8, 2)]
        [1.0, 0.1, 0.010000000000000002, 0.0010000000000000002]
    """
    return 0.1 ** (4 * step // steps)


def normalized_blocks(model: nn.Module) -> dict[str, Any]:
    """Blocks of a linear map that batch norm follows, by name.

    Example:
        >>> from normprop import models
        >>> list(normalized_blocks(models.create("resnet8", (3, 8, 8), 10, norm="batch")))[:2]
        ['0', '1.branch.0']
    """
    return {
        name: block
        for name, block in model.named_modules()
        if hasattr(block, "linear") and isinstance(getattr(block, "norm", None), nn.modules.batchnorm._BatchNorm)
    }


def run(plan: Plan, out: Path, progress: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Train all arms for all seeds.

    Args:
        plan: what is trained.
        out: directory for the lengths that ``decay`` had, ``norms-SEED.npz``.
        progress: called with a line after each run.

    Returns:
        A row for each arm, seed and epoch: arm, seed, epoch, training loss (mean over the epoch), test error (fraction)
        and effective step (geometric mean over the epoch's steps and all normalised filters).

    Raises:
        NormPropError: if the data cannot be read or a run diverges.
    """
    training = TrainConfig(epochs=plan.epochs, batch_size=plan.batch_size, lr=plan.lr, momentum=plan.momentum)
    shared = {name: getattr(plan, name) for name in ("data", "data_dir", "train", "test", "model", "width")}
    settings = Settings(**shared, training=training)
    dataset = settings.load()
    build = settings.builder(dataset, "batch")
    rows: list[Row] = []
    with random_state.preserved():
        for seed in plan.seeds:
            config = TrainConfig.from_dict(training.to_dict() | {"seed": seed})
            recorded: dict[str, Tensor] = {}
            for arm in ARMS:
                curve, norms = train_arm(arm, assemble(build, dataset, config), dataset, plan, seed, recorded)
                if arm == "decay":
                    recorded = norms
                    save_norms(out / f"norms-{seed}.npz", norms)
                rows += curve
                progress(f"seed {seed}, {arm}: test error {100 * curve[-1]['test_error']:.2f} %")
    return rows


def train_arm(
    arm: str, model: nn.Module, dataset: Dataset, plan: Plan, seed: int, recorded: dict[str, Tensor]
) -> tuple[list[Row], dict[str, Tensor]]:
    """Train one arm.

    Args:
        arm: one of ARMS.
        model: network with batch norm; it is trained in place.
        dataset: training and test images.
        plan: what is trained.
        seed: of the order of the batches.
        recorded: lengths that "decay" had, for the arms that follow them.

    Returns:
        A row for each epoch as :func:`run` has it, and the lengths of the filters before each step.

    Raises:
        ConfigError: if a loss is not finite, or no filter is normalised.
    """
    steps = plan.epochs * len(batch_sizes(len(dataset.train), plan.batch_size))
    blocks = normalized_blocks(model)
    weights: dict[str, nn.Parameter] = {name: block.linear.weight for name, block in blocks.items()}
    if not weights:
        raise ConfigError(f"model {plan.model!r} has no batch norm after a linear map; use nin or resnet8")
    optimizer = torch.optim.SGD(_groups(model, weights, arm, plan), lr=plan.lr, momentum=plan.momentum)
    scheduled = arm in ("decay", "no decay", "corrected rate")
    if arm == "corrected rate":
        mimic_decay(optimizer, weights, recorded, plan.weight_decay)
    if arm == "norm schedule":
        followers = {name: block.norm for name, block in blocks.items()}
        schedule_norms(optimizer, weights, lambda step: staircase(step, steps), recorded, followers)
    recorder = NormRecorder(optimizer, weights)
    order = torch.Generator().manual_seed(seed)
    rates: list[float] = []
    rows: list[Row] = []
    for epoch in range(1, plan.epochs + 1):
        losses = []
        for images, labels in join_single(batches(dataset.train, plan.batch_size, shuffle=True, generator=order)):
            rates.append(plan.lr * (staircase(len(rates), steps) if scheduled else 1.0))
            for group in optimizer.param_groups:
                group["lr"] = rates[-1]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            if not math.isfinite(loss.item()):
                raise ConfigError(f"{arm}, seed {seed}: loss was {loss.item()} at step {len(rates)}; use a lower --lr")
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        # A corrected rate is c^2 times the rate at lengths c times those recorded: the quotient is the recorded one.
        lengths = recorded if arm == "corrected rate" else recorder.norms()
        rows.append(
            {
                "arm": arm,
                "seed": seed,
                "epoch": epoch,
                "train_loss": fmean(losses),
                "test_error": _error(model, dataset),
                "effective_step": _effective_step(lengths, rates, len(losses)),
            }
        )
    return rows, recorder.norms()


def _groups(model: nn.Module, weights: dict[str, nn.Parameter], arm: str, plan: Plan) -> list[Row]:
    """Parameter groups: normalised filters, other weights (the last layer's), and what never decays."""
    ours = {id(weight) for weight in weights.values()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in ours]
    return [
        {"params": list(weights.values()), "weight_decay": plan.weight_decay if arm == "decay" else 0.0},
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": plan.last_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _effective_step(norms: dict[str, Tensor], rates: list[float], last: int) -> float:
    """Geometric mean of rate / length^2 over all filters and the last few of the steps so far."""
    window = slice(len(rates) - last, len(rates))
    lengths = torch.cat([value[window] for value in norms.values()], dim=1)
    return math.exp((torch.tensor(rates[window]).log().unsqueeze(1) - 2 * lengths.log()).mean().item())


def _error(model: nn.Module, dataset: Dataset) -> float:
    """Fraction of the test images that are misclassified."""
    with statistics.evaluating(model):
        wrong = [(model(x).argmax(1) != labels).sum() for x, labels in batches(dataset.test, 512, shuffle=False)]
    return int(torch.stack(wrong).sum()) / len(dataset.test)


class _Parser(argparse.ArgumentParser):
    """Bad options become the one line that all errors are."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"norm_schedule: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m normprop.experiments.norm_schedule", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for curves.json, table.md and figure.html")
    texts = {name.strip(): text.strip() for name, _, text in map(_split, (Plan.__doc__ or "").splitlines())}
    kinds: dict[str, Callable[[str], Any]] = {"data_dir": Path, "train": int, "test": int, "seeds": _seeds}
    for field in fields(Plan):
        kind = kinds.get(field.name, type(field.default))
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text = f"{texts[field.name]} [{shown}]"
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=field.default, help=text)
    return parser


def _split(line: str) -> tuple[str, str, str]:
    """A line of a docstring's arguments: name, colon, text."""
    return line.partition(": ")


def _seeds(text: str) -> tuple[int, ...]:
    """A comma list of whole numbers."""
    return tuple(int(item) for item in text.split(","))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment from the command line.

    Args:
        arguments: what follows the program's name; by default the process's own.

    Returns:
        The exit code: 0, or 2 for an error named in one line on stderr.
    """
    try:
        values = vars(_parser().parse_args(arguments))
        out: Path = values.pop("out")
        plan = Plan(**values)
        rows = run(plan, out, lambda line: print(line, flush=True))
        settings = asdict(plan) | {"data_dir": None, "seeds": list(plan.seeds)}
        write(settings, rows, out)
    except NormPropError as error:
        print("normprop: " + "; ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except OSError as error:
        print(f"normprop: {error}", file=sys.stderr)
        return 2
    print(f"\n{table(rows)}\nwritten: {out}/curves.json, table.md, figure.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
