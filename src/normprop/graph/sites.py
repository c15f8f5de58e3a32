"""Where a network normalises by batch statistics: found by what is called, not by the names of classes."""

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.graph.contract import calls, enters, leaves_from
from normprop.graph.node import Graph, Node, Ref, State
from normprop.graph.random_state import preserved

BATCH_NORMS = frozenset({"batch_norm", "native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm",
                         "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "_batch_norm_no_update",
                         "_batch_norm_impl_index"})  # fmt: skip


# Added to a predicted variance: it need not guard against a batch of equal values, only against a filter of zeros.
EPS = 1e-12


_OPERANDS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Place:
    """One call of a normaliser: what goes in and what comes out, as indices of nodes."""

    input: int
    output: int
    tail: tuple[int, ...] = ()


@dataclass
class Site:
    """A normaliser of the network with all its calls.

    Args:
        path: dotted path of its module.
        kind: "batch norm", or "frozen batch norm" for a module that applies running statistics by hand.
        channels: number of channels.
        eps: added to the variance.
        weight: gain, or ``None``.
        bias: bias, or ``None``.
        running_mean: running mean, or ``None`` if there is none.
        running_var: running variance.
        places: its calls.
        problem: why it cannot be replaced, or "".
        source: line of code of the first call.
    """

    path: str
    kind: str
    channels: int
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    places: list[Place] = field(default_factory=list)
    problem: str = ""
    source: str = ""

    @property
    def trained(self) -> bool:
        """Whether its running statistics have seen data."""
        if self.running_mean is None or self.running_var is None:
            return False
        return bool((self.running_mean != 0).any() or (self.running_var != 1).any())

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Running mean and variance, of a site that has them."""
        assert self.running_mean is not None
        assert self.running_var is not None
        return self.running_mean, self.running_var

    def affine(self) -> tuple[Tensor, Tensor]:
        """The function in evaluation as scale and shift per channel, in float64."""
        mean, var = self.statistics()
        scale = (var.double() + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight.detach().double()
        shift = -mean.double() * scale
        return scale, shift if self.bias is None else shift + self.bias.detach().double()


def find(graph: Graph) -> list[Site]:
    """Every normaliser by batch statistics in a network, in the order of its first call.

    Args:
        graph: the captured network.

    Returns:
        The sites; those that cannot be replaced say why in ``problem``.
    """
    sites: dict[str, Site] = {}
    for node in graph.nodes:
        if node.op in BATCH_NORMS:
            _batch_norm(graph, node, sites)
    _frozen(graph, sites)
    return sorted(sites.values(), key=lambda site: site.places[0].output if site.places else 0)


def _first_path(graph: Graph, path: str) -> str:
    """The first of the paths under which a module stands in the network."""
    module = graph.model.get_submodule(path)
    names: dict[nn.Module, str] = {other: name for name, other in graph.model.named_modules()}
    return names[module]


def _tensor(graph: Graph, node: Node, name: str) -> Tensor | None:
    value = node.args.get(name)
    if isinstance(value, State):
        return graph.state(value)
    return value if isinstance(value, Tensor) else None


def _batch_norm(graph: Graph, node: Node, sites: dict[str, Site]) -> None:
    """Add one call of a batch norm operator."""
    scope = node.scopes[-1]
    path = _first_path(graph, scope.path)
    weight, bias, mean, var = (_tensor(graph, node, name) for name in _OPERANDS)
    shape = graph.nodes[node.inputs[0]].shape or ()
    site = Site(path, "batch norm", shape[1], float(node.args["eps"]), weight, bias, mean, var, source=node.source)
    known = sites.setdefault(path, site)
    output = node.index
    if node.shape is None:  # the operator returns its statistics as well
        output = next(reader.index for reader in graph.readers(node.index) if reader.args["1"] == 0)
    members = [n.index for n in graph.nodes if scope in n.scopes]
    known.problem = known.problem or _obstacle(graph, node, output, members)
    known.places.append(Place(node.inputs[0], output, _tail(graph, output, members)))


def _obstacle(graph: Graph, node: Node, output: int, members: list[int]) -> str:
    """Why the module that calls a batch norm cannot be replaced by another."""
    states = [value for value in node.args.values() if isinstance(value, State)]
    where = f" at {node.source}" if node.source else ""
    if node.scopes[-1].path == "" and not isinstance(graph.model, nn.modules.batchnorm._NormBase):
        return f"batch_norm is called as a function in the model's own forward{where}; give it a module of its own"
    module = graph.model.get_submodule(node.path)
    if any(getattr(module, state.name, None) is not graph.state(state) for state in states):
        return f"its parameters belong to another module{where}"
    if enters(graph, members) != [node.inputs[0]]:
        return f"the module does more than normalise before its batch norm{where}; give batch norm a module of its own"
    before = [index for index in members if index < node.index and node.inputs[0] in graph.nodes[index].inputs]
    if before:
        return f"the module computes something before its batch norm{where}; give batch norm a module of its own"
    if len(leaves_from(graph, members)) != 1:
        return f"the module returns several tensors{where}"
    tail = _tail(graph, output, members)
    if any(graph.nodes[index].inputs != [before] for before, index in zip((output, *tail), tail, strict=False)):
        return f"the module does more than apply functions after its batch norm{where}"
    return ""


def _tail(graph: Graph, output: int, members: list[int]) -> tuple[int, ...]:
    """What a module with batch norm and activation in one does after the batch norm."""
    chain = [output]
    for index in members:
        if index > output and any(source in chain for source in graph.nodes[index].inputs):
            chain.append(index)
    return tuple(chain[1:])


def has_statistics(module: nn.Module) -> bool:
    """Whether a module holds a running mean and variance for each channel.

    Example:
        >>> has_statistics(nn.BatchNorm1d(2)), has_statistics(nn.BatchNorm1d(2, track_running_stats=False))
        (True, False)
    """
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    return isinstance(mean, Tensor) and isinstance(var, Tensor) and mean.ndim == 1 and mean.shape == var.shape


def _frozen(graph: Graph, sites: dict[str, Site]) -> None:
    """Add modules that hold running statistics and apply them without calling a batch norm."""

    for scope, members in calls(graph, has_statistics):
        path = _first_path(graph, scope.path)
        if any(graph.nodes[index].op in BATCH_NORMS for index in members):
            continue
        module = graph.model.get_submodule(path)
        inputs, outputs = enters(graph, members), leaves_from(graph, members)
        if len(inputs) != 1 or len(outputs) != 1:
            continue
        if path not in sites:
            shape = graph.nodes[inputs[0]].shape or ()
            eps = _frozen_eps(module, shape)
            if eps is None:
                continue
            weight, bias, mean, var = (getattr(module, name, None) for name in _OPERANDS)
            source = graph.nodes[members[0]].source
            sites[path] = Site(path, "frozen batch norm", shape[1], eps, weight, bias, mean, var, source=source)
        sites[path].places.append(Place(inputs[0], outputs[0]))


@torch.no_grad()
def _frozen_eps(module: nn.Module, shape: tuple[int, ...]) -> float | None:
    """The eps with which a module is batch norm in evaluation, measured on random input; ``None`` if it is not."""
    probe: Any = copy.deepcopy(module).double().eval()
    channels = probe.running_mean.numel()
    if len(shape) < 2 or shape[1] != channels:
        return None
    sizes = 2, channels, *(min(size, 3) for size in shape[2:])
    x = torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.to(probe.running_mean.device)
    try:
        with preserved(probe):
            output = probe(x)
    except Exception:  # whatever it says, it takes more than one tensor, or others
        return None
    if not isinstance(output, Tensor) or output.shape != x.shape:
        return None
    weight, bias = getattr(probe, "weight", None), getattr(probe, "bias", None)
    own = [float(value) for value in (getattr(module, name, None) for name in ("eps", "epsilon")) if value is not None]
    for eps in dict.fromkeys([*own, 1e-5, 1e-3, 0.0]):
        expected = F.batch_norm(x, probe.running_mean, probe.running_var, weight, bias, eps=eps)
        if torch.allclose(output, expected, rtol=1e-7, atol=1e-9):
            return eps
    return None


def normalised(graph: Graph, sites: list[Site]) -> Graph:
    """The graph in which every call of a site is batch norm by the statistics of its input.

    Args:
        graph: the graph.
        sites: which; those with a problem are left.

    Returns:
        A graph with the same numbering: nodes inside a site's call that only served it are skipped over.
    """
    nodes = list(graph.nodes)
    for site in sites:
        operands: dict[str, Any] = {name: _state(graph, site, name) for name in ("weight", "bias")}
        operands |= {"running_mean": None, "running_var": None, "training": True, "eps": EPS}
        for place in site.places:
            nodes[place.output] = dataclasses.replace(
                nodes[place.output],
                op="batch_norm",
                args={"input": Ref(place.input), **operands},
                overload="aten.batch_norm.default",
                shape=nodes[place.input].shape,
            )
    return Graph(graph.model, nodes, graph.outputs, graph.how, graph.note)


def _state(graph: Graph, site: Site, name: str) -> State | None:
    return State(site.path, name) if getattr(site, name) is not None else None
