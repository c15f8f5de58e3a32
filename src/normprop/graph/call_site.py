"""What is known of one value in a network: what was predicted, what was measured, and whether the two agree."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normprop.graph.measure import moments
from normprop.graph.node import Node, Ref, leaves, replace
from normprop.graph.operators import execute
from normprop.graph.signal import Signal

FEWEST = 64  # values from which a measured standard deviation is good to a tenth
_DETAIL = 0.05  # a standard deviation below this share of the mean is a detail beside it


@dataclass(frozen=True)
class Statistics:
    """Mean and spread of a value, where ``std**2 == within**2 + between**2``.

    Args:
        mean: over everything.
        std: standard deviation over everything.
        within: standard deviation over samples and positions, root mean square over channels.
        between: standard deviation over channels of the channels' means.
    """

    mean: float
    std: float
    within: float
    between: float

    @staticmethod
    def measured(value: Tensor) -> "Statistics":
        """Statistics of a tensor, with the count as divisor; channels are axis 1.

        Example:
            >>> Statistics.measured(torch.tensor([[0.0, 5.0], [2.0, 7.0]]))
            Statistics(mean=3.5, std=2.69258240..., within=1.0, between=2.5)
        """
        found = moments(value)
        return Statistics._of(torch.as_tensor(found.mean), torch.as_tensor(found.var))

    @staticmethod
    def predicted(signal: Signal) -> "Statistics":
        """Statistics that a signal promises."""
        if len(signal.shape) < 2:
            overall = signal.overall()
            return Statistics._of(torch.as_tensor(overall.mean), torch.as_tensor(overall.var))
        return Statistics._of(*signal.channels(1))

    @staticmethod
    def _of(mean: Tensor, var: Tensor) -> "Statistics":
        """From mean and variance per channel."""
        mean, var = mean.detach().double(), var.detach().double()
        within, between = float(var.mean()), float(mean.var(correction=0))
        return Statistics(float(mean.mean()), *(math.sqrt(max(part, 0.0)) if part == part else part
                                                for part in (within + between, within, between)))  # fmt: skip


@dataclass(frozen=True)
class CallSite:
    """One call in a network and the floating point tensor that it returns.

    Args:
        index: which node of the graph.
        path: dotted path of the innermost module that the call stands in.
        call: how many times that module was called before.
        module: class of that module.
        group: path of the smallest module around it that has parts, to read a table by.
        op: name of the operator.
        source: file, line and text of the code.
        shape: shape of the output.
        predicted: predicted statistics; ``None`` where nothing could be predicted.
        measured: measured statistics.
        gradient: root mean square of the loss's derivative by the output's elements; ``None`` if the loss does not
            depend on it or no gradient could be computed.
        zeros: share of elements that are exactly zero; only for activations.
        dead: share of channels that are zero, or constant, over the whole example; only for activations.
        skew: skewness over all elements; only for inputs of activations.
        kurtosis: excess kurtosis over all elements; only for inputs of activations.
        ratio: predicted over measured standard deviation; ``None`` where that says nothing, because there is no
            prediction, too few values, or a spread that is nothing beside the mean.
        flagged: the ratio or its inverse is beyond the threshold, or what was measured is not finite.

    Example:
        >>> statistics = Statistics(0.0, 1.0, 1.0, 0.0)
        >>> CallSite(3, "net.act", 1, "ReLU", "net", "relu", "", (2, 8), statistics, statistics).name
        'net.act (call 2): relu'
    """

    index: int
    path: str
    call: int
    module: str
    group: str
    op: str
    source: str
    shape: tuple[int, ...]
    predicted: Statistics | None
    measured: Statistics
    gradient: float | None = None
    zeros: float | None = None
    dead: float | None = None
    skew: float | None = None
    kurtosis: float | None = None
    ratio: float | None = None
    flagged: bool = False

    @property
    def name(self) -> str:
        """Where the call stands and what it calls."""
        call = f" (call {self.call + 1})" if self.call else ""
        return f"{self.path or '(the model itself)'}{call}: {self.op}"

    @property
    def error(self) -> float:
        """The factor by which the prediction is off, at least 1; 1 where the ratio says nothing."""
        return factor(self.ratio)


def factor(ratio: float | None) -> float:
    """A ratio or its inverse, whichever is at least 1; 1 for none.

    Example:
        >>> factor(0.5), factor(3.0), factor(0.0), factor(None)
        (2.0, 3.0, inf, 1.0)
    """
    if ratio is None:
        return 1.0
    return max(ratio, 1.0 / ratio if ratio else math.inf)


def ratio(predicted: Statistics | None, measured: Statistics, count: int) -> float | None:
    """Predicted over measured standard deviation, where it says something.

    Args:
        predicted: what was predicted, if anything.
        measured: what was measured.
        count: of how many values.

    Returns:
        The ratio, from 0 to infinity, or ``None``.

    Example:
        >>> def spread(std):
        ...     return Statistics(0.5, std, std, 0.0)
        >>> ratio(spread(2.0), spread(1.0), 100), ratio(spread(2.0), spread(1.0), 4)
        (2.0, None)
        >>> ratio(spread(0.0), spread(0.01), 100) is None
        True
    """
    if predicted is None or count < FEWEST or not math.isfinite(measured.std):
        return None
    if max(predicted.std, measured.std) <= _DETAIL * abs(measured.mean):
        return None
    if predicted.std == measured.std:
        return 1.0
    return predicted.std / measured.std if measured.std else math.inf


def distribution(value: Tensor) -> tuple[float, float]:
    """Skewness and excess kurtosis of all elements, nan for a constant.

    Example:
        >>> distribution(torch.tensor([-1.0, 1.0]))
        (0.0, -2.0)
    """
    value = value.detach().double().flatten()
    var, mean = torch.var_mean(value, correction=0)
    value = value.sub(mean).div_(var.sqrt())
    square = value.square()
    return float((square * value).mean()), float(square.square().mean()) - 3.0


def silent(value: Tensor) -> tuple[float, float]:
    """Share of exact zeros, and of channels (axis 1) that hold one value only, or only zeros where they hold one.

    Example:
        >>> silent(torch.tensor([[0.0, 3.0, 0.0, 0.0], [0.0, 3.0, 1.0, 2.0]]))
        (0.5, 0.5)
    """
    value = value.detach()
    zeros = float((value == 0).double().mean())
    if value.ndim < 2:
        return zeros, float(value.numel() > 0 and bool((value == 0).all()))
    rows = value.transpose(0, 1).flatten(1)
    still = (rows == 0).all(1) if rows.shape[1] == 1 else rows.amin(1) == rows.amax(1)
    return zeros, float(still.double().mean())


def activated(node: Node, given: dict[str, Any]) -> Tensor | None:
    """The input of a node that is an activation: a nonlinear function of each element of one tensor.

    Found by trying the operator on a part of the input, so that no list of activations has to be kept.

    Args:
        node: the node.
        given: its arguments.

    Returns:
        The input; ``None`` if the node is no activation.
    """
    names = [name for name, leaf in node.args.items() if isinstance(leaf, Ref) and isinstance(given[name], Tensor)]
    if len(names) != 1 or not node.overload or given[names[0]].shape != node.shape:
        return None
    input: Tensor = given[names[0]]
    given = {name: None if name == names[0] else value for name, value in given.items()}
    matrix = any(isinstance(leaf, Tensor) and leaf.ndim > 1 for leaf in leaves(given))
    if matrix or not input.is_floating_point():
        return None
    # A corner of the first sample, with all its channels.
    first = input.detach()[tuple(slice({0: 1, 1: None}.get(axis, 8)) for axis in range(input.ndim))]
    # Two unlike values for every element, one of them on each side of most kinks.
    second = 1.0 - 2.0 * first
    mixed = torch.rand(first.shape, generator=torch.Generator().manual_seed(0)).to(first.device) < 0.5

    def call(probe: Tensor) -> Any:
        return execute(node, {**replace(given, _copied), names[0]: probe})

    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            one, other = call(first), call(second)
            # Close, not equal: the last digits depend on where in a vector register an element stands.
            together, apart = call(torch.where(mixed, first, second)), torch.where(mixed, one, other)
            elementwise = torch.allclose(together, apart, rtol=1e-4, atol=1e-6, equal_nan=True)
            straight = torch.allclose(call((first + second) / 2), (one + other) / 2, rtol=1e-3, atol=1e-5)
    except (RuntimeError, TypeError, ValueError):  # an operator that does not take a part
        return None
    return input if elementwise and not straight else None


def _copied(leaf: Any) -> Any:
    """What an operator may write to while it is tried: a few update the statistics that they are given."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
