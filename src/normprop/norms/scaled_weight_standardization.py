r"""``scaled-weight-standardized``: the layers of norm-free networks.

.. math::
    o = \gamma_f \, f\!\left(g_i \frac{W_i - m_i}{\sqrt{N} s_i} * x + b_i\right), \qquad \gamma_f = 1 / c_1

m and s are mean and biased deviation of one filter, over its N weights; g starts at 1, b at 0. :math:`\gamma_f` is the
reciprocal deviation of f(N(0, 1)), exact, not the Monte-Carlo values of the public code (1.7139 for ReLU, where 1.7129
is exact). Outputs have variance 1 and the mean c2 / c1, which the next layer's filters, of mean 0, do not see: away
from zero padding the chain is NormProp with centred filters and fixed moments. There is no epsilon (the public code
adds 1e-6 to the variance of a filter): a constant filter gives zeros.

Residual blocks are :math:`x + \alpha \, r(\gamma_f f(x / \beta))` with alpha = 0.2 and beta the deviation that x has at
initialisation: its variance grows by alpha^2 per block, from 1 after a projection; see
:class:`NormFreeResidual`.

No statistics of activations: train and eval are the same function, and a sample's output depends on that sample alone.
Maps (N, C_in, \*space) to (N, C_out, \*space').

Use it when batches are small and the network is residual, together with
:func:`normprop.training.adaptive_clip.adaptive_gradient_clip_` where batches are large. Do not use it on layers whose
filters have a single weight (a depthwise 1x1 convolution): they would be zero.

Source:
    Brock et al. 2021, Characterizing signal propagation (norm-free ResNets), and High-Performance Large-Scale Image
    Recognition Without Normalization (NFNets).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from normprop import moments
from normprop.functional import normalize_weight
from normprop.moments import Activation
from normprop.norms.plain import ElementwiseActivation, apply_linear, linear_map, of_blocks
from normprop.norms.weight_standardization import require_fan_in


class ScaledWeightStandardized(nn.Module):
    r"""A linear map with centred filters of the length of a learnable gain: :math:`g_i (W_i - m_i) / \|W_i - m_i\|`.

    Args:
        linear: torch's linear map.

    Raises:
        ConfigError: if a filter has a single weight.

    Shape:
        That of ``linear``.

    Source:
        Brock et al. 2021 (norm-free ResNets), with the gain and without the activation's scale.

    Example:
        >>> ScaledWeightStandardized(nn.Conv2d(3, 8, 3))(torch.randn(2, 3, 5, 5)).shape
        torch.Size([2, 8, 3, 3])
    """

    def __init__(self, linear: Any) -> None:
        super().__init__()
        require_fan_in(linear, "scaled-weight-standardized")
        self.linear = linear
        self.gain = nn.Parameter(torch.ones_like(self.linear.weight.flatten(1)[:, 0]))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the linear map with normalised weights."""
        return apply_linear(self.linear, input, normalize_weight(self.linear.weight, self.gain, center=True))


class ScaledActivation(nn.Module):
    r"""An activation of variance 1: :math:`\gamma_f f(x)` with :math:`\gamma_f = 1 / c_1`.

    The gain is worked out once; for an activation with parameters of its own it is that of their initial values, the
    mean over channels.

    Args:
        activation: f, see :func:`normprop.moments.resolve`.

    Source:
        Brock et al. 2021 (norm-free ResNets).

    Example:
        >>> round(ScaledActivation("relu").gain, 7)
        1.7128586
    """

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation if isinstance(activation, nn.Module) else ElementwiseActivation(activation)
        with torch.no_grad():
            self.gain = float(
                torch.as_tensor(moments.of(activation).std, dtype=torch.float64, device="cpu").reciprocal().mean()
            )

    def forward(self, input: Tensor) -> Tensor:
        """Apply and scale."""
        output: Tensor = self.activation(input) * self.gain
        return output

    def extra_repr(self) -> str:
        """The gain."""
        return f"gain={self.gain:.7g}"


def block(dims: int, *args: Any, activation: Activation = "relu", **kwargs: Any) -> nn.Module:
    """Linear map with scaled standardised weights and bias, then the activation times its gain."""
    parts = nn.Sequential()
    parts.add_module("linear", ScaledWeightStandardized(linear_map(dims, *args, **kwargs)))
    if activation is not None:
        parts.add_module("activation", ScaledActivation(activation))
    return parts


