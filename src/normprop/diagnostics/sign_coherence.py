"""Sign coherence: do the terms of a weight's gradient add up, or cancel?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from normprop.diagnostics.diagnosis import Diagnosis, Subject, by_network, finite
from normprop.diagnostics.linear_calls import LinearCall, linear_calls
from normprop.diagnostics.loss import cross_entropy, labels_of
from normprop.diagnostics.plot import Line, Plot
from normprop.errors import ConfigError


@dataclass(frozen=True)
class SignCoherence:
    r"""How far the terms of a gradient cancel; see :func:`sign_coherence`. Each a mean over the weight's entries.

    Args:
        layer: dotted name of the layer.
        terms: :math:`a = \sum_{bxy} |t_{bxy}|`.
        per_sample: :math:`b_1 = \sum_b |\sum_{xy} t_{bxy}|`.
        total: :math:`c = |\sum_{bxy} t_{bxy}|`.
    """

    layer: str
    terms: float
    per_sample: float
    total: float

    @property
    def within_samples(self) -> float:
        """a / b1: 1 if all positions of a sample agree; nan where all is 0."""
        return _ratio(self.terms, self.per_sample)

    @property
    def overall(self) -> float:
        """a / c: 1 if all positions of all samples agree."""
        return _ratio(self.terms, self.total)


def _ratio(above: float, below: float) -> float:
    return above / below if below else (math.inf if above else math.nan)


def sign_coherence(calls: Sequence[LinearCall], output_gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    r"""Sums over the terms of the gradient by each entry of a weight, exact.

    The gradient by an entry of a convolution is a sum over samples b and positions xy of terms
    :math:`t_{bxy} = d_{bxy} \, u_{b, x + i, y + j}`, d the gradient by the output, u the input. As
    :math:`|t| = |d| |u|`, the sum of their absolute values is the gradient that |d| and |u| give, and no term is ever
    stored.

    Args:
        calls: the calls of one weight, one or more; the first axis of their inputs is the samples'. The outputs do not
            matter.
        output_gradients: d for each call, shaped as its output.

    Returns:
        a, b1 and c for each entry, of the weight's shape: sums of the terms' absolute values, of the absolute values
        of the samples' gradients, and the absolute value of the gradient.

    Raises:
        ConfigError: if a gradient has another number of samples than the input.

    Source:
        Bjorck et al. 2018, Understanding Batch Normalization (signs of the terms of a convolution's gradient).

    Example:
        >>> u, w, d = torch.tensor([[1.0], [-2.0]]), torch.ones(1, 1), torch.tensor([[1.0], [1.0]])
        >>> call = LinearCall("", torch.nn.functional.linear, {"input": u, "weight": w}, u @ w.T)
        >>> [value.item() for value in sign_coherence([call], [d])]
        [3.0, 3.0, 1.0]
    """
    pairs = [(call, call.arguments["input"], d) for call, d in zip(calls, output_gradients, strict=True)]
    for call, u, d in pairs:
        if len(u) != len(d) or len(u) != len(pairs[0][1]):
            raise ConfigError(
                f"{call.layer or 'layer'}: input and gradient need equally many samples, got {len(u)} and {len(d)}"
            )
    weight = calls[0].arguments["weight"]
    terms = sum((_weight_gradient(call, u.abs(), d.abs()) for call, u, d in pairs), torch.zeros_like(weight))
    per_sample, total = torch.zeros_like(weight), torch.zeros_like(weight)
    for b in range(len(pairs[0][1])):
        sample = sum((_weight_gradient(call, u[b : b + 1], d[b : b + 1]) for call, u, d in pairs), torch.zeros(()))
        per_sample += sample.abs()
        total += sample
    return terms, per_sample, total.abs()


def _weight_gradient(call: LinearCall, u: Tensor, d: Tensor) -> Tensor:
    """Gradient by the weight of a linear map of u, whose output has the gradient d."""
    found: Any = torch.func.vjp(lambda w: call.again(input=u, weight=w, bias=None), call.arguments["weight"])
    gradient: Tensor = found[1](d)[0]
    return gradient


def measure(subject: Subject, layer: str | None = None) -> SignCoherence:
    """Measure how far the terms of the gradient of a layer's weight cancel.

    The weight is the one that the linear map is called with. For NormProp, weight norm and weight standardisation that
    is the normalised weight: its gradient is a sum of d times input; that of the layer's own parameter is a projection
    of it and has no such terms. The input is the one that the map is called with, after any padding by the layer but
    zeros. A linear layer without positions has a / b1 = 1.

    Args:
        subject: network, inputs and labels.
        layer: dotted name of the layer, as in :func:`normprop.training.statistics.watched`; by default the middle one.

    Returns:
        The sums, over all calls of the layer.

    Raises:
        ConfigError: without labels, or if the layer calls no linear map with one row for each image.

    Example:
        >>> from normprop.models import create
        >>> images = torch.randn(4, 3, 16, 16)
        >>> subject = Subject("batch", create("resnet8", (3, 16, 16), 10, "batch", 0.25), images, torch.arange(4))
        >>> found = measure(subject)
        >>> found.terms >= found.per_sample >= found.total
        True
    """
    labels, chosen = labels_of(subject), list[LinearCall]()

    def differentiate(output: Tensor, calls: list[LinearCall]) -> list[tuple[Tensor, Tensor, Tensor]]:
        chosen.extend(_of_layer(calls, layer, subject))
        outputs = [call.output for call in chosen]
        found = torch.autograd.grad(cross_entropy(output, labels), outputs, allow_unused=True)
        return [
            (call.arguments["input"], call.arguments["weight"], torch.zeros_like(call.output) if d is None else d)
            for call, d in zip(chosen, found, strict=True)
        ]

    # What left the transform stands in for what was noted within.
    tensors = linear_calls(subject.model, subject.inputs, differentiate)
    calls = [
        replace(call, arguments={**call.arguments, "input": u.detach(), "weight": weight.detach()})
        for call, (u, weight, _) in zip(chosen, tensors, strict=True)
    ]
    sums = sign_coherence(calls, [d.detach() for _, _, d in tensors])
    terms, per_sample, total = (value.double().mean().item() for value in sums)
    return SignCoherence(chosen[0].layer, terms, per_sample, total)


def _of_layer(calls: Sequence[LinearCall], layer: str | None, subject: Subject) -> list[LinearCall]:
    """The calls of one layer with a row for each image; a normaliser's own calls on statistics have none."""
    samples = len(subject.inputs)
    fitting = [call for call in calls if len(call.arguments["input"]) == samples]
    names = list(dict.fromkeys(call.layer for call in fitting))
    if layer is None and names:
        layer = names[len(names) // 2]
    if layer not in names:
        raise ConfigError(
            f"{subject.name}: no layer {layer or ''!r} that calls a linear map or convolution with one row for each of "
            f"the {samples} images; there are {', '.join(names) or 'none'}"
        )
    return [call for call in fitting if call.layer == layer]


def describe(results: Mapping[str, SignCoherence]) -> Diagnosis:
    """Put the coherence of some networks side by side.

    Args:
        results: by network.

    Returns:
        What was found.

    Example:
        >>> describe({"none": SignCoherence("1", 6.0, 3.0, 2.0)}).numbers["none"]["a_over_c"]
        3.0
    """
    ticks = [(0.0, "all terms: a"), (1.0, "per image: b1"), (2.0, "in all: c")]
    lines = [
        Line(name, [x for x, _ in ticks], [_ratio(value, found.terms) for value in _sums(found)])
        for name, found in results.items()
    ]
    return Diagnosis(
        name="sign-coherence",
        title="Do images and positions agree on where a weight should go?",
        look_for=(
            "A line that stays near 1 is a gradient whose terms share their sign, so that every image pushes the same "
            "way; a line that falls is one whose terms cancel."
        ),
        found=by_network(results, _words),
        numbers={
            name: {
                "layer": found.layer,
                "a": finite(found.terms),
                "b1": finite(found.per_sample),
                "c": finite(found.total),
                "a_over_b1": finite(found.within_samples),
                "a_over_c": finite(found.overall),
            }
            for name, found in results.items()
        },
        figures=(
            Plot(
                "What is left of the terms of a weight's gradient",
                "after the signs have met",
                "mean size, relative to a",
                lines,
                y_scale="log",
                x_ticks=ticks,
            ),
        ),
        source="Bjorck et al. 2018, Understanding Batch Normalization (signs of the terms of a convolution's gradient)",
    )


def _sums(found: SignCoherence) -> tuple[float, float, float]:
    return found.terms, found.per_sample, found.total


def _words(found: SignCoherence) -> str:
    """What was found of one network."""
    if not all(math.isfinite(value) for value in _sums(found)):
        return f"the gradient of layer {found.layer} is not finite."
    if not found.terms:
        return f"all terms of the gradient of layer {found.layer} are 0."
    return (
        f"without their signs, the terms of the gradient of layer {found.layer} add up to {found.within_samples:.3g} "
        f"times what is left of them within images (a/b1), and {found.overall:.3g} times what is left in all (a/c)."
    )
