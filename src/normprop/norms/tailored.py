r"""``tailored``: tailored activation transformations (TAT), a leaky ReLU or a transformed smooth activation.

.. math:: \hat f(x) = \sqrt{2 / (1 + a^2)} \, (x \text{ if } x > 0 \text{ else } a x)

keeps the mean square of its input and maps the correlation c of two inputs to C(c), see :func:`leaky_correlation`;
the slope a is the one with which uncorrelated inputs of the whole network, C composed layer after layer, come out with
correlation 0.9. ReLU, leaky ReLU and PReLU, whatever slope is asked for, become this; in a network so shallow that even
ReLU (a = 0) stays below 0.9, up to twelve layers, a is 0. Smooth activations become
:math:`\gamma (f(\alpha x + \beta) + \delta)` with Q(1) = 1, Q'(1) = 1, C'(1) = 1 and C''(1) such that the curvature of
the network's map is 0.3: 0.3 / L for a chain of L layers. Activations with a kink other than the ReLUs have no finite
curvature and are refused.

Initialisation, residual sums and what :func:`finish` counts are those of ``kernel-shaped``; a block alone takes its
network to be ten layers deep. Poolings are left out of the account, as is the maximum over subnetworks, for which the
whole network stands. No statistics: train and eval are the same function, and a sample's output depends on that sample
alone. Maps (N, C_in, \*space) to (N, C_out, \*space').

Use it when a deep network, with few or no skip connections, is to train without normalisation. Do not use it with
inputs whose samples differ much in scale: a leaky ReLU network hands the scale on, a smooth one is tuned for 1.

Source:
    Zhang, Botev & Martens 2022, Deep Learning without Shortcuts; the authors' code.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from normprop import moments
from normprop.errors import ConfigError
from normprop.moments import Activation
from normprop.norms.activation_transform import Transform, bisect, constants, expectations, grid, nearest, solve
from normprop.norms.kernel_shaping import ALONE, NormalizedResidual, ShapedActivation, block, head, through
from normprop.norms.plain import of_blocks

CORRELATION = 0.9
"""Correlation with which uncorrelated inputs leave a leaky ReLU network: eta of the paper."""
CURVATURE = 0.3
"""Second derivative at 1 of the correlation map of a smooth network: tau of the paper."""
_RELUS = ("relu", "leaky_relu", "prelu")


def leaky_correlation(c: float, slope: float) -> float:
    r"""Correlation of two outputs of the leaky ReLU, given that of its inputs.

    .. math:: C(c) = c + \frac{(1 - a)^2}{\pi (1 + a^2)} \left(\sqrt{1 - c^2} - c \arccos c\right)

    Args:
        c: correlation of the inputs.
        slope: a.

    Returns:
        Correlation of the outputs, not below that of the inputs.

    Source:
        Zhang et al. 2022; at a = 0 the map of ReLU (Cho & Saul 2009).

    Example:
        >>> round(leaky_correlation(0.0, 0.0), 6), leaky_correlation(0.5, 1.0), leaky_correlation(1.0, 0.3)
        (0.31831, 0.5, 1.0)
    """
    c = min(max(c, -1.0), 1.0)
    share = (1.0 - slope) ** 2 / (math.pi * (1.0 + slope * slope))
    return c + share * (math.sqrt((1.0 - c) * (1.0 + c)) - c * math.acos(c))


def leaky_slope(network: nn.Module, correlation: float = CORRELATION) -> float:
    """Slope with which a network takes correlation 0 to ``correlation``, or 0 where no slope from 0 to 1 does.

    Args:
        network: a network of blocks.
        correlation: eta.

    Returns:
        The slope.

    Source:
        Zhang et al. 2022.

    Example:
        >>> network = nn.Sequential(*[tailored("relu") for _ in range(20)])
        >>> slope = leaky_slope(network)
        >>> round(through(network, 0.0, lambda c: leaky_correlation(c, slope)), 9)
        0.9
    """

    def short(slope: float) -> float:
        return correlation - through(network, 0.0, lambda c: leaky_correlation(c, slope))

    return 0.0 if short(0.0) >= 0 else bisect(short, 0.0, 1.0)


def leaky_transform(slope: float) -> Transform:
    """Constants of the leaky ReLU that keeps the mean square."""
    return Transform(out_scale=math.sqrt(2.0 / (1.0 + slope * slope)))


@constants
def tailored_transform(activation: Activation, curvature: float) -> Transform:
    r"""Constants of a smooth activation with Q(1) = 1, Q'(1) = 1, C'(1) = 1 and C''(1) = ``curvature``.

    out_scale is :math:`E[\alpha^2 f'(u)^2]^{-1/2}`, from C'(1), and out_shift one of the two roots of Q(1) = 1; the
    others are found by Newton's method.

    Args:
        activation: f, see :func:`normprop.moments.resolve`.
        curvature: of this layer.

    Returns:
        The constants.

    Raises:
        ConfigError: if there are none, or the activation is learnable or has a kink.

    Source:
        Zhang et al. 2022.

    Example:
        >>> scale = tailored_transform("tanh", 0.03).in_scale
        >>> 0 < scale < 1
        True
    """
    rule = moments.resolve(activation)
    unit = expectations(rule, *torch.tensor([[1.0], [0.5]], dtype=torch.float64))
    # E[f'(u) z] = E[f''(u)] at scale 1, unless f'' has a part that derivatives do not show: a jump of f'.
    if float((unit.tilt - unit.second).abs()) > 1e-6:
        raise ConfigError(
            f"norms.tailored: {rule.name} has a kink, so its curvature cannot be tailored; use relu, leaky_relu or a "
            f"smooth activation"
        )

    def residual(x: Tensor, sign: float) -> Tensor:
        scale = x[:, 0].exp()
        e = expectations(rule, scale, x[:, 1])
        slope = scale.square() * e.slope
        shift = sign * (slope - e.square + e.mean.square()).sqrt() - e.mean
        q_slope = scale * (e.square_tilt + shift * e.tilt) / slope
        return torch.stack([q_slope - 1.0, scale.square() * e.bend / e.slope - curvature], 1) / curvature

    roots = []
    for sign in (1.0, -1.0):
        found = solve(partial(residual, sign=sign), grid(curvature))
        roots.append(torch.cat([found, torch.full_like(found[:, :1], sign)], 1))
    log_scale, in_shift, sign = nearest(rule, torch.cat(roots), "tailored", f"curvature {curvature:.6g}").tolist()
    in_scale = math.exp(log_scale)
    e = expectations(rule, *torch.tensor([[in_scale], [in_shift]], dtype=torch.float64))
    slope = in_scale**2 * float(e.slope)
    mean = float(e.mean)
    return Transform(
        in_scale, in_shift, slope**-0.5, sign * math.sqrt(max(slope - float(e.square) + mean**2, 0.0)) - mean
    )


def tailored(activation: Activation) -> nn.Module:
    """The tailored form of an activation, for a chain of ``ALONE`` layers.

    Example:
        >>> tailored("relu").activation  # ten layers are too few for 0.9
        LeakyReLU(negative_slope=0.0)
    """
    rule = moments.resolve(activation)
    if rule.name == "identity":
        return nn.Identity()
    if rule.name not in _RELUS:
        return ShapedActivation(activation, tailored_transform(activation, CURVATURE / ALONE))
    layer = ShapedActivation(nn.LeakyReLU(1.0), Transform())
    _set_slope(layer, leaky_slope(nn.Sequential(*[layer] * ALONE)))
    return layer


def _set_slope(layer: ShapedActivation, slope: float) -> None:
    """Make a layer the leaky ReLU of that slope that keeps the mean square."""
    layer.activation = nn.LeakyReLU(slope)
    layer.transform = leaky_transform(slope)


def finish(network: nn.Module) -> None:
    """Tailor every activation to the whole network.

    Args:
        network: the network, changed in place.

    Raises:
        ConfigError: if a smooth activation cannot have the curvature.

    Source:
        Zhang et al. 2022.

    Example:
        >>> network = nn.Sequential(*[block(tailored, 0, 4, 4) for _ in range(20)])
        >>> finish(network)
        >>> network[0].activation.activation
        LeakyReLU(negative_slope=0.1813...)
    """
    slope = leaky_slope(network)
    layers = max(through(network, 0.0, lambda count: count + 1.0), 1.0)
    for module in network.modules():
        if isinstance(module, ShapedActivation):
            if isinstance(module.activation, nn.LeakyReLU):
                _set_slope(module, slope)
            else:
                module.transform = tailored_transform(module.activation, CURVATURE / layers)


METHODS = {
    "tailored": of_blocks(
        "Zhang, Botev & Martens 2022, Deep Learning without Shortcuts",
        partial(block, tailored),
        head=head,
        residual=partial(NormalizedResidual, tailored),
        finish=finish,
    )
}
