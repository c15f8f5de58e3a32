"""Gradient noise: how far is the gradient of a mini-batch from that of all images?"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.diagnostics.diagnosis import Diagnosis, Subject, by_network, finite
from normprop.diagnostics.loss import gradients, labels_of
from normprop.diagnostics.plot import Line, Plot
from normprop.diagnostics.quiet import quietly
from normprop.errors import ConfigError

_CHUNK = 8  # gradients that are held at the same time
# Of the size of an image's gradient: the mean of all must be the batch's up to this, which C feels only by its square.
# Rounding moves single pre-activations across the kink of ReLU, so agreement is not to the last digit.
_AGREE = 1e-2


@dataclass(frozen=True)
class GradientNoise:
    r"""Noise of mini-batch gradients; see :func:`gradient_noise`.

    Args:
        samples: n, number of images.
        rate: eta, the learning rate that turns noise of gradients into noise of steps.
        sizes: |B|, sizes of the batches.
        noise: mean of :math:`\|g_B - g\|^2` over batches of each size.
        errors: standard errors of these means.
        deviation: C, mean over the images of :math:`\|g_i - g\|^2`.
        per_sample: whether C is exact, from the images' own gradients; else it is what batches of the largest size
            imply, as in a network whose samples influence each other no image has a gradient of its own.
        gradient: :math:`\|g\|^2`.
    """

    samples: int
    rate: float
    sizes: tuple[int, ...]
    noise: tuple[float, ...]
    errors: tuple[float, ...]
    deviation: float
    per_sample: bool
    gradient: float

    def predicted(self, size: int) -> float:
        r"""Noise of batches drawn without replacement: :math:`(C / |B|) (n - |B|) / (n - 1)`, below :math:`C / |B|`."""
        return self.deviation / size * _finite_population(self.samples, size)


def _finite_population(samples: int, size: int) -> float:
    """Factor of the variance of a mean of draws without replacement."""
    return (samples - size) / (samples - 1)


def gradient_noise(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    sizes: Sequence[int] | None = None,
    repeats: int = 10,
    rate: float = 0.1,
    seed: int = 0,
) -> GradientNoise:
    r"""Measure the noise of mini-batch gradients about the gradient g of all images, and its bound.

    .. math:: E\|\eta g_B - \eta g\|^2 = \frac{\eta^2}{|B|} C \frac{n - |B|}{n - 1} \le \frac{\eta^2}{|B|} C,
        \qquad C = \frac1n \sum_i \|g_i - g\|^2

    for batches without replacement, if the loss of an image does not depend on the others. Whether it does is found
    out: the mean of the images' own gradients must be g. In a network with batch norm in training mode it is not;
    there C is what the largest batches imply.

    Args:
        model: the network, in the mode to run in; a copy runs, from the same state for each batch.
        inputs: images, (n, ...), at least 3.
        labels: their classes.
        sizes: sizes of the batches, increasing, below n; by default powers of 2 up to n / 2, from 1 where C is exact,
            from 2 elsewhere.
        repeats: number of batches of each size, at least 2.
        rate: eta; scales the plots only.
        seed: of the draws.

    Returns:
        The noise.

    Raises:
        ConfigError: for sizes or a number of repeats that cannot work, or labels that do not fit.

    Source:
        Bjorck et al. 2018, Understanding Batch Normalization (noise of a step and learning rate).

    Example:
        >>> torch.manual_seed(0)
        <torch...>
        >>> found = gradient_noise(nn.Linear(4, 3), torch.randn(12, 4), torch.arange(12) % 3)
        >>> found.per_sample, found.sizes
        (True, (1, 2, 4))
    """
    samples = len(inputs)
    if samples < 3 or repeats < 2:
        raise ConfigError(
            f"gradient noise needs at least 3 images and 2 batches of a size, got {samples} images, repeats={repeats}"
        )
    _, whole = gradients(model, inputs, labels)
    deviation = sample_deviation(model, inputs, labels, whole)
    if sizes is None:
        sizes = [2**k for k in range(deviation is None, (samples // 2).bit_length())]
    if not sizes or sizes[0] < 1 or sizes[-1] >= samples or any(a >= b for a, b in pairwise(sizes)):
        raise ConfigError(
            f"gradient noise: sizes of batches must increase from 1 or more to less than the {samples} images, "
            f"got {list(sizes)}"
        )
    generator = torch.Generator().manual_seed(seed)
    noise, errors = [], []
    for size in sizes:
        distances = []
        for _ in range(repeats):
            batch = torch.randperm(samples, generator=generator)[:size].to(inputs.device)
            _, found = gradients(model, inputs[batch], labels[batch.to(labels.device)])
            distances.append(_squared_distance(found, whole))
        drawn = torch.tensor(distances, dtype=torch.float64)
        noise.append(drawn.mean().item())
        errors.append(drawn.std().item() / math.sqrt(repeats))
    exact = deviation is not None
    if deviation is None:
        deviation = noise[-1] * sizes[-1] / _finite_population(samples, sizes[-1])
    return GradientNoise(
        samples, rate, tuple(sizes), tuple(noise), tuple(errors), deviation, exact, _squared_distance(whole, {})
    )


def sample_deviation(model: nn.Module, inputs: Tensor, labels: Tensor, whole: Mapping[str, Tensor]) -> float | None:
    r"""Mean squared distance of the images' own gradients from that of all, :math:`\frac1n \sum_i \|g_i - g\|^2`.

    Args:
        model: the network.
        inputs: images, (n, ...).
        labels: their classes.
        whole: g, by name of the parameter.

    Returns:
        C, or ``None`` if images have no gradients of their own: if ``torch.func.vmap`` cannot map the network over
        them, or their mean is not g.

    Example:
        >>> layer, x, y = nn.Linear(2, 3), torch.eye(2), torch.tensor([0, 0])
        >>> round(sample_deviation(layer, x, y, gradients(layer, x, y)[1]), 3) > 0
        True
    """
    deviation = size = 0.0
    mean = {name: torch.zeros_like(value) for name, value in whole.items()}
    with quietly(model, inputs) as twin, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # operators that vmap maps one by one
        parameters = {name: twin.get_parameter(name).detach() for name in whole}

        def loss(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            # Buffers that the forward pass writes to must belong to the transform.
            buffers = {name: buffer.clone() for name, buffer in twin.named_buffers()}
            logits = torch.func.functional_call(twin, {**values, **buffers}, (image[None],))
            return F.cross_entropy(logits, label[None].long())

        per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")
        for images, own in zip(inputs.split(_CHUNK), labels.split(_CHUNK), strict=True):
            try:
                found = per_image(parameters, images, own)
            except (RuntimeError, ValueError):  # statistics of a batch: of one sample, or written to buffers
                return None
            for name, value in found.items():
                deviation += _square(value - whole[name])
                size += _square(value)
                mean[name] += value.sum(0) / len(inputs)
    if not _squared_distance(mean, whole) <= _AGREE**2 * size / len(inputs):
        return None
    return deviation / len(inputs)


def _square(value: Tensor) -> float:
    """Squared length."""
    length: float = torch.linalg.vector_norm(value).item()
    return length * length


def _squared_distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Squared distance of two gradients, of which either may lack parameters."""
    return sum(_square(a.get(name, 0) - b.get(name, torch.zeros(()))) for name in {**a, **b})


