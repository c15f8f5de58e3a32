"""``none``: no normalisation, and the plain parts that other methods are built from.

Weights start with He's variance for the activation in use, 1 / (fan_in E[f(z)^2]), so that the second moment of the
pre-activations is kept at initialisation.

Use ``none`` as the baseline, and in shallow networks. Do not use it in deep ones: the mean of the activations drifts,
and nothing holds their scale in training.

Source:
    He et al. 2015, generalised to any activation by its second moment.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop import moments
from normprop.moments import Activation
from normprop.norms.registry import Method

LINEAR_MAPS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ElementwiseActivation(nn.Module):
    """An activation given by name or as a callable, as a module.

    Example:
        >>> ElementwiseActivation("tanh")(torch.zeros(1))
        tensor([0.])
    """

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation."""
        return moments.resolve(self.activation).function(input)

    def extra_repr(self) -> str:
        """The activation's name."""
        return str(getattr(self.activation, "__name__", self.activation))


def activation_module(activation: Activation) -> nn.Module:
    """Return an activation as a module; ReLU works in place, as networks that care for memory have it."""
    if isinstance(activation, nn.Module):
        return activation
    if moments.resolve(activation).name == "relu":
        return nn.ReLU(inplace=True)
    return ElementwiseActivation(activation)


def linear_map(dims: int, *args: Any, activation: Activation = None, **kwargs: Any) -> nn.Module:
    """Build torch's linear map of ``dims`` dimensions with He's initialisation for the activation that follows."""
    layer: Any = LINEAR_MAPS[dims](*args, **kwargs)
    with torch.no_grad():
        fan_in = layer.weight[0].numel()
        layer.weight.normal_(0.0, (fan_in * float(moments.of(activation).second)) ** -0.5)
        if layer.bias is not None:
            layer.bias.zero_()
    return layer  # type: ignore[no-any-return]


def apply_linear(linear: Any, input: Tensor, weight: Tensor) -> Tensor:
    """Apply torch's linear map with another weight in place of its own."""
    weight = weight.to(linear.weight.dtype)
    if isinstance(linear, nn.Linear):
        return F.linear(input, weight, linear.bias)
    output: Tensor = linear._conv_forward(input, weight, linear.bias)
    return output


def block(dims: int, *args: Any, activation: Activation = "relu", **kwargs: Any) -> nn.Module:
    """Linear map with bias and activation."""
    return with_norm(lambda dims, channels: None)(dims, *args, activation=activation, **kwargs)


def with_norm(norm: Callable[[int, int], nn.Module | None]) -> Callable[..., nn.Module]:
    """Return a block constructor that puts ``norm(dims, out_channels)`` between linear map and activation."""

    def build(
        dims: int, in_channels: int, out_channels: int, *args: Any, activation: Activation = "relu", **kwargs: Any
    ) -> nn.Module:
        normaliser = norm(dims, out_channels)
        kwargs["bias"] = normaliser is None
        parts = nn.Sequential()
        parts.add_module("linear", linear_map(dims, in_channels, out_channels, *args, activation=activation, **kwargs))
        if normaliser is not None:
            parts.add_module("norm", normaliser)
        if activation is not None:
            parts.add_module("activation", activation_module(activation))
        return parts

    return build


class PlainResidual(nn.Module):
    """Residual block ``f(shortcut(x) + branch(x))``.

    Args:
        branch: module of the branch.
        shortcut: module of the skip path, or ``None`` for the identity.
        activation: f, or ``None``.
        spatial_dims: not needed here; methods that know their moments use it.

    Source:
        He et al. 2016.
    """

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        activation: Activation = "relu",
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.activation = nn.Identity() if activation is None else activation_module(activation)

    def forward(self, input: Tensor) -> Tensor:
        """Add the two paths and apply the activation."""
        skip = input if self.shortcut is None else self.shortcut(input)
        output: Tensor = self.activation(skip + self.branch(input))
        return output


def of_blocks(paper: str, block: Callable[..., nn.Module], **options: Any) -> Method:
    """Describe a method by its block; head and residual sum are the plain ones unless given."""
    parts: dict[str, Any] = {"head": linear_map, "residual": PlainResidual}
    return Method(paper, block, **parts | options)


def of_layers(paper: str, norm: Callable[[int, int], nn.Module], **options: Any) -> Method:
    """Describe a method by its drop-in layer, ``norm(dims, num_features)``."""
    return of_blocks(paper, with_norm(norm), layer=norm, **options)


METHODS = {"none": of_blocks("He et al. 2015, Delving Deep into Rectifiers", block)}
