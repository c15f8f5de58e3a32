r"""``kernel-shaped``: deep kernel shaping (DKS), activations transformed for the depth of their network.

.. math:: \hat f(x) = \gamma \, (f(\alpha x + \beta) + \delta)

With u, v ~ N(0, 1) of correlation c, a layer maps the correlation of two inputs by
:math:`C(c) = E[\hat f(u) \hat f(v)]` and their mean square by :math:`Q(q) = E[\hat f(\sqrt q u)^2]`. The four constants
solve Q(1) = 1, Q'(1) = 1, C(0) = 0 and C'(1) = the slope that makes the slope of the whole network 1.5: 1.5^(1/L) for a
chain of L layers. At the start a deep network then neither forgets its input nor confuses its inputs.

ReLU and its relatives have one shape at every scale: alpha = 1 and beta = 0 give the activation of NormProp,
(f - c2) / c1, of slope pi / (pi - 1) = 1.467 whatever the depth. Use ``tailored`` for them in deep networks.

Linear maps start orthogonal at the centre of the kernel and 0 elsewhere ("delta"), scaled so that inputs of mean square
1 stay so; residual sums are :math:`w s + \sqrt{1 - w^2} r`, w^2 = 1/2. :func:`finish` counts the layers; a block alone
takes its network to be ten layers deep, since few activations have a solution for one. Poolings are left out of the
account. No statistics: train and eval are the same function, and a sample's output depends on that sample alone. Maps
(N, C_in, \*space) to (N, C_out, \*space').

Use it when a deep network with smooth activations is to train without normalisation, or without skip connections.
Do not use it in shallow networks, which it makes needlessly linear.

Source:
    Martens et al. 2021, Rapid training of deep neural networks without skip connections or normalization layers using
    Deep Kernel Shaping; the authors' code.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normprop import moments
from normprop.fused import at_least_float32
from normprop.moments import Activation
from normprop.norms.activation_transform import Transform, bisect, constants, expectations, grid, nearest, solve
from normprop.norms.plain import linear_map, of_blocks

MAX_SLOPE = 1.5
"""Slope at 1 of the network's correlation map: zeta of the paper."""
ALONE = 10
"""Layers of the network that a block takes itself to be in: one or two layers have too little room to be shaped."""


@constants
def kernel_transform(activation: Activation, slope: float) -> Transform:
    r"""Constants with Q(1) = 1, Q'(1) = 1, C(0) = 0 and C'(1) = ``slope``.

    out_shift = -E[f(u)] and out_scale = Var[f(u)]^(-1/2) settle C(0) and Q(1); the others are found by Newton's
    method. Homogeneous activations (ReLU) get in_scale 1 and in_shift 0, which leaves them their own slope.

    Args:
        activation: f, see :func:`normprop.moments.resolve`.
        slope: of this layer, above 1.

    Returns:
        The constants.

    Raises:
        ConfigError: if there are none or the activation is learnable.

    Source:
        Martens et al. 2021.

    Example:
        >>> [round(constant, 4) for constant in kernel_transform("relu", 1.5)]
        [1.0, 0.0, 1.7129, -0.3989]
    """
    rule = moments.resolve(activation)
    if rule.homogeneous:
        unit = moments.of(rule)
        return Transform(1.0, 0.0, 1.0 / float(unit.std), -float(unit.mean))

    def residual(x: Tensor) -> Tensor:
        scale = x[:, 0].exp()
        e = expectations(rule, scale, x[:, 1])
        var = e.square - e.mean.square()
        q_slope = scale * (e.square_tilt - e.mean * e.tilt) / var
        return torch.stack([q_slope - 1.0, scale.square() * e.slope / var - slope], 1) / (slope - 1.0)

    root = nearest(rule, solve(residual, grid(slope - 1.0)), "kernel-shaped", f"slope {slope:.6g}")
    e = expectations(rule, root[:1].exp(), root[1:])
    std = math.sqrt(float(e.square - e.mean.square()))
    return Transform(math.exp(float(root[0])), float(root[1]), 1.0 / std, -float(e.mean))


class ShapedActivation(nn.Module):
    r"""A transformed activation :math:`\gamma (f(\alpha x + \beta) + \delta)`, computed in float32 or better.

    Args:
        activation: f.
        transform: the constants.

    Shape:
        Any.

    Source:
        Martens et al. 2021.

    Example:
        >>> ShapedActivation("tanh", Transform(in_scale=2.0))(torch.zeros(1))
        tensor([0.])
    """

    def __init__(self, activation: Activation, transform: Transform) -> None:
        super().__init__()
        self.activation = activation
        self.transform = transform

    def forward(self, input: Tensor) -> Tensor:
        """Apply the transformed activation."""
        in_scale, in_shift, out_scale, out_shift = self.transform
        value = at_least_float32(input)
        if (in_scale, in_shift) != (1.0, 0.0):
            value = value * in_scale + in_shift
        value = moments.resolve(self.activation).function(value)
        if out_shift:
            value = value + out_shift
        return (value * out_scale).to(input.dtype)

    def extra_repr(self) -> str:
        """The constants."""
        constants = ", ".join(f"{name}={value:.4g}" for name, value in self.transform._asdict().items())
        return constants if isinstance(self.activation, nn.Module) else f"{self.activation}, {constants}"


