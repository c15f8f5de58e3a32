"""Softmax and what is built on it. Logits are taken as Gaussian, so that their exponentials are log-normal."""

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normprop.graph.rules.arithmetic import reduced_axes, squeezed
from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Signal

_STEEPEST = 40.0  # variance of logits beyond which a softmax is a choice of one


def shares(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Moments of softmax over the last axis, of ``count`` logits that are all alike where the axis has length 1.

    p_i = sigmoid(x_i - L_i), where L_i, the logarithm of the sum of the other exponentials, is independent of x_i and
    taken as Gaussian with the moments of :func:`log_sum`. Exact for two logits.

    Args:
        mean: means of the logits, minus infinity for those that take no part.
        var: their variances.
        count: their number.

    Returns:
        Mean and variance of the shares.

    Source:
        L. F. Fenton, The sum of log-normal probability distributions, IRE Transactions 1960, for L.

    Example:
        >>> mean, var = shares(torch.zeros(1), torch.zeros(1), 4)
        >>> round(float(mean), 4), round(float(var), 6)
        (0.25, 0.0)
    """
    mean, var = torch.broadcast_tensors(mean, var.clamp_max(_STEEPEST))
    log_weight = mean + var / 2
    copies = count / mean.shape[-1]
    total = torch.logsumexp(log_weight, -1, keepdim=True) + math.log(copies)
    share = torch.exp(log_weight - total)
    excess = share.square() * torch.expm1(var)
    others = (1.0 - share).clamp_min(1e-20)
    spread = torch.log1p((excess.sum(-1, keepdim=True) * copies - excess).clamp_min(0.0) / others.square())
    distance = (mean - (total + others.log() - spread / 2)).clamp(-80.0, 80.0)
    first, second = _sigmoid(distance, (var + spread).clamp_min(torch.finfo(var.dtype).tiny ** 0.5).sqrt())
    return first / (first.sum(-1, keepdim=True) * copies), (second - first.square()).clamp_min(0.0)


_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(20)


def _sigmoid(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """E[sigmoid] and E[sigmoid^2] of Gaussians, node by node: there are as many of them as pairs of tokens."""
    first = second = torch.zeros_like(mean)
    for node, weight in zip(_NODES.tolist(), (_WEIGHTS / _WEIGHTS.sum()).tolist(), strict=True):
        value = torch.sigmoid(torch.add(mean, std, alpha=node))
        first, second = torch.add(first, value, alpha=weight), torch.addcmul(second, value, value, value=weight)
    return first, second


def _last(value: Tensor, x: Signal, axis: int) -> Tensor:
    """A moment with one axis at full length and last."""
    size = [x.shape[i] if i == axis else 1 for i in range(len(x.shape))]
    return value.expand(torch.broadcast_shapes(value.shape, size)).transpose(axis, -1)


@rule("softmax", "_softmax", "_safe_softmax")
def softmax(call: Call) -> Signal:
    """Softmax of Gaussian logits: p_i = sigmoid(x_i - L_i), L_i the logarithm of the other logits' log-normal sum."""
    x = call.inputs[0]
    axis = call["dim"] % len(x.shape)
    mean, var = shares(x.mean.transpose(axis, -1), x.var.transpose(axis, -1), x.shape[axis])
    last = axis == len(x.shape) - 1
    return Signal(mean.transpose(axis, -1), var.transpose(axis, -1), x.shape, repeat=x.repeat, simplex=last)


@rule("logsumexp")
def logsumexp(call: Call) -> Signal:
    """Logarithm of a sum taken as log-normal: variance s = log(1 + sum q^2 (e^v - 1)), mean log E - s/2."""
    x = call["self"]
    axes = reduced_axes(call, x)
    mean, var = x.mean, x.var
    for axis in axes:
        mean, var = log_sum(_last(mean, x, axis), _last(var, x, axis))
        mean, var = mean.transpose(axis, -1), var.transpose(axis, -1)
    return Signal(*squeezed(mean, var, axes, call), call.shape)


def log_sum(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of the logarithm of a sum of log-normal values over the last axis, the sum taken as log-normal."""
    mean, var = torch.broadcast_tensors(mean, var.clamp_max(_STEEPEST))
    share = torch.softmax(mean + var / 2, -1)
    spread = torch.log1p((share.square() * torch.expm1(var)).sum(-1, keepdim=True))
    return torch.logsumexp(mean + var / 2, -1, keepdim=True) - spread / 2, spread


@rule("log_softmax", "_log_softmax")
def log_softmax(call: Call) -> Signal:
    """Logit less the logarithm L of the sum: variances add, less twice cov(x_i, L) = v_i E[p_i] (Stein)."""
    x = call.inputs[0]
    axis = call["dim"] % len(x.shape)
    mean, var = _last(x.mean, x, axis), _last(x.var, x, axis)
    total, spread = log_sum(mean, var)
    share = torch.softmax(mean + var.clamp_max(_STEEPEST) / 2, -1)
    result = (var + spread - 2.0 * var * share).clamp_min(0.0)
    return Signal((mean - total).transpose(axis, -1), result.transpose(axis, -1), x.shape, repeat=x.repeat)


@rule(
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_attention_math_for_mps",
)
def attention(call: Call) -> Any:
    """softmax(q k^T scale + mask) v of independent q, k, v; the mean of v that all keys share passes unchanged."""
    query, key, value = (call[name] for name in ("query", "key", "value"))
    shapes = [tuple(part.shape) for part in (query, key, value)]
    width, keys = shapes[0][-1], shapes[1][-2]
    wide = functools.reduce(torch.promote_types, (_dtype(part) for part in (query, key, value)))
    (mq, vq), (mk, vk), (mv, vv) = (_tokens(part, wide) for part in (query, key, value))
    if call.get("enable_gqa", False):
        copies = shapes[0][-3] // shapes[1][-3]
        mk, vk, mv, vv = (_repeated(part, copies) for part in (mk, vk, mv, vv))
    scale = call.get("scale", width**-0.5)
    mv, vv = (part.expand(*part.shape[:-2], keys, part.shape[-1]) for part in (mv, vv))
    # What all keys have in common moves no share from one to another.
    common = mk - mk.mean(-2, keepdim=True)
    logits = (mq @ mk.mT) * scale
    spread = ((vq + mq.square()) @ vk.mT + vq @ common.square().mT) * scale**2
    mask = _mask(call, shapes[0][-2], keys, logits)
    if mask is not None:
        logits = logits + (mask.mean if isinstance(mask, Signal) else mask)
        spread = spread + mask.var if isinstance(mask, Signal) else spread
    mean, var = (part.expand(*part.shape[:-1], keys) for part in shares(logits, spread, keys))
    p = float(call.get("dropout_p", 0.0))
    result = mean @ mv
    centred = var @ mv.square() - 2.0 * (var @ mv) * result + var.sum(-1, keepdim=True) * result.square()
    second = mean.square() + var
    varied = second @ vv + centred.clamp_min(0.0)
    if p > 0.0:  # dropped shares no longer add up to one
        varied = (second @ vv) / (1.0 - p) + centred.clamp_min(0.0) + second @ mv.square() * (p / (1.0 - p))
    shape = (*shapes[0][:-1], shapes[2][-1])
    output = Signal(result, varied, shape, repeat=max(part.repeat for part in call.inputs))
    return output if call.node.shape is not None else (output, *[None] * 8)


def _dtype(value: Any) -> torch.dtype:
    dtype: torch.dtype = value.mean.dtype if isinstance(value, Signal) else value.dtype
    return torch.promote_types(dtype, torch.float32)


def _tokens(value: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Moments of queries, keys or values with the axis of features at full length."""
    mean, var = (value.mean, value.var) if isinstance(value, Signal) else (value, torch.zeros_like(value))
    return mean.expand(*mean.shape[:-1], value.shape[-1]).to(dtype), var.expand(*var.shape[:-1], value.shape[-1]).to(
        dtype
    )


def _repeated(value: Tensor, copies: int) -> Tensor:
    return value if value.shape[-3] == 1 else value.repeat_interleave(copies, -3)


def _mask(call: Call, queries: int, keys: int, like: Tensor) -> Any:
    """What is added to the logits: minus infinity where a key must not be seen."""
    mask = call.get("attn_mask", call.get("attn_bias"))
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, -math.inf)
    if call.get("is_causal", False):
        if "causal" not in call.memory:
            call.memory["causal"] = torch.full((queries, keys), -math.inf, dtype=like.dtype).triu(1)
        return call.memory["causal"].to(like)
    return mask.to(like.dtype) if isinstance(mask, Tensor) else mask
