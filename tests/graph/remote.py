"""A device without hardware: tensors that say they are elsewhere and refuse to meet those of the CPU, as on a GPU.

The values lie on the CPU. Networks whose tensors are of this kind show where a tensor is made on the wrong device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy:0")  # a type of device that needs no driver
_TRANSFERS = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Remote(Tensor):
    """A tensor on the device."""

    @staticmethod
    def __new__(cls, local: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, local.shape, strides=local.stride(), dtype=local.dtype, device=DEVICE, requires_grad=False
        )

    def __init__(self, local: Tensor) -> None:
        self.local = local

    def new_tensor(self, data: Any) -> Tensor:
        """A tensor of the same type and device."""
        return Remote(self.local.new_tensor(data))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, dict(kwargs or {}))


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    remote = any(isinstance(tensor, Remote) for tensor in tensors)
    if remote and func not in _TRANSFERS and any(not isinstance(tensor, Remote) and tensor.ndim for tensor in tensors):
        raise RuntimeError(f"{func} of tensors on two devices")
    if kwargs.get("device") is not None:
        remote = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs["device"] = torch.device("cpu")
    output = func(*pytree.tree_map(local, args), **pytree.tree_map(local, kwargs))
    return pytree.tree_map(lambda leaf: Remote(leaf) if remote and isinstance(leaf, Tensor) else leaf, output)


def local(leaf: Any) -> Any:
    """What a tensor of the device is on the CPU."""
    return leaf.local if isinstance(leaf, Remote) else leaf


class _Transfers(TorchDispatchMode):
    """Lets tensors of the CPU move to the device, and new ones be made there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, dict(kwargs or {}))


@contextmanager
def available() -> Iterator[None]:
    """Let the device be used."""

    def through_cpu(make: Any) -> Any:
        """Torch fills new tensors where no dispatch sees it."""

        def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            value = make(data, *args, **kwargs)
            return value if device is None else value.to(device)

        return made

    with pytest.MonkeyPatch.context() as patch, _Transfers():
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, through_cpu(getattr(torch, name)))
        yield


def send(model: nn.Module) -> nn.Module:
    """Put a network's parameters and buffers on the device, in place."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: Remote(tensor.detach()) for name, tensor in tensors.items() if tensor is not None})
    return model
