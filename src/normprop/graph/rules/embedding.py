"""Look-ups in learned tables."""

from typing import Any

import torch
from torch import Tensor

from normprop.errors import UnknownOperatorError
from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Signal


def _table(weight: Tensor, padding: int | None) -> tuple[Tensor, Tensor]:
    """Mean and variance of every column over the rows, each as likely as another; not of the row that pads."""
    if padding is not None and 0 <= padding < len(weight):
        weight = torch.cat([weight[:padding], weight[padding + 1 :]])
    return weight.mean(0), weight.var(0, correction=0)


@rule("embedding")
def embedding(call: Call) -> Any:
    """Rows of a table, each as likely as another: mean and variance of every column over the vocabulary."""
    return Signal.of(*_table(call["weight"], call.get("padding_idx")), call.shape, axis=len(call.shape) - 1)


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(call: Call) -> Any:
    """Bags of n independent rows: sums have n times mean and variance, means 1/n of the variance."""
    weight, indices, offsets = call["weight"], call["indices"], call.get("offsets")
    mean, var = _table(weight, call.get("padding_idx"))
    bags = indices.shape[0] if offsets is None else offsets.shape[0] - bool(call.get("include_last_offset", False))
    count = indices.shape[0] / max(bags, 1)
    mode = call.get("mode", 0)
    if mode == 0:
        mean, var = mean * count, var * count
    elif mode == 1:
        var = var / count
    else:
        raise UnknownOperatorError(f"{call.node}: there is no rule for bags of mode 'max', only 'sum' and 'mean'")
    return Signal.of(mean, var, (bags, weight.shape[1]), axis=1), None, None, None
