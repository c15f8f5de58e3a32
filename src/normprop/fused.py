"""The two inner loops of a NormProp layer as autograd functions: few passes forward, few backward.

Both are ordinary differentiable functions, higher derivatives, vmap, compile and export included. What the backward
needs again is an output of the forward; where the backward is itself differentiated, it is computed anew.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

VARIANCE_FLOOR = 1e-3
"""Smallest variance that a live activation is taken to have, relative to its input's: see ``standard_deviation``."""


def filters(weight: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """View a weight as (groups, fan-in, filters per group, kernel), so that one filter spans the axes 1 and 3.

    Args:
        weight: (out, in / groups, *kernel), or (in, out / groups, *kernel) of a transposed convolution.
        groups: number of groups of the convolution.
        transposed: whether the layout is that of a transposed convolution.

    Returns:
        A view of ``weight`` with four axes.

    Example:
        >>> filters(torch.zeros(6, 2, 3, 3), groups=2).shape
        torch.Size([6, 18, 1, 1])
        >>> filters(torch.zeros(4, 5, 3, 3), groups=2, transposed=True).shape
        torch.Size([2, 2, 5, 9])
    """
    if transposed:
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return weight.reshape(weight.shape[0], -1, 1, 1)


def filter_statistics(rows: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """Mean (0 without ``center``) and reciprocal norm of every filter; a zero filter has reciprocal norm 0.

    Args:
        rows: weight as seen by :func:`filters`.
        center: whether the norm is taken after subtracting the filter's mean.

    Returns:
        Mean and reciprocal norm, each (groups, 1, filters per group, 1).

    Example:
        >>> rows = filters(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        >>> mean, inverse = filter_statistics(rows, center=False)
        >>> inverse.flatten()
        tensor([0.2000, 0.0000])
    """
    if center:
        mean = rows.mean((1, 3), keepdim=True)
        norm = torch.linalg.vector_norm(rows - mean, dim=(1, 3), keepdim=True)
        zero = norm <= mean.abs() * rounding(rows)
    else:
        mean = rows.new_zeros(())
        norm = torch.linalg.vector_norm(rows, dim=(1, 3), keepdim=True)
        zero = norm == 0
    return mean, norm.masked_fill(zero, math.inf).reciprocal()


def rounding(rows: Tensor) -> float:
    """Bound what rounding leaves of a constant filter of mean 1 after centring: that is zero, not a direction.

    Args:
        rows: weight as seen by :func:`filters`, or (out, fan-in).

    Returns:
        Largest norm.

    Example:
        >>> rounding(torch.zeros(4, 16)) < 1e-5
        True
    """
    return 8 * torch.finfo(rows.dtype).eps * math.sqrt(rows.shape[1] * math.prod(rows.shape[3:]))


def at_least_float32(value: Tensor) -> Tensor:
    """Return a half-precision tensor in float32, others as they are: norms and moments need the range."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def rescale(rows: Tensor, mean: Tensor, factor: Tensor, center: bool) -> Tensor:
    """Return ``factor * (rows - mean)`` in one pass, where ``mean`` is 0 without ``center``."""
    return torch.addcmul(-mean * factor, rows, factor) if center else rows * factor


class NormalizeFilters(torch.autograd.Function):
    """``factor * (rows - mean)`` with factor = scale / norm: three passes over the weight forward, four backward.

    With w the unit filter and G the incoming gradient (centred when the filters are),
    dL/dW = factor (G - w <w, G>) and dL/dscale = <w, G>.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, scale: Tensor, center: bool, groups: int, transposed: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normalised weight and, for the backward, mean and reciprocal norm of its filters."""
        rows = filters(weight, groups, transposed)
        mean, inverse = filter_statistics(rows, center)
        normalized = rescale(rows, mean, inverse * scale.reshape(inverse.shape), center)
        return normalized.reshape(weight.shape), mean, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep what the backward needs."""
        weight, scale, ctx.center, ctx.groups, ctx.transposed = inputs
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.save_for_backward(weight, scale, output[1], output[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of weight and scale."""
        weight, scale, mean, inverse = ctx.saved_tensors
        rows = filters(weight, ctx.groups, ctx.transposed)
        outer = filters(grad, ctx.groups, ctx.transposed)
        if torch.is_grad_enabled():
            mean, inverse = filter_statistics(rows, ctx.center)
        inner = (outer * rows).sum((1, 3), keepdim=True)
        factor = inverse * scale.reshape(inverse.shape)
        if ctx.center:
            total = outer.sum((1, 3), keepdim=True)
            inner = (inner - mean * total) * inverse  # <w, G>
            slope = -factor * inverse * inner
            offset = -slope * mean - factor * total / (rows.shape[1] * rows.shape[3])
            by_rows = torch.addcmul(torch.addcmul(offset, rows, slope), outer, factor)
        else:
            inner = inner * inverse
            by_rows = torch.addcmul(rows * (-factor * inverse * inner), outer, factor)
        return by_rows.reshape(weight.shape), inner.reshape(scale.shape), None, None, None


class LiveReLU(torch.autograd.Function):
    r"""What surrounds the linear map of a ReLU layer with live moments: scale, shift and mean.

    With :math:`a = b / |g|` the ReLU of N(b, g^2) has mean |g| h and variance g^2 v, where
    :math:`h = a \Phi + \varphi` and :math:`v = (a^2 + 1) \Phi + a \varphi - h^2`; so, with :math:`r = v^{-1/2}`,
    the scale is sign(g) r, the shift a r and the mean h r: functions of a alone. h' is :math:`\Phi` and v' is
    :math:`2 h (1 - \Phi)`.
    """

    generate_vmap_rule = True

    @staticmethod
    def _terms(gain: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        """Return |g|, a, Phi, h and v."""
        size = gain.abs().clamp_min(1e-12)
        a = bias / size
        below = torch.erfc(a * math.sqrt(0.5)) * 0.5  # 1 - Phi
        above = 1 - below  # where this cancels, v is below its floor
        density = torch.exp(a.square() * -0.5) * (1 / math.sqrt(2 * math.pi))
        h = torch.addcmul(density, a, above)
        # v rewritten as Phi + h (a (1 - Phi) - phi), which does not cancel where a is large.
        return size, a, above, h, torch.addcmul(above, h, torch.addcmul(-density, a, below))

    @staticmethod
    def forward(gain: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        """Return scale, shift and mean, each (out,), and the terms for the backward."""
        terms = LiveReLU._terms(gain, bias)
        _, a, _, h, v = terms
        r = v.clamp_min(VARIANCE_FLOOR).rsqrt()
        return torch.copysign(r, gain), a * r, h * r, *terms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        """Keep what the backward needs."""
        ctx.mark_non_differentiable(*output[3:])
        ctx.save_for_backward(*inputs, *output[3:])

    @staticmethod
    def backward(ctx: Any, scale: Tensor, shift: Tensor, mean: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of gain and bias."""
        gain, bias, *terms = ctx.saved_tensors
        slopes = LiveReLU.slopes(gain, LiveReLU._terms(gain, bias) if torch.is_grad_enabled() else terms)
        by_bias = torch.addcmul(torch.addcmul(scale * slopes[0], shift, slopes[1]), mean, slopes[2])
        return by_bias * slopes[3], by_bias

    @staticmethod
    def slopes(gain: Tensor, terms: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the derivatives by the bias of scale, shift and mean, and what turns their sum into one by the gain.

        Args:
            gain: gamma, (out,).
            terms: what ``forward`` returns after scale, shift and mean.

        Returns:
            Four tensors, each (out,).
        """
        size, a, above, h, v = terms
        floored = v.clamp_min(VARIANCE_FLOOR)
        r = floored.rsqrt()
        # dr/da = -r / v * v' / 2, and 0 on the floor
        slope = (r / floored * h * (above - 1)).masked_fill(v < VARIANCE_FLOOR, 0.0) / size
        sign = gain.sign()
        direct = r / size
        return slope * sign, torch.addcmul(direct, a, slope), torch.addcmul(direct * above, h, slope), -a * sign


for _function in (NormalizeFilters, LiveReLU):
    # torch inspects the signature of forward at every call unless it finds one ready: 20 us, as much as all the rest.
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[attr-defined, union-attr]
