"""What a training step holds in memory between forward and backward."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(loss: Callable[[], Tensor], excluded: Iterable[Tensor]) -> int:
    """Count the bytes that autograd keeps for the backward pass, exactly.

    Every saved tensor counts with the whole storage it keeps alive, and every storage counts once, however many views
    of it are saved.

    Args:
        loss: computes a loss; its graph is not run backward.
        excluded: tensors that are there anyway, such as parameters, buffers and the batch.

    Returns:
        Bytes. What an autograd function keeps outside ``save_for_backward`` is not seen.

    Example:
        >>> x = torch.ones(8, requires_grad=True)
        >>> saved_bytes(lambda: (2 * x).exp().sum(), [x])  # exp keeps its output
        32
    """
    kept: dict[int, int] = {}
    known = {_storage(tensor) for tensor in excluded}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(torch.compiler.disable(pack), lambda tensor: tensor):
        output = loss()  # keeps the graph, and so every storage counted, alive: no address is used twice
    del output
    return sum(kept.values())


def peak_bytes(step: Callable[[], None], device: torch.device) -> int | None:
    """Measure the most memory of a GPU that a step allocates at one time, above what it found allocated.

    Args:
        step: a training step.
        device: where it runs.

    Returns:
        Bytes, or None where there is no count of them (the CPU).

    Example:
        >>> peak_bytes(lambda: None, torch.device("cpu")) is None
        True
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _storage(tensor: Tensor) -> int:
    """The address that tells a storage from every other one alive."""
    return tensor.untyped_storage().data_ptr()