class NormFreeResidual(nn.Module):
    r"""Residual block :math:`s + \alpha \, r(a)` with :math:`a = \gamma_f f(x / \beta)`, the activation in front.

    The skip path s is x itself, or ``shortcut(a)`` where there is a projection, as in the public code. ``variance``
    is what x is expected to have, :math:`\beta^2`. A block alone takes it as 1; :func:`finish` sets it to the block's
    position in a network, and ``last`` to the activation that follows the last block of a chain.

    Args:
        branch: module of r, of variance 1, ending in a block without activation.
        shortcut: module on the skip path, of variance 1, or ``None`` for the identity.
        activation: f, or ``None`` for none.
        spatial_dims: not needed here.
        alpha: weight of the branch.

    Source:
        Brock et al. 2021 (norm-free ResNets).

    Example:
        >>> residual = NormFreeResidual(block(2, 4, 4, 3, padding=1, activation=None))
        >>> residual(torch.randn(2, 4, 5, 5)).shape, round(residual.output_variance, 12)
        (torch.Size([2, 4, 5, 5]), 1.04)
    """

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        activation: Activation = "relu",
        spatial_dims: int = 2,
        alpha: float = 0.2,
    ) -> None:
        super().__init__()
        self.activation: nn.Module = nn.Identity() if activation is None else ScaledActivation(activation)
        self.branch = branch
        self.shortcut = shortcut
        self.alpha = alpha
        self.variance = 1.0
        self.last = False

    @property
    def output_variance(self) -> float:
        """Variance of the sum: a projection starts again from 1."""
        return (self.variance if self.shortcut is None else 1.0) + self.alpha**2

    def forward(self, input: Tensor) -> Tensor:
        """Activate, add the branch to the skip path and, at the end of a chain, activate once more."""
        activated = self.activation(input / math.sqrt(self.variance))
        skip = input if self.shortcut is None else self.shortcut(activated)
        output: Tensor = skip + self.alpha * self.branch(activated)
        return self.activation(output / math.sqrt(self.output_variance)) if self.last else output

    def extra_repr(self) -> str:
        """Branch weight, expected variance of the input, end of a chain."""
        return f"alpha={self.alpha}, variance={self.variance:.4g}, last={self.last}"


def finish(network: nn.Module) -> None:
    """Put every residual block of a network in its place in its chain; children are taken to run in their order.

    The first block of a chain takes over the activation of the block before it, so that the skip path starts from the
    linear map, of mean 0 and variance 1; every block gets the variance that the blocks before it have piled up; the
    last one activates its sum. Calling it again changes nothing.

    Args:
        network: the network, changed in place.

    Source:
        Brock et al. 2021 (norm-free ResNets); the activation after the last block as in the public code,
        but on a sum of variance 1.

    Example:
        >>> residuals = [NormFreeResidual(block(0, 4, 4, activation=None), spatial_dims=0) for _ in range(3)]
        >>> finish(nn.Sequential(block(0, 8, 4), *residuals))
        >>> [round(residual.variance, 2) for residual in residuals]
        [1.0, 1.04, 1.08]
    """
    before: Any = None
    steps = _steps(network)
    for module, after in zip(steps, [*steps[1:], None], strict=True):
        if isinstance(module, NormFreeResidual):
            module.last = not isinstance(after, NormFreeResidual)
            if isinstance(before, NormFreeResidual):
                module.variance = before.output_variance
            elif isinstance(module.activation, ScaledActivation) and _activated(before):
                before.activation = nn.Identity()
        before = module


def _activated(module: nn.Module | None) -> bool:
    """Whether a module is a block of this method with an activation."""
    return isinstance(module, nn.Sequential) and isinstance(getattr(module, "activation", None), ScaledActivation)


def _steps(module: nn.Module) -> list[nn.Module]:
    """The modules that run one after the other: residual blocks, and what contains none."""
    if isinstance(module, NormFreeResidual) or not any(isinstance(m, NormFreeResidual) for m in module.modules()):
        return [module]
    return [step for child in module.children() for step in _steps(child)]


METHODS = {
    "scaled-weight-standardized": of_blocks(
        "Brock et al. 2021, Characterizing signal propagation; NFNets", block, residual=NormFreeResidual, finish=finish
    )
}
