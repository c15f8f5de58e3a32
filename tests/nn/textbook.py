"""The paper's layer as it is written, filter by filter, in float64, with moments integrated by scipy."""

import itertools
import math
from typing import Any

import numpy as np
import scipy.integrate
import scipy.stats
import torch

FUNCTIONS = {
    "relu": lambda x: np.maximum(x, 0.0),
    "tanh": np.tanh,
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "gelu": lambda x: x * scipy.stats.norm.cdf(x),
}


def gaussian_moments(name: str, mean: float, std: float) -> tuple[float, float]:
    """Mean and variance of f(N(mean, std^2))."""
    f = FUNCTIONS[name]

    def expect(g: Any) -> float:
        knot = -mean / std
        points = sorted({-12.0, *([knot] if -12 < knot < 12 else []), 12.0})
        pieces = itertools.pairwise(points)
        return sum(
            scipy.integrate.quad(lambda z: g(f(mean + std * z)) * scipy.stats.norm.pdf(z), a, b, epsabs=1e-14)[0]
            for a, b in pieces
        )

    first = expect(lambda y: y)
    return first, expect(lambda y: (y - first) ** 2)


def unit_filters(layer: Any) -> torch.Tensor:
    """The layer's weight with every filter centred (or not) and of the length that keeps unit variance."""
    weight = layer.weight.detach().double().clone()
    transposed = isinstance(layer, torch.nn.modules.conv._ConvTransposeNd)
    groups = getattr(layer, "groups", 1)
    outputs = layer.gain.numel()
    length = math.sqrt(math.prod(layer.stride)) if transposed else 1.0
    for unit in range(outputs):
        if transposed:
            per_group = outputs // groups
            ins = weight.shape[0] // groups
            group, column = divmod(unit, per_group)
            index = (slice(group * ins, (group + 1) * ins), column)
        else:
            index = (unit,)
        w = weight[index]
        if layer.center:
            w = w - w.mean()
        weight[index] = length * w / w.norm()
    return weight


def textbook(layer: Any, plain: torch.nn.Module, input: torch.Tensor) -> torch.Tensor:
    """((f(gain * (W x) / ||W|| + bias) - c2) / c1, computed by a plain layer that holds the unit filters."""
    plain = plain.double()
    with torch.no_grad():
        plain.weight.copy_(unit_filters(layer))
        plain.bias.zero_()
    output = plain(input.double())
    spatial = 0 if isinstance(layer, torch.nn.Linear) else len(layer.kernel_size)
    axis = -1 - spatial
    channels = []
    for unit, z in enumerate(output.unbind(axis)):
        gain = layer.gain[unit].item()
        bias = 0.0 if layer.bias is None else layer.bias[unit].item()
        z = gain * z + bias
        if layer.activation is not None:
            live = layer.moments == "live"
            mean, var = gaussian_moments(layer.activation, bias if live else 0.0, abs(gain) if live else 1.0)
            f = torch.from_numpy(np.asarray(FUNCTIONS[layer.activation](z.detach().numpy())))
            z = (f - mean) / math.sqrt(var)
        channels.append(z)
    return torch.stack(channels, axis)
