"""Section 5.6 of the paper: the time of an epoch with NormProp and with batch norm."""

from collections.abc import Mapping
from typing import Any

import torch

from normprop import models
from normprop.diagnostics.plot import Line, Plot, Reference
from normprop.experiments import machine
from normprop.experiments.grid import Combination
from normprop.experiments.reproduce.context import Context
from normprop.experiments.reproduce.reproduction import Reproduction, Table, judged
from normprop.experiments.timing import step_times

METHODS = ("none", "batch", "normprop-paper", "normprop")
BATCH_SIZE, _IMAGES = 50, 50_000
_PRINTED = {"batch": 96, "normprop-paper": 84}  # seconds of an epoch on a Titan X
_SECONDS = {"small": 40.0, "paper": 240.0}


def run(context: Context) -> Reproduction:
    """Time training steps of the paper's network at full width, all methods in turns.

    Args:
        context: scale and storage.

    Returns:
        Seconds of an epoch of 50,000 images, and ratios to batch norm.

    Source:
        Arpit et al. 2016, section 5.6.
    """
    device = machine.device(context.accelerator)
    where = machine.describe(context.accelerator)

    def measure(combination: Combination) -> Mapping[str, Any]:
        networks = {method: models.create("nin", (3, 32, 32), 10, norm=method).to(device) for method in METHODS}
        images, labels = torch.randn(BATCH_SIZE, 3, 32, 32), torch.randint(10, (BATCH_SIZE,))
        times = step_times(networks, images.to(device), labels.to(device), _SECONDS[context.scale])
        return {time.method: {"milliseconds": time.milliseconds, "ratio": time.ratio} for time in times}

    combination = Combination("all in turns", BATCH_SIZE, 0.05, 0)
    settings = {"model": "nin", "scale": context.scale, **{key: str(value) for key, value in where.items()}}
    times = context.measure(f"normprop-speed-{context.scale}", settings, [combination], measure)[combination] or {}
    epochs = {method: times[method]["milliseconds"] * _IMAGES / BATCH_SIZE / 1000 for method in METHODS}
    ratios = {method: epochs[method] / epochs["batch"] for method in METHODS}
    agrees, contradicts = judged(
        [
            (
                ratios["normprop-paper"] < 1,
                f"An epoch of normprop-paper takes {ratios['normprop-paper']:.3f} times batch norm's (the paper: "
                f"{_PRINTED['normprop-paper'] / _PRINTED['batch']:.3f}).",
            )
        ]
    )
    positions = [float(index) for index in range(len(METHODS))]
    printed = {method: f"{seconds} s" for method, seconds in _PRINTED.items()}
    rows = [(m, f"{epochs[m]:.0f} s", f"{ratios[m]:.3f}", printed.get(m, "–")) for m in METHODS]
    return Reproduction(
        name="normprop-speed",
        title="An epoch of NormProp takes 0.875 times the time of batch norm",
        paper="Arpit et al. 2016, section 5.6",
        scale=context.scale,
        protocol=f"The paper's NIN at full width, steps of {BATCH_SIZE} images of 32x32 (random numbers: time does not "
        f"depend on them), forward, backward, fused SGD and constraint, all methods in turns for "
        f"{_SECONDS[context.scale]:g} seconds; medians, times 1,000 steps. {where['processor']}, threads "
        f"{where['threads']}, {where['device']}.",
        differs_from_paper="The paper timed a Theano implementation on a Titan X.",
        table=Table(("method", "epoch", "ratio to batch norm", "printed"), rows),
        figures=[
            Plot(
                "Time of an epoch",
                "",
                "ratio to batch norm",
                [
                    Line(method, [x], [ratios[method]], style="points")
                    for x, method in zip(positions, METHODS, strict=True)
                ],
                references=[Reference(_PRINTED["normprop-paper"] / _PRINTED["batch"], "NormProp as printed")],
                x_ticks=list(zip(positions, METHODS, strict=True)),
            )
        ],
        agrees=agrees,
        contradicts=contradicts,
        numbers={"milliseconds of a step": times, "ratio to batch": ratios},
    )
