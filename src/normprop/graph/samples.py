"""Which entries of a tensor belong to which sample of a batch, found by changing samples and looking."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from normprop.errors import ConfigError

TELLS_APART = 0.5  # the largest share at which rows are taken to be the samples', where nothing else tells


class Rows(NamedTuple):
    """The rows along one axis that belong to the held samples, a bool per row."""

    axis: int
    held: Tensor

    def fits(self, tensor: Tensor) -> bool:
        """Whether the tensor has that axis with as many rows."""
        return self.axis < tensor.ndim and tensor.shape[self.axis] == len(self.held)

    def reorders(self, other: "Rows") -> bool:
        """Whether as many rows are in another order than elsewhere."""
        return len(self.held) == len(other.held) and not torch.equal(self.held, other.held)

    def mask(self, tensor: Tensor) -> Tensor:
        """The rows as a mask that broadcasts against the tensor."""
        return self.held.to(tensor.device).view([-1 if axis == self.axis else 1 for axis in range(tensor.ndim)])


def splits(samples: int) -> list[Tensor]:
    """Divide a batch in held and changed samples so that each is held while each other changes, in few divisions.

    Example:
        >>> [held.tolist() for held in splits(2)]
        [[True, False], [False, True]]
        >>> len(splits(4)), len(splits(256))
        (4, 16)
    """
    index = torch.arange(samples)
    return [(index >> bit) % 2 == side for bit in range((samples - 1).bit_length()) for side in (0, 1)]


def exchange(input: tuple[Tensor, ...], held: Tensor) -> tuple[Tensor, ...]:
    """Replace all samples but the held ones by others from the range of values that each entry has in the batch.

    Args:
        input: tensors with the samples along axis 0.
        held: (samples,), bool.

    Returns:
        New tensors: each entry moves at least half of the way to the next sample's, integers all of it.

    Raises:
        ConfigError: if a sample is the same as the next one, so that nothing would change.
    """
    generator = torch.Generator().manual_seed(1)
    changed, moved = [], torch.zeros(len(held), dtype=torch.bool)
    for tensor in input:
        target = tensor.roll(-1, 0)
        if tensor.is_floating_point():
            share = 0.5 + 0.5 * torch.rand(tensor.shape, generator=generator)
            target = torch.lerp(tensor, target, share.to(tensor))
        moved |= (target != tensor).flatten(1).any(1).cpu() if tensor.ndim > 1 else (target != tensor).cpu()
        changed.append(torch.where(Rows(0, held).mask(tensor), tensor, target))
    if not bool((moved | held).all()):
        first = int((~(moved | held)).nonzero()[0])
        raise ConfigError(
            f"batch_dependence: samples {first} and {(first + 1) % len(held)} of x are the same, so that exchanging "
            "them shows nothing; give samples that all differ, such as torch.randn(...)"
        )
    return tuple(changed)


def double(input: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The batch with as many further samples."""
    others = exchange(input, torch.zeros(len(input[0]), dtype=torch.bool))
    return tuple(torch.cat(pair) for pair in zip(input, others, strict=True))