def measure(
    subject: Subject, sizes: Sequence[int] | None = None, repeats: int = 10, rate: float = 0.1, seed: int = 0
) -> GradientNoise:
    """Measure the noise of mini-batch gradients on the images of a subject.

    Args:
        subject: network, inputs and labels.
        sizes, repeats, rate, seed: as in :func:`gradient_noise`.

    Returns:
        The noise.

    Raises:
        ConfigError: without labels, or as :func:`gradient_noise`.

    Example:
        >>> subject = Subject("plain", nn.Linear(4, 3), torch.randn(12, 4), torch.arange(12) % 3)
        >>> measure(subject, sizes=(2, 6)).sizes
        (2, 6)
    """
    return gradient_noise(subject.model, subject.inputs, labels_of(subject), sizes, repeats, rate, seed)


def describe(results: Mapping[str, GradientNoise]) -> Diagnosis:
    """Put the noise of some networks side by side.

    Args:
        results: by network.

    Returns:
        What was found.

    Example:
        >>> found = GradientNoise(9, 0.1, (1, 2), (4.0, 1.75), (0.1, 0.1), 4.0, True, 2.0)
        >>> describe({"none": found}).numbers["none"]["noise_over_predicted"]
        [1.0, 1.0]
    """
    steps: list[Line] = []
    relative: list[Line] = []
    for name, found in results.items():
        scale = found.rate**2
        mean, error = ([scale * value for value in values] for values in (found.noise, found.errors))
        low, high = zip(*((max(m - 2 * e, m / 10), m + 2 * e) for m, e in zip(mean, error, strict=True)), strict=True)
        steps.append(Line(name, found.sizes, mean, low, high))
        steps.append(Line(name, found.sizes, [scale * found.predicted(b) for b in found.sizes], style="theory"))
        own = [noise / found.gradient if found.gradient else math.nan for noise in found.noise]
        relative.append(Line(name, found.sizes, own))
    rates = ", ".join(dict.fromkeys(f"{found.rate:g}" for found in results.values()))
    return Diagnosis(
        name="gradient-noise",
        title="How noisy are the steps of small batches?",
        look_for=(
            "A curve far above the others is a network whose small batches disagree; on the dashed line the noise is "
            "that of independent images, inversely proportional to the size of the batch."
        ),
        found=by_network(results, _words),
        numbers={name: _numbers(found) for name, found in results.items()},
        figures=(
            Plot(
                f"Noise of a step at rate {rates}; dashed: independent images",
                "images in the batch",
                "mean squared distance of steps",
                steps,
                x_scale="log",
                y_scale="log",
            ),
            Plot(
                "Noise of the gradient, relative to its squared length",
                "images in the batch",
                "mean squared distance / squared gradient",
                relative,
                x_scale="log",
                y_scale="log",
            ),
        ),
        source="Bjorck et al. 2018, Understanding Batch Normalization (bound on the noise of a step)",
    )


