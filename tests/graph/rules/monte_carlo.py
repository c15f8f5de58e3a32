"""Compare predicted moments with those of many random samples.

A case is a function of the network's inputs; the cases of a test are captured as one network that returns all of them,
by export and by recording. Inputs are Gaussian with another mean and variance in every channel. A prediction that is
the same along an axis is for the mean and variance over that axis as well.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normprop.graph.capture import capture
from normprop.graph.propagate import propagate
from normprop.graph.record import record
from normprop.graph.signal import Signal
from normprop.moments import Moments

CAPTURES = {
    "export": lambda model, args: capture(model, args),
    "record": lambda model, args: record(model, args, {}).settled(),
}
_BLOCKS = 40
_ERRORS = 6.0  # standard errors

Cases = dict[str, Callable[..., Any]]


class Network(nn.Module):
    """Every case of the inputs; modules among the cases are its children."""

    def __init__(self, cases: Cases) -> None:
        super().__init__()
        self.cases = cases
        self.parts = nn.ModuleList([case for case in cases.values() if isinstance(case, nn.Module)])

    def forward(self, x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> tuple[Any, ...]:
        inputs = [value for value in (x, y, z) if value is not None]
        # In-place operators get copies of their own.
        return tuple(case(*(input.clone() for input in inputs)) for case in self.cases.values())


def moments(channels: int, generator: torch.Generator) -> Moments:
    """Uneven moments: means around 0.3, deviations from 0.5 to 1.5."""
    mean = torch.randn(channels, generator=generator, dtype=torch.float64) * 0.7 + 0.3
    return Moments(mean, (torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5).square())


def shaken(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """The model in float64 with fresh weights, other parameters and buffers off special values such as 0 and 1."""
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            fresh = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                parameter.copy_(fresh * (parameter.shape[0] / parameter.numel()) ** 0.5)
            else:
                parameter.add_(fresh, alpha=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
    return model


def check(
    cases: Cases,
    *shapes: tuple[int, ...],
    how: str,
    samples: int = 8000,
    batch: int = 3,
    var: float = 0.002,
    mean: float = 0.002,
    train: bool = True,
    given: bool = True,
    repeats: int = 0,
) -> None:
    """Assert that predictions are right.

    Args:
        cases: the cases by name.
        shapes: shapes of the inputs without the batch.
        how: "export" or "record".
        samples: number of random samples.
        batch: batch size of the capture.
        var: relative error that the variance may have beyond six standard errors.
        mean: error of the mean, in predicted deviations, beyond six standard errors.
        train: mode of the modules.
        given: uneven moments of the inputs; else 0 and 1.
        repeats: run batches of the captured size so many times, for what depends on the batch.
    """
    generator = torch.Generator().manual_seed(0)
    network = shaken(Network(cases), generator).train(train)
    laws = [moments(shape[0], generator) if given else Moments(0.0, 1.0) for shape in shapes]

    def draw(count: int) -> tuple[Tensor, ...]:
        inputs = []
        for shape, law in zip(shapes, laws, strict=True):
            size = [-1] + [1] * (len(shape) - 1)
            scale, offset = (torch.as_tensor(part, dtype=torch.float64).reshape(size) for part in (law.std, law.mean))
            inputs.append(torch.randn(count, *shape, generator=generator, dtype=torch.float64) * scale + offset)
        return tuple(inputs)

    graph = CAPTURES[how](network, draw(batch))
    assert graph.how == ("export" if how == "export" else "recorded"), graph.note
    found = propagate(graph, dict(enumerate(laws)))
    outputs = [found.values[index] for index in graph.outputs]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if repeats:
            runs = [network(*draw(batch)) for _ in range(repeats)]
            measured = [torch.stack(parts) for parts in zip(*runs, strict=True)]
        else:
            measured = list(network(*draw(samples)))
    wrong = []
    assert len(outputs) == len(measured) == len(cases)
    for name, signal, value in zip(cases, outputs, measured, strict=True):
        wrong += [f"{name}: {text}" for text in compare(signal, value, var, mean, stacked=bool(repeats))]
    assert not wrong, "\n" + "\n".join(wrong)


def compare(signal: Any, value: Tensor, var: float, mean: float, stacked: bool = False) -> list[str]:
    """What is wrong with a prediction; the first axis of ``value`` counts samples, or batches if stacked."""
    if not isinstance(signal, Signal):
        return [f"no signal but {type(signal).__name__}"]
    predicted = [part.double() for part in torch.broadcast_tensors(signal.mean, signal.var)]
    if not stacked and predicted[0].ndim == value.ndim:
        predicted = [part[0] for part in predicted]
    blocks = min(_BLOCKS, len(value))
    value = value.double()[: len(value) // blocks * blocks].unflatten(0, (blocks, -1))
    if predicted[0].ndim != value.ndim - 2 or signal.shape[int(not stacked) :] != value.shape[2:]:
        return [f"moments of shape {tuple(signal.mean.shape)} for {tuple(value.shape[2:])}"]
    over = [1, *(axis + 2 for axis, size in enumerate(predicted[0].shape) if size == 1)]
    average = value.mean(over, keepdim=True)
    centre = average.mean(0, keepdim=True)
    spread = (value - centre).square().mean(over, keepdim=True)
    found, errors = [], []
    for part in (average, spread):
        found.append(part.mean(0)[0])
        errors.append(part.std(0)[0] / blocks**0.5)
    allowed = _ERRORS * errors[0] + mean * predicted[1].sqrt() + 1e-9, _ERRORS * errors[1] + var * found[1] + 1e-9
    texts = []
    for label, guess, truth, limit in zip(("mean", "var"), predicted, found, allowed, strict=True):
        excess = (guess - truth).abs() / limit
        if not bool((excess <= 1).all()):
            at = int(excess.nan_to_num(torch.inf).flatten().argmax())
            texts.append(
                f"{label} {guess.flatten()[at]:.5g} but measured {truth.flatten()[at]:.5g}, "
                f"{excess.flatten()[at]:.3g} times what is allowed"
            )
    return texts
