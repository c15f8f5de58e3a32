"""Make one node of everything that happens inside one call of a module."""

import dataclasses
from collections.abc import Callable

from torch import nn

from normprop.graph.node import Graph, Node, Ref, Scope, replace

Group = tuple[Scope, list[int]]


def calls(graph: Graph, chosen: Callable[[nn.Module], bool]) -> list[Group]:
    """The calls of chosen modules and the nodes inside each; of nested ones the outermost.

    Args:
        graph: the graph.
        chosen: whether a module is one of them.

    Returns:
        The module's call and the indices of its nodes.
    """
    modules = graph.model.named_modules(remove_duplicate=False)
    paths = {name for name, module in modules if chosen(module)}
    groups: dict[Scope, list[int]] = {}
    for node in graph.nodes:
        scope = next((scope for scope in node.scopes if scope.path in paths), None) if node.op != "input" else None
        if scope is not None:
            groups.setdefault(scope, []).append(node.index)
    return [*groups.items()]


def enters(graph: Graph, members: list[int]) -> list[int]:
    """The nodes outside a group, dependent on the network's input, whose outputs it reads, in the order of reading."""
    inside = set(members)
    read = (i for index in members for i in graph.nodes[index].inputs if i not in inside)
    return [*dict.fromkeys(i for i in read if graph.depends(i))]


def leaves_from(graph: Graph, members: list[int]) -> list[int]:
    """The nodes of a group, dependent on the network's input, that are read outside or returned by the network."""
    inside = set(members)
    return [
        index
        for index in members
        if graph.depends(index)
        and (index in graph.outputs or any(reader.index not in inside for reader in graph.readers(index)))
    ]


def contract(graph: Graph, groups: list[Group]) -> Graph:
    """A graph with one node of operator "module" for each group; its arguments are what enters, by number.

    A group that hands out several tensors, or takes none, stays as it is.

    Args:
        graph: the graph.
        groups: calls of modules, see :func:`calls`.

    Returns:
        The graph with fewer nodes.
    """
    single: dict[int, tuple[Scope, list[int]]] = {}
    members: set[int] = set()
    for scope, inside in groups:
        outputs, inputs = leaves_from(graph, inside), enters(graph, inside)
        if len(outputs) == 1 and inputs:
            single[outputs[0]] = (scope, inputs)
            members.update(inside)
    number: dict[int, int] = {}
    nodes: list[Node] = []

    def renumber(leaf: object) -> object:
        return Ref(number[leaf.index]) if isinstance(leaf, Ref) else leaf

    for node in graph.nodes:
        if node.index in single:
            scope, inputs = single[node.index]
            args = {str(position): Ref(number[index]) for position, index in enumerate(inputs)}
            depth = node.scopes.index(scope)
            scopes = node.scopes[: depth + 1]
            made = Node(len(nodes), "module", args, "", node.shape, node.dtype, scopes, node.source)
        elif node.index in members:
            continue
        else:
            args = {name: replace(value, renumber) for name, value in node.args.items()}
            made = dataclasses.replace(node, index=len(nodes), args=args)
        number[node.index] = len(nodes)
        nodes.append(made)
    return Graph(graph.model, nodes, [number[i] for i in graph.outputs if i in number], graph.how, graph.note)
