"""Listen to a run of a graph: what every call returns, what its activations are given, what gradients come back."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from normprop.graph import call_site
from normprop.graph.call_site import CallSite, Statistics
from normprop.graph.contract import calls, contract, enters, leaves_from
from normprop.graph.measure import moments
from normprop.graph.node import Graph, Node, Scope
from normprop.graph.rules import module_rule
from normprop.graph.signal import Signal
from normprop.moments import Moments


class Watch:
    """Writes down what a run of a graph shows, call by call.

    Args:
        graph: the graph to run; calls inside a module with a rule of its own count for that module's call.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        groups = calls(graph, lambda module: module_rule(module) is not None)
        self.listed = contract(graph, groups)
        # The nodes behind each listed one, the one that returns its output last.
        self._behind = {node: [node] for node in range(len(graph.nodes))}
        for _, inside in groups:
            outputs = leaves_from(graph, inside)
            if len(outputs) == 1 and enters(graph, inside):
                for node in inside:
                    del self._behind[node]
                self._behind[outputs[0]] = [*(node for node in inside if node != outputs[0]), outputs[0]]
        self._outputs = sorted(self._behind)
        self.moments: dict[int, Moments] = {}
        self.gradients: dict[int, float] = {}
        self._statistics: dict[int, Statistics] = {}
        self._silent: dict[int, tuple[float, float]] = {}
        self._distributions: dict[int, tuple[float, float]] = {}
        self._activations: set[int] = set()

    def enter(self, node: Node, given: dict[str, Any]) -> None:
        """Look at what an activation is given, before it is overwritten."""
        before = call_site.activated(node, given)
        if before is not None:
            self._activations.add(node.index)
            self._distributions.update(dict.fromkeys(node.inputs, call_site.distribution(before)))

    def leave(self, node: Node, value: Tensor) -> None:
        """Look at what a call returns, and later at its gradient."""
        self.moments[node.index] = moments(value)
        behind = self._behind.get(node.index)
        if node.op == "input" or not behind or not self._used(node):
            return
        self._statistics[node.index] = Statistics.measured(value)
        if self._activations.intersection(behind):
            self._silent[node.index] = call_site.silent(value)
        if value.requires_grad:
            value.register_hook(lambda gradient: self._gradient(node.index, gradient))

    def _used(self, node: Node) -> bool:
        return node.index in self.graph.outputs or bool(self.graph.readers(node.index))

    def _gradient(self, index: int, gradient: Tensor) -> None:
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
        self.gradients[index] = float(norm) / gradient.numel() ** 0.5

    def measured(self, node: Node) -> Moments:
        """What was measured of a listed node."""
        return self.moments[self._outputs[node.index]]

    def sites(self) -> list[Node]:
        """The listed nodes that something is known of."""
        return [node for node in self.listed.nodes if self._outputs[node.index] in self._statistics]

    def site(self, node: Node, signal: Signal | None, threshold: float) -> CallSite:
        """All that is known of a listed node.

        Args:
            node: the node.
            signal: what was predicted.
            threshold: factor beyond which a prediction is flagged.
        """
        output = self._outputs[node.index]
        behind = [known for index in reversed(self._behind[output]) if (known := self._distributions.get(index))]
        skew, kurtosis = behind[0] if behind else (None, None)
        zeros, dead = self._silent.get(output, (None, None))
        measured = self._statistics[output]
        predicted = None if signal is None else Statistics.predicted(signal)
        shape = node.shape or ()
        found = call_site.ratio(predicted, measured, math.prod(shape))
        scope = node.scopes[-1]
        return CallSite(
            index=output,
            path=scope.path,
            call=scope.call,
            module=type(self._module(scope)).__name__,
            group=self._group(node),
            op=self._op(node),
            source=node.source,
            shape=shape,
            predicted=predicted,
            measured=measured,
            gradient=self.gradients.get(output),
            zeros=zeros,
            dead=dead,
            skew=skew,
            kurtosis=kurtosis,
            ratio=found,
            flagged=not (math.isfinite(measured.std) and call_site.factor(found) <= threshold),
        )

    def _module(self, scope: Scope) -> nn.Module:
        return self.graph.model.get_submodule(scope.path)

    def _group(self, node: Node) -> str:
        """Path of the smallest module with parts around a call."""
        around = node.scopes[:-1] if node.op == "module" else node.scopes
        return next((scope.path for scope in reversed(around) if [*self._module(scope).children()]), "")

    def _op(self, node: Node) -> str:
        """What a call is named by: its operator, with a number for a part of its output, or its module's class."""
        if node.op == "module":
            return type(self._module(node.scopes[-1])).__name__
        if node.op == "getitem":
            return f"{self.listed.nodes[node.inputs[0]].op}[{node.args['1']}]"
        return node.op
