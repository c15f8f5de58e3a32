"""Live moments of activations other than ReLU, worked out for all layers at once as :mod:`normprop.nn.known` says.

A closed form such as GELU's is some fifty operators on tiny tensors, forward and backward anew in every layer. Of many
layers together it costs as much as of one; and as it works element by element, its derivatives by gain and bias are
numbers, so that each layer's backward is two products.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, cat

from normprop.functional import live_normalization
from normprop.moments import Rule


class KnownMoments(NamedTuple):
    """What is left of a normalisation after the linear map, and its derivatives, each (out,).

    ``mean`` and ``reciprocal`` are those of :class:`normprop.functional.Normalization`; ``by_gain`` and ``by_bias``
    their derivatives, that of the mean first.
    """

    rule: Rule
    mean: Tensor
    reciprocal: Tensor
    by_gain: tuple[Tensor, Tensor]
    by_bias: tuple[Tensor, Tensor]


def moments_together(parameters: Sequence[tuple[Tensor, Tensor | None]], rule: Rule) -> list[KnownMoments]:
    """Work out the live moments of many layers of one activation together.

    Args:
        parameters: gain and bias of each layer, (out,), all on one device and of one type.
        rule: the activation, without parameters of its own.

    Returns:
        Those of each.

    Example:
        >>> from normprop.moments import resolve
        >>> known = moments_together([(torch.ones(2), None), (torch.ones(1), torch.zeros(1))], resolve("gelu"))
        >>> [len(moments.mean) for moments in known], round(float(known[1].mean), 3)
        ([2, 1], 0.48)
    """
    with torch.enable_grad():
        gains = cat([gain.detach() for gain, _ in parameters]).requires_grad_()
        biases = [gain.new_zeros(gain.shape) if bias is None else bias.detach() for gain, bias in parameters]
        inputs = gains, cat(biases).requires_grad_()
        mean, reciprocal = live_normalization(rule, *inputs)
        of_mean = torch.autograd.grad(mean.sum(), inputs, retain_graph=True, materialize_grads=True)
        of_reciprocal = torch.autograd.grad(reciprocal.sum(), inputs, materialize_grads=True)
    sizes = [len(gain) for gain, _ in parameters]
    whole = mean.detach(), reciprocal.detach(), of_mean[0], of_reciprocal[0], of_mean[1], of_reciprocal[1]
    parts = zip(*(values.split(sizes) for values in whole), strict=True)
    return [KnownMoments(rule, part[0], part[1], part[2:4], part[4:6]) for part in parts]


class Noted(torch.autograd.Function):
    """Mean and reciprocal deviation of :class:`KnownMoments` as functions of gain and bias."""

    @staticmethod
    def forward(ctx: Any, gain: Tensor, bias: Tensor | None, known: KnownMoments) -> tuple[Tensor, Tensor]:
        """Return what is known."""
        ctx.known = known
        ctx.save_for_backward(gain, bias)
        return known.mean.detach(), known.reciprocal.detach()

    @staticmethod
    def backward(ctx: Any, by_mean: Tensor, by_reciprocal: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of gain and bias."""
        known: KnownMoments = ctx.known
        needs = ctx.needs_input_grad
        if not torch.is_grad_enabled():
            slopes = zip(needs, (known.by_gain, known.by_bias), strict=False)
            return *(torch.addcmul(by_mean * a, by_reciprocal, b) if need else None for need, (a, b) in slopes), None
        gain, bias = ctx.saved_tensors
        inputs = [value for value, need in zip((gain, bias), needs, strict=False) if need]
        outputs = live_normalization(known.rule, gain, torch.zeros_like(gain) if bias is None else bias)
        by = by_mean, by_reciprocal
        grads = iter(torch.autograd.grad(outputs, inputs, by, create_graph=True, materialize_grads=True))
        return *(next(grads) if need else None for need in needs[:2]), None


# torch inspects the signature of forward at every call unless it finds one ready.
Noted.forward.__signature__ = inspect.signature(Noted.forward)  # type: ignore[attr-defined]
