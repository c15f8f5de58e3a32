"""The loss of labelled inputs, its gradients, and batches to train on."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.diagnostics.diagnosis import Subject
from normprop.diagnostics.quiet import call, quietly, trained
from normprop.errors import ConfigError


def labels_of(subject: Subject) -> Tensor:
    """Return the labels of a subject, which a loss needs.

    Raises:
        ConfigError: if there are none.

    Example:
        >>> labels_of(Subject("plain", nn.Identity(), torch.ones(1, 2), torch.tensor([1])))
        tensor([1])
    """
    if subject.labels is None:
        raise ConfigError(f"{subject.name}: the loss needs labels, but the subject has none; give it labels")
    return subject.labels


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of a batch, with errors that say what does not fit.

    Args:
        logits: (N, classes, *space).
        labels: classes, (N, *space), whole numbers.

    Returns:
        The loss, a scalar.

    Raises:
        ConfigError: if shapes, types or classes do not fit each other.

    Example:
        >>> round(cross_entropy(torch.zeros(2, 10), torch.tensor([3, 4])).item(), 4)
        2.3026
    """
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise ConfigError("cross-entropy needs a network that returns one tensor of logits, (N, classes)")
    if labels.shape != (len(logits), *logits.shape[2:]) or labels.is_floating_point():
        raise ConfigError(
            f"logits of shape {tuple(logits.shape)} need whole-number labels of shape "
            f"{(len(logits), *logits.shape[2:])}, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if not labels.numel():
        raise ConfigError("cross-entropy needs at least one image, got an empty batch")
    classes = logits.shape[1]
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ConfigError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but the network has {classes} classes, "
            f"0 to {classes - 1}"
        )
    return F.cross_entropy(logits, labels.long())


def gradients(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Gradient of the mean cross-entropy of a batch by each parameter that requires one.

    A copy runs in the network's mode: with batch norm in training mode that takes the batch's statistics, and
    leaves the running ones as they are.

    Args:
        model: the network.
        inputs: a batch, (N, ...).
        labels: its classes.

    Returns:
        The loss, and the gradients by name, in the order of the parameters; without those that the loss does not
        depend on.

    Raises:
        ConfigError: if no parameter requires a gradient, or if the labels do not fit.

    Example:
        >>> loss, found = gradients(nn.Linear(2, 3), torch.ones(4, 2), torch.tensor([0, 1, 2, 0]))
        >>> found["weight"].shape
        torch.Size([3, 2])
    """
    with quietly(model, inputs, grad=True) as twin:
        parameters = trained(twin)
        loss = cross_entropy(call(twin, inputs), labels)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return loss.item(), {name: value for name, value in zip(parameters, found, strict=True) if value is not None}


def batches_of(subject: Subject, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels of a subject in batches to train on.

    Args:
        subject: inputs and labels.
        batch_size: samples of a batch, 1 or more; a last one that is smaller is left out, unless it is the only one.

    Returns:
        The batches, in order.

    Raises:
        ConfigError: without labels.

    Example:
        >>> subject = Subject("plain", nn.Identity(), torch.ones(5, 2), torch.arange(5))
        >>> [len(labels) for _, labels in batches_of(subject, 2)]
        [2, 2]
    """
    batches = list(zip(subject.inputs.split(batch_size), labels_of(subject).split(batch_size), strict=True))
    return [batch for batch in batches if len(batch[1]) == batch_size] or batches
