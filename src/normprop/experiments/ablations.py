"""Networks for ablations of our recipe: what else it could be, one change at a time.

``normprop compare --model normprop.experiments.ablations:resnet14 --methods batch,normprop,normprop+zero-bias`` trains
them as any other; a method is a normaliser's name, or that of ours, ``+`` and one of :data:`CHANGES`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normprop import models, moments
from normprop.errors import ConfigError
from normprop.functional import activate, normalize_weight
from normprop.nn import NormPropLayer, Residual, init_by_depth_


@torch.no_grad()
def zero_bias(network: nn.Module) -> None:
    """Biases 0 and gains 1 everywhere, whatever the depth: the recipe without :func:`normprop.nn.init_by_depth_`."""
    for layer in _layers(network):
        nn.init.constant_(layer.gain, layer.initial_gain)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def any_angle(network: nn.Module) -> None:
    """Filters of length 1 that nothing draws towards right angles."""
    for layer in _layers(network):
        layer.orthogonal = False


def slope(value: float, network: nn.Module) -> None:
    """Another slope of the whole network's correlation map."""
    zero_bias(network)
    init_by_depth_(network, value)


@torch.no_grad()
def branch_gain(value: float, network: nn.Module) -> None:
    """Another initial gain of residual branches, the same at all depths."""
    zero_bias(network)
    for block in _blocks(network):
        # A gain of just 1 would be taken as not chosen, and replaced.
        nn.init.constant_(block.branch[-1].gain, value + 1e-6)  # type: ignore[index, arg-type]
    init_by_depth_(network)


def stochastic_depth(rate: float, network: nn.Module) -> None:
    """Drop each sample's branches in training, the first with a probability near 0 and the last with ``rate``.

    Source:
        Huang et al. 2016.
    """
    blocks = _blocks(network)
    for number, block in enumerate(blocks, 1):
        block.branch.register_forward_hook(partial(_dropped, rate * number / len(blocks)))


def noise(size: float, network: nn.Module) -> None:
    """Add Gaussian noise to every layer's output in training, one number for each sample and channel."""
    for layer in _layers(network)[:-1]:
        layer.register_forward_hook(partial(_noisy, size))


def batch_gradient(network: nn.Module) -> None:
    """Predict as ever, but take the gradients of all weights but the head's as through the statistics of the batch.

    What a change of a filter does to mean and variance of its pre-activations over the batch is then left out of its
    gradient, as with batch norm; outputs and all other gradients stay as they are.
    """
    for layer in _layers(network)[:-1]:
        layer.forward = partial(_by_batch, layer)  # type: ignore[method-assign]


def _by_batch(layer: NormPropLayer, input: Tensor) -> Tensor:
    rule = moments.resolve(layer.activation)
    constants = layer._constants(rule)

    def linear(input: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        filters = normalize_weight(
            weight,
            scale * layer._phases**0.5,
            center=layer.center,
            groups=layer.groups,
            transposed=layer._transposed,
        )
        return layer._linear(input, filters, shift)

    output = linear(input, layer.weight.detach(), constants.scale, constants.shift)
    if layer.training:
        same = linear(input.detach(), layer.weight, constants.scale.detach(), constants.shift.detach())
        others = [axis for axis in range(same.ndim) if axis != same.ndim - 1 - layer._spatial_dims]
        mean, std = same.mean(others, keepdim=True), same.std(others, keepdim=True, correction=0).clamp_min(1e-3)
        unit = (same - mean) / std
        output = output + (unit - unit.detach()) * std.detach()  # zero, but for its gradient
    return activate(output, rule, constants, layer._spatial_dims)


def _dropped(rate: float, module: nn.Module, _: Any, output: Tensor) -> Tensor:
    if not module.training:
        return output
    kept = torch.rand(_one_each(output, 1), device=output.device) >= rate
    return output * (kept.to(output.dtype) / (1 - rate))


def _noisy(size: float, module: nn.Module, _: Any, output: Tensor) -> Tensor:
    if not module.training:
        return output
    return output + size * torch.randn(_one_each(output, output.shape[1]), device=output.device, dtype=output.dtype)


def _one_each(output: Tensor, channels: int) -> tuple[int, ...]:
    return len(output), channels, *[1] * (output.ndim - 2)


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "zero-bias": zero_bias,
    "any-angle": any_angle,
    "slope-2": partial(slope, 2.0),
    "slope-8": partial(slope, 8.0),
    "slope-32": partial(slope, 32.0),
    "branch-gain-0.25": partial(branch_gain, 0.25),
    "branch-gain-1": partial(branch_gain, 1.0),
    "branch-gain-2": partial(branch_gain, 2.0),
    "stochastic-depth-0.5": partial(stochastic_depth, 0.5),
    "noise-0.1": partial(noise, 0.1),
    "noise-0.3": partial(noise, 0.3),
    "batch-gradient": batch_gradient,
}


def changed(build: Callable[..., nn.Module], norm: str) -> nn.Module:
    """Build a network with a method, changed or not.

    Args:
        build: called with ``norm=``.
        norm: a method's name, or "normprop+CHANGE".

    Returns:
        The network.

    Raises:
        ConfigError: for a change that there is not, or of another method than ours.

    Example:
        >>> changed(partial(models.nin, 3, 10, width=0.125), "normprop+zero-bias")[0].bias.sum().item()
        0.0
    """
    name, _, change = norm.partition("+")
    network = build(norm=name)
    if change:
        if change not in CHANGES or name != "normprop":
            raise ConfigError(f"ablations: no method {norm!r}; there are normprop+ {', '.join(CHANGES)}")
        CHANGES[change](network)
    return network


def _layers(network: nn.Module) -> list[NormPropLayer]:
    return [module for module in network.modules() if isinstance(module, NormPropLayer)]


def _blocks(network: nn.Module) -> list[Residual]:
    return [module for module in network.modules() if isinstance(module, Residual)]


nin = partial(changed, partial(models.nin, 3, 10, width=0.25))
resnet14 = partial(changed, partial(models.resnet, 14, 3, 10))
resnet20 = partial(changed, partial(models.resnet, 20, 3, 10))
mlp40 = partial(changed, partial(models.mlp, (3, 32, 32), 10, depth=40, hidden_features=128))
unet = partial(changed, partial(models.unet, 3, 2, width=0.5, dims=2))
vit = partial(changed, partial(models.vit, (3, 32, 32), 10))
