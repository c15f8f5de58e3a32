"""What a method needs and keeps, measured on a small network of its blocks rather than taken on trust."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from normprop.errors import ConfigError
from normprop.norms import registry

_SAMPLES, _CHANNELS, _SIZE = 6, 8, 6
_TOLERANCE = 1e-8  # in float64 what is equal is equal to 1e-12, what differs differs by more than 1e-3


@dataclass(frozen=True)
class Info:
    """Facts about one method.

    Attributes:
        name: its name.
        paper: authors, year and title of its source.
        dims: spatial dimensions it can be built for, 0 for linear layers.
        drop_in: whether :func:`normprop.norms.create` gives it as a layer of its own.
        depends_on_others: whether in training a sample's output changes when another sample of the batch does.
        needs_batch: whether in training it refuses a single sample of features (one value per channel), or gives it an
            output that does not depend on the input, where it trains on several.
        works_at_batch_1: whether it trains on a single image: forward and backward are finite and see the input.
        running_state: whether a forward pass in training changes buffers.
        same_in_eval: whether an untrained network gives the same output in training and in evaluation.
        folds: whether in evaluation the block without activation is an affine function of its input, so that a plain
            convolution or linear layer can stand for it.
        cannot: contracts of the other methods that this one does not keep, such as "empty batch".
    """

    name: str
    paper: str
    dims: tuple[int, ...]
    drop_in: bool
    depends_on_others: bool
    needs_batch: bool
    works_at_batch_1: bool
    running_state: bool
    same_in_eval: bool
    folds: bool
    cannot: tuple[str, ...]


@cache
def info(name: str) -> Info:
    """Measure what a method needs and keeps.

    Args:
        name: name of the method, one of :func:`normprop.norms.names`.

    Returns:
        The facts; the measurement takes part of a second, once, and leaves the random state as it was.

    Raises:
        ConfigError: if there is no method of that name.

    Example:
        >>> facts = info("batch")
        >>> facts.depends_on_others, facts.works_at_batch_1, facts.folds
        (True, True, True)
    """
    method = registry.method(name)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        dims = tuple(dims for dims in range(4) if _buildable(name, dims))
        if not dims:
            raise ConfigError(f"norms.{name}: its block can be built neither as linear layer nor as convolution")
        spatial, flat = 2 if 2 in dims else max(dims), min(dims)
        images = torch.randn(_SAMPLES, _CHANNELS, *[_SIZE] * spatial, dtype=torch.float64)
        features = torch.randn(_SAMPLES, _CHANNELS, *[1] * flat, dtype=torch.float64)
        network = _network(name, spatial, 3)
        return Info(
            name=name,
            paper=method.paper,
            dims=dims,
            drop_in=method.layer is not None,
            depends_on_others=_depends_on_others(network, images),
            needs_batch=_needs_batch(_network(name, flat, 1), features),
            works_at_batch_1=_trains(network, images[:1], images[1:2]),
            running_state=_changes_buffers(network, images),
            same_in_eval=_equal(_run(network, images), _run(copy.deepcopy(network).eval(), images)),
            folds=_is_affine(_block(name, spatial).eval(), images),
            cannot=method.cannot,
        )


def _buildable(name: str, dims: int) -> bool:
    try:
        _block(name, dims)
    except ConfigError:
        return False
    return True


def _block(name: str, dims: int) -> nn.Module:
    """One block without activation, its parameters moved off special initial values such as zero."""
    kernel = [1] if dims else []
    network = nn.Sequential(registry.block(name, dims)(_CHANNELS, _CHANNELS, *kernel, activation=None))
    return _stirred(registry.finish(name, network))


def _network(name: str, dims: int, kernel_size: int) -> nn.Module:
    """Two blocks, for methods in which one layer tells the next something."""
    kernel = [kernel_size] if dims else []
    build = registry.block(name, dims)
    blocks = [build(_CHANNELS, _CHANNELS, *kernel, activation=activation) for activation in ("relu", None)]
    return _stirred(registry.finish(name, nn.Sequential(*blocks)))


def _stirred(network: nn.Module) -> nn.Module:
    network.double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network


def _run(network: nn.Module, input: Tensor) -> Tensor:
    """The output of a copy, so that one measurement leaves no running state to the next."""
    with torch.no_grad():
        output: Tensor = copy.deepcopy(network)(input)
    return output


def _equal(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() <= _TOLERANCE * (1 + first.abs().max()))


def _depends_on_others(network: nn.Module, input: Tensor) -> bool:
    changed = torch.cat([input[:1], 2 * input[1:] + 1])
    return not _equal(_run(network, input)[:1], _run(network, changed)[:1])


def _trains(network: nn.Module, input: Tensor, other: Tensor) -> bool:
    """Whether a training step on the input works and its output tells the input from another."""
    model = copy.deepcopy(network)
    try:
        output = model(input)
        output.square().sum().backward()
        second = _run(network, other)
    except ValueError:
        return False
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in [output.detach(), *gradients])
    return finite and not _equal(output.detach(), second)


def _needs_batch(network: nn.Module, input: Tensor) -> bool:
    return _trains(network, input, input + torch.randn_like(input)) and not _trains(network, input[:1], input[1:2])


def _changes_buffers(network: nn.Module, input: Tensor) -> bool:
    model = copy.deepcopy(network)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        model(input)
    return any(not torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def _is_affine(block: Callable[[Tensor], Tensor], input: Tensor) -> bool:
    """Whether f(x) + f(y) = f(x + y) + f(0)."""
    other = input.flip(0) * 3 - 1
    with torch.no_grad():
        return _equal(block(input) + block(other), block(input + other) + block(torch.zeros_like(input)))
