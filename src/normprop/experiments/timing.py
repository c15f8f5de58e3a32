"""Step times of methods as ratios to the network without normalisation.

All networks take turns in one process, so that whatever else the machine does falls on all of them alike; each round
gives one ratio per method, and the median over the rounds is reported with its quartiles.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class Spread(NamedTuple):
    """A median with its quartiles.

    Args:
        ratio: the median.
        low: lower quartile.
        high: upper quartile.
    """

    ratio: float
    low: float
    high: float


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

    def loss(network: nn.Module) -> Callable[[], Tensor]:
        return lambda: F.cross_entropy(network(images), labels)

    steps = {method: training_step(network, loss(network)) for method, network in networks.items()}
    times = interleaved(steps, seconds, images.device)
    return [
        StepTime(method, len(labels), *ratios(own, times[BASELINE]), 1000 * statistics.median(own))
        for method, own in times.items()
    ]


def training_step(network: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Return one training step as `fit` does it: forward, backward, fused SGD and the unit-norm constraint.

    Args:
        network: what is trained; it is put into training mode, and its filters to unit length.
        loss: computes the loss of a batch.

    Returns:
        The step.

    Example:
        >>> network = nn.Linear(4, 2)
        >>> training_step(network, lambda: network(torch.ones(1, 4)).sum())()
    """
    network.train()
    # No rate: a network that comes to fit its one batch has gradients so small that the processor is slow with them.
    optimizer = torch.optim.SGD(parameter_groups(network, weight_decay=5e-4), lr=0.0, momentum=0.9, fused=True)
    constrain(optimizer, network)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Time calls that take turns round by round, the order rotated from one round to the next.

    Args:
        calls: what to time, by name; each is called twice before.
        seconds: time to spend; at least five rounds are run however long they take.
        device: where they run; a GPU's queue is drained around each call.

    Returns:
        The seconds of every call in every round.

    Example:
        >>> {len(times) >= 5 for times in interleaved({"a": list, "b": dict}, 0.0, torch.device("cpu")).values()}
        {True}
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(_WARMUP):
        for name in order:
            calls[name]()
    collecting = gc.isenabled()
    gc.disable()
    try:
        end, rounds = time.perf_counter() + seconds, 0
        while rounds < _LEAST_ROUNDS or (time.perf_counter() < end and rounds < _MOST_ROUNDS):
            for name in order:
                times[name].append(_seconds(calls[name], device))
            order.append(order.pop(0))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return times


def ratios(times: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Take the ratio of two calls in every round.

    Args:
        times: seconds of the one.
        baseline: seconds of the other in the same rounds.

    Returns:
        Median and quartiles of the ratios.

    Example:
        >>> ratios([2.0, 3.0, 8.0], [1.0, 1.0, 2.0])
        Spread(ratio=3.0, low=2.5, high=3.5)
    """
    quotients = [own / other for own, other in zip(times, baseline, strict=True)]
    low, middle, high = statistics.quantiles(quotients, n=4, method="inclusive")
    return Spread(middle, low, high)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call, with a GPU's queue drained before and after."""
    _drain(device)
    start = time.perf_counter()
    call()
    _drain(device)
    return time.perf_counter() - start


def _drain(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
