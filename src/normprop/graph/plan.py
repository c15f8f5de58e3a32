"""What a conversion would do to a network, worked out before anything is touched."""

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normprop import norms
from normprop.errors import ConfigError, ConversionError, GraphError
from normprop.graph.absorb import linear_map
from normprop.graph.calibrate import Rehearsal
from normprop.graph.capture import Inputs, arguments, capture, in_training
from normprop.graph.contract import calls, contract
from normprop.graph.measure import measure
from normprop.graph.node import Graph, Node
from normprop.graph.program import mixed
from normprop.graph.propagate import OnUnknown, Propagation, propagate
from normprop.graph.report import ConversionReport, SiteReport
from normprop.graph.rules import module_rule
from normprop.graph.sites import Site, find, has_statistics, normalised
from normprop.moments import Moments

Weights = Literal["fresh", "exact", "rescale"]
Patterns = str | Iterable[str] | Callable[[str, nn.Module], bool] | None


_CHOICES = {
    "weights": ("fresh", "exact", "rescale"),
    "moments": ("fixed", "live"),
    "on_unknown": ("error", "warn", "measure"),
    "calibrate": ("noise", "input", None),
}


@dataclass(frozen=True)
class Options:
    """What a caller asks of a conversion; see :func:`normprop.convert`."""

    to: str = "normprop"
    weights: Weights = "fresh"
    moments: Literal["fixed", "live"] = "live"
    center: bool | None = None
    include: Patterns = None
    exclude: Patterns = None
    on_unknown: OnUnknown = "error"
    given: Moments | Sequence[Moments] | None = None
    calibrate: Rehearsal = "noise"

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                choices = ", ".join(repr(value) for value in known)
                raise ConfigError(f"convert: {name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.to != "normprop":
            norms.method(self.to)
            if self.weights == "exact":
                raise ConfigError(
                    f"convert: weights='exact' keeps a trained network's function, which {self.to!r} cannot; use "
                    f"to='normprop', or weights='rescale' to keep the filters alone"
                )

    @property
    def centered(self) -> bool:
        """Whether filters are centred: in new networks, unless the caller says otherwise."""
        return self.weights == "fresh" if self.center is None else self.center


@dataclass
class Plan:
    """A conversion that is thought through but not made.

    Args:
        model: the network, untouched.
        x: its example input.
        options: what was asked for.
        graph: its calls, each converted normaliser as a batch norm by the statistics of its input.
        known: predicted moments, if the conversion needs them.
        sites: the normalisers that will be converted.
        absorbed: the linear map that takes a site in, with its calls, by the site's path.
        report: the plan for people.
    """

    model: nn.Module
    x: Inputs
    options: Options
    graph: Graph
    known: Propagation | None
    sites: list[Site]
    absorbed: dict[str, tuple[str, list[Node]]]
    report: ConversionReport

    def apply(self, inplace: bool = False) -> nn.Module:
        """Make the conversion, see :func:`normprop.convert`."""
        from normprop.graph.convert import apply

        return apply(self, inplace)

    def __str__(self) -> str:
        return str(self.report)

    def predict(self, model: nn.Module) -> Propagation:
        """The moments of every call with the weights that a copy of the network has now."""
        graph = Graph(model, self.graph.nodes, self.graph.outputs, self.graph.how, self.graph.note)
        return _predict(graph, self.options, self.x)


def analyze(model: nn.Module, x: Inputs, **options: Any) -> Plan:
    """Work out what converting a network would do, and touch nothing.

    Args:
        model: the network.
        x: example input: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        **options: as for :func:`normprop.convert`.

    Returns:
        The plan; ``print`` it, or ``apply`` it.

    Raises:
        ConfigError: for options that cannot work.
        GraphError: if the network cannot be captured.
        UnknownOperatorError: for an operator without a rule.

    Example:
        >>> print(analyze(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), torch.zeros(2, 3, 8, 8)))
        Sequential: 1 normaliser to normprop, weights fresh (1 absorbed)
          site  module       channels  predicted       what becomes of it
          1     BatchNorm2d         8  ...   absorbed by 0
    """
    chosen = Options(**options)
    with in_training(model):
        try:
            graph = capture(model, x)
        except GraphError:
            doubled = _doubled(x)  # batch norm refuses to train on a single value per channel
            if doubled is None:
                raise
            x, graph = doubled, capture(model, doubled)
        graph = contract(graph, calls(graph, lambda module: module_rule(module) is not None))
        found = find(graph)
    report = ConversionReport(type(model).__name__, chosen.to, chosen.weights,
                              graph.how + (f" ({graph.note})" if graph.note else ""), [])  # fmt: skip
    selected: list[Site] = []
    absorbed: dict[str, tuple[str, list[Node]]] = {}
    for site in found:
        entry = SiteReport(site.path, type(model.get_submodule(site.path)).__name__, site.kind, site.channels,
                           len(site.places), "kept", source=site.source)  # fmt: skip
        report.sites.append(entry)
        if not _selected(site.path, model, chosen):
            entry.reason = "not among those to convert"
            continue
        if not site.problem and chosen.weights == "exact" and site.running_mean is None:
            site.problem = "it has no running statistics, so its function in evaluation depends on the batch"
        if site.problem:
            entry.action, entry.reason = "cannot", site.problem
            continue
        selected.append(site)
        _decide(graph, site, entry, chosen, absorbed)
    _left(graph, found, report)
    graph = normalised(graph, selected)
    plan = Plan(model, x, chosen, graph, None, selected, absorbed, report)
    if chosen.to == "normprop" and chosen.weights != "exact":
        plan.known = plan.predict(model)
        report.unknown = [f"{graph.nodes[index]}: {what}" for index, what in plan.known.unknown.items()]
        for site, entry in ((s, e) for s in selected for e in report.sites if e.path == s.path):
            mean, var = mixed([plan.known.values[place.input].channels(1) for place in site.places])
            entry.mean, entry.std = float(mean.mean()), float(var.mean().sqrt())
    return plan


def _decide(
    graph: Graph, site: Site, entry: SiteReport, options: Options, absorbed: dict[str, tuple[str, list[Node]]]
) -> None:
    """Whether a linear map takes a site in, or what stands in its place."""
    layer = options.to == "normprop" or norms.method(options.to).layer is not None
    answer = linear_map(graph, site) if options.to == "normprop" or not layer else "not needed"
    if not isinstance(answer, str):
        absorbed[site.path] = answer
        entry.action, entry.into = "absorbed", answer[0]
    elif not layer:
        entry.action = "cannot"
        entry.reason = f"{options.to!r} needs a linear map right before it, but {answer}"
    elif options.to == "normprop":
        entry.action, entry.into, entry.reason = "predicted", "PredictedNorm", answer
    else:
        entry.action, entry.into = "replaced", options.to


def _left(graph: Graph, found: list[Site], report: ConversionReport) -> None:
    """Say which batch norms the example input never reaches, and what has running statistics without being one."""
    known = {id(graph.model.get_submodule(site.path)) for site in found}
    scopes = {scope.path for node in graph.nodes for scope in node.scopes}
    reached = {id(module) for path, module in graph.model.named_modules(remove_duplicate=False) if path in scopes}
    for path, module in graph.model.named_modules():
        one = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if id(module) in known or not (one or has_statistics(module)):
            continue
        channels = module.num_features if one else len(module.running_mean)  # type: ignore[arg-type]
        kind = "batch norm" if one else "running statistics"
        reason = "it is not batch norm in evaluation" if id(module) in reached else "the example input never reaches it"
        report.sites.append(SiteReport(path, type(module).__name__, kind, channels, 0, "kept", reason=reason))  # type: ignore[arg-type]


def _predict(graph: Graph, options: Options, x: Inputs) -> Propagation:
    given = options.given
    inputs = [node for node in graph.nodes if node.op == "input"]
    parts = [given] * len(inputs) if given is None or isinstance(given, Moments) else [*given]
    if len(parts) != len(inputs):
        raise ConfigError(f"convert: given holds moments of {len(parts)} inputs, but the network takes {len(inputs)}")
    measured: dict[int, Moments] = {}

    def look(node: Node) -> Moments:
        if not measured:
            measured.update(measure(graph, x))
        return measured[node.index]

    return propagate(graph, dict(enumerate(parts)), on_unknown=options.on_unknown, measure=look)


def _selected(path: str, model: nn.Module, options: Options) -> bool:
    return _matches(options.include, path, model, True) and not _matches(options.exclude, path, model, False)


def _matches(patterns: Patterns, path: str, model: nn.Module, default: bool) -> bool:
    """Whether a path is meant by glob patterns or a function of path and module."""
    if patterns is None:
        return default
    if callable(patterns):
        return bool(patterns(path, model.get_submodule(path)))
    several = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in several)


