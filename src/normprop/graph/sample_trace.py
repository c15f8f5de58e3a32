"""Find the modules in which samples meet: a run whose held samples are repaired wherever the others changed them."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normprop.graph.samples import Rows, difference, growing, locate, magnitude, map_tensors

Which = Literal["output", "gradient"]
Key = tuple[str, int, str, int]  # path of the module, number of the call, "in" or "out", number of the tensor
Shapes = dict[Key, torch.Size]
_NEGLIGIBLE = 1e-3  # gradients this much smaller than the largest of the network are judged as if they were not


@dataclass(eq=False)
class Frame:
    """One call of a module: where the held samples were in its input, in which pass all that reached it was placed."""

    path: str
    number: int
    near: Rows | None = None
    placed: dict[Which, bool] = field(default_factory=lambda: {"output": True, "gradient": True})


class _Repair(torch.autograd.Function):
    """The values of the unchanged run for the held samples; gradients pass."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, base: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, base, tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


class Trace:
    """Record what enters and leaves every module in a run, or compare it with such a record.

    In a comparison some samples of the input are held and the others are changed. Whatever enters or leaves a module is
    compared for the held samples. Where it changed, samples met in the code run since the last such place, which is one
    module's own code; the values are then put back, so that what follows is judged by its own doing alone. Gradients
    are treated alike on their way back.

    Args:
        base: record of the unchanged run; ``None`` to make one.
        held: (samples,), bool: the samples that were not changed.
        shapes: of all that is compared in a batch twice as large; empty if the model takes no other batch.
        tolerance: relative size of what counts as rounding.
    """

    def __init__(
        self,
        base: "Trace | None" = None,
        held: Tensor | None = None,
        shapes: Shapes | None = None,
        tolerance: float = 0.0,
    ) -> None:
        self.base = base
        self._larger = shapes or {}
        self.held = held
        self.tolerance = tolerance
        self.record: dict[tuple[Which, Key], Tensor] = {}
        self.effects: dict[tuple[str, Which], float] = {}
        self.moved: set[str] = set()
        self.lost: set[str] = set()
        self._scales: dict[tuple[Which, Key], float] = {}
        self._near = None if held is None else Rows(0, held)
        self._places: dict[Key, Rows | None] = {}
        self._stack: list[Frame] = []
        self._calls: Counter[str] = Counter()

    def follow(self, model: nn.Module) -> None:
        """Put hooks on a model that is used for one run only, and on its modules."""
        for path, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # takes no hooks; counts for the module around it
                module.register_forward_pre_hook(self._enter(path), prepend=True, with_kwargs=True)
                module.register_forward_hook(self._leave, with_kwargs=True)

    def include(self, other: "Trace") -> None:
        """Add what another comparison found."""
        self.lost |= other.lost
        self.moved |= other.moved
        for place, effect in other.effects.items():
            self.effects[place] = max(effect, self.effects.get(place, 0.0))

    def shapes(self) -> Shapes:
        """Shapes of all that entered or left a module."""
        return {key: tensor.shape for (which, key), tensor in self.record.items() if which == "output"}

    def scale(self, which: Which, key: Key) -> float:
        """Largest value of a recorded tensor."""
        if (which, key) not in self._scales:
            self._scales[which, key] = magnitude(self.record[which, key])
        return self._scales[which, key]

    @cached_property
    def largest_gradient(self) -> float:
        """Largest value of all recorded gradients."""
        return max((self.scale(which, key) for which, key in self.record if which == "gradient"), default=0.0)

    def outputs(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what each module returned, in the order of its return."""
        for (which, (path, _, side, _)), tensor in self.record.items():
            if which == "output" and side == "out":
                yield path, tensor

    def _enter(self, path: str) -> Callable[..., Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            callers = tuple(self._stack)
            frame = Frame(path, self._calls[path])
            self._calls[path] += 1
            self._stack.append(frame)
            visited: tuple[Any, Any] = self._visit((args, kwargs), "in", frame, callers, (*callers, frame))
            frame.near = self._near
            return visited

        return enter

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        callers, frame = tuple(self._stack[:-1]), self._stack[-1]
        visited = self._visit(output, "out", frame, (*callers, frame), callers)
        self._stack.pop()
        if frame.near is not None and self._near is not None and self._near.reorders(frame.near):
            self.moved.add(frame.path)
        return visited

    def _visit(self, tree: Any, side: str, frame: Frame, forward: tuple[Frame, ...], back: tuple[Frame, ...]) -> Any:
        """Check all tensors, and later their gradients.

        The code that ran since the last such place is that of ``forward[-1]``, for gradients that of ``back[-1]``.
        """
        count = 0

        def visit(tensor: Tensor) -> Tensor:
            nonlocal count
            key = (frame.path, frame.number, side, count)
            count += 1
            if tensor.layout != torch.strided or tensor.is_nested:
                frame.placed["output"] &= side == "out"
                return tensor
            tensor = self._check("output", key, tensor, forward, frame)
            if tensor.requires_grad and torch.is_grad_enabled():
                # An alias, so that the hook sees the gradient of this use of the tensor alone.
                tensor = tensor.view_as(tensor)
                tensor.register_hook(lambda gradient: self._check("gradient", key, gradient, back, frame))
            return tensor

        return map_tensors(visit, tree)

    def _check(self, which: Which, key: Key, tensor: Tensor, code: tuple[Frame, ...], frame: Frame) -> Tensor:
        """Record a tensor, or compare it and return it with the held samples as they were."""
        if self.base is None or self.held is None:
            self.record[which, key] = tensor.detach().clone()
            return tensor
        base = self.base.record.get((which, key))
        arrives = (key[2] == "in") == (which == "output")  # at the frame, rather than from it
        if base is None or base.shape != tensor.shape:
            self._lose(which, frame, arrives)
            return tensor
        change = difference(base, tensor)
        scale = self.base.scale(which, key) or magnitude(tensor)
        floor = self.base.largest_gradient * _NEGLIGIBLE if which == "gradient" else 0.0
        near = self._near if which == "output" else self._places.get(key)
        axes = growing(tensor.shape, self._larger.get(key))
        rows, clean = locate(change, change > self.tolerance * max(scale, floor), self.held, near, axes)
        if which == "output":
            self._near = self._places[key] = rows or self._near
        if clean or not code:
            return tensor
        if rows is None:
            self._lose(which, frame, arrives)
            return tensor
        mask = rows.mask(tensor)
        at_fault = next((frame for frame in reversed(code) if frame.placed[which]), code[0])
        effect = float(change.masked_fill(~mask, 0).max()) / (scale or 1.0)
        place = (at_fault.path, which)
        self.effects[place] = max(effect, self.effects.get(place, 0.0))
        repaired: Tensor = _Repair.apply(tensor, base, mask) if which == "output" else torch.where(mask, base, tensor)
        return repaired

    def _lose(self, which: Which, frame: Frame, arrives: bool) -> None:
        """Note a tensor whose samples cannot be told apart; what the frame makes of it is not held against it."""
        self.lost.add(frame.path)
        if arrives:
            frame.placed[which] = False
