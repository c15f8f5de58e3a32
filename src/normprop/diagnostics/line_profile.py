"""Line profile: how far can a step against the gradient go before the loss rises?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normprop.diagnostics.diagnosis import Diagnosis, Subject, by_network, finite
from normprop.diagnostics.loss import cross_entropy, gradients, labels_of
from normprop.diagnostics.plot import Line, Plot, Reference
from normprop.diagnostics.quiet import call, quietly
from normprop.errors import ConfigError

STEPS = tuple(10 ** (k / 4) for k in range(-20, 9))
"""Steps from 1e-5 to 100, four to a factor of ten."""


@dataclass(frozen=True)
class LineProfile:
    """The loss of one batch along its gradient; see :func:`line_profile`.

    Args:
        start: loss before the step.
        gradient_norm: length of the gradient.
        steps: t, increasing.
        losses: loss after each step, which need not be finite.
        rise: first t at which the loss exceeds its start by more than rounding, or is not finite; infinite if none.
        best: t of the smallest loss; 0 if no step lowers the loss by more than rounding.
    """

    start: float
    gradient_norm: float
    steps: tuple[float, ...]
    losses: tuple[float, ...]
    rise: float
    best: float


def line_profile(model: nn.Module, inputs: Tensor, labels: Tensor, steps: Sequence[float] = STEPS) -> LineProfile:
    r"""Loss of a batch along the line through its own gradient: L(w - t grad L(w)), for several t.

    The network runs in its own mode, so batch norm in training mode takes its statistics from the batch anew at each
    t; the running ones stay as they are. Random numbers, such as those of dropout, are the same at each t.

    Args:
        model: the network; the parameters that require a gradient take part.
        inputs: a batch, (N, ...).
        labels: its classes.
        steps: t, positive and increasing; `rise` and `best` are found among them.

    Returns:
        The profile.

    Raises:
        ConfigError: if the steps do not increase from above 0, or the labels do not fit.

    Source:
        Bjorck et al. 2018, Understanding Batch Normalization (loss along the gradient in the first epochs).

    Example:
        >>> found = line_profile(nn.Linear(2, 3), torch.eye(2), torch.tensor([0, 1]), steps=(0.01, 0.1))
        >>> found.best, found.rise
        (0.1, inf)
    """
    steps = tuple(float(step) for step in steps)
    if not steps or not all(a < b for a, b in zip((0.0, *steps), steps, strict=False)):
        raise ConfigError(f"line profile: steps must increase from above 0, got {list(steps)}; sort them")
    start, gradient = gradients(model, inputs, labels)
    losses = tuple(_moved(model, gradient, step, inputs, labels) for step in steps)
    precision = max((torch.finfo(value.dtype).eps for value in gradient.values()), default=0.0)
    rounding = 32 * precision * max(start, 1.0)
    norm = math.sqrt(sum(value.double().square().sum().item() for value in gradient.values()))
    rise = next((t for t, loss in zip(steps, losses, strict=True) if not loss <= start + rounding), math.inf)
    lowest, best = min(
        ((loss, t) for t, loss in zip(steps, losses, strict=True) if math.isfinite(loss)), default=(math.inf, 0.0)
    )
    return LineProfile(start, norm, steps, losses, rise, best if lowest < start - rounding else 0.0)


def _moved(model: nn.Module, gradient: Mapping[str, Tensor], step: float, inputs: Tensor, labels: Tensor) -> float:
    """Loss after a step against the gradient."""
    with quietly(model, inputs) as twin:
        for name, value in gradient.items():
            twin.get_parameter(name).sub_(value, alpha=step)
        return cross_entropy(call(twin, inputs), labels).item()


def measure(subject: Subject, steps: Sequence[float] = STEPS) -> LineProfile:
    """Measure the loss of a subject's batch along its gradient, at the state that its network is in.

    Args:
        subject: network (in training mode, to see what batch norm does in training), inputs and labels.
        steps: t, positive and increasing.

    Returns:
        The profile.

    Raises:
        ConfigError: without labels, or as :func:`line_profile`.

    Example:
        >>> found = measure(Subject("plain", nn.Linear(2, 3), torch.eye(2), torch.tensor([0, 1])))
        >>> len(found.losses)
        29
    """
    return line_profile(subject.model, subject.inputs, labels_of(subject), steps)


def describe(results: Mapping[str, LineProfile]) -> Diagnosis:
    """Put the profiles of some networks, or of one at several times, side by side.

    Args:
        results: by network.

    Returns:
        What was found.

    Example:
        >>> describe({"none": LineProfile(2.0, 1.0, (0.1, 1.0), (1.5, 9.0), 1.0, 0.1)}).found
        'none: the loss is above its start from a step of 1 on; it is lowest after a step of 0.1.'
    """
    lines = [
        Line(name, found.steps, [loss / found.start if found.start else math.nan for loss in found.losses])
        for name, found in results.items()
    ]
    return Diagnosis(
        name="line-profile",
        title="How large a step against the gradient does the loss stand?",
        look_for=(
            "The further right a curve dips before it rises above the dotted line, the larger the learning rates that "
            "the network stands."
        ),
        found=by_network(results, _words),
        numbers={
            name: {
                "start": finite(found.start),
                "gradient_norm": finite(found.gradient_norm),
                "rise": finite(found.rise),
                "best": found.best,
                "steps": list(found.steps),
                "losses": [finite(loss) for loss in found.losses],
            }
            for name, found in results.items()
        },
        figures=(
            Plot(
                "Loss of the same batch after one step",
                "step t against the gradient",
                "loss, relative to its start",
                lines,
                x_scale="log",
                y_scale="log",
                references=(Reference(1.0, "before the step"),),
            ),
        ),
        source="Bjorck et al. 2018, Understanding Batch Normalization (loss along the gradient, same batch)",
    )


def _words(found: LineProfile) -> str:
    """What was found of one network."""
    if not math.isfinite(found.start):
        return "the loss is not finite before the step."
    rise = f"is above its start from a step of {found.rise:.2g} on"
    if not math.isfinite(found.rise):
        rise = f"stays at its start or below up to a step of {found.steps[-1]:.2g}"
    best = f"it is lowest after a step of {found.best:.2g}" if found.best else "no step lowers it"
    return f"the loss {rise}; {best}."
