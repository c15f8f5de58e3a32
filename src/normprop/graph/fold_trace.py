"""The forward code of one module as a graph of plain modules: parameters are constants, children that are plain stay.

What a module computes from its parameters alone is computed here, once. What is left of it runs on activations: linear
maps with a constant weight become torch's layers, products and sums with constants become affine maps, activations
become torch's modules; anything else stays the call that it is.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

Shape = tuple[int, ...]


def ours(module: nn.Module) -> bool:
    """Whether a module's class comes from normprop.

    Example:
        >>> ours(nn.ReLU())
        False
    """
    return any(base.__module__.partition(".")[0] == "normprop" for base in type(module).__mro__)


class _Value(fx.Proxy):
    """An activation: known by its type and number of axes, so that code can ask for them, not by its size."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    @property
    def ndim(self) -> int:
        example = self.node.meta.get("example")
        if example is None:
            raise AttributeError("the number of axes is known only from an example input")
        return int(example.ndim)


class Tracer(fx.Tracer):
    """Follow the forward of a module that takes one activation, with its own parameters as plain tensors.

    Args:
        shape: of an input, so that code can ask for its number of axes.
    """

    def __init__(self, shape: Shape | None) -> None:
        super().__init__()
        self.example = None if shape is None else torch.zeros(shape, dtype=torch.float64)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """One activation goes in."""
        return root_fn, [self.root, self.create_proxy("placeholder", "input", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """What is not normprop's stays a call."""
        return not ours(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run what sees no activation, and follow what is no module on its own."""
        if not any(isinstance(arg, fx.Proxy) for arg in (*args, *kwargs.values())):
            return forward(*args, **kwargs)
        # A module of ours that takes one activation is folded on its own; what takes more belongs to the one around it.
        if ours(m) and len(args) + len(kwargs) == 1:
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters are tensors."""
        return attr_val

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """An activation, with its value for the example."""
        node.meta["example"] = self._run(node)
        return _Value(node, self)

    def _run(self, node: fx.Node) -> Any:
        """The value of a node for the example, where there is one."""
        if node.op == "placeholder":
            return self.example
        if any(source.meta.get("example") is None for source in node.all_input_nodes if source.op != "get_attr"):
            return None
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs),
            lambda source: constant(self.root, source) if source.op == "get_attr" else _fresh(source.meta["example"]),
        )
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs) if callable(node.target) else None


def _fresh(value: Any) -> Any:
    """A copy of a tensor, which a call may overwrite."""
    return value.clone() if isinstance(value, Tensor) else value


def constant(root: nn.Module, node: fx.Node) -> Tensor:
    """The tensor of a node that names one."""
    return operator.attrgetter(str(node.target))(root)  # type: ignore[no-any-return]
