import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.rules.monte_carlo import CAPTURES, check

HOW = pytest.mark.parametrize("how", CAPTURES)


def stochastic_depth(x):
    mask = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.7)
    return x * mask.div_(0.7)


CASES = {
    "Dropout": nn.Dropout(0.3),
    "functional": lambda x: F.dropout(x, 0.3),
    "in place": lambda x: F.dropout(x, 0.3, inplace=True),
    "Dropout2d": nn.Dropout2d(0.4),
    "stochastic depth": stochastic_depth,
    "noise": lambda x: x + 0.5 * torch.randn_like(x),
    "uniform": lambda x: x * (1 + 0.2 * torch.rand_like(x)),
    "mask": lambda x: x * (torch.rand_like(x) > 0.25),
    "floor": lambda x: x / 0.8 * (0.8 + torch.rand_like(x)).floor(),
}


@HOW
def test_random_operators(how):
    check(CASES, (4, 3, 3), how=how, samples=6000, var=0.0, mean=1e-4)


@HOW
def test_dropout_that_keeps_mean_and_variance(how):
    # By construction at N(0, 1) alone.
    cases = {"alpha": nn.AlphaDropout(0.2), "features": nn.FeatureAlphaDropout(0.2)}
    check(cases, (4, 3, 3), how=how, given=False, var=1e-6, mean=1e-6)
