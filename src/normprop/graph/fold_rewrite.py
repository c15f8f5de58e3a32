"""Rewriting the graph of one module: affine maps together, behind sums before them, and in front of ReLUs."""

import operator
from typing import Any

import torch
from torch import fx, nn

from normprop.graph.fold_parts import Affine, Floor, as_floor

_SUMS = (operator.add, operator.iadd, torch.add)


def rewrite(module: fx.GraphModule) -> nn.Module:
    """Bring affine maps to where layers can take them up, and unpack a graph that is a chain.

    Args:
        module: a lowered graph, changed in place.

    Returns:
        The module, or what it is a chain of.
    """
    while any(_step(module, node) for node in module.graph.nodes):
        module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return _unpacked(module)


def _step(module: fx.GraphModule, node: fx.Node) -> bool:
    """One change at an affine map, or at a module that does nothing."""
    here = called(module, node)
    if isinstance(here, nn.Identity) or (isinstance(here, Affine) and here.is_identity()):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        module.graph.erase_node(node)
        return True
    source: Any = node.args[0] if node.args else None
    if not isinstance(here, Affine) or len(source.users) > 1:
        return False
    before = called(module, source)
    if isinstance(before, Affine):
        both = before.then(here)
        if both is None:
            return False
        source.target = _add(module, both)
    elif isinstance(floor := as_floor(before), Floor) and (raised := floor.after(here)) is not None:
        source.target = _add(module, here)
        node.target = _add(module, raised)
        return True
    elif source.op == "call_function" and source.target in _SUMS and not source.kwargs and _two_paths(source):
        first, second = source.args
        with module.graph.inserting_before(source):
            skip = _call(module, first, Affine(here.scale.clone(), torch.zeros_like(here.shift), here.dims))
            branch = _call(module, second, here)
        source.args = (skip, branch)
    else:
        return False
    node.replace_all_uses_with(source)
    module.graph.erase_node(node)
    return True


def _two_paths(node: fx.Node) -> bool:
    return len(node.all_input_nodes) == 2 and all(source.op != "get_attr" for source in node.all_input_nodes)


def called(module: fx.GraphModule, node: Any) -> nn.Module | None:
    """The module that a node calls, if it calls one."""
    called_module = isinstance(node, fx.Node) and node.op == "call_module"
    return module.get_submodule(str(node.target)) if called_module else None


def _add(module: fx.GraphModule, part: nn.Module) -> str:
    """Give a new module a name."""
    name, count = type(part).__name__.lower(), 0
    while hasattr(module, f"{name}_{count}"):
        count += 1
    module.add_submodule(f"{name}_{count}", part)
    return f"{name}_{count}"


def _call(module: fx.GraphModule, source: Any, part: nn.Module) -> fx.Node:
    """A call of a new module."""
    return module.graph.call_module(_add(module, part), (source,))


def _unpacked(module: fx.GraphModule) -> nn.Module:
    """The modules of a graph in which each takes the output of the one before."""
    chain: list[nn.Module] = []
    last: Any = None
    for node in module.graph.nodes:
        if node.op == "placeholder" and last is None:
            last = node
        elif node.op == "call_module" and node.args == (last,) and len(last.users) == 1:
            chain.append(module.get_submodule(str(node.target)))
            last = node
        elif node.op != "output" or node.args != (last,):
            return module
    return chain[0] if len(chain) == 1 else nn.Sequential(*chain) if chain else nn.Identity()
