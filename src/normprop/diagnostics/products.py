"""Products with the Jacobian of a network or of its layers, which is never formed.

A linear function of a cotangent is differentiated once more for the product with a tangent, so one forward pass gives
both products: batch statistics, dropout and networks that remember what they saw are met in one and the same state.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from normprop.diagnostics.quiet import call, quietly
from normprop.errors import ConfigError, first_line
from normprop.training.statistics import watched


@dataclass(frozen=True)
class Linearisation:
    """The products with the Jacobian of an output by some tensors of its graph.

    Args:
        output: f(x).
        inputs: x, one tensor or several.
        cotangent: u, of the output's shape.
        pulled: J^T u, one for each input, with the graph from u; ``None`` where an input has no part in the output.
    """

    output: Tensor
    inputs: tuple[Tensor, ...]
    cotangent: Tensor
    pulled: tuple[Tensor | None, ...]

    def vjp(self, cotangent: Tensor) -> tuple[Tensor, ...]:
        """J^T u, one for each input."""
        found = torch.autograd.grad(
            self.output, self.inputs, cotangent.to(self.output), retain_graph=True, allow_unused=True
        )
        return tuple(
            torch.zeros_like(at) if grad is None else grad for at, grad in zip(self.inputs, found, strict=True)
        )

    def jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        """J v, of the output's shape."""
        pairs = [
            (grad, tangent.to(grad))
            for grad, tangent in zip(self.pulled, tangents, strict=True)
            if grad is not None and grad.requires_grad
        ]
        found = None
        if pairs:
            grads, given = zip(*pairs, strict=True)
            found = torch.autograd.grad(grads, self.cotangent, given, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(self.output) if found is None else found


def linearise(output: Tensor, inputs: Sequence[Tensor], path: str) -> Linearisation:
    """Prepare the products with the Jacobian of an output by tensors that it was computed from.

    Args:
        output: with a graph that leads back to the inputs.
        inputs: tensors of that graph, as many as wanted.
        path: what computed it, for messages.

    Returns:
        The products.

    Raises:
        ConfigError: if the output is not a floating point tensor, has no derivative, or none that can be
            differentiated once more.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> products = linearise(x.prod()[None] * x, [x], "f")
        >>> products.jvp([torch.tensor([1.0, 0.0])]), products.vjp(torch.tensor([1.0, 0.0]))
        (tensor([4., 4.]), (tensor([4., 1.]),))
    """
    if not (isinstance(output, Tensor) and output.is_floating_point()):
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(f"{path} returns {kind}; a Jacobian needs one floating point tensor: wrap it to return that")
    if not output.requires_grad:
        raise ConfigError(f"{path}: its output does not depend on what it is to be differentiated by; detach nothing")
    cotangent = torch.zeros_like(output, requires_grad=True)
    try:
        pulled = torch.autograd.grad(output, inputs, cotangent, create_graph=True, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"{path} cannot be differentiated twice: {first_line(error)}") from error
    return Linearisation(output, tuple(inputs), cotangent, pulled)


@contextmanager
def differentiably(model: nn.Module, inputs: Tensor, seed: int = 0) -> Iterator[nn.Module]:
    """A copy of a network as from :func:`~normprop.diagnostics.quiet.quietly`, whose derivatives can be taken twice.

    Args:
        model: the network; it stays as it is, its buffers included.
        inputs: what it will be given, a floating point batch.
        seed: where random states start inside.

    Returns:
        The copy.

    Raises:
        ConfigError: if the inputs are empty or not floating point, or the network cannot be copied.

    Example:
        >>> model = nn.BatchNorm1d(1)
        >>> with differentiably(model, torch.ones(2, 1)) as same:
        ...     _ = same(torch.ones(2, 1))
        >>> model.running_mean
        tensor([0.])
    """
    if not (isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim and inputs.numel()):
        kind = f"{tuple(inputs.shape)} of {inputs.dtype}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ConfigError(f"inputs: expected a floating point batch (N, ...) of at least one sample, got {kind}")
    with (
        torch.inference_mode(False),
        quietly(model, inputs, seed=seed, grad=True) as copied,
        sdpa_kernel(SDPBackend.MATH),  # the fused attentions cannot be differentiated twice
    ):
        yield copied


@dataclass(frozen=True)
class LayerCall:
    """A call of a layer inside a forward pass.

    Args:
        name: dotted name of the layer.
        module: the layer.
        input: what it was given, a tensor of the graph.
        output: what it returned, a tensor of the graph.
    """

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor


def run(model: nn.Module, inputs: Tensor) -> tuple[LayerCall, list[LayerCall]]:
    """Run a network that may be changed, and keep what enters and leaves its watched layers, in the order of calls.

    Args:
        model: a copy, as from :func:`differentiably`.
        inputs: a batch.

    Returns:
        The call of the network, under the name "", and those of the layers from one tensor to one.

    Raises:
        ConfigError: if the network does not take the inputs.

    Example:
        >>> whole, layers = run(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), torch.ones(4, 2))
        >>> [(call.name, tuple(call.input.shape), tuple(call.output.shape)) for call in layers]
        [('0', (4, 2), (4, 3)), ('1', (4, 3), (4, 1))]
    """
    entered: dict[nn.Module, Tensor] = {}
    calls: list[LayerCall] = []

    def enter(module: nn.Module, args: Any) -> Any:
        entered.pop(module, None)
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            entered[module] = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            return entered[module].clone(), *args[1:]  # the layer may overwrite what it is given
        return None

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            given = entered.pop(module, None)
            if given is None or not isinstance(output, Tensor):
                return None
            calls.append(LayerCall(name, module, given, output))
            return output.clone()  # and whoever comes next what it returns

        return hook

    # Known layers that are differentiated twice ask for the gradients of their own parameters on the way.
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    start = inputs.detach().clone().requires_grad_()
    with ExitStack() as stack:
        for name, layer in watched(model):
            stack.callback(layer.register_forward_pre_hook(enter).remove)
            stack.callback(layer.register_forward_hook(leave(name)).remove)
        output = call(model, start.clone())
    return LayerCall("", model, start, output), calls
