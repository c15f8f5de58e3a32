"""Output gradients: does every image pull the outputs the same way?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from normprop.diagnostics.diagnosis import Diagnosis, Subject, by_network, finite
from normprop.diagnostics.loss import cross_entropy, labels_of
from normprop.diagnostics.plot import Figure, Heat, Line, Plot
from normprop.diagnostics.quiet import call, quietly
from normprop.errors import ConfigError

_ROWS = 100  # images of a heat map; more have no pixels of their own


@dataclass(frozen=True)
class OutputGradients:
    r"""Gradients of each image's loss by the logits; see :func:`output_gradients`.

    Args:
        gradients: :math:`d_{ic} = \partial L_i / \partial z_{ic}`, images by classes, (N, C), on the CPU.
        labels: classes of the images, (N,), on the CPU.
        class_means: mean over the images for each class: the gradient of the mean loss by the bias of the last layer.
        between: share of the variance of all entries that lies between the columns, 0 to 1. As each row sums to 0, it
            is also :math:`\|\bar d\|^2 / \overline{\|d_i\|^2}`, the share of the gradient that a bias can follow.
        dominating: class with the largest absolute mean.
        share: its share of the sum of the squared means, 1 / C to 1 - 1 / C.
        predicted: largest share of the images that are given the same class, 1 / C to 1.
    """

    gradients: Tensor
    labels: Tensor
    class_means: tuple[float, ...]
    between: float
    dominating: int
    share: float
    predicted: float


def output_gradients(logits: Tensor, labels: Tensor) -> OutputGradients:
    r"""Gradient of each image's cross-entropy by its logits, :math:`d_{ic} = p_{ic} - [y_i = c]`, and its columns.

    .. math:: \mathrm{between} = \frac{N \sum_c (\bar d_c - \bar d)^2}{\sum_{ic} (d_{ic} - \bar d)^2}

    A network that gives every image the same answer has columns that are constant but for the labels. A label is part
    of every row, so `between` stays below 1: a sure network that always says the same of C equally frequent classes
    has 1/2.

    Args:
        logits: outputs of the network, (N, C), C at least 2.
        labels: classes, (N,).

    Returns:
        The gradients, N times those of the mean loss, and how alike they are.

    Raises:
        ConfigError: if the logits are no matrix, have one column, or the labels do not fit.

    Source:
        Bjorck et al. 2018, Understanding Batch Normalization (gradients by the output at initialisation).

    Example:
        >>> found = output_gradients(torch.tensor([[50.0, 0.0], [50.0, 0.0]]), torch.tensor([0, 1]))
        >>> found.between, found.class_means
        (0.5, (0.5, -0.5))
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(f"output gradients need one row of two or more logits for each image, got {got}")
    # On the CPU, where there is double precision: there are few logits.
    outputs, labels = logits.detach().cpu().double().requires_grad_(), labels.detach().cpu()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(cross_entropy(outputs, labels) * len(outputs), outputs)
    means = found.mean(0)
    total = (found - found.mean()).square().sum()
    squares = means.square()
    return OutputGradients(
        gradients=found,
        labels=labels,
        class_means=tuple(means.tolist()),
        between=(len(found) * (means - means.mean()).square().sum() / total).item(),
        dominating=int(means.abs().argmax()),
        share=(squares.max() / squares.sum()).item(),
        predicted=outputs.detach().argmax(1).bincount().max().item() / len(found),
    )


def measure(subject: Subject) -> OutputGradients:
    """Measure the gradients by the outputs of a network, in its own mode and at the state that it is in.

    Args:
        subject: network, inputs and labels.

    Returns:
        The gradients.

    Raises:
        ConfigError: without labels, or if the network does not give each image a row of logits.

    Example:
        >>> layer = torch.nn.Linear(2, 3)
        >>> measure(Subject("plain", layer, torch.eye(2), torch.tensor([0, 1]))).gradients.shape
        torch.Size([2, 3])
    """
    labels = labels_of(subject)
    with quietly(subject.model, subject.inputs) as network:
        logits = call(network, subject.inputs, subject.name)
    return output_gradients(logits, labels)


def describe(results: Mapping[str, OutputGradients]) -> Diagnosis:
    """Put the output gradients of some networks side by side.

    Args:
        results: by network.

    Returns:
        What was found: the mean by class for all, the heat maps of the two that differ most.

    Example:
        >>> found = output_gradients(torch.tensor([[50.0, 0.0], [50.0, 0.0]]), torch.tensor([0, 1]))
        >>> describe({"none": found}).numbers["none"]["between"]
        0.5
    """
    ranked = sorted((n for n in results if math.isfinite(results[n].between)), key=lambda n: results[n].between)
    shown = [ranked[-1], ranked[0]] if len(ranked) > 1 else ranked
    heats: list[Figure] = [_heat(name, results[name]) for name in shown]
    means = Plot(
        "Mean gradient of each class: what the last bias sees",
        "class",
        "mean gradient by the logit",
        [Line(name, list(range(len(found.class_means))), found.class_means) for name, found in results.items()],
    )
    return Diagnosis(
        name="output-gradients",
        title="Does every image pull the outputs the same way?",
        look_for=(
            "A column of one colour is a class that every image is pushed away from, whatever it shows; in a healthy "
            "start only the blue marks of the right classes stand out."
        ),
        found=by_network(results, _words),
        numbers={
            name: {
                "between": finite(found.between),
                "class_means": [finite(mean) for mean in found.class_means],
                "dominating_class": found.dominating,
                "dominating_share": finite(found.share),
                "largest_share_of_predictions": found.predicted,
            }
            for name, found in results.items()
        },
        figures=(*heats, means),
        source=(
            "Bjorck et al. 2018, Understanding Batch Normalization (gradients by the output and by the last bias at "
            "initialisation)"
        ),
    )


def _heat(name: str, found: OutputGradients) -> Heat:
    """The gradients of some images, sorted by class."""
    images = found.labels[:_ROWS].argsort(stable=True)
    rows = found.gradients[images].tolist()
    return Heat(f"Gradient by the outputs, {name}", "class", "image, sorted by class", rows)


def _words(found: OutputGradients) -> str:
    """What was found of one network."""
    if not math.isfinite(found.between):
        return "not known, as its outputs are not finite or its gradients all 0."
    share = f"{found.share:.0%}" if math.isfinite(found.share) else "no share"
    return (
        f"{found.between:.1%} of the variance of the output gradients lies between the classes, the same for every "
        f"image; class {found.dominating} has {share} of the squared mean gradient, and {found.predicted:.0%} of the "
        f"images are given one class."
    )
