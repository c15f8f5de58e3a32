"""Proof that a converted network is what it should be."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normprop.errors import ConversionError
from normprop.graph.capture import Inputs, arguments
from normprop.graph.plan import Plan
from normprop.graph.random_state import preserved

_ROUNDING = 1e-9  # in float64, relative to the largest value


def prove(plan: Plan, net: nn.Module) -> float:
    """Compare a conversion with the original, both in evaluation and float64, on the example input.

    Args:
        plan: the plan, with the original.
        net: the original in float64, converted.

    Returns:
        The largest difference, relative to the largest value of the output.

    Raises:
        ConversionError: if they differ by more than rounding; it names the first normaliser at which they part.
    """
    pair = [copy.deepcopy(plan.model).double().eval(), net.eval()]
    x = _double(plan.x)
    (expected, wanted), (output, found) = (_watched(part, x, [site.path for site in plan.sites]) for part in pair)
    difference = _difference(expected, output)
    if difference <= _ROUNDING:
        return difference
    for site in plan.sites:
        if site.path in wanted and _difference(wanted[site.path], found.get(site.path)) > _ROUNDING:
            raise ConversionError(
                f"{site.path}: after conversion its output differs by "
                f"{_difference(wanted[site.path], found.get(site.path)):.1e} of its largest value, so the conversion "
                f"is not exact; leave it with exclude={site.path!r}"
            )
    raise ConversionError(
        f"{type(plan.model).__name__}: the converted network's output differs by {difference:.1e} of its largest "
        f"value although every normaliser agrees: the network is random in evaluation or changes with every call"
    )


def require_finite(plan: Plan, net: nn.Module) -> None:
    """Run a converted network once and raise unless its output is finite.

    Args:
        plan: the plan, with example input and sites.
        net: the converted network; its state stays as it is.

    Raises:
        ConversionError: if there is an output that is not finite; it names the first normaliser where one is.
    """
    probe = copy.deepcopy(net).eval()
    outputs, found = _watched(probe, plan.x, [site.path for site in plan.sites])
    if _finite(outputs):
        return
    first = next((path for path, value in found.items() if not _finite(value)), None)
    where = f"{first}: " if first else ""
    raise ConversionError(f"{where}after conversion the output on the example input is not finite")


def _watched(net: nn.Module, x: Inputs, paths: list[str]) -> tuple[Any, dict[str, Any]]:
    """Output of a network, and of some of its modules, with the same random draws every time."""
    found: dict[str, Any] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found.setdefault(path, output.detach().clone() if isinstance(output, Tensor) else None)

        return hook

    for path in paths:
        net.get_submodule(path).register_forward_hook(keep(path))
    args, kwargs = arguments(x)
    with torch.no_grad(), preserved(net, seed=0):
        output = net(*pytree.tree_map(_clone, args), **pytree.tree_map(_clone, kwargs))
    return output, found


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _double(x: Inputs) -> Inputs:
    doubled: Inputs = pytree.tree_map(
        lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, x
    )
    return doubled


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(leaf).all()) for leaf in _tensors(value))


def _difference(expected: Any, output: Any) -> float:
    """Largest difference of two outputs of one structure, relative to the largest expected value."""
    pairs = [*zip(_tensors(expected), _tensors(output), strict=False)]
    if len(_tensors(expected)) != len(_tensors(output)) or any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    scale = max((float(a.abs().max()) for a, _ in pairs if a.numel()), default=1.0) or 1.0
    largest = max((float((a - b).abs().nan_to_num(nan=float("inf")).max()) for a, b in pairs if a.numel()), default=0.0)
    return largest / scale