def _ratios(found: GradientNoise) -> list[float]:
    """Measured over predicted noise."""
    predicted = [found.predicted(size) for size in found.sizes]
    return [noise / p if p else math.nan for noise, p in zip(found.noise, predicted, strict=True)]


def _numbers(found: GradientNoise) -> dict[str, object]:
    return {
        "images": found.samples,
        "rate": found.rate,
        "batch_sizes": list(found.sizes),
        "noise": [finite(value) for value in found.noise],
        "standard_errors": [finite(value) for value in found.errors],
        "noise_over_predicted": [finite(value) for value in _ratios(found)],
        "deviation": finite(found.deviation),
        "deviation_from_single_images": found.per_sample,
        "squared_gradient": finite(found.gradient),
    }


def _words(found: GradientNoise) -> str:
    """What was found of one network."""
    if not math.isfinite(found.deviation + found.gradient):
        return "not known, as gradients are not finite."
    if not found.gradient:
        return "not known, as the gradient is 0."
    origin = "" if found.per_sample else f", as batches of {found.sizes[-1]} imply; no image has a gradient of its own"
    text = (
        f"the mean squared distance of an image's gradient from that of all images is "
        f"{found.deviation / found.gradient:.3g} times the squared length of the latter{origin}."
    )
    ratios = [value for value in _ratios(found) if math.isfinite(value)]
    if ratios:
        text += f" Batches have {min(ratios):.2g} to {max(ratios):.2g} times the noise that this predicts."
    return text
