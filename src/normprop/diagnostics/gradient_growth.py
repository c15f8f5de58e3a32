"""How gradients grow with depth: the squared length of the gradient at every layer's output, and the rate per layer.

Deep networks with batch norm and without skips multiply it by a constant factor per layer on its way back, whatever the
nonlinearity: J2 = E[f'(z)^2] / Var f(z) for large batches, as do NormProp layers at gain 1; pi / (pi - 1) for ReLU.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from normprop.diagnostics.diagnosis import Diagnosis, Subject, by_network, finite
from normprop.diagnostics.jacobian import predicted
from normprop.diagnostics.plot import Line, Plot, Reference
from normprop.diagnostics.products import LayerCall, differentiably, run
from normprop.errors import ConfigError, first_line
from normprop.moments import Activation, maps


@dataclass(frozen=True)
class Rate:
    """A factor per layer.

    Args:
        value: the factor.
        error: its standard error; nan from fewer than two steps.
    """

    value: float
    error: float


@dataclass(frozen=True)
class Growth:
    """Gradients along a network.

    Args:
        layers: dotted names, in the order of the calls.
        squares: squared length of the gradient at each layer's output, mean over samples.
        rate: its growth per layer on the way back; between the hidden layers, without the read-out.
        predicted: the rate that the theory gives; ``None`` where it gives none.
    """

    layers: tuple[str, ...]
    squares: tuple[float, ...]
    rate: Rate
    predicted: float | None = None


def fit(squares: Sequence[float]) -> Rate:
    """Fit a rate of growth to what is measured at one layer after another.

    Each layer multiplies by a random factor, so the logarithms are a random walk with drift: the best estimate of the
    drift is the mean step, and its error follows from the spread of the steps. A line fitted to the logarithms would
    take the walk for independent errors, and promise too much.

    Args:
        squares: squared lengths at layers in the order of the forward pass, positive.

    Returns:
        The factor from a layer to the one before, exp(mean step), with its standard error; nan where a squared length
        is 0 or not finite, or there is no step.

    Example:
        >>> rate = fit([8.0, 4.0, 2.0, 1.0])
        >>> round(rate.value, 6), round(rate.error, 6)
        (2.0, 0.0)
    """
    if len(squares) < 2 or not all(0 < square < math.inf for square in squares):
        return Rate(math.nan, math.nan)
    steps = [math.log(before / after) for before, after in itertools.pairwise(squares)]
    mean = sum(steps) / len(steps)
    error = math.nan
    if len(steps) > 1:
        spread = sum((step - mean) ** 2 for step in steps) / (len(steps) - 1)
        error = math.exp(mean) * math.sqrt(spread / len(steps))
    return Rate(math.exp(mean), error)


def linear_batch_norm_rate(batch_size: int) -> float:
    """Rate of a deep, wide linear network with batch norm at a finite batch size, (B - 2) / (B - 3).

    Args:
        batch_size: B, at least 4.

    Returns:
        The factor on the squared length of the gradient per layer.

    Raises:
        ConfigError: if the batch is smaller: then the mean does not exist.

    Source:
        Yang et al., A Mean Field Theory of Batch Normalization, ICLR 2019.

    Example:
        >>> round(linear_batch_norm_rate(6), 4)
        1.3333
    """
    if batch_size < 4:
        raise ConfigError(f"linear_batch_norm_rate: batch_size must be 4 or more, got {batch_size}")
    return (batch_size - 2) / (batch_size - 3)


def normprop_rate(activation: Activation = "relu", gain: float = 1.0) -> float:
    """Rate of a deep, wide network of NormProp layers; at gain 1 also that of batch norm as the batch grows.

    gain^2 E[f'(gain sqrt(q) z)^2] / Var f(z) at the second moment q that the network settles at. At gain 1 that is
    J2, for ReLU pi / (pi - 1); at the gain 1 / sqrt(J2) it is 1 for ReLU, and near 1 for others, whose q is not 1.

    Args:
        activation: see :func:`normprop.moments.resolve`.
        gain: gamma of all layers.

    Returns:
        The factor on the squared length of the gradient per layer.

    Raises:
        MomentError: if the second moment does not settle, as for ReLU at a gain above 1.

    Source:
        Arpit et al., Normalization Propagation, ICML 2016, section 3.4; for batch norm Yang et al., ICLR 2019.

    Example:
        >>> round(normprop_rate("relu"), 5), round(normprop_rate("relu", math.sqrt(1 - 1 / math.pi)), 5)
        (1.46694, 1.0)
    """
    return maps.backward_growth(activation, gain, maps.fixed_point(activation, gain))


def measure(
    subject: Subject, *, probes: int = 4, skip: int = 1, predicted_rate: float | None = None, seed: int = 0
) -> Growth:
    """Measure the gradient at the output of every watched layer, in one forward pass.

    What is sent back from the network's output is random, N(0, 1) for each element: no loss, and no labels. What stands
    between two layers, such as pooling or a skip, is part of the step between them, which the theory knows nothing of.

    Args:
        subject: the network, in the mode it is to be looked at in: training, for batch statistics.
        probes: random gradients, over which squares are averaged.
        skip: hidden layers at either end that the rate leaves out, where three or more are left: until the signal has
            settled, and until the gradient has (batch norm takes away its part along the batch at the first layer).
        predicted_rate: what a theory says; by default that of NormProp layers, where all hidden layers are such.
        seed: of the random gradients, and where random states start.

    Returns:
        Squared lengths and their rate. The last layer is the read-out if there are three or more; it has no part in
        the rate.

    Raises:
        ConfigError: if the network has no watched layer that the output depends on, or does not take the inputs.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
        >>> for layer in model:
        ...     _ = layer.weight.data.copy_(2.0 * torch.eye(4))
        >>> measure(Subject("doubling", model, torch.randn(8, 4))).rate
        Rate(value=4.0, error=0.0)
    """
    if probes < 1 or skip < 0:
        raise ConfigError(f"gradient_growth: probes must be positive and skip not negative, got {probes} and {skip}")
    with differentiably(subject.model, subject.inputs, seed) as model:
        whole, calls = run(model, subject.inputs)
        squares = [torch.zeros((), dtype=torch.float64)] * len(calls)
        if not (isinstance(whole.output, torch.Tensor) and whole.output.requires_grad and calls):
            raise ConfigError(
                f"{subject.name}: no layer with a weight leads to one floating point tensor that can be differentiated"
            )
        generator = torch.Generator().manual_seed(seed)
        for _ in range(probes):
            sent = torch.randn(whole.output.shape, generator=generator).to(whole.output)
            try:
                grads = torch.autograd.grad(
                    whole.output, [call.output for call in calls], sent, retain_graph=True, allow_unused=True
                )
            except RuntimeError as error:
                raise ConfigError(f"{subject.name} cannot be differentiated: {first_line(error)}") from error
            for index, grad in enumerate(grads):
                if grad is not None:
                    squares[index] = squares[index] + grad.double().square().sum().cpu()
    lengths = tuple(float(square) / (probes * len(subject.inputs)) for square in squares)
    end = len(calls) - (len(calls) > 2)
    hidden = slice(skip, end - skip) if end - 2 * skip > 2 else slice(0, end)
    theory = _predicted(calls[hidden]) if predicted_rate is None else predicted_rate
    return Growth(tuple(call.name for call in calls), lengths, fit(lengths[hidden]), theory)


def _predicted(calls: Sequence[LayerCall]) -> float | None:
    """Rate between NormProp layers: the gradient passes all but the first of them."""
    values = [predicted(call.module) for call in calls[1:]]
    known = [value for value in values if value is not None and value > 0]
    if not known or len(known) < len(values):
        return None
    return math.exp(sum(map(math.log, known)) / len(known))


def describe(results: Mapping[str, Growth]) -> Diagnosis:
    """Say how fast gradients grow on their way back, and plot them by layer.

    Args:
        results: by the name of the network.

    Returns:
        The diagnosis.

    Example:
        >>> describe({"a": Growth(("0", "1", "2"), (4.0, 2.0, 1.0), Rate(2.0, 0.01), 2.0)}).found
        'a: on the way back the squared gradient is multiplied by 2.000 ± 0.010 per layer, where theory says 2.000.'
    """
    lengths, rates, theory = [], [], []
    for index, (name, found) in enumerate(results.items()):
        places = [*range(1, len(found.squares) + 1)]
        lengths.append(Line(name, places, found.squares))
        value, error = found.rate.value, found.rate.error
        bars = {"low": [value - error], "high": [value + error]} if math.isfinite(error) else {}
        rates.append(Line(name, [index], [value], style="points", **bars))
        if found.predicted is not None:
            theory.append((index, found.predicted))
    if theory:
        rates.append(Line("theory", [at for at, _ in theory], [rate for _, rate in theory], style="theory"))
    return Diagnosis(
        name="gradient-growth",
        title="Do gradients explode or vanish with depth?",
        look_for="A straight line on the logarithmic axis is growth by a constant factor per layer: rising to the "
        "left, gradients explode on their way back to the input; a flat line is healthy.",
        found=by_network(results, _words),
        numbers={name: _numbers(found) for name, found in results.items()},
        figures=(
            Plot(
                "Gradient at each layer's output", "layer", "squared length, mean over samples", lengths, y_scale="log"
            ),
            Plot(
                "Growth per layer",
                "network",
                "factor per layer, on the way back",
                rates,
                references=(Reference(1.0, "length kept"),),
                x_ticks=[*enumerate(results)],
            ),
        ),
        source="Yang et al., A Mean Field Theory of Batch Normalization, ICLR 2019; Arpit et al., Normalization "
        "Propagation, ICML 2016, section 3.4",
    )


def _words(found: Growth) -> str:
    """What was found of one network."""
    rate = found.rate
    if not math.isfinite(rate.value):
        pairs = zip(found.layers, found.squares, strict=True)
        bad = next((f"{square:g} at layer {layer}" for layer, square in pairs if not 0 < square < math.inf), "")
        return f"no rate, {f'the squared gradient is {bad}' if bad else 'there are too few layers'}."
    size = f"{rate.value:.3f} ± {rate.error:.3f}" if math.isfinite(rate.error) else f"{rate.value:.3f}"
    theory = "" if found.predicted is None else f", where theory says {found.predicted:.3f}"
    return f"on the way back the squared gradient is multiplied by {size} per layer{theory}."


def _numbers(found: Growth) -> dict[str, Any]:
    """The numbers of one network."""
    return {
        "layers": [*found.layers],
        "squares": [finite(square) for square in found.squares],
        "rate": finite(found.rate.value),
        "error": finite(found.rate.error),
        "predicted": None if found.predicted is None else finite(found.predicted),
    }
