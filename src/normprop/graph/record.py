"""Capture by running: every operator that a real execution calls, for models that torch.export cannot take."""

import linecache
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from normprop.errors import GraphError, first_line
from normprop.graph.node import Graph, Node, Ref, Scope, State, memory, replace
from normprop.graph.operators import bind, describe


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], note: str = "") -> Graph:
    """Capture the operators below autograd that one execution calls.

    Args:
        model: any module; buffers that the execution changes are put back.
        args: its positional arguments.
        kwargs: its keyword arguments.
        note: why it is recorded.

    Returns:
        The graph.

    Raises:
        GraphError: if the model raises.

    Example:
        >>> [node.op for node in record(nn.Linear(2, 3), (torch.zeros(1, 2),), {}).nodes]
        ['input', 't', 'addmm']
    """
    recorder = _Recorder(model)
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            recorder.add("input", "", {}, leaf)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with recorder.scopes(), torch.no_grad(), recorder:
            output = model(*args, **kwargs)
    except Exception as failure:
        where = recorder.stack[-1]
        raise GraphError(
            f"{type(model).__name__} cannot run on the example input: {where}: {first_line(failure)}"
        ) from failure
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
    known = [recorder.index.get(id(leaf)) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return Graph(model, recorder.nodes, [index for index in known if index is not None], "recorded", note)


class _Recorder(TorchDispatchMode):
    """Write a node for every operator; tensors are known by identity and kept alive meanwhile."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.index: dict[int, int] = {}
        self.stack = [Scope("")]
        self._keep: list[Any] = []
        self._paths = {id(module): name for name, module in reversed([*model.named_modules()])}
        self._calls: Counter[str] = Counter()
        self._state = {
            id(tensor): State(name.rpartition(".")[0], name.rpartition(".")[2])
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }

    @contextmanager
    def scopes(self) -> Iterator[None]:
        """Follow the calls of modules by hooks on all of them, removed at the end."""

        def enter(module: nn.Module, args: Any) -> None:
            path = self._paths.get(id(module), self.stack[-1].path)
            self.stack.append(Scope(path, self._calls[path]))
            self._calls[path] += 1

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.stack.pop()

        handles = [hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(
        self, op: str, overload: str, args: dict[str, Any], output: Any, inplace: bool = False, view: bool = False
    ) -> int:
        """Write one node and remember its output."""
        index = len(self.nodes)
        tensor = output if isinstance(output, Tensor) else None
        self.nodes.append(
            Node(
                index,
                op,
                args,
                overload,
                tuple(tensor.shape) if tensor is not None else None,
                tensor.dtype if tensor is not None else None,
                tuple(self.stack[1:]) or (Scope(""),),
                _source() if overload else "",
                inplace,
                view,
            )
        )
        if tensor is not None:
            self.index[id(tensor)] = index
            self._keep.append(tensor)
        return index

    def _argument(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in self.index:
            return Ref(self.index[id(leaf)])
        return self._state.get(id(leaf), leaf)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorded = bind(func, replace(tuple(args), self._argument), replace(dict(kwargs), self._argument))
        output = func(*args, **kwargs)
        op, overload, inplace = describe(func)
        if isinstance(output, Tensor) and any(output is leaf for leaf in args) and not inplace:
            return output
        view = not inplace and any(memory(output) & memory(leaf) for leaf in args[:1])
        whole = self.add(op, overload, recorded, output, inplace, view)
        if isinstance(output, (tuple, list)):
            for position, part in enumerate(output):
                if isinstance(part, Tensor):
                    self.add("getitem", "", {"0": Ref(whole), "1": position}, part, view=view)
        return output


_TORCH = re.compile(r"[\\/]torch[\\/]|[\\/]normprop[\\/]graph[\\/]")


def _source() -> str:
    """File, line and text of the innermost frame that is not torch's."""
    frame = sys._getframe(1)
    while frame is not None and _TORCH.search(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return ""
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f"{file}:{line}: {linecache.getline(file, line).strip()}"
