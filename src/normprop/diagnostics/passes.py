"""One pass through a copy of a network: what goes into each layer and what comes out."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normprop import moments as M
from normprop.diagnostics.diagnosis import Subject
from normprop.diagnostics.quiet import call, quietly
from normprop.errors import ConfigError
from normprop.moments import Rule
from normprop.moments.table import ROWS
from normprop.norms.plain import ElementwiseActivation
from normprop.training.statistics import watched

LINEAR_MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LayerPass:
    """What one layer did in a pass.

    Args:
        name: dotted path.
        module: the layer, of the copy.
        input: what went in, (N, ...).
        branch: the same as only this layer reads it: its gradient is the part that comes through the layer.
        output: what came out.
        follows: whether the input is the output of the layer before, with nothing but a change of shape between.
    """

    name: str
    module: nn.Module
    input: Tensor
    branch: Tensor
    output: Tensor
    follows: bool


def forward(subject: Subject) -> tuple[list[LayerPass], Tensor]:
    """Send a subject's inputs through a copy of its network, in its mode, with gradients.

    Args:
        subject: the network and its inputs.

    Returns:
        The layers of :func:`normprop.training.statistics.watched` in the order of their first calls, each once, and
        the network's first floating point output. Gradients can be taken in the layers' inputs and outputs.

    Raises:
        ConfigError: if the network cannot be called with the inputs, or no layer with a weight is called.

    Example:
        >>> from torch import ones
        >>> subject = Subject("small", nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), ones(2, 4))
        >>> layers, output = forward(subject)
        >>> [(layer.name, layer.follows) for layer in layers], output.shape
        ([('0', False), ('1', True)], torch.Size([2, 2]))
    """
    started: dict[str, tuple[Tensor, Tensor, bool]] = {}
    passes: list[LayerPass] = []
    last: list[tuple[int, int, int]] = [(0, 0, -1)]  # memory, version and size of the last layer's output

    def watch(name: str, layer: nn.Module) -> None:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if name in started or not args or not isinstance(args[0], Tensor):
                return args
            branch = args[0].view_as(args[0])
            started[name] = args[0], branch, _place(args[0]) == last[0]
            return branch, *args[1:]

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if name in started and isinstance(output, Tensor):
                if all(done.name != name for done in passes):
                    value, branch, follows = started[name]
                    passes.append(LayerPass(name, module, value, branch, output, follows))
                last[0] = _place(output)

        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)

    with quietly(subject.model, subject.inputs, grad=True) as network:
        for name, layer in watched(network):
            watch(name, layer)
        start = subject.inputs.detach().clone()
        if start.is_floating_point():
            start = start.requires_grad_().clone()  # which a first layer may overwrite
        outputs = call(network, start, subject.name)
    floating = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not passes or not floating:
        missing = "calls no layer with a weight" if not passes else "returns no floating point tensor"
        raise ConfigError(f"{subject.name}: the network {missing}; there is nothing to look at")
    return passes, floating[0]


def parts(module: nn.Module) -> tuple[nn.Module, Rule] | None:
    """Linear map and activation of a plain layer: a linear map alone, or followed by an activation in a Sequential.

    Args:
        module: a layer.

    Returns:
        The linear map and its activation's rule; ``None`` for any other module.

    Example:
        >>> parts(nn.Sequential(nn.Linear(3, 2), nn.Tanh()))[1].name
        'tanh'
        >>> parts(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Tanh())) is None
        True
    """
    pieces = [*module] if isinstance(module, nn.Sequential) else [module]
    pieces = [piece for piece in pieces if not isinstance(piece, nn.Identity)]
    if not pieces or type(pieces[0]) not in LINEAR_MAPS or len(pieces) > 2:
        return None
    if len(pieces) == 1:
        return pieces[0], M.resolve(None)
    activation = pieces[1]
    if isinstance(activation, ElementwiseActivation):
        return pieces[0], M.resolve(activation.activation)
    rule = M.resolve(activation)
    return (pieces[0], rule) if rule.name in _NAMED and not rule.learnable else None


# A module without a name among the activations may be anything: a normaliser, a pool.
_NAMED = frozenset(row.name for row in ROWS)


def _place(value: Tensor) -> tuple[int, int, int]:
    """Where a tensor's values are: memory, how often it was overwritten, how many there are."""
    return value.untyped_storage().data_ptr(), value._version, value.numel()
