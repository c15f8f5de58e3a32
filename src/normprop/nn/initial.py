r"""Initial biases and branch gains by depth, so that nearby samples stay near through a whole network.

Two nearby inputs of a layer part by the slope of its correlation map at 1, :math:`\chi = E[f'(z)^2] / Var[f(z)]` for
z ~ N(rho, 1): 1.47 for ReLU without bias. Normalised layers pass this on undiminished, so that 30 of them part all
inputs (and multiply gradients on their way back) by :math:`10^5`. A positive bias, rho standard deviations of the
pre-activation, makes ReLU more nearly linear: 1.25 at rho = 0.5, 1.12 at 1, 1.02 at 2. Live moments keep mean 0 and
variance 1 whatever the bias.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import nn

from normprop import moments as M
from normprop.errors import ConfigError
from normprop.moments import Activation
from normprop.nn.layer import NormPropLayer
from normprop.nn.residual import Residual, output_moments
from normprop.nn.skip import Skip

SLOPE = 4.0
"""Slope of a network's correlation map at 1; chosen by experiment, see docs/results/learning.md."""
_RHOS = [0.05 * step for step in range(61)]


@functools.lru_cache(maxsize=64)
@torch.no_grad()
def _slopes(rule: M.Rule) -> list[float]:
    """Slope of the correlation map at 1 for every bias of _RHOS, or without bias alone if the activation learns."""
    if rule.learnable:
        moments = M.of(rule)
        return [float(torch.as_tensor(moments.squared_derivative / moments.var).mean())]
    found = M.of(rule, torch.tensor(_RHOS, dtype=torch.float64), 1.0)
    return torch.as_tensor(found.squared_derivative / found.var).tolist()


def offset(activation: Activation, slope: float) -> tuple[float, float]:
    """Find the smallest bias with which an activation's slope is at most a given one.

    Args:
        activation: see :func:`normprop.moments.resolve`; one with parameters gets no bias.
        slope: chi, above 1.

    Returns:
        The bias in standard deviations of the pre-activation, from 0 to 3 in steps of 0.05, and chi with it: the least
        there is where none is as small as asked for.

    Source:
        Ours; the slope: Poole et al. 2016, Martens et al. 2021 (Deep Kernel Shaping).

    Example:
        >>> rho, chi = offset("relu", 1.25)
        >>> round(rho, 2), round(chi, 3)
        (0.5, 1.249)
    """
    rule = M.resolve(activation)
    if rule.name == "identity":
        return 0.0, 1.0
    slopes = _slopes(rule)
    index = next((i for i, chi in enumerate(slopes) if chi <= slope), slopes.index(min(slopes)))
    return _RHOS[index], slopes[index]


def total_slope(module: nn.Module, slope: float, start: float = 1.0) -> float:
    """Slope of a network's correlation map at 1, if live layers outside of branches have the bias of :func:`offset`.

    Children are taken to run in their order. A residual sum mixes the slopes of its paths by their variances. Of
    :class:`Skip` the skip alone counts: what is near stays near in part of the channels, whatever the branch does.

    Args:
        module: the network.
        slope: asked of every activation.
        start: slope at its input.

    Returns:
        Slope at its output.

    Example:
        >>> from normprop.nn import Linear
        >>> layers = [Linear(4, 4, activation="relu") for _ in range(2)]
        >>> round(total_slope(nn.Sequential(*layers), 1.25), 3)
        1.561
    """
    if isinstance(module, NormPropLayer):
        return start * _chi(module, slope)
    if isinstance(module, Residual):
        skip = start if module.shortcut is None else total_slope(module.shortcut, slope, start)
        branch = total_slope(module.branch, math.inf, start)
        variances = [_variance(module.shortcut), _variance(module.branch)]
        mixed = (variances[0] * skip + variances[1] * branch) / sum(variances)
        return mixed * offset(module.activation, slope if _last(module) is not None else math.inf)[1]
    if isinstance(module, Skip):
        return start
    for child in module._modules.values():  # not children(), which leaves out a module's second and later places
        start = start if child is None else total_slope(child, slope, start)
    return start


def activations_in_sequence(module: nn.Module) -> int:
    """Count the activations of NormProp layers and residual sums that follow one another, outside of branches.

    Children are taken to run in their order, and of :class:`Skip` the skip alone counts, as in :func:`total_slope`.

    Args:
        module: the network.

    Returns:
        The number.

    Example:
        >>> from normprop import models
        >>> [activations_in_sequence(network) for network in (models.nin(3, 10), models.resnet(20, 3, 10))]
        [8, 10]
    """
    if isinstance(module, NormPropLayer):
        return int(M.resolve(module.activation).name != "identity")
    if isinstance(module, Residual):
        ahead = 0 if module.shortcut is None else activations_in_sequence(module.shortcut)
        return ahead + int(M.resolve(module.activation).name != "identity")
    if isinstance(module, Skip):
        return 0
    return sum(activations_in_sequence(child) for child in module._modules.values() if child is not None)


@torch.no_grad()
def init_by_depth_(network: nn.Module, slope: float = SLOPE) -> nn.Module:
    r"""Set the biases of a network's layers, and the gains of its residual branches, by its depth.

    A branch's last layer gets the gain :math:`1 / \sqrt{B}` in a network of B residual blocks; and every activation
    outside of branches the smallest bias with which the slope of the whole network is at most ``slope``, that of a
    residual sum in its branch's last layer. Within branches activations keep all of their bend. Layers with fixed
    moments are left as they are, as are gains that are not 1.

    Args:
        network: the network, changed in place.
        slope: of its correlation map at 1.

    Returns:
        The network.

    Raises:
        ConfigError: for a slope that is not above 1.

    Source:
        Ours.

    Example:
        >>> from normprop.nn import Linear
        >>> network = init_by_depth_(nn.Sequential(*[Linear(4, 4, activation="relu") for _ in range(6)]))
        >>> network[0].bias[0].item()
        0.5
    """
    if not slope > 1:
        raise ConfigError(f"init_by_depth_: slope must be above 1, got {slope}")
    blocks = [module for module in network.modules() if isinstance(module, Residual)]
    for block in blocks:
        last = _last(block)
        if last is not None and bool((last.gain == 1).all()):
            last.gain.fill_(len(blocks) ** -0.5)
    each = _bisect(lambda each: total_slope(network, each) - slope, 1.0, slope)
    within = {id(module) for block in blocks for module in block.branch.modules()}
    for module in network.modules():
        if isinstance(module, NormPropLayer) and _live(module) and id(module) not in within:
            module.bias.copy_(offset(module.activation, each)[0] * module.gain)
    for block in blocks:
        last = _last(block)
        if last is not None:
            deviation = (_variance(block.shortcut) + _variance(block.branch)) ** 0.5
            last.bias.fill_(offset(block.activation, each)[0] * deviation)
    return network


def _live(layer: NormPropLayer) -> bool:
    return layer.moments == "live" and layer.bias is not None


def _chi(layer: NormPropLayer, slope: float) -> float:
    return offset(layer.activation, slope if _live(layer) else math.inf)[1]


def _last(block: Residual) -> NormPropLayer | None:
    """The layer that ends a block's branch, whose bias is that of the sum."""
    last = block.branch
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    if isinstance(last, NormPropLayer) and _live(last) and M.resolve(last.activation).name == "identity":
        return last
    return None


@torch.no_grad()
def _variance(module: nn.Module | None) -> float:
    return float(torch.as_tensor(output_moments(module).var).mean())


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """The largest value at which a rising function is not above 0."""
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return low