@torch.no_grad()
def delta_orthogonal_(weight: Tensor, groups: int = 1) -> Tensor:
    r"""Fill a weight with random orthogonal maps at the centre of the kernel, zeros elsewhere, in place.

    With more outputs than inputs the columns are orthogonal and of length :math:`\sqrt{out / in}`, which keeps the mean
    square of every input; with fewer, the rows are orthonormal, which keeps it on average.

    Args:
        weight: (out, in / groups, \*kernel).
        groups: number of groups, each with a map of its own.

    Returns:
        The weight.

    Source:
        Xiao et al. 2018 (delta-orthogonal); Martens et al. 2021 (scaled, for any shape).

    Example:
        >>> weight = delta_orthogonal_(torch.empty(4, 4, 3))
        >>> bool(torch.allclose(weight[..., 1] @ weight[..., 1].T, torch.eye(4), atol=1e-5))
        True
    """
    weight.zero_()
    at: Any = (..., *(size // 2 for size in weight.shape[2:]))
    centre = weight[at]
    for rows in centre.chunk(groups):
        scale = max(1.0, rows.shape[0] / rows.shape[1]) ** 0.5
        rows.copy_(nn.init.orthogonal_(torch.empty(rows.shape, device=weight.device, dtype=torch.float32), scale))
    return weight


def head(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Linear map with bias, delta-orthogonal."""
    linear: Any = linear_map(dims, *args, **kwargs)
    delta_orthogonal_(linear.weight, getattr(linear, "groups", 1))
    return linear  # type: ignore[no-any-return]


Shaper = Callable[[Activation], nn.Module]


def block(shape: Shaper, dims: int, *args: Any, activation: Activation = "relu", **kwargs: Any) -> nn.Module:
    """Delta-orthogonal linear map with bias and the activation that ``shape`` makes of the one asked for."""
    parts = nn.Sequential()
    parts.add_module("linear", head(dims, *args, **kwargs))
    if activation is not None:
        parts.add_module("activation", shape(activation))
    return parts


class NormalizedResidual(nn.Module):
    r"""Residual block whose sum keeps the mean square, :math:`f(w s + \sqrt{1 - w^2} \, r)`.

    Args:
        shape: what makes the activation of the one asked for.
        branch: module of r, ending in a block without activation.
        shortcut: module on the skip path s, or ``None`` for the identity.
        activation: f, or ``None``.
        spatial_dims: not needed here.
        share: w^2, the skip path's share of the mean square.

    Source:
        Martens et al. 2021 (normalised sums).

    Example:
        >>> branch = block(kernel_shaped, 0, 4, 4, activation=None)
        >>> NormalizedResidual(kernel_shaped, branch)(torch.randn(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        shape: Shaper,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        activation: Activation = "relu",
        spatial_dims: int = 2,
        share: float = 0.5,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.activation = nn.Identity() if activation is None else shape(activation)
        self.share = share

    def forward(self, input: Tensor) -> Tensor:
        """Add the two paths by their shares and apply the activation."""
        skip = input if self.shortcut is None else self.shortcut(input)
        total = math.sqrt(self.share) * skip + math.sqrt(1.0 - self.share) * self.branch(input)
        output: Tensor = self.activation(total)
        return output


def through(module: nn.Module, value: float, local: Callable[[float], float]) -> float:
    """Carry a property of the correlation map through a network, activation by activation.

    A correlation, the slope at 1 and (where all slopes are 1) the curvature at 1 all mix in a normalised sum by the
    shares of its two paths. Children are taken to run in their order.

    Args:
        module: the network.
        value: at its input.
        local: from the value before an activation to that after it.

    Returns:
        The value at its output.

    Example:
        >>> network = nn.Sequential(*[ShapedActivation("tanh", Transform())] * 3)
        >>> through(network, 0.0, lambda count: count + 1)
        3.0
    """
    if isinstance(module, ShapedActivation):
        return float(local(value))
    if isinstance(module, NormalizedResidual):
        skip = value if module.shortcut is None else through(module.shortcut, value, local)
        mixed = module.share * skip + (1.0 - module.share) * through(module.branch, value, local)
        return through(module.activation, mixed, local)
    # Not children(), which leaves out a module's second and later places.
    for child in module._modules.values():
        value = value if child is None else through(child, value, local)
    return value


def kernel_shaped(activation: Activation) -> nn.Module:
    """The kernel-shaped form of an activation, for a chain of ``ALONE`` layers."""
    if moments.resolve(activation).name == "identity":
        return nn.Identity()
    return ShapedActivation(activation, kernel_transform(activation, MAX_SLOPE ** (1 / ALONE)))


def finish(network: nn.Module) -> None:
    """Give every activation the slope with which that of the whole network is 1.5.

    Args:
        network: the network, changed in place.

    Raises:
        ConfigError: if an activation cannot have that slope.

    Source:
        Martens et al. 2021.

    Example:
        >>> network = nn.Sequential(*[block(kernel_shaped, 0, 4, 4, activation="tanh") for _ in range(3)])
                >>> finish(network)
        >>> round(network[0].activation.transform.in_scale, 4)
        0.5905
    """
    target = bisect(lambda each: through(network, 1.0, lambda s: s * each) - MAX_SLOPE, 1.0, MAX_SLOPE)
    for module in network.modules():
        if isinstance(module, ShapedActivation):
            module.transform = kernel_transform(module.activation, target)


METHODS = {
    "kernel-shaped": of_blocks(
        "Martens et al. 2021, Deep Kernel Shaping",
        partial(block, kernel_shaped),
        head=head,
        residual=partial(NormalizedResidual, kernel_shaped),
        finish=finish,
    )
}
