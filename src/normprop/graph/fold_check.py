"""Proof of a fold: both networks in float64, on the example input and on noise."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normprop.errors import ConversionError
from normprop.graph.fold_probe import shapes
from normprop.graph.fold_trace import Shape
from normprop.graph.random_state import preserved

RTOL = 1e-9
"""Largest difference that counts as rounding in float64, relative to the largest value of the output."""


def difference(first: Any, second: Any) -> float:
    """Largest difference of the tensors of two outputs, relative to the largest value; infinite if they do not match.

    Example:
        >>> difference({"a": torch.tensor([4.0])}, {"a": torch.tensor([3.0])})
        0.25
    """
    pairs = [[leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)] for output in (first, second)]
    if not pairs[0] or [leaf.shape for leaf in pairs[0]] != [leaf.shape for leaf in pairs[1]]:
        return float("inf")
    worst = 0.0
    for own, other in zip(*pairs, strict=True):
        own, other = own.double(), other.double()
        same = (own == other) | (own.isnan() & other.isnan())
        gap = torch.where(same, 0.0, (own - other).abs()).nan_to_num(float("inf"))
        scale = torch.where(own.isfinite(), own, 0.0).abs()
        if bool(gap.any()):
            worst = max(worst, float(gap.max() / scale.max()))
    return worst


def check_network(net: nn.Module, plain: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compare two networks in float64 on an input and on Gaussian noise of its shape.

    Raises:
        ConversionError: if they differ.
    """
    generator = torch.Generator().manual_seed(0)

    def noisy(leaf: Any) -> Any:
        noise = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator) if noise else leaf

    for inputs in ((args, kwargs), pytree.tree_map(noisy, (args, kwargs))):
        size = difference(*(_run(model, *inputs) for model in (net, plain)))
        if not size <= RTOL:
            raise ConversionError(
                f"fold: {type(net).__name__} differs from its folded form by {size:.1e} of its output in float64, "
                f"where {RTOL:.0e} is rounding; its forward may use a layer's weights itself, or depend on values"
            )


def check_guess(net: nn.Module, plain: nn.Module) -> None:
    """Compare two networks on noise of a shape that they may take, if there is one.

    Raises:
        ConversionError: if they differ.
    """
    for shape in shapes(net):
        noise = torch.zeros(shape, dtype=torch.float64)
        try:
            _run(net, (noise,), {})
        except Exception:  # it does not take such an input
            continue
        check_network(net, plain, (noise,), {})


def check_module(path: str, module: nn.Module, plain: nn.Module, shape: Shape | None) -> None:
    """Compare a module with its plain form on noise.

    Raises:
        ConversionError: if they differ.
    """
    generator = torch.Generator().manual_seed(0)
    for each in shapes(module) if shape is None else [shape]:
        noise = torch.randn(each, dtype=torch.float64, generator=generator)
        try:
            expected = _run(module, (noise,), {})
        except Exception:  # it does not take such an input
            continue
        size = difference(expected, _run(plain, (noise,), {}))
        if not size <= RTOL:
            raise ConversionError(
                f"fold: {path or 'the network'} ({type(module).__name__}) differs from its plain form by {size:.1e} of "
                f"its output in float64, where {RTOL:.0e} is rounding"
            )
        return
    raise ConversionError(
        f"fold: {path or 'the network'} ({type(module).__name__}) cannot be checked without an example input; call "
        f"fold(net, x)"
    )


@torch.no_grad()
def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = copy.deepcopy((args, kwargs))  # a network may overwrite its input
    with preserved(model, seed=0):
        return model(*args, **kwargs)
