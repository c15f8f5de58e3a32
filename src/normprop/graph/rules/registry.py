"""The registry of rules: from the moments of what goes into an operator or module to those of what comes out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from normprop.errors import ConfigError
from normprop.graph.node import Node, leaves
from normprop.graph.signal import Signal
from normprop.moments import Moments


@dataclass
class Call:
    """One call that a rule is asked about.

    Args:
        node: the call in the graph: its operator, its place, the shape of its output.
        arguments: its arguments by name; a :class:`Signal` where a tensor depends on the network's input, otherwise
            the tensor or number itself.
        module: the module, for the rule of a module; ``None`` for that of an operator.
        memory: what a rule keeps between calls; only what the shapes and numbers of the call decide.

    Example:
        >>> x = Signal.of(0.0, 1.0, (1, 2))
        >>> call = Call(Node(1, "dropout", {}, shape=(1, 2)), {"input": x, "p": 0.5, "train": True})
        >>> call["p"], len(call.inputs), call.shape
        (0.5, 1, (1, 2))
    """

    node: Node
    arguments: dict[str, Any]
    module: nn.Module | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, or the default where it is missing or ``None``."""
        value = self.arguments.get(name)
        return default if value is None else value

    @property
    def inputs(self) -> list[Signal]:
        """The arguments that depend on the network's input, in order."""
        return [leaf for leaf in leaves(self.arguments) if isinstance(leaf, Signal)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output for the example input."""
        assert self.node.shape is not None
        return self.node.shape


Answer = Signal | Moments | Tensor | tuple[Any, ...] | list[Any]
Rule = Callable[[Call], Answer]
RuleT = TypeVar("RuleT", bound=Callable[..., Any])

_OPERATORS: dict[str, Rule] = {}
_MODULES: dict[type[nn.Module], Rule] = {}


def rule(*targets: Any) -> Callable[[RuleT], RuleT]:
    """Register a rule for operators or modules: a function from a :class:`Call` to the moments of its output.

    Args:
        *targets: operators of :data:`torch.ops`, functions of torch with the name of such an operator, names of
            operators, or classes of modules. A module with a rule is one call: what happens inside is not looked at.

    Returns:
        A decorator that leaves the function as it is. The function returns :class:`~normprop.moments.Moments` (numbers
        or tensors that broadcast to the output, batch axis of length 1) or a :class:`Signal`. To stand in models that
        are pickled with live moments it must be importable by its name.

    Raises:
        ConfigError: if a target is none of these.

    Example:
        >>> @rule("mylib.twice")
        ... def twice(call):
        ...     (x,) = call.inputs
        ...     return Moments(2 * x.mean, 4 * x.var)
    """

    def register(function: RuleT) -> RuleT:
        for target in targets:
            if isinstance(target, type) and issubclass(target, nn.Module):
                _MODULES[target] = function
            else:
                _OPERATORS[_name(target)] = function
        return function

    return register


def _name(target: Any) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if isinstance(target, torch._ops.OpOverloadPacket):
        namespace, _, name = target._qualified_op_name.partition("::")
        name = name.removesuffix("_")
        return name if namespace == "aten" else f"{namespace}.{name}"
    name = getattr(target, "__name__", "")
    if callable(target) and hasattr(torch.ops.aten, name.removesuffix("_")):
        return name.removesuffix("_")
    raise ConfigError(
        f"graph.rule: {target!r} is neither an operator of torch.ops, nor a function with the name of one, nor a class "
        f"of modules"
    )


def operator_rule(name: str) -> Rule | None:
    """The rule of an operator, if there is one."""
    return _OPERATORS.get(name)


def module_rule(module: nn.Module) -> Rule | None:
    """The rule of a module: that of its class, or of the nearest base class whose ``forward`` it still has."""
    return module_rule_of(type(module))


def module_rule_of(kind: type[nn.Module]) -> Rule | None:
    """The rule of a class of modules, see :func:`module_rule`."""
    for base in kind.__mro__:
        if base in _MODULES:
            return _MODULES[base]
        if "forward" in vars(base) and base not in _MODULES:
            return None
    return None


def operators() -> list[str]:
    """Names of all operators that have a rule, sorted."""
    return sorted(_OPERATORS)


def modules() -> list[type[nn.Module]]:
    """All classes of modules that have a rule."""
    return [*_MODULES]
