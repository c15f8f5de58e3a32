"""What do a normaliser's outputs differ by? The power of each channel, split into four parts that add up.

With m and s the mean and standard deviation of a channel over the positions of one sample,

    E[y^2] = (E m)^2 + Var m + (E s)^2 + Var s.

The first part is what is the same in every sample and at every position: a layer whose power is all there has channels
that are constants, and tells nothing apart. Layer norm lets it grow with depth, batch norm keeps it at 0; instance norm
keeps m = 0 and s = 1, so that samples no longer differ by the strength of a channel.

Looked at are pre-activations, what goes into each activation: behind a normaliser whose gain is 1 and bias 0, as at the
start, they are its outputs, and they exist for methods without such a layer as well. Into an activation behind a
residual sum goes the sum, which no method normalises by its statistics.

Source:
    Labatie, Masters, Eaton-Rosen & Luschi 2021, Proxy-Normalizing Activations (power decomposition).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normprop.diagnostics.diagnosis import Diagnosis, Subject, by_network, finite
from normprop.diagnostics.plot import Line, Plot
from normprop.diagnostics.preactivations import preactivations
from normprop.errors import ConfigError


@dataclass(frozen=True)
class Power:
    """Power of the channels of a signal and its parts, each (channels,), float64.

    Args:
        constant: (E m)^2, the same everywhere.
        between: Var m, by which samples' means differ.
        within: (E s)^2, by which positions differ.
        contrast: Var s, by which samples' deviations differ.
        total: E[y^2]; the sum of the parts, to rounding.
    """

    constant: Tensor
    between: Tensor
    within: Tensor
    contrast: Tensor
    total: Tensor

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """The parts, averaged over channels, as shares of the average power; nan where there is none."""
        mean = self.total.mean()
        parts = (self.constant, self.between, self.within, self.contrast)
        constant, between, within, contrast = ((part.mean() / mean).item() for part in parts)
        return constant, between, within, contrast


def power(activations: Tensor) -> Power:
    """Split the power of every channel into its parts.

    Args:
        activations: y, (N, channels, *space); without space every s is 0.

    Returns:
        The parts, on the CPU.

    Raises:
        ConfigError: for fewer than two axes, or without values.

    Source:
        Labatie et al. 2021.

    Example:
        >>> y = torch.tensor([[[0.0, 2.0]], [[3.0, 7.0]]])  # means 1 and 5, deviations 1 and 2
        >>> found = power(y)
        >>> [part.item() for part in (found.constant, found.between, found.within, found.contrast, found.total)]
        [9.0, 4.0, 2.25, 0.25, 15.5]
    """
    if activations.ndim < 2 or not activations.numel():
        raise ConfigError(
            f"power: activations of shape {tuple(activations.shape)}; expected (samples, channels, *space) with values"
        )
    values = activations.detach().cpu().reshape(*activations.shape[:2], -1)
    values = values if values.dtype == torch.float64 else values.float()
    var, mean = (part.double() for part in torch.var_mean(values, 2, correction=0))
    std = var.sqrt()
    total = torch.linalg.vector_norm(values, dim=(0, 2), dtype=torch.float64).square()
    return Power(
        constant=mean.mean(0).square(),
        between=mean.var(0, correction=0),
        within=std.mean(0).square(),
        contrast=std.var(0, correction=0),
        total=total / (values.shape[0] * values.shape[2]),
    )


@dataclass(frozen=True)
class LayerPower:
    """Power of one pre-activation.

    Args:
        layer: name from :func:`normprop.diagnostics.preactivations.preactivations`.
        power: by channel.
    """

    layer: str
    power: Power


def measure(subject: Subject) -> tuple[LayerPower, ...]:
    """Split the power of what goes into each activation of a network.

    Args:
        subject: the network, in the mode it is to be looked at in (batch norm uses its running statistics in
            evaluation), and a batch of two samples or more.

    Returns:
        One entry for each call of an activation, from the input on.

    Raises:
        ConfigError: without activations, or for fewer than two samples.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.InstanceNorm2d(4, eps=0), torch.nn.ReLU())
        >>> layer = measure(Subject("instance", model, torch.randn(4, 3, 8, 8)))[0]
        >>> [round(share, 4) for share in layer.power.shares]
        [0.0, 0.0, 1.0, 0.0]
    """
    if len(subject.inputs) < 2:
        raise ConfigError(f"power: {subject.name} was given {len(subject.inputs)} samples; samples differ from 2 on")
    found = preactivations(subject.model, subject.inputs, power)
    return tuple(LayerPower(layer, value) for layer, value in found.items())


def describe(results: Mapping[str, Sequence[LayerPower]]) -> Diagnosis:
    """Say which parts of the power some networks lose with depth.

    Args:
        results: by network name.

    Returns:
        Sentences, numbers, and plots of the constant part, of the parts that tell samples apart, and of the part
        within maps, against depth.

    Example:
        >>> part = power(torch.tensor([[[0.0, 2.0]], [[3.0, 7.0]]]))
        >>> describe({"net": [LayerPower("0", part)]}).found
        'net: from the first layer to the last, the share of the power that is the same in all samples and positions
        goes from 0.58 to 0.58, and the share by which samples differ from 0.27 to 0.27.'
    """
    shares = {name: [layer.power.shares for layer in layers] for name, layers in results.items()}

    def plot(title: str, label: str, pick: Any) -> Plot:
        lines = [Line(name, range(1, len(rows) + 1), [pick(row) for row in rows]) for name, rows in shares.items()]
        return Plot(title, "activation, from the input", label, lines)

    return Diagnosis(
        name="power",
        title="Do channels become constants, or samples alike, with depth?",
        look_for="A constant part that grows towards 1 means that channels tell nothing apart (layer norm in deep "
        "networks); a part between samples of 0 means that the strength of a channel is lost (instance norm).",
        found=by_network({name: rows for name, rows in shares.items() if rows}, _words)
        or "No pre-activations were looked at.",
        numbers={name: [_numbers(layer) for layer in layers] for name, layers in results.items()},
        figures=[
            plot("Constant part", "(E m)² as a share of E[y²]", lambda row: row[0]),
            plot("Between samples", "Var m + Var s as a share of E[y²]", _samples),
            plot("Within maps", "(E s)² as a share of E[y²]", lambda row: row[2]),
        ],
        source="Labatie, Masters, Eaton-Rosen & Luschi 2021, Proxy-Normalizing Activations to Match Batch "
        "Normalization while Removing Batch Dependence",
    )


def _words(rows: Sequence[tuple[float, float, float, float]]) -> str:
    """What was found in one network."""
    constant, between = ([_share(pick(rows[end])) for end in (0, -1)] for pick in (lambda row: row[0], _samples))
    return (
        "from the first layer to the last, the share of the power that is the same in all samples and positions goes "
        f"from {constant[0]} to {constant[1]}, and the share by which samples differ from {between[0]} to {between[1]}."
    )


def _samples(shares: tuple[float, float, float, float]) -> float:
    """The share by which samples differ."""
    return shares[1] + shares[3]


def _share(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2g}" if value > 1e-6 else "0"


def _numbers(layer: LayerPower) -> dict[str, Any]:
    values = (*layer.power.shares, layer.power.total.mean().item())
    names = ("constant", "between", "within", "contrast", "total")
    return {"layer": layer.layer} | {name: finite(value) for name, value in zip(names, values, strict=True)}
