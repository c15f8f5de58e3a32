"""Whether a module is an affine map of every element, measured: batch norm in evaluation, whatever its class."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normprop.graph.absorb import LINEAR_MAPS
from normprop.graph.fold_parts import Affine
from normprop.graph.fold_trace import Shape
from normprop.graph.random_state import preserved

_TOLERANCE = 1e-9


def normalises(module: nn.Module) -> bool:
    """Whether a module has running statistics that it uses in evaluation.

    Example:
        >>> normalises(nn.BatchNorm1d(2)), normalises(nn.GroupNorm(1, 2))
        (True, False)
    """
    return isinstance(getattr(module, "running_var", None), Tensor)


@torch.no_grad()
def probe(module: nn.Module, shape: Shape | None) -> Affine | None:
    """The affine map that a module is, element by element and for every sample.

    Args:
        module: in evaluation and float64.
        shape: of an input; without one, shapes that fit the module's number of channels are tried.

    Returns:
        The map, or ``None`` if the module is none or takes something else.

    Example:
        >>> round(probe(nn.BatchNorm2d(3, eps=3.0).double().eval(), None).scale.item(), 3)
        0.5
    """
    tried = [shape] if shape is not None else [*shapes(module)]
    found = [affine for affine in (_measure(module, each) for each in tried) if affine is not None]
    if not found:
        return None
    # A module that takes inputs of one number of axes says where its channels are.
    if len(found) > 1:
        found[-1].dims = None
    return found[-1]


def shapes(module: nn.Module) -> Iterator[Shape]:
    """Shapes of input that a module may take, from its linear maps, its statistics or its number of channels.

    Example:
        >>> [*shapes(nn.Conv2d(3, 4, 3, stride=2))]
        [(2, 3, 23, 23)]
    """
    linear: Any = next((part for part in module.modules() if isinstance(part, LINEAR_MAPS)), None)
    shape = getattr(module, "shape", None)
    if isinstance(linear, nn.Linear):
        yield (2, linear.in_features)
    elif linear is not None:
        reach = zip(linear.kernel_size, linear.stride, linear.dilation, strict=True)
        yield (2, linear.in_channels, *(4 * size * step * space - 1 for size, step, space in reach))
    elif isinstance(shape, tuple):
        yield (2, *shape)
    else:
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        sizes = [getattr(module, "num_features", None), *(len(tensor) for tensor in tensors if tensor.ndim == 1)]
        channels = next((size for size in sizes if isinstance(size, int)), 4)
        for space in ((), (5,), (5, 4), (5, 4, 3)):
            yield (2, channels, *space)


def _measure(module: nn.Module, shape: Shape) -> Affine | None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    wide = noise.flip(-1).exp() * 7 - 3
    module = copy.deepcopy(module)
    try:
        with preserved(module):
            shift, one, *outputs = (module(x.clone()) for x in (noise * 0, noise * 0 + 1, noise, wide))
    except Exception:  # whatever it says, it does not take such an input
        return None
    if not isinstance(shift, Tensor) or shift.shape != noise.shape:
        return None
    scale = one - shift
    for input, output in zip((noise, wide), outputs, strict=True):
        expected = input * scale[:1] + shift[:1]
        if not bool(((output - expected).abs() <= _TOLERANCE * (1 + expected.abs())).all()):
            return None
    return _along(scale[0], shift[0])


def _along(scale: Tensor, shift: Tensor) -> Affine:
    """Tensors of a sample's shape, along as few axes as they vary in."""
    first = tuple([slice(None)] + [slice(1)] * (scale.ndim - 1))
    if all(torch.allclose(value, value[first], rtol=1e-12, atol=1e-12) for value in (scale, shift)):
        return Affine(scale[first].flatten().clone(), shift[first].flatten().clone(), scale.ndim - 1).plainly()
    return Affine(scale.clone(), shift.clone())
