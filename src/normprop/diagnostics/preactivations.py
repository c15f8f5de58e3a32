"""What goes into each activation of a network, in modules, in functions and inside NormProp's layers."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normprop import moments
from normprop.diagnostics.quiet import call, quietly
from normprop.errors import ConfigError
from normprop.functional import normalized_sum
from normprop.moments import Moments
from normprop.nn import NormPropLayer, Residual, output_moments
from normprop.nn.lstm import LSTMLayer
from normprop.norms.filter_response import ThresholdedLinearUnit
from normprop.norms.recurrent import RowLSTM

T = TypeVar("T")
Look = Callable[[Tensor], T]

ACTIVATIONS = frozenset(
    ["relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "celu", "selu", "gelu", "silu", "mish", "sigmoid", "tanh",
     "softplus", "softsign", "tanhshrink", "softshrink", "hardshrink", "hardtanh", "hardsigmoid", "hardswish",
     "log_sigmoid", "logsigmoid", "threshold"]
)  # fmt: skip
"""Names of torch's functions whose inputs are pre-activations."""
_GATES = ("sigmoid", "tanh")
_LINEAR = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def preactivations(model: nn.Module, inputs: Tensor, look: Look[T]) -> dict[str, T]:
    """Look at everything that goes into an activation, in the order of the calls.

    Found are calls of :data:`ACTIVATIONS`, in modules and as functions, and the activations inside NormProp's layers
    and sums, whose inputs, ``gain (w x) / ||w|| + bias``, are computed anew. Sigmoid and tanh that an LSTM or a
    module with parameters of its own calls are gates and squashing normalisers, not activations.

    Args:
        model: the network, looked at in the mode that it is in; a copy runs.
        inputs: a batch, (N, ...).
        look: turns a pre-activation, (N, units, positions), into what is kept of it.

    Returns:
        By the dotted path of the module that the activation is called in, with a number from its second call on.

    Raises:
        ConfigError: if there is no activation, or the network does not take the inputs.

    Example:
        >>> from torch import zeros
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
        >>> preactivations(model, zeros(2, 3, 6, 6), lambda z: tuple(z.shape))
        {'1': (2, 4, 16)}
    """
    calls = _Calls(look, inputs)
    with quietly(model, inputs) as twin:
        for path, module in twin.named_modules():
            calls.follow(path or type(module).__name__, module)
        with calls:
            call(twin, inputs.detach().clone())
    if not calls.found:
        raise ConfigError(
            f"{type(model).__name__} calls no activation that is known ({', '.join(sorted(ACTIVATIONS))}); "
            f"give a network that does"
        )
    return calls.found


class _Calls(TorchFunctionMode):
    """Sees every call of torch's functions and knows which module makes it."""

    def __init__(self, look: Look[Any], inputs: Tensor) -> None:
        super().__init__()
        self.look = look
        self.found: dict[str, Any] = {}
        self.count: Counter[str] = Counter()
        self.running: list[tuple[str, nn.Module]] = []
        self.own: set[nn.Module] = set()  # modules whose activations are looked at by their hooks
        self.parts: dict[nn.Module, Tensor] = {}
        self.linear = (2, inputs.shape[:1], 1)  # the last linear map, at first the input: axes, samples, axis of units

    def follow(self, path: str, module: nn.Module) -> None:
        """Note when a module runs; of NormProp's also what goes into their activations."""

        def enter(module: Any, args: Any) -> None:
            self.running.append((path, module))
            if isinstance(module, ThresholdedLinearUnit):
                self._see(args[0], -1 - module.dims)

        def leave(module: Any, args: Any, output: Any) -> None:
            if active and isinstance(module, Residual):
                self._sum(module, args[0])
            elif active:
                self._layer(module, args)
            self.running.pop()

        active = False
        module.register_forward_pre_hook(enter)
        if isinstance(module, NormPropLayer | Residual):
            inside: Any = module.activation
            active = moments.resolve(inside).name != "identity"
            self.own.update([module, *(inside.modules() if isinstance(inside, nn.Module) else [])])
        if isinstance(module, Residual):
            for part in filter(None, (module.shortcut, module.branch)):
                part.register_forward_hook(lambda part, _, output: self.parts.update({part: output}))
        module.register_forward_hook(leave)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the input of an activation; note the shape of a linear map's output."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if name in ACTIVATIONS and self.running and not self._aside(name, self.running[-1][1]):
            value = args[0] if args else kwargs["input"]
            axes, samples, axis = self.linear
            # Tables of constants pass through activations as well: they have fewer axes or other samples.
            if value.ndim >= axes and value.shape[:1] == samples:
                self._see(value, axis if value.ndim == axes else 1)
        output = func(*args, **kwargs)
        if name in _LINEAR:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.linear = output.ndim, output.shape[:1], 1 - weight.ndim
        return output

    def _aside(self, name: str, module: nn.Module) -> bool:
        """Whether a module's call is no activation, or one that is looked at elsewhere."""
        gated = isinstance(module, LSTMLayer | RowLSTM) or next(module.parameters(recurse=False), None) is not None
        return module in self.own or (name in _GATES and gated)

    def _see(self, value: Tensor, axis: int) -> None:
        path, _ = self.running[-1]
        self.count[path] += 1
        units = value.detach().movedim(axis, 1)
        name = path if self.count[path] == 1 else f"{path} ({self.count[path]})"
        self.found[name] = self.look(units.reshape(*units.shape[:2], -1).clone())

    def _layer(self, layer: Any, args: Any) -> None:
        bare = copy.copy(layer)
        vars(bare).update(_modules={}, activation=None)  # what is left is the normalised linear map
        self._see(bare.forward(*args), 1 - layer.weight.ndim)

    def _sum(self, residual: Residual, input: Tensor) -> None:
        skip = input if residual.shortcut is None else self.parts[residual.shortcut]
        spread = [Moments(0.0, output_moments(part).var) for part in (residual.shortcut, residual.branch)]
        total = normalized_sum([skip, self.parts[residual.branch]], spread, None, residual.spatial_dims)
        self._see(total, -1 - residual.spatial_dims)
