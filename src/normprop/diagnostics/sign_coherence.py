"""Sign coherence: do the terms of a weight's gradient add up, or cancel?"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normprop.diagnostics.diagnosis import Diagnosis, Subject
from normprop.diagnostics.gradient_histogram import cross_entropy, finite, labels_of
from normprop.diagnostics.plot import Line, Plot
from normprop.errors import ConfigError
from normprop.training.random_state import preserved
from normprop.training.statistics import watched

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class LinearCall:
    """One call of a linear map while a network ran.

    Args:
        layer: dotted name of the layer that made it.
        function: ``torch.nn.functional``'s linear or convolution.
        arguments: its arguments by name; "weight" is the effective one, after whatever the layer does to its own.
        output: what it returned.
    """

    layer: str
    function: Callable[..., Tensor]
    arguments: dict[str, Any]
    output: Tensor


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


class _Recorder(TorchFunctionMode):
    """Notes the calls of linear maps by the layer that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.layer: str | None = None
        self.calls: list[LinearCall] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function; note its arguments if it is a linear map."""
        output = func(*args, **(kwargs or {}))
        if self.layer is not None and func in (F.linear, F.conv1d, F.conv2d, F.conv3d):
            arguments = {**dict(zip(_ARGUMENTS, args, strict=False)), **(kwargs or {})}
            self.calls.append(LinearCall(self.layer, func, arguments, output))
            return output.clone()  # which may be overwritten, unlike what is differentiated by
        return output


def linear_calls(model: nn.Module, inputs: Tensor, then: Callable[[Tensor, list[LinearCall]], Any]) -> Any:
    """Run a copy of a network and look at the calls of linear maps that its layers make.

    The run is under a transform of ``torch.func``, where every layer is composed of ordinary operators, so that the
    effective weights of all methods are seen: those of NormProp and its relatives are normalised, scaled, centred.

    Args:
        model: the network, in the mode to run in.
        inputs: a batch, (N, ...).
        then: is called within the transform with the outputs and the calls, in order; outputs and calls are
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
    twin = copy.deepcopy(model)
    recorder = _Recorder()

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            recorder.layer = name

        return hook

    for name, layer in watched(twin):
        layer.register_forward_pre_hook(enter(name), prepend=True)
        layer.register_forward_hook(lambda *_: setattr(recorder, "layer", None))

    def run(zero: Tensor) -> tuple[Tensor, Any]:
        # Buffers that the forward pass writes to must belong to the transform.
        buffers = {name: buffer.clone() for name, buffer in twin.named_buffers()}
        output = torch.func.functional_call(twin, buffers, (inputs.detach() + zero,))
        return zero, then(output, recorder.calls)

    # Gradients are taken within the transform; what autograd notes around it would only take memory.
    with preserved(), torch.no_grad(), recorder:
        try:
            zero = torch.zeros((), dtype=inputs.dtype, device=inputs.device)
            results: Any = torch.func.vjp(run, zero, has_aux=True)
        except RuntimeError as error:
            message = str(error).splitlines()[0]
            raise ConfigError(f"{type(model).__name__}: the network cannot run under torch.func: {message}") from error
    return results[2]


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
        >>> call = LinearCall("", F.linear, {"input": u, "weight": w}, u @ w.T)
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
    arguments = {**call.arguments, "bias": None, "input": u}
    found: Any = torch.func.vjp(lambda w: call.function(**{**arguments, "weight": w}), call.arguments["weight"])
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
        found=(
            "The terms of a gradient, taken without their signs, add up to so many times what is left within each "
            "image (a/b1), and in all (a/c): "
            + "; ".join(f"{name} {_words(found)}" for name, found in results.items())
            + "."
        ),
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
    """One network's result."""
    if not all(math.isfinite(value) for value in _sums(found)):
        return f"not known, as the gradient is not finite ({found.layer})"
    if not found.terms:
        return f"not known, as all terms are 0 ({found.layer})"
    return f"{found.within_samples:.3g} and {found.overall:.3g} ({found.layer})"
