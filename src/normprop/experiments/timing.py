"""Step times of methods as ratios to the network without normalisation.

All networks take turns in one process, so that whatever else the machine does falls on all of them alike; each round
gives one ratio per method, and the median over the rounds is reported with its quartiles.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normprop.errors import ConfigError
from normprop.training.groups import parameter_groups
from normprop.training.unit_norm import constrain

BASELINE = "none"
_WARMUP = 2
_LEAST_ROUNDS = 5
_MOST_ROUNDS = 500


@dataclass(frozen=True)
class StepTime:
    """The time of one training step of a method.

    Args:
        method: name of the normaliser.
        batch_size: samples per step.
        ratio: median over the rounds of the time divided by the baseline's.
        low: lower quartile of that ratio.
        high: upper quartile of that ratio.
        milliseconds: median time of a step.

    Example:
        >>> StepTime("none", 8, 1.0, 1.0, 1.0, 3.5).ratio
        1.0
    """

    method: str
    batch_size: int
    ratio: float
    low: float
    high: float
    milliseconds: float


def step_times(networks: Mapping[str, nn.Module], images: Tensor, labels: Tensor, seconds: float) -> list[StepTime]:
    """Time forward, backward and SGD step (with the unit-norm constraint) of every network, interleaved.

    Args:
        networks: methods and their networks on the images' device; one of them is "none", the baseline.
        images: float input of shape (batch, ...).
        labels: classes of shape (batch,).
        seconds: time to spend; at least five rounds are run however long they take.

    Returns:
        One value per method, in the order given.

    Raises:
        ConfigError: if the baseline is missing.

    Example:
        >>> networks = {"none": nn.Linear(4, 2), "more": nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 2))}
        >>> [time.method for time in step_times(networks, torch.ones(2, 4), torch.tensor([0, 1]), seconds=0.01)]
        ['none', 'more']
    """
    if BASELINE not in networks:
        raise ConfigError(f"step times need the network {BASELINE!r}: every ratio is taken to it")
    steps = {method: _step(network, images, labels) for method, network in networks.items()}
    times: dict[str, list[float]] = {method: [] for method in steps}
    order = list(steps)
    for _ in range(_WARMUP):
        for method in order:
            steps[method]()
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(times[BASELINE]) < _LEAST_ROUNDS or (
            time.perf_counter() < end and len(times[BASELINE]) < _MOST_ROUNDS
        ):
            for method in order:
                times[method].append(_seconds(steps[method], images.device))
            order.append(order.pop(0))
    finally:
        if collecting:
            gc.enable()
    return [_summary(method, len(labels), times[method], times[BASELINE]) for method in networks]


def _step(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One training step as `fit` does it, as a closure."""
    network.train()
    optimizer = torch.optim.SGD(parameter_groups(network, weight_decay=5e-4), lr=1e-3, momentum=0.9, fused=True)
    constrain(optimizer, network)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    """Wall-clock time of one step, with a GPU's queue drained before and after."""
    _drain(device)
    start = time.perf_counter()
    step()
    _drain(device)
    return time.perf_counter() - start


def _drain(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _summary(method: str, batch_size: int, times: list[float], baseline: list[float]) -> StepTime:
    ratios = [own / other for own, other in zip(times, baseline, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return StepTime(method, batch_size, ratio, low, high, 1000 * statistics.median(times))
