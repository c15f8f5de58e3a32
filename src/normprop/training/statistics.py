"""Mean and standard deviation of what each layer puts out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normprop.training.groups import UNDECAYED
from normprop.training.records import LayerRecord


def watched(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the layers of a model whose outputs tell how the signal travels.

    A layer is the largest part of the model that holds a single linear map: a NormProp layer, or the block of a
    convolution with its normaliser and activation, so that methods can be compared layer by layer.

    Args:
        model: the network.

    Returns:
        Dotted names and modules, each module once, in the model's order; a model that is itself a linear map is its
        only layer, under the name of its class.

    Example:
        >>> block = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> [name for name, _ in watched(nn.Sequential(nn.Flatten(), block, nn.Linear(3, 2)))]
        ['1', '2']
    """
    if _is_linear_map(model):
        return [(type(model).__name__, model)]
    first: dict[int, tuple[str, nn.Module]] = {}
    for name, layer in _layers(model, ""):
        first.setdefault(id(layer), (name, layer))
    return list(first.values())


def _is_linear_map(module: nn.Module) -> bool:
    """Tell whether a module multiplies by a weight of its own."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim >= 2 and not isinstance(module, UNDECAYED)


def _layers(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Walk down to the parts with a single linear map."""
    for name, child in module.named_children():
        maps = sum(_is_linear_map(part) for part in child.modules())
        if maps == 1:
            yield prefix + name, child
        elif maps > 1:
            yield from _layers(child, f"{prefix}{name}.")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients for the block; then each module back into its own mode.

    Args:
        model: the network.

    Example:
        >>> model = nn.Dropout()
        >>> with evaluating(model):
        ...     print(model.training)
        False
        >>> model.training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def recording(layers: Sequence[tuple[str, nn.Module]]) -> Iterator[dict[str, list[Tensor]]]:
    """Record mean and variance of each output of some layers for the block.

    Args:
        layers: names and modules.

    Returns:
        For each name the pairs (mean, variance) of its outputs, in the order of the calls.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> with recording([("layer", model)]) as outputs:
        ...     _ = model(torch.ones(2, 4))
        >>> [pair.shape for pair in outputs["layer"]]
        [torch.Size([2])]
    """
    outputs: dict[str, list[Tensor]] = {name: [] for name, _ in layers}

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Tensor) -> None:
            values = output.detach()
            values = values if values.dtype == torch.float64 else values.float()
            outputs[name].append(torch.stack([values.mean(), values.var(correction=0)]))

        return record

    with ExitStack() as stack:
        for name, layer in layers:
            stack.callback(layer.register_forward_hook(hook(name)).remove)
        yield outputs


def measure(
    model: nn.Module, probe: Tensor, layers: Sequence[tuple[str, nn.Module]] | None = None
) -> list[LayerRecord]:
    """Measure the output of each layer of a model on a probe, in evaluation mode.

    Args:
        model: the network.
        probe: a batch of inputs.
        layers: names and modules; ``None`` for :func:`watched`.

    Returns:
        Mean and standard deviation over samples, channels and positions, for each layer that was called; over all
        calls of a layer that is called more than once.

    Example:
        >>> measure(nn.Sequential(nn.Identity(), nn.Linear(1, 1)).requires_grad_(False), torch.ones(2, 1))[0].std
        0.0
    """
    with evaluating(model), recording(watched(model) if layers is None else layers) as outputs:
        model(probe)
    return summarize(outputs)


def summarize(outputs: Mapping[str, list[Tensor]]) -> list[LayerRecord]:
    """Turn what :func:`recording` gave into numbers, with one wait for the device.

    Args:
        outputs: for each layer the pairs (mean, variance) of its outputs.

    Returns:
        Mean and standard deviation for each layer that was called; over all calls of a layer called more than once.

    Example:
        >>> summarize({"a": [torch.tensor([1.0, 4.0])], "b": []})
        [LayerRecord(layer='a', mean=1.0, std=2.0)]
    """
    called = {name: pairs for name, pairs in outputs.items() if pairs}
    rows = []
    for pairs in called.values():
        means, variances = torch.stack(pairs).unbind(1)
        # Var = E[Var] + Var[E] over calls, which put out equally many values.
        rows.append(torch.stack([means.mean(), (variances.mean() + means.var(correction=0)).sqrt()]))
    numbers = torch.stack(rows).tolist() if rows else []
    return [LayerRecord(name, mean, std) for name, (mean, std) in zip(called, numbers, strict=True)]
