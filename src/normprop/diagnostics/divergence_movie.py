"""Where does a run break that diverges? Moments of every layer's channels, step by step, until the loss is lost.

Source:
    Bjorck, Gomes, Selman & Weinberger 2018, Understanding Batch Normalization (the recording; its definition here is
    ours).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.diagnostics.channels import pooled, recording
from normprop.diagnostics.diagnosis import Diagnosis, Subject, by_network, finite
from normprop.diagnostics.loss import batches_of
from normprop.diagnostics.plot import Figure, Heat, Line, Plot, Reference
from normprop.diagnostics.quiet import quietly
from normprop.errors import ConfigError
from normprop.training import constrain
from normprop.training.statistics import watched

Loss = Callable[[Tensor, Tensor], Tensor]
Batches = Sequence[tuple[Tensor, Tensor]]

RATES = tuple(10 ** (half / 2) for half in range(-6, 7))
"""From 1e-3 to 1e3, each the square root of ten times the one before."""


@dataclass(frozen=True)
class Movie:
    """Moments of every layer's channels at every step of a run.

    Args:
        rate: learning rate.
        limit: loss at which the run counts as lost.
        layers: dotted names of the layers (:func:`normprop.training.statistics.watched`), from the input on.
        losses: before each step; the last one is above ``limit`` or not finite if the run diverged.
        means: for each layer (steps, channels), over samples and positions, on the CPU; a frame for each loss.
        variances: likewise.
    """

    rate: float
    limit: float
    layers: tuple[str, ...]
    losses: tuple[float, ...]
    means: tuple[Tensor, ...]
    variances: tuple[Tensor, ...]

    @property
    def diverged(self) -> bool:
        """Whether the loss passed the limit or was not finite."""
        return not self.losses[-1] <= self.limit

    @property
    def mean_size(self) -> Tensor:
        """Mean over channels of the absolute channel mean, (steps, layers)."""
        return torch.stack([values.abs().mean(1) for values in self.means], 1)

    @property
    def variance(self) -> Tensor:
        """Mean over channels of the channel variance, (steps, layers)."""
        return torch.stack([values.mean(1) for values in self.variances], 1)

    @property
    def last(self) -> int:
        """Last frame with finite moments in all layers, the first if there is none."""
        whole = (self.variance.isfinite() & self.mean_size.isfinite()).all(1)
        return int(whole.nonzero().max()) if whole.any() else 0

    @property
    def growth(self) -> Tensor:
        """By how much each layer's :attr:`variance` grew from the first frame to the :attr:`last`, (layers,)."""
        return self.variance[self.last] / self.variance[0]


def movie(
    model: nn.Module,
    batches: Batches,
    rate: float,
    steps: int = 100,
    momentum: float = 0.0,
    limit: float = 1e3,
    loss: Loss = F.cross_entropy,
) -> Movie:
    """Train a copy of a network with SGD and record every layer's moments before each step until the loss is lost.

    NormProp layers are kept at unit length, as in training.

    Args:
        model: the network at its start; trained is a copy in training mode.
        batches: pairs of inputs and labels, taken in turn and again from the start.
        rate: learning rate.
        steps: frames at most.
        momentum: of SGD.
        limit: loss at which the run ends.
        loss: mean over a batch.

    Returns:
        The frames; their number is that of the losses.

    Raises:
        ConfigError: without batches, steps or layers.

    Source:
        Bjorck et al. 2018.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = movie(model, [(torch.randn(16, 4), torch.arange(16) % 2)], rate=1e4)
        >>> found.diverged, found.layers, tuple(found.variances[0].shape[1:])
        (True, ('0', '2'), (8,))
    """
    if not batches or steps < 1:
        raise ConfigError(f"movie: {len(batches)} batches and {steps} steps; expected at least one of each")
    losses: list[float] = []
    with quietly(model, grad=True) as trained:
        layers = watched(trained.train())
        if not layers:
            raise ConfigError(
                f"movie: {type(model).__name__} has no linear map to watch; expected a convolution or linear"
            )
        optimizer = torch.optim.SGD(trained.parameters(), lr=rate, momentum=momentum)
        constrain(optimizer, trained)
        with recording(layers) as frames:
            for step in range(steps):
                inputs, labels = batches[step % len(batches)]
                optimizer.zero_grad()
                value = loss(trained(inputs), labels)
                losses.append(value.item())
                if not losses[-1] <= limit:
                    break
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    # The calls of a layer, equally many in each frame, frame by frame.
    moments = {
        name: torch.stack([pooled(calls) for calls in torch.stack(frames[name]).unflatten(0, (len(losses), -1))]).cpu()
        for name, _ in layers
        if name in frames
    }
    return Movie(
        rate,
        limit,
        tuple(moments),
        tuple(losses),
        tuple(values[:, 0] for values in moments.values()),
        tuple(values[:, 1] for values in moments.values()),
    )


def diverging_rate(
    model: nn.Module,
    batches: Batches,
    rates: Sequence[float] = RATES,
    steps: int = 100,
    momentum: float = 0.0,
    limit: float = 1e3,
    loss: Loss = F.cross_entropy,
) -> float | None:
    """Find the smallest rate of a grid at which a network diverges, which is one just above its limit.

    Args:
        model: the network at its start; left as it is.
        batches: pairs of inputs and labels.
        rates: the grid.
        steps: updates of each run.
        momentum: of SGD.
        limit: loss at which a run counts as lost.
        loss: mean over a batch.

    Returns:
        The rate; ``None`` if the network bears them all.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> batch = torch.ones(2, 1), torch.zeros(2, 1)
        >>> diverging_rate(model, [batch], rates=[0.5, 0.9, 1.1], loss=F.mse_loss)  # w <- (1 - 2 rate) w
        1.1
    """
    for rate in sorted(rates):
        if movie(model, batches, rate, steps, momentum, limit, loss).diverged:
            return rate
    return None


