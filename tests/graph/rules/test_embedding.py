import pytest
import torch
from torch import nn

from normprop.errors import UnknownOperatorError
from tests.graph.rules.monte_carlo import CAPTURES, check

HOW = pytest.mark.parametrize("how", CAPTURES)


class Lookup(nn.Module):
    """Rows drawn by the input: its distribution function times their number, rounded down."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return self.table((torch.special.ndtr(x) * 10).long())


@HOW
def test_embedding(how):
    cases = {"rows": Lookup(nn.Embedding(10, 5)), "padded": Lookup(nn.Embedding(11, 5, padding_idx=10))}
    check(cases, (6,), how=how, given=False, var=0.0, mean=0.0)


@HOW
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags(how, mode):
    check({mode: Lookup(nn.EmbeddingBag(10, 5, mode=mode))}, (6,), how=how, given=False, var=0.0, mean=0.0)


def test_the_largest_of_a_bag_has_no_rule():
    with pytest.raises(UnknownOperatorError, match="mode 'max'"):
        check({"max": Lookup(nn.EmbeddingBag(10, 5, mode="max"))}, (6,), how="export", given=False)
