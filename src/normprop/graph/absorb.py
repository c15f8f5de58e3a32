"""Which linear map a normaliser can be absorbed by: the one whose output only it reads."""

from typing import Any

import torch
from torch import nn

from normprop.graph.node import Graph, Node, State, leaves
from normprop.graph.propagate import evaluate
from normprop.graph.signal import Signal
from normprop.graph.sites import Site

LINEAR_MAPS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_OPERATORS = {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
              "convolution", "addmm"}  # fmt: skip
_CARRIERS = {"view", "reshape", "flatten", "unflatten", "transpose", "permute", "squeeze", "unsqueeze", "contiguous",
             "_unsafe_view", "clone", "getitem", "t"}  # fmt: skip


def linear_map(graph: Graph, site: Site) -> tuple[str, list[Node]] | str:
    """The linear layer that can take a normaliser in.

    Args:
        graph: the captured network.
        site: the normaliser.

    Returns:
        The layer's path and its node for every call of the normaliser; or why there is none.
    """
    found: list[Node] = []
    for place in site.places:
        node = _before(graph, place.input)
        if isinstance(node, str):
            return node
        found.append(node)
    paths = {node.path for node in found}
    if len(paths) != 1:
        return "it normalises the outputs of several layers"
    path = paths.pop()
    module = graph.model.get_submodule(path)
    if type(module) not in LINEAR_MAPS:
        return f"{path or 'the model'} is a {type(module).__name__}, which may compute more than a plain linear map"
    if any(getattr(module, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")):
        return f"{path} has hooks"
    calls = [node for node in graph.nodes if node.op in _OPERATORS and node.path == path]
    if len(calls) != len(found):
        return f"{path} is also called elsewhere"
    uses = [node for node in graph.nodes if _uses(node, graph, module) and node.path != path]
    if uses:
        return f"the weight of {path} is also used in {uses[0].scopes[-1]}"
    for node, place in zip(found, site.places, strict=True):
        if not _aligned(graph, node, place.input, site.channels):
            return f"between {path} and it the channels change their order"
    return path, found


def _uses(node: Node, graph: Graph, module: nn.Module) -> bool:
    """Whether a node reads a parameter of a module."""
    own = {id(parameter) for parameter in module.parameters()}
    return any(isinstance(leaf, State) and id(graph.state(leaf)) in own for leaf in leaves(node.args))


def _before(graph: Graph, index: int) -> Node | str:
    """The linear map that alone feeds a node, through nothing but changes of shape."""
    while True:
        node = graph.nodes[index]
        if index in graph.outputs:
            return "what it normalises is an output of the network"
        if len(graph.readers(index)) != 1:
            return "what it normalises is also read elsewhere"
        if node.op in _OPERATORS:
            weight = node.args.get("weight") or node.args.get("mat2")
            constant = isinstance(weight, State) or (node.op == "addmm" and len(node.inputs) == 2)
            return node if constant else "the weight before it is computed in the forward pass"
        if node.op not in _CARRIERS or len(node.inputs) != 1:
            return f"it follows {node.op}, not a linear map"
        index = node.inputs[0]


def _aligned(graph: Graph, node: Node, last: int, channels: int) -> bool:
    """Whether channel i of the linear map is channel i of what is normalised."""
    assert node.shape is not None
    axis = channel_axis(node)
    if node.shape[axis] != channels:
        return False
    labels = torch.arange(channels, dtype=torch.float32)
    values = {node.index: Signal.of(labels, torch.zeros(channels), node.shape, axis).made_by(node.index)}
    chain = []
    index = last
    while index != node.index:
        chain.append(graph.nodes[index])
        (index,) = graph.nodes[index].inputs
    for step in reversed(chain):
        values[step.index] = evaluate(step, graph.state, graph.model.get_submodule, values)
    mean, var = values[last].channels(1)
    return mean.shape == labels.shape and torch.equal(mean, labels) and not bool(var.any())


def channel_axis(node: Node) -> int:
    """The axis of the channels in a linear map's output.

    Example:
        >>> channel_axis(Node(0, "conv2d", {}, shape=(2, 8, 4, 4)))
        1
    """
    assert node.shape is not None
    return len(node.shape) - 1 if node.op in ("linear", "addmm") else 1 if len(node.shape) > 2 else len(node.shape) - 1


def linear_inputs(linear: Any) -> int:
    """Channels that a linear map takes."""
    return int(linear.in_features if isinstance(linear, nn.Linear) else linear.in_channels)


def linear_outputs(linear: Any) -> int:
    """Channels that a linear map gives."""
    return int(linear.out_features if isinstance(linear, nn.Linear) else linear.out_channels)