def measure(subject: Subject, rates: Sequence[float] = RATES, steps: int = 20, batch_size: int = 16) -> Movie:
    """Record a network just above its limit: the smallest rate at which it diverges, or the largest of all it bears.

    Args:
        subject: the network, a batch and its labels.
        rates: the grid; three more rates lie between the last that is borne and the first that is not.
        steps: frames at most.
        batch_size: samples per step, out of the subject's inputs.

    Returns:
        The frames.

    Raises:
        ConfigError: without labels or rates, or as :func:`movie`.

    Example:
        >>> from normprop import models
        >>> _ = torch.manual_seed(0)
        >>> model = models.create("mlp", (6,), 2, norm="none", width=0.05)
        >>> measure(Subject("none", model, torch.randn(64, 6), torch.arange(64) % 2), rates=[0.1, 100.0]).diverged
        True
    """
    if not rates:
        raise ConfigError("divergence-movie: no rates to try; expected at least one")
    batches = batches_of(subject, batch_size)
    rate = diverging_rate(subject.model, batches, rates, steps)
    if rate is None:
        return movie(subject.model, batches, max(rates), steps)
    borne = max((other for other in rates if other < rate), default=rate)
    between = [borne * (rate / borne) ** (quarter / 4) for quarter in (1, 2, 3)]
    # Closer to the limit a run takes longer to break, and more of it is seen.
    rate = diverging_rate(subject.model, batches, between, steps) or rate
    return movie(subject.model, batches, rate, steps)


def describe(results: Mapping[str, Movie]) -> Diagnosis:
    """Say how fast each run broke and where its moments grew.

    Args:
        results: by network name.

    Returns:
        Sentences, numbers, and plots of the loss, of the growth by depth and of the first diverging run.

    Example:
        >>> moments = (torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [50.0]]))
        >>> describe({"none": Movie(0.5, 1e3, ("0", "1"), (2.3, 4e4), moments, moments)}).found
        'none: at a learning rate of 0.5 the loss was 4e+04 after 1 step; the variance of the channels changed 2-fold in
        the first layer, 50-fold in the last.'
    """
    diverging = [name for name, found in results.items() if found.diverged]
    limits = sorted({found.limit for found in results.values()})
    loss = Plot(
        "Loss",
        "step",
        "cross entropy",
        [Line(name, range(len(found.losses)), found.losses) for name, found in results.items()],
        y_scale="log",
        references=[Reference(limit, "lost") for limit in limits],
    )
    growth = Plot(
        "Growth by depth",
        "layer, from the input",
        "channel variance, last finite frame to first",
        [Line(name, range(1, len(found.layers) + 1), found.growth.tolist()) for name, found in results.items()],
        y_scale="log",
        references=[Reference(1.0, "unchanged")],
    )
    figures: list[Figure] = [loss, growth]
    if results:
        shown = (diverging or list(results))[0]
        figures.append(_heat(shown, results[shown]))
    return Diagnosis(
        name="divergence-movie",
        title="Where does a run break that diverges?",
        look_for="In a network without normalisation the channels' variances grow from step to step until the loss is "
        "lost, the more the deeper the layer.",
        found=by_network(results, _words),
        numbers={name: _numbers(found) for name, found in results.items()},
        figures=figures,
        source="Bjorck, Gomes, Selman & Weinberger 2018, Understanding Batch Normalization",
    )


def _words(found: Movie) -> str:
    """What was found of one network."""
    taken = len(found.losses) - 1
    steps = f"{taken} step{'' if taken == 1 else 's'}"
    folds = [_fold(growth) for growth in found.growth.tolist()]
    places = [f"{folds[0]} in the first layer", f"{folds[-1]} in the last"]
    if len(folds) > 2:
        places.insert(1, f"{folds[-2]} in the last hidden one")
    return (
        f"at a learning rate of {found.rate:.3g} the loss was {'' if found.diverged else 'still '}"
        f"{found.losses[-1]:.3g} after {steps}; the variance of the channels changed {', '.join(places)}."
    )


def _fold(growth: float) -> str:
    return f"{growth:.3g}-fold" if math.isfinite(growth) else "without measure"


def _heat(name: str, found: Movie) -> Heat:
    """Variances of one run, layers against steps."""
    logs = found.variance.double().log10().T
    return Heat(
        f"{name}: log10 of the channel variance",
        "step",
        "layer",
        torch.where(logs.isfinite(), logs, math.nan).tolist(),
        rows=found.layers,
        diverging=False,
    )


def _numbers(found: Movie) -> dict[str, Any]:
    def row(values: Tensor) -> list[float | None]:
        return [finite(value) for value in values.tolist()]

    return {
        "rate": found.rate,
        "diverged": "yes" if found.diverged else "no",
        "steps": len(found.losses) - 1,
        "layers": list(found.layers),
        "loss": row(torch.tensor(found.losses, dtype=torch.float64)),
        "growth of the variance": row(found.growth),
        "variance, first frame": row(found.variance[0]),
        "variance, last finite frame": row(found.variance[found.last]),
        "mean size, first frame": row(found.mean_size[0]),
        "mean size, last finite frame": row(found.mean_size[found.last]),
    }
