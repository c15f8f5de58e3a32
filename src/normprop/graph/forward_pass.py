"""One forward pass of a converted network: predictions of its layers that begin alike are worked out once."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normprop.graph.node import State


class ForwardPass:
    """What the programs of a network have worked out, for as long as one forward pass of the network takes.

    A layer's prediction begins with those of the layers before it: without this a residual network of n layers would
    work out its first branch n times. Nothing outlives the pass, so every backward pass has its own graph. A layer
    called by itself, outside of its network's forward pass, works out all that it needs.

    Example:
        >>> net, moments = nn.Identity(), ForwardPass()
        >>> moments.watch(net)
        >>> seen = net.register_forward_pre_hook(lambda *_: moments.values({}).update({3: "known"}))
        >>> after = net.register_forward_hook(lambda *_: print(moments.values({})), prepend=True)
        >>> _ = net(torch.zeros(1))
        {3: 'known'}
        >>> moments.values({})
        {}
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def __reduce__(self) -> Any:
        """Copies and pickles of a network have passes of their own, with nothing known."""
        return ForwardPass, ()

    def watch(self, net: nn.Module) -> None:
        """Begin with every forward pass of a network, knowing nothing, and end with it, whether it succeeds or not."""
        net.register_forward_pre_hook(self._begin, prepend=True)
        net.register_forward_hook(self._end, always_call=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A pass without a network: what one program works out the next ones know."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    def _begin(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._local.known = {}

    def _end(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._local.known = None

    def values(self, tensors: Mapping[State, Tensor]) -> dict[int, Any]:
        """Values by node, to read and to add to, as long as parameters and buffers are what they were.

        Those worked out without gradients are of no use with them. Under hooks on saved tensors there are none to read:
        activation checkpoints run a part of the network a second time, outside of its forward pass, and count on the
        same operators in the same order.

        Args:
            tensors: what the values depend on.
        """
        known = getattr(self._local, "known", None)
        if known is None or torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(True):
            return {}
        found = known.setdefault(torch.is_grad_enabled(), _Known())
        for state, tensor in tensors.items():
            version = None if tensor.is_inference() else tensor._version
            before, then = found.read.setdefault(state, (tensor, version))
            if before is not tensor or then != version:
                return {}
        return found.values


@dataclass
class _Known:
    """What was worked out, and from which versions of which tensors."""

    values: dict[int, Any] = field(default_factory=dict)
    read: dict[State, tuple[Tensor, int | None]] = field(default_factory=dict)
