"""Do layers keep mean 0 and variance 1 by themselves, as self-normalising networks promise?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from normprop import moments
from normprop.diagnostics.diagnosis import Diagnosis, Subject, by_network, finite
from normprop.diagnostics.moment_map import DOMAINS, image, jacobian
from normprop.diagnostics.passes import LayerPass, forward, parts
from normprop.diagnostics.plot import Line, Plot, Reference
from normprop.fused import at_least_float32


@dataclass(frozen=True)
class Trajectory:
    """Mean and variance by depth: entry l is the input of layer l, the last one the output of the last layer.

    Args:
        layers: dotted paths in the order of the calls.
        means: over samples, features and positions.
        variances: the same.
        predicted_means: from the map with the layers' own weights and biases, along every chain of plain layers (a
            linear map and an activation) from what was measured at its start; nan where the map does not apply.
        predicted_variances: the same.
    """

    layers: tuple[str, ...]
    means: tuple[float, ...]
    variances: tuple[float, ...]
    predicted_means: tuple[float, ...]
    predicted_variances: tuple[float, ...]

    @property
    def self_normalizing(self) -> int:
        """Number of layers whose output lies in the domain of theorem 1."""
        box = DOMAINS["theorem 1"]
        return sum(
            box.mean[0] <= mean <= box.mean[1] and box.var[0] <= var <= box.var[1]
            for mean, var in zip(self.means[1:], self.variances[1:], strict=True)
        )


def measure(subject: Subject) -> Trajectory:
    """Follow mean and variance through a network, and by the map where layers are plain.

    The map sees no borders of convolutions, and takes inputs as independent.

    Args:
        subject: the network and its inputs.

    Returns:
        The trajectory.

    Raises:
        ConfigError: if the network cannot be called with the inputs, or no layer with a weight is called.

    Source:
        Klambauer et al. 2017.

    Example:
        >>> from torch.nn import SELU, Linear, Sequential
        >>> net = Sequential(Sequential(Linear(64, 64), SELU()), Linear(64, 2))
        >>> measure(Subject("selu", net, torch.randn(8, 64))).layers
        ('0', '1')
    """
    layers, _ = forward(subject)
    measured = [_moments(value) for value in [*(layer.input for layer in layers), layers[-1].output]]
    predicted = [(math.nan, math.nan)] * len(measured)
    for index, layer in enumerate(layers):
        mapped = index + 1 == len(layers) or layers[index + 1].follows
        start = predicted[index] if math.isfinite(predicted[index][0]) else measured[index]
        after = _mapped(layer, *start) if mapped else None
        if after is not None:
            predicted[index], predicted[index + 1] = start, after
    means, variances = zip(*measured, strict=True)
    predicted_means, predicted_variances = zip(*predicted, strict=True)
    return Trajectory(tuple(layer.name for layer in layers), means, variances, predicted_means, predicted_variances)


def describe(results: Mapping[str, Trajectory]) -> Diagnosis:
    """Say whether layers keep mean 0 and variance 1.

    Args:
        results: from :func:`measure`, by the networks' names.

    Returns:
        The diagnosis.

    Example:
        >>> from torch.nn import SELU, Linear, Sequential
        >>> net = Sequential(Sequential(Linear(64, 64), SELU()), Linear(64, 2))
        >>> describe({"selu": measure(Subject("selu", net, torch.randn(8, 64)))}).name
        'self-normalizing'
    """
    box = DOMAINS["theorem 1"]
    means = (Reference(box.mean[0]), Reference(box.mean[1], "theorem 1"))
    variances = (Reference(box.var[0]), Reference(box.var[1], "theorem 1"))
    return Diagnosis(
        name="self-normalizing",
        title="Do layers keep mean 0 and variance 1 by themselves?",
        look_for=(
            "Lines that stay between the dotted ones, where SELU provably keeps a network's mean and variance; dashed "
            "lines are what theory predicts from the layers' weights, and in the last plot arrival near (0, 1)."
        ),
        found=by_network(results, _words),
        numbers={
            "map": {
                "spectral_norm": torch.linalg.matrix_norm(jacobian(), 2).item(),
                **{name: vars(image(domain)) for name, domain in DOMAINS.items()},
            },
            "networks": {name: _numbers(result) for name, result in results.items()},
        },
        figures=[
            Plot("Mean", "layer", "mean of the layer's input", _lines(results, "means"), references=means),
            Plot(
                "Variance",
                "layer",
                "variance of the layer's input",
                _lines(results, "variances", positive=True),
                y_scale="log",
                references=variances,
            ),
            Plot(
                "Mean and variance together",
                "mean",
                "variance",
                [
                    Line(name, result.means, [value if value > 0 else math.nan for value in result.variances])
                    for name, result in results.items()
                ],
                y_scale="log",
                references=(*variances, *(replace(reference, axis="x") for reference in means)),
            ),
        ],
        source="Klambauer et al. 2017, theorems 1 to 3",
    )


def _moments(value: Tensor) -> tuple[float, float]:
    """Mean and variance of all elements."""
    value = at_least_float32(value.detach())
    return value.mean().item(), value.var(correction=0).item()


@torch.no_grad()
def _mapped(layer: LayerPass, mean: float, var: float) -> tuple[float, float] | None:
    """Mean and variance over the units of a plain layer, each by its own weights; ``None`` where the map is unknown."""
    plain = parts(layer.module)
    if plain is None or not math.isfinite(mean) or not math.isfinite(var):
        return None
    linear: Any = plain[0]
    rows = linear.weight.detach().double().flatten(1)
    bias = 0.0 if linear.bias is None else linear.bias.detach().double()
    centres, stds = mean * rows.sum(1) + bias, (var * rows.square().sum(1)).sqrt()
    if not bool((centres.isfinite() & stds.isfinite()).all()):
        return None
    found = moments.of(plain[1], centres, stds)
    means, variances = torch.as_tensor(found.mean), torch.as_tensor(found.var)
    return means.mean().item(), (variances.mean() + means.var(correction=0)).item()


def _words(result: Trajectory) -> str:
    """What was found in one network."""
    count = len(result.layers)
    means = [value for value in result.means[1:] if math.isfinite(value)]
    variances = [value for value in result.variances[1:] if math.isfinite(value)]
    if not means or not variances:
        return f"means and variances are not finite in any of {count} layers."
    words = (
        f"{result.self_normalizing} of {count} layers put out a mean within ±0.1 and a variance from 0.8 to "
        f"1.5; means are from {min(means):.3g} to {max(means):.3g}, variances from {min(variances):.3g} to "
        f"{max(variances):.3g}"
    )
    ratios = [
        abs(math.log(measured / predicted))
        for measured, predicted in zip(result.variances[1:], result.predicted_variances[1:], strict=True)
        if 0 < measured < math.inf and 0 < predicted < math.inf
    ]
    if ratios:
        words += f", which theory predicts to within a factor of {math.exp(max(ratios)):.3g}"
    return f"{words}."


def _numbers(result: Trajectory) -> dict[str, Any]:
    """The numbers of one network for JSON."""
    numbers: dict[str, Any] = {
        key: [*values] if key == "layers" else [finite(value) for value in values]
        for key, values in vars(result).items()
    }
    return {"self_normalizing": result.self_normalizing, **numbers}


def _lines(results: Mapping[str, Trajectory], field: str, positive: bool = False) -> list[Line]:
    """One line measured and one predicted for each network."""
    lines = []
    for name, result in results.items():
        for prefix in ("", "predicted_"):
            values = getattr(result, prefix + field)
            y = [value if not positive or value > 0 else math.nan for value in values]
            if any(math.isfinite(value) for value in y):
                lines.append(Line(name, range(len(y)), y, style="theory" if prefix else "both"))
    return lines