def growing(shape: torch.Size, doubled: torch.Size | None) -> tuple[int, ...] | None:
    """Axes that double with the batch; ``None`` if something else changes, too.

    Example:
        >>> growing(torch.Size([2, 6]), torch.Size([4, 6])), growing(torch.Size([6]), torch.Size([6]))
        ((0,), ())
        >>> growing(torch.Size([2, 6]), torch.Size([3, 6])) is None
        True
    """
    if doubled is None or len(doubled) != len(shape):
        return None
    axes = tuple(axis for axis, size in enumerate(shape) if size != doubled[axis])
    return axes if all(doubled[axis] == 2 * shape[axis] for axis in axes) else None


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply a function to the tensors in nested containers and dataclasses, in order, and rebuild those."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = copy.copy(value)
            for field in dataclasses.fields(value):
                object.__setattr__(value, field.name, map_tensors(function, getattr(value, field.name)))
        return value

    return pytree.tree_map(leaf, tree)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested containers and dataclasses, in the order of :func:`map_tensors`."""
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    return found


def difference(first: Tensor, second: Tensor) -> Tensor:
    """Distance of two tensors per entry; equal infinities and two NaN are no distance apart."""
    first, second = _comparable(first), _comparable(second)
    distance = (first - second).abs()
    if distance.numel() and not bool(distance.amax().isfinite()):
        same = (first == second) | (first.isnan() & second.isnan())
        distance = torch.where(same, 0.0, distance).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return distance


def magnitude(tensor: Tensor) -> float:
    """Largest finite absolute value, 0 for an empty tensor."""
    if tensor.numel() == 0:
        return 0.0
    values = _comparable(tensor).abs()
    largest = values.amax()
    return float(largest if largest.isfinite() else values.nan_to_num(nan=0.0, posinf=0.0).amax())


def _comparable(tensor: Tensor) -> Tensor:
    """In a type that can be subtracted; integers as float64 where the device has it."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.detach()
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def candidates(shape: torch.Size, axes: tuple[int, ...] | None, held: Tensor) -> list[Rows]:
    """Where the held samples can be in a tensor, most usual first.

    Beside an axis of the samples alone that is any in which they are folded with others: of i samples or of j in (i j),
    or of j in (i j k).

    Args:
        shape: of the tensor.
        axes: those that grow with the batch; ``None`` if that is not known.
        held: (samples,), bool.

    Example:
        >>> [rows.held.tolist() for rows in candidates(torch.Size([4, 3]), (0,), torch.tensor([True, False]))]
        [[True, True, False, False], [True, False, True, False]]
    """
    found = []
    for axis in range(len(shape)) if axes is None else axes:
        fold, rest = divmod(shape[axis], len(held))
        if rest == 0:
            inner = (inner for inner in range(fold, 0, -1) if fold % inner == 0)
            found += [Rows(axis, held[torch.arange(shape[axis]) // size % len(held)]) for size in inner]
    return found


def locate(
    change: Tensor, changed: Tensor, held: Tensor, near: Rows | None, axes: tuple[int, ...] | None
) -> tuple[Rows | None, bool]:
    """Find the held samples in a tensor from what changed with the other samples.

    Args:
        change: how far each entry moved when the other samples changed.
        changed: whether that is more than rounding.
        held: (samples,), bool: the samples that were not changed.
        near: where they were in a tensor shortly before; their order is likely to be the same.
        axes: those that grow with the batch; ``None`` if that is not known.

    Returns:
        Their rows, ``None`` if they cannot be told, and whether those did not change.
    """
    if not changed.any():
        return near, True
    usual: list[Rows] = []
    if near is not None:
        rows = [Rows(axis, near.held) for axis in ((near.axis,) if axes is None else axes)]
        usual = [each for each in rows if each.fits(change)]
    found = candidates(change.shape, axes, held)
    for place in [*usual, *found, *_unchanged(changed, held, axes)]:
        if not (changed & place.mask(change)).any():
            return place, True
    if usual:
        return usual[0], False
    best = min(found, key=lambda rows: share(change, rows), default=None)
    certain = axes is not None and len(found) == 1
    return best if best is None or certain or share(change, best) < TELLS_APART else None, False


def _unchanged(changed: Tensor, held: Tensor, axes: tuple[int, ...] | None) -> Iterator[Rows]:
    """Sets of unchanged rows as large as the share of the held samples, in whatever order these are."""
    for axis in range(changed.ndim) if axes is None else axes:
        size = changed.shape[axis]
        if size % len(held) == 0:
            rows = ~changed.movedim(axis, 0).reshape(size, -1).any(1).cpu()
            if int(rows.sum()) == size // len(held) * int(held.sum()):
                yield Rows(axis, rows)


def share(change: Tensor, rows: Rows) -> float:
    """Mean change of the held rows relative to that of the others: small where these are the samples' rows."""
    profile = change.movedim(rows.axis, 0).reshape(len(rows.held), -1).mean(1).cpu()
    return float(profile[rows.held].mean() / profile[~rows.held].mean())