def _doubled(x: Inputs) -> Inputs | None:
    """The example twice, if it is a batch of one."""
    tensors = [leaf for leaf in pytree.tree_leaves(arguments(x)) if isinstance(leaf, Tensor)]
    if any(tensor.ndim == 0 or tensor.shape[0] != 1 for tensor in tensors):
        return None
    twice: Inputs = pytree.tree_map(lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) else leaf, x)
    return twice


def refuse(plan: Plan) -> None:
    """Raise unless the plan converts something, and everything that it should.

    Raises:
        ConversionError: if there is nothing to convert, or a normaliser that cannot be.
    """
    stuck = [site for site in plan.report.sites if site.action == "cannot"]
    if stuck:
        more = f" ({len(stuck) - 1} more: print normprop.analyze(model, x))" if len(stuck) > 1 else ""
        raise ConversionError(
            f"{stuck[0].path or type(plan.model).__name__}: {stuck[0].reason}; to convert the rest, leave it with "
            f"exclude={stuck[0].path!r}{more}"
        )
    if not plan.sites:
        kept = len(plan.report.sites)
        left = f"its {kept} normaliser{'s' * (kept != 1)} are all left as they are"
        raise ConversionError(
            f"{type(plan.model).__name__}: there is nothing to convert, {left if kept else 'it calls no batch norm'}; "
            f"print normprop.analyze(model, x)"
        )
