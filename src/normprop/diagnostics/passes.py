"""One pass through a copy of a network: what goes into each layer, what it applies and what comes out."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from normprop import moments as M
from normprop.diagnostics.diagnosis import Subject
from normprop.errors import ConfigError, NormPropError, first_line
from normprop.functional import normalize_weight
from normprop.graph.random_state import preserved
from normprop.moments import Rule
from normprop.moments.table import ROWS
from normprop.nn import NormPropLayer
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
        >>> subject = Subject("small", nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.ones(2, 4))
        >>> layers, output = forward(subject)
        >>> [(layer.name, layer.follows) for layer in layers], output.shape
        ([('0', False), ('1', True)], torch.Size([2, 2]))
    """
    network = copy.deepcopy(subject.model)
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

    for name, layer in watched(network):
        watch(name, layer)
    start = subject.inputs.detach().clone()
    with torch.enable_grad():
        if start.is_floating_point():
            start = start.requires_grad_().clone()  # which a first layer may overwrite
        outputs = call(subject, network, start)
    floating = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not passes or not floating:
        missing = "calls no layer with a weight" if not passes else "returns no floating point tensor"
        raise ConfigError(f"{subject.name}: the network {missing}; there is nothing to look at")
    return passes, floating[0]


def call(subject: Subject, network: nn.Module, inputs: Tensor) -> Any:
    """Call a copy of a subject's network, with all random draws undone.

    Args:
        subject: gives the name for errors.
        network: the copy.
        inputs: what to call it with.

    Returns:
        Whatever the network returns.

    Raises:
        ConfigError: if it fails.

    Example:
        >>> call(Subject("same", nn.Identity(), torch.ones(1)), nn.Identity(), torch.ones(1))
        tensor([1.])
    """
    try:
        with preserved(network, inputs):
            return network(inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, NormPropError):
            raise
        raise ConfigError(
            f"{subject.name}: the network fails on inputs of shape {tuple(inputs.shape)} ({first_line(error)}); give "
            f"a batch as it takes it"
        ) from error


@dataclass(frozen=True)
class LinearCall:
    """A linear map or a convolution that a network calls.

    Args:
        name: dotted path of the module whose forward calls it, with "#2" for the second such call.
        weight: (out, in / groups, *kernel) as it is applied; filters of unit length in a NormProp layer.
        groups: of the convolution.
        centered: whether filters are known to have mean 0.
        input: (N, in, ...).
        output: (N, out, ...).
    """

    name: str
    weight: Tensor
    groups: int
    centered: bool
    input: Tensor
    output: Tensor


def linear_calls(subject: Subject, look: Callable[[LinearCall], None]) -> None:
    """Send a subject's inputs through a copy of its network and look at each linear map that it calls.

    Whatever method computes the weights: those that are applied are seen. Transposed convolutions are left out.

    Args:
        subject: the network and its inputs.
        look: is called at each call of a new name, before anything overwrites the output.

    Raises:
        ConfigError: if the network cannot be called with the inputs.

    Example:
        >>> linear_calls(Subject("small", nn.Linear(4, 3), torch.ones(2, 4)), lambda call: print(call.output.shape))
        torch.Size([2, 3])
    """
    network = copy.deepcopy(subject.model)
    watch = _LinearWatch(look)
    watch.follow(network)
    with torch.no_grad(), watch:
        call(subject, network, subject.inputs.detach().clone())


class _LinearWatch(TorchFunctionMode):
    """Looks at the calls of torch's linear maps, and knows the module that makes them."""

    def __init__(self, look: Callable[[LinearCall], None]) -> None:
        super().__init__()
        self.look = look
        self.seen: set[str] = set()
        self.inside: list[tuple[str, nn.Module]] = []
        self.calls: list[int] = []

    def follow(self, network: nn.Module) -> None:
        """Keep track of the module that is being called."""

        def enter(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                self.inside.append((name, module))
                self.calls.append(0)

            return hook

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.inside.pop()
            self.calls.pop()

        for name, module in network.named_modules():
            module.register_forward_pre_hook(enter(name or type(module).__name__))
            module.register_forward_hook(leave)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _LINEAR and self.inside:
            self._note(func, output, *args, **(kwargs or {}))
        return output

    def _note(self, func: Any, output: Tensor, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> None:
        transposed, groups = _form(func, *args, **kwargs)
        if transposed or weight.ndim < 2:
            return
        self.calls[-1] += 1
        name, module = self.inside[-1]
        name += f"#{self.calls[-1]}" if self.calls[-1] > 1 else ""
        if name in self.seen:
            return
        self.seen.add(name)
        centered = isinstance(module, NormPropLayer) and module.center
        if isinstance(module, NormPropLayer):  # which applies gain and deviation too
            weight = normalize_weight(module.weight, torch.ones_like(module.gain), center=centered, groups=groups)
            output = func(input, weight.to(input.dtype), None, *args[1:])
        if output.ndim < weight.ndim:
            input, output = input.unsqueeze(0), output.unsqueeze(0)
        if func is F.linear:  # features are last
            input, output = input.movedim(-1, 1), output.movedim(-1, 1)
        self.look(LinearCall(name, weight, groups, centered, input, output))


_LINEAR = (F.linear, F.conv1d, F.conv2d, F.conv3d, torch.convolution)


def _form(func: Any, bias: Any = None, *args: Any, **kwargs: Any) -> tuple[bool, int]:
    """Whether a call is a transposed convolution, and its number of groups, from what follows the weight."""
    if func is F.linear:
        return False, 1
    if func is torch.convolution:
        return args[3], args[5]
    return False, args[3] if len(args) > 3 else kwargs.get("groups", 1)


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


def finite(value: float) -> float | None:
    """A number for JSON: ``None`` for what is not finite.

    Example:
        >>> finite(1.5), finite(math.nan)
        (1.5, None)
    """
    return value if math.isfinite(value) else None
