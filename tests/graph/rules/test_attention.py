"""Logits are taken as Gaussian and independent of the values: tolerances are what that costs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.rules.monte_carlo import CAPTURES, check

HOW = pytest.mark.parametrize("how", CAPTURES)

SOFTMAX = {
    "softmax": lambda x: x.softmax(1),
    "small": lambda x: (0.3 * x).softmax(1),
    "softmin": nn.Softmin(1),
    "Softmax2d": lambda x: F.softmax(x.unsqueeze(-1), 1),
    "log_softmax": nn.LogSoftmax(1),
    "over tokens": lambda x: x.softmax(2),
    "log over tokens": lambda x: x.log_softmax(2),
}


@HOW
def test_softmax(how):
    check(SOFTMAX, (12, 16), how=how, samples=4000, var=0.35, mean=0.25)


@HOW
def test_softmax_of_small_logits_to_first_order(how):
    # Var = (v / n^2) (1 - 1 / n) of n logits of variance v, with an error of order v.
    check({"small": lambda x: (0.1 * x).softmax(2)}, (3, 16), how=how, samples=4000, var=0.08, mean=0.03)


class Attention(nn.Module):
    """Attention written out or by torch's function, of independent queries, keys and values."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.value = nn.Linear(8, 8)

    def forward(self, q, k, v):
        v = self.value(v)
        if self.kind == "by hand":
            return ((q @ k.mT) / 8**0.5).softmax(-1) @ v
        if self.kind == "baddbmm":
            empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
            return torch.bmm(torch.baddbmm(empty, q, k.mT, beta=0, alpha=8**-0.5).softmax(-1), v)
        mask = torch.ones(6, 6, dtype=torch.bool).tril() if self.kind == "mask" else None
        options = {"attn_mask": mask, "is_causal": self.kind == "causal"}
        if self.kind == "heads":
            q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.scaled_dot_product_attention(q, k, v, **options)


@HOW
@pytest.mark.parametrize("kind", ["function", "by hand", "heads", "mask", "causal"])
def test_attention(how, kind):
    check({kind: Attention(kind)}, *[(6, 8)] * 3, how=how, samples=4000, given=False, var=0.15, mean=0.1)


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.training)[0]


# The output's linear map follows that of the values at once: single channels' variances are those of products of
# weights, known on average over channels only.
@HOW
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_multihead_attention(how, dropout):
    case = {"mha": SelfAttention(dropout=dropout)}
    check(case, (12, 32), how=how, samples=1000, given=False, var=0.9, mean=0.2)


def test_multihead_attention_in_evaluation():
    check({"mha": SelfAttention()}, (12, 32), how="export", samples=1000, given=False, train=False, var=0.9, mean=0.2)


@HOW
@pytest.mark.parametrize("first", [True, False])
def test_transformer_layer(how, first):
    layer = nn.TransformerEncoderLayer(32, 2, 64, 0.1, "gelu", norm_first=first, batch_first=True)
    check({"layer": layer}, (12, 32), how=how, samples=1000, given=False, var=0.5, mean=0.3)
