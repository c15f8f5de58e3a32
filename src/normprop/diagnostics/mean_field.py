"""Do signals keep their size and their differences through depth, and do gradients come back whole?

Predicted by the maps of :mod:`normprop.diagnostics.mean_field_maps` where a layer is of Normalization Propagation or
plain (a linear map and an activation), measured in any network.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normprop import moments as M
from normprop.diagnostics.diagnosis import Diagnosis, Subject, by_network, finite
from normprop.diagnostics.mean_field_maps import Layer, Signal, backward_growth, normprop, propagate
from normprop.diagnostics.passes import LayerPass, forward, parts
from normprop.diagnostics.plot import Line, Plot, Scale
from normprop.errors import ConfigError, first_line
from normprop.functional import MomentKind
from normprop.fused import at_least_float32
from normprop.moments import Activation
from normprop.nn import Linear, NormPropLayer
from normprop.training import random_state


@dataclass(frozen=True)
class Profile:
    """Signals and gradients by depth: entry l is the input of layer l, the last one the output of the last layer.

    Args:
        second_moments: mean square over samples and features.
        means: mean over features, root mean square over samples, with the sign of the overall mean.
        correlations: of two samples, h.h' / (|h| |h'|), mean over pairs; nan for a single sample.
        gradients: E||dL/dh||^2, mean over samples.
    """

    second_moments: tuple[float, ...]
    means: tuple[float, ...]
    correlations: tuple[float, ...]
    gradients: tuple[float, ...]


@dataclass(frozen=True)
class MeanField:
    """A network's signals and gradients, measured and predicted.

    Args:
        layers: dotted paths in the order of the calls.
        measured: one entry more than there are layers.
        predicted: as many, nan where no theory applies. Predictions start from what was measured where a chain of
            layers starts: signals at its input, gradients at its output.
        starts: entries at which chains start that theory covers; (0,) if it covers the whole network.
    """

    layers: tuple[str, ...]
    measured: Profile
    predicted: Profile
    starts: tuple[int, ...]

    @property
    def covered(self) -> bool:
        """Whether all layers form one chain that theory covers."""
        return self.starts == (0,) and math.isfinite(self.predicted.second_moments[-1])

    @property
    def growth(self) -> float:
        """Measured growth of E||dL/dh||^2 per layer on the way back, geometric mean."""
        return _growth(self.measured.gradients)

    @property
    def predicted_growth(self) -> float:
        """Predicted growth; nan unless all layers form one chain that theory covers."""
        return _growth(self.predicted.gradients) if self.covered else math.nan


def theory(module: nn.Module) -> Layer | None:
    """The random layer that a module is one of, by the mean square of its filters' lengths and without its biases.

    Args:
        module: a layer of :func:`normprop.training.statistics.watched`.

    Returns:
        The layer; ``None`` if there is no theory for the module.

    Example:
        >>> theory(Linear(8, 4, activation="relu", center=False, moments="fixed")).gain
        1.0
        >>> theory(nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))) is None
        True
    """
    if isinstance(module, NormPropLayer):
        rule = M.resolve(module.activation)
        if rule.learnable:
            return None
        gain = _root_mean_square(module.gain)
        if not 0 < gain < math.inf:
            return None
        if rule.name == "identity":
            return Layer(rule, gain, center=module.center)
        return normprop(rule, gain, module.moments, module.center)
    plain = parts(module)
    if plain is None:
        return None
    weight: Any = plain[0].weight
    gain = _root_mean_square(torch.linalg.vector_norm(at_least_float32(weight).flatten(1), dim=1))
    return Layer(plain[1], gain) if 0 < gain < math.inf else None


def measure(subject: Subject, seed: int = 0) -> MeanField:
    """Measure sizes, likenesses and gradients at every layer of a network, and predict them where there is theory.

    Gradients are those of the output's product with a random direction. In a convolution, features are channels and
    positions; theory takes positions as independent and sees no borders.

    Args:
        subject: the network and its inputs; one sample gives no correlations.
        seed: of the random direction.

    Returns:
        What was found.

    Raises:
        ConfigError: if the network cannot be called with the inputs or differentiated, or no layer with a weight is
            called.

    Source:
        Poole et al. 2016; Schoenholz et al. 2017.

    Example:
        >>> net = nn.Sequential(Linear(32, 64, activation="relu"), Linear(64, 64, activation="relu"))
        >>> found = measure(Subject("normprop", net, torch.randn(8, 32)))
        >>> found.layers, len(found.measured.gradients)
        (('0', '1'), 3)
    """
    layers, output = forward(subject)
    hidden = [*(layer.input for layer in layers), layers[-1].output]
    signals = [_signal(value) for value in hidden]
    try:
        sizes = _gradients(output, [*hidden, *(layer.branch for layer in layers)], seed)
    except RuntimeError as error:
        raise ConfigError(
            f"{subject.name}: the network has no gradients ({first_line(error)}); its layers must be differentiable "
            f"and not overwritten"
        ) from error
    gradients, through = sizes[: len(hidden)], sizes[len(hidden) :]
    # Where something else reads a layer's input too, as in a residual block, no layer alone tells its gradient.
    alone = [size == own for size, own in zip(gradients, through, strict=False)]
    names = tuple(layer.name for layer in layers)
    return MeanField(names, _profile(signals, gradients), *_predict(layers, signals, gradients, alone))


def monte_carlo(
    activation: Activation = "relu",
    gain: float = 1.0,
    width: int = 1000,
    depth: int = 30,
    *,
    moments: MomentKind = "fixed",
    center: bool = False,
    samples: int = 100,
    correlation: float = 0.0,
    seed: int = 0,
) -> MeanField:
    """Measure a random perceptron of NormProp layers with Gaussian weights on Gaussian inputs.

    Args:
        activation: f.
        gain: gamma of every layer.
        width: features of every layer and of the input.
        depth: number of layers.
        moments: "fixed" or "live".
        center: whether filters are centred.
        samples: number of inputs.
        correlation: of each pair of inputs, from 0 to 1.
        seed: of weights and inputs; the generators are left as they were.

    Returns:
        What was found.

    Raises:
        ConfigError: for numbers that cannot work.

    Example:
        >>> found = monte_carlo(width=200, depth=2, samples=20)
        >>> abs(found.measured.second_moments[2] - found.predicted.second_moments[2]) < 0.1
        True
    """
    if min(width, depth, samples) < 1 or not 0 <= correlation <= 1:
        raise ConfigError(
            f"monte_carlo: width, depth and samples must be at least 1 and the correlation from 0 to 1, got {width}, "
            f"{depth}, {samples} and {correlation}"
        )
    with random_state.preserved():
        random_state.seed(seed)
        network = nn.Sequential()
        for _ in range(depth):
            layer = Linear(width, width, activation=activation, center=center, moments=moments, gain=gain)
            nn.init.normal_(layer.weight)
            network.append(layer)
        shared = correlation**0.5 * torch.randn(1, width)
        inputs = shared + (1 - correlation) ** 0.5 * torch.randn(samples, width)
        return measure(Subject("random", network, inputs), seed)


def describe(results: Mapping[str, MeanField]) -> Diagnosis:
    """Say what depth does to signals and gradients.

    Args:
        results: from :func:`measure`, by the networks' names.

    Returns:
        The diagnosis.

    Example:
        >>> describe({"normprop": monte_carlo(width=50, depth=2, samples=4)}).name
        'mean-field'
    """
    return Diagnosis(
        name="mean-field",
        title="Do signals keep their size and their differences with depth, and do gradients come back whole?",
        look_for=(
            "Level lines are best: a second moment that drifts, samples that become all alike (correlation 1) or all "
            "unlike (0), and gradients that grow or shrink from layer to layer make deep networks hard to train; "
            "dashed lines are what theory predicts for random weights."
        ),
        found=by_network(results, _words),
        numbers={name: _numbers(result) for name, result in results.items()},
        figures=[
            _plot("Size of the signal", "mean square of the layer's input", "second_moments", results, "log"),
            _plot("Likeness of two samples", "correlation of the layer's inputs", "correlations", results, "linear"),
            _plot("Gradient on its way back", "E‖∂L/∂h‖² over that at the output", "gradients", results, "log"),
        ],
        source="Arpit et al. 2016, section 3.4; Poole et al. 2016; Schoenholz et al. 2017",
    )


def _root_mean_square(value: Tensor) -> float:
    return at_least_float32(value.detach()).square().mean().sqrt().item()


@torch.no_grad()
def _signal(hidden: Tensor) -> Signal:
    """Second moment, mean and correlation of a batch."""
    rows = (
        at_least_float32(hidden.detach()).flatten(1) if hidden.ndim > 1 else at_least_float32(hidden.detach())[:, None]
    )
    unit = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    count = len(rows)
    # Over pairs i != j of unit rows: |sum|^2 has the pairs and every row with itself.
    pairs = (unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1)) if count > 1 else math.nan
    means = rows.mean(1)
    mean = math.copysign(means.square().mean().sqrt().item(), means.mean().item())
    return Signal(rows.square().mean().item(), mean, float(pairs))


def _gradients(output: Tensor, hidden: Sequence[Tensor], seed: int) -> list[float]:
    """E||dL/dh||^2 for a random direction of the output."""
    wanted = [index for index, value in enumerate(hidden) if value.requires_grad]
    norms = [math.nan] * len(hidden)
    if not output.requires_grad or not wanted:
        return norms
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(output.shape, generator=generator).to(output)
    found = torch.autograd.grad(output, [hidden[index] for index in wanted], direction, allow_unused=True)
    for index, gradient in zip(wanted, found, strict=True):
        if gradient is not None:
            norms[index] = at_least_float32(gradient).square().sum().item() / len(gradient)
    return norms


def _profile(signals: Sequence[Signal], gradients: Sequence[float]) -> Profile:
    return Profile(
        tuple(signal.second_moment for signal in signals),
        tuple(signal.mean for signal in signals),
        tuple(signal.correlation for signal in signals),
        tuple(gradients),
    )


def _predict(
    layers: Sequence[LayerPass], signals: Sequence[Signal], gradients: Sequence[float], alone: Sequence[bool]
) -> tuple[Profile, tuple[int, ...]]:
    """Predictions along every chain of layers that theory covers, and where the chains start."""
    unknown = Signal(math.nan, math.nan, math.nan)
    rules = [theory(layer.module) for layer in layers]
    # Entry l + 1 follows from entry l if the next layer's input is this one's output.
    follows = [*(layer.follows for layer in layers[1:]), True]
    linked = [rule is not None and link for rule, link in zip(rules, follows, strict=True)]
    predicted = [unknown] * len(signals)
    growths, starts = [math.nan] * len(layers), []
    for index, rule in enumerate(rules):
        if rule is None or not linked[index]:
            continue
        if index == 0 or not linked[index - 1]:
            predicted[index] = signals[index]
            starts.append(index)
        before = predicted[index]
        size = before.second_moment - (before.mean**2 if rule.center else 0.0)
        growths[index] = backward_growth(rule, size) if 0 < size < math.inf else math.nan
        predicted[index + 1] = propagate(rule, before)
    back = [math.nan] * len(gradients)
    for index in reversed(range(len(layers))):
        if linked[index] and alone[index]:
            if not math.isfinite(back[index + 1]):
                back[index + 1] = gradients[index + 1]
            back[index] = back[index + 1] * growths[index]
    return _profile(predicted, back), tuple(starts)


def _growth(gradients: Sequence[float]) -> float:
    """Geometric mean of the growth from the last entry to the first."""
    first, last = gradients[0], gradients[-1]
    whole = all(math.isfinite(value) for value in gradients)
    return (first / last) ** (1 / (len(gradients) - 1)) if whole and first > 0 and last > 0 else math.nan


def _words(result: MeanField) -> str:
    """What was found in one network."""
    measured, count = result.measured, len(result.layers)
    sizes, likes = measured.second_moments, measured.correlations
    broken = [place for place, size in enumerate(sizes) if not math.isfinite(size)]
    if broken:
        where = f"the output of layer {result.layers[broken[0] - 1]}" if broken[0] else "the input"
        return f"the signal is not finite from {where} on."
    theory_size, theory_like = result.predicted.second_moments[-1], result.predicted.correlations[-1]
    if not result.covered:
        theory_size = theory_like = math.nan
    words = [
        f"over {count} layer{'s' * (count != 1)} the mean square goes from {sizes[0]:.3g} to "
        f"{_with_theory(sizes[-1], theory_size)}"
    ]
    if math.isfinite(likes[0]):
        words.append(
            f"the correlation of two samples from {likes[0]:z.2f} to {_with_theory(likes[-1], theory_like, 2)}"
        )
    if math.isfinite(result.growth):
        growth = _with_theory(result.growth, result.predicted_growth)
        words.append(f"the squared gradient is multiplied by {growth} per layer on its way back")
    return f"{'; '.join(words)}."


def _with_theory(measured: float, predicted: float, decimals: int | None = None) -> str:
    """A number, in three digits or some decimals, and what theory has for it."""
    kind = ".3g" if decimals is None else f"z.{decimals}f"
    return f"{measured:{kind}}" + (f" (theory {predicted:{kind}})" if math.isfinite(predicted) else "")


def _numbers(result: MeanField) -> dict[str, Any]:
    """The numbers of one network for JSON."""
    profiles = {
        name: {key: [finite(value) for value in values] for key, values in vars(profile).items()}
        for name, profile in (("measured", result.measured), ("predicted", result.predicted))
    }
    growths = {"growth": finite(result.growth), "predicted_growth": finite(result.predicted_growth)}
    return {"layers": [*result.layers], "starts": [*result.starts], **growths, **profiles}


def _plot(title: str, label: str, field: str, results: Mapping[str, MeanField], scale: Scale) -> Plot:
    """A figure: one line measured and one predicted for each network."""
    lines = []
    for name, result in results.items():
        measured, predicted = getattr(result.measured, field), getattr(result.predicted, field)
        # Gradients have the scale of the loss: both lines are relative to what was measured at the output.
        unit = measured[-1] if field == "gradients" else 1.0
        lines.append(_line(name, measured, unit, scale))
        theory_line = replace(_line(name, predicted, unit, scale), style="theory")
        if any(math.isfinite(value) for value in theory_line.y):
            lines.append(theory_line)
    return Plot(title, "layer", label, lines, y_scale=scale)


def _line(name: str, values: Sequence[float], unit: float, scale: Scale) -> Line:
    """Values by depth; what a logarithmic axis cannot show is a gap."""
    shown = [value / unit if unit else math.nan for value in values]
    return Line(name, range(len(shown)), [y if scale != "log" or y > 0 else math.nan for y in shown])
