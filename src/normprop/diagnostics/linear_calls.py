"""The linear maps that a network calls, with the weights that it applies, whatever method computes them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normprop.diagnostics.quiet import quietly
from normprop.errors import ConfigError, first_line
from normprop.training.statistics import watched

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONVOLUTION = (*_ARGUMENTS[:-1], "transposed", "output_padding", "groups")
_NAMES = {F.linear: _ARGUMENTS, F.conv1d: _ARGUMENTS, F.conv2d: _ARGUMENTS, F.conv3d: _ARGUMENTS} | {
    torch.convolution: _CONVOLUTION
}


@dataclass(frozen=True)
class LinearCall:
    """One call of a linear map or a convolution while a network ran; transposed convolutions are none.

    Args:
        layer: dotted name of the layer of :func:`normprop.training.statistics.watched` that made it; "" for none.
        function: torch's linear map or convolution.
        arguments: its arguments by name; "weight" is the effective one, after whatever the layer does to its own.
        output: what it returned.
        name: dotted path of the module whose forward made the call, with "#2" for its second such call.
        module: that module.
    """

    layer: str
    function: Callable[..., Tensor]
    arguments: dict[str, Any]
    output: Tensor
    name: str = ""
    module: nn.Module | None = None

    @property
    def groups(self) -> int:
        """Groups of the convolution."""
        groups: int = self.arguments.get("groups", 1)
        return groups

    def again(self, **arguments: Any) -> Tensor:
        """What the map returns with some arguments exchanged."""
        return self.function(**{**self.arguments, **arguments})


class Watching(TorchFunctionMode):
    """Looks at the linear maps that a network calls for the block, and knows the modules that make the calls.

    Args:
        network: a copy, which keeps the hooks.
        look: is called at each call.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 3))
        >>> with Watching(network, lambda call: print(call.layer, call.output.shape)):
        ...     _ = network(torch.ones(2, 4))
        0 torch.Size([2, 3])
    """

    def __init__(self, network: nn.Module, look: Callable[[LinearCall], None]) -> None:
        super().__init__()
        self.look = look
        self.layers = {module: name for name, module in watched(network)}
        self.inside: list[tuple[str, nn.Module]] = []
        self.counts: list[int] = []  # of the calls that each running module has made
        for name, module in network.named_modules():
            module.register_forward_pre_hook(self._enter(name or type(module).__name__), prepend=True)
            module.register_forward_hook(self._leave)

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.inside.append((name, module))
            self.counts.append(0)

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.inside.pop()
        self.counts.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function; look at it if it is a linear map."""
        output = func(*args, **(kwargs or {}))
        if func not in _NAMES or not self.inside:
            return output
        arguments = {**dict(zip(_NAMES[func], args, strict=False)), **(kwargs or {})}
        if arguments.get("transposed") or arguments["weight"].ndim < 2:
            return output
        self.counts[-1] += 1
        name, module = self.inside[-1]
        name += f"#{self.counts[-1]}" if self.counts[-1] > 1 else ""
        layer = next((self.layers[part] for _, part in reversed(self.inside) if part in self.layers), "")
        self.look(LinearCall(layer, func, arguments, output, name, module))
        return output.clone()  # which may be overwritten, unlike what was looked at


def linear_calls(model: nn.Module, inputs: Tensor, then: Callable[[Tensor, list[LinearCall]], Any]) -> Any:
    """Run a copy of a network and look at the calls of linear maps that its layers make.

    The run is under a transform of ``torch.func``, where every layer is composed of ordinary operators, so that the
    effective weights of all methods are differentiable by: those of NormProp and its relatives are normalised, scaled,
    centred.

    Args:
        model: the network, in the mode to run in.
        inputs: a batch, (N, ...).
        then: is called within the transform with the outputs and the layers' calls, in order; outputs and calls are
            differentiable by ``torch.autograd.grad``.

    Returns:
        The tensors that `then` returns.

    Raises:
        ConfigError: if the network cannot run under such a transform.

    Example:
        >>> calls = linear_calls(nn.Linear(2, 3), torch.ones(1, 2), lambda output, calls: calls[0].output)
        >>> calls.shape
        torch.Size([1, 3])
    """
    calls: list[LinearCall] = []
    # Gradients are taken within the transform; what autograd notes around it would only take memory.
    with quietly(model, inputs) as twin, Watching(twin, calls.append):

        def run(zero: Tensor) -> tuple[Tensor, Any]:
            # Buffers that the forward pass writes to must belong to the transform.
            buffers = {name: buffer.clone() for name, buffer in twin.named_buffers()}
            output = torch.func.functional_call(twin, buffers, (inputs.detach() + zero,))
            return zero, then(output, [call for call in calls if call.layer])

        try:
            zero = torch.zeros((), dtype=inputs.dtype, device=inputs.device)
            results: Any = torch.func.vjp(run, zero, has_aux=True)
        except RuntimeError as error:
            raise ConfigError(
                f"{type(model).__name__}: the network cannot run under torch.func: {first_line(error)}"
            ) from error
    return results[2]
