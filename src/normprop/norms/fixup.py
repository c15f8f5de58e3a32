r"""``fixup``: an initialisation that trains residual networks without normalisation.

.. math::
    o = f(W * (x + a) + b), \qquad \text{residual: } f(s + c \, r + d)

a, b, c, d are scalars, one each per layer or branch: biases that start at 0 and multipliers that start at 1. Weights
start as He's, except in residual blocks: there projections and branches start with deviation
:math:`(n \, E[f(z)^2])^{-1/2}`, n being the fan-*out* (output channels times kernel) as in the authors' code; then the
last linear map of every branch is set to 0 and the others are multiplied by :math:`L^{-1 / (2m - 2)}`, with L residual
blocks in the network (:func:`finish`) and m linear maps in the branch. The classifier starts at 0 as well. So at the
start every residual block is the identity (and its activation), and the first step of SGD on the weights changes the
function by an amount that does not depend on the depth.

No statistics of activations or weights: train and eval are the same function, and a sample's output depends on that
sample alone. Maps (N, C_in, \*space) to (N, C_out, \*space'). The authors give the scalars a tenth of the learning
rate; our parameter groups have one learning rate, so ask for those groups yourself where the difference matters.

A network without residual blocks is the plain one with scalar biases and a classifier of 0: the layers before it get
their first gradient in the second step.

Use it when the network is residual and nothing may depend on statistics. Do not use it in deep networks that are not
residual, for which it does nothing.

Source:
    Zhang, Dauphin & Ma 2019, Fixup Initialization; the authors' code for the fan-out and the place of the biases.
"""

from typing import Any

import torch
from torch import Tensor, nn

from normprop import moments
from normprop.errors import ConfigError
from normprop.moments import Activation
from normprop.norms.plain import LINEAR_MAPS, activation_module, linear_map, of_blocks


class ScalarBias(nn.Module):
    """Add one learnable number, 0 at the start, to everything.

    Shape:
        Any.

    Source:
        Zhang et al. 2019.

    Example:
        >>> ScalarBias()(torch.ones(2)).tolist()
        [1.0, 1.0]
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, input: Tensor) -> Tensor:
        """Add the bias."""
        return input + self.bias


def block(dims: int, *args: Any, activation: Activation = "relu", **kwargs: Any) -> nn.Module:
    """Scalar bias, linear map without bias, and, if there is an activation, scalar bias and activation."""
    parts = nn.Sequential()
    parts.add_module("input_bias", ScalarBias())
    parts.add_module("linear", linear_map(dims, *args, activation=activation, bias=False, **kwargs))
    if activation is not None:
        parts.add_module("output_bias", ScalarBias())
        parts.add_module("activation", activation_module(activation))
    return parts


def head(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Scalar bias and a linear map that starts at 0."""
    linear: Any = linear_map(dims, *args, **kwargs)
    nn.init.zeros_(linear.weight)
    parts = nn.Sequential()
    parts.add_module("input_bias", ScalarBias())
    parts.add_module("linear", linear)
    return parts


class FixupResidual(nn.Module):
    r"""Residual block :math:`f(s + c \, r + d)` whose branch r is 0 at the start.

    The linear maps of branch and projection are initialised here, with the moments of ``activation``; the branch's last
    is 0, the others are scaled for the number of residual blocks in the network, 1 until :func:`finish` says otherwise.

    Args:
        branch: module of r, ending in a linear map without bias.
        shortcut: module on the skip path s, or ``None`` for the identity.
        activation: f, or ``None``.
        spatial_dims: not needed here.

    Raises:
        ConfigError: if the branch has no linear map.

    Source:
        Zhang et al. 2019.

    Example:
        >>> residual = FixupResidual(block(2, 4, 4, 3, padding=1, activation=None), activation=None)
        >>> input = torch.randn(2, 4, 5, 5)
        >>> torch.equal(residual(input), input)
        True
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
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))
        self.activation = nn.Identity() if activation is None else activation_module(activation)
        self.blocks = 1
        second = float(moments.of(activation).second)
        if not _linear_maps(branch):
            raise ConfigError("norms.fixup: a residual branch needs a linear map, and this one has none")
        *inner, last = _linear_maps(branch)
        for linear in [*inner, *(_linear_maps(shortcut) if shortcut is not None else [])]:
            nn.init.normal_(linear.weight, 0.0, (linear.weight[:, 0].numel() * second) ** -0.5)
        nn.init.zeros_(last.weight)

    @torch.no_grad()
    def rescale(self, blocks: int) -> None:
        """Scale the linear maps of the branch, but for the last, for a network of ``blocks`` residual blocks."""
        *inner, _ = _linear_maps(self.branch)
        for linear in inner:
            linear.weight.mul_((blocks / self.blocks) ** (-0.5 / len(inner)))
        self.blocks = blocks

    def forward(self, input: Tensor) -> Tensor:
        """Scale the branch, add the bias and the skip path, and activate."""
        skip = input if self.shortcut is None else self.shortcut(input)
        output: Tensor = self.activation(skip + self.branch(input) * self.scale + self.bias)
        return output

    def extra_repr(self) -> str:
        """Number of blocks that the branch is scaled for."""
        return f"blocks={self.blocks}"


def _linear_maps(module: nn.Module) -> list[Any]:
    """The linear maps inside a module, in order."""
    return [part for part in module.modules() if isinstance(part, LINEAR_MAPS)]


def finish(network: nn.Module) -> None:
    """Scale every branch for the number of residual blocks in the network; calling it again changes nothing.

    Args:
        network: the network, changed in place.

    Source:
        Zhang et al. 2019.

    Example:
        >>> layers = [block(0, 4, 4), block(0, 4, 4, activation=None)]
        >>> network = nn.Sequential(FixupResidual(nn.Sequential(*layers)), FixupResidual(block(0, 4, 4)))
        >>> before = layers[0].linear.weight.detach().norm()
        >>> finish(network)
        >>> round(float(layers[0].linear.weight.detach().norm() / before), 4)
        0.7071
    """
    residuals = [module for module in network.modules() if isinstance(module, FixupResidual)]
    for residual in residuals:
        residual.rescale(len(residuals))


METHODS = {
    "fixup": of_blocks(
        "Zhang, Dauphin & Ma 2019, Fixup Initialization", block, head=head, residual=FixupResidual, finish=finish
    )
}
