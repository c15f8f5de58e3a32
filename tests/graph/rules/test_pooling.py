import pytest
import torch.nn.functional as F
from torch import nn

from tests.graph.rules.monte_carlo import CAPTURES, check

HOW = pytest.mark.parametrize("how", CAPTURES)

AVERAGES = {
    "avg": nn.AvgPool2d(2),
    "overlapping": nn.AvgPool2d(3, stride=1),
    "padded": nn.AvgPool2d(3, stride=2, padding=1),
    "adaptive": nn.AdaptiveAvgPool2d(2),
    "global": nn.AdaptiveAvgPool2d(1),
    "mean": lambda x: x.mean((2, 3)),
    "keepdim": lambda x: x.mean([-2, -1], keepdim=True),
    "lp": nn.LPPool2d(1, 2),
}
# The largest of independent values, whatever function of a Gaussian they are.
MAXIMA = {
    "max": nn.MaxPool2d(2),
    "functional": lambda x: F.max_pool2d(x, 3, 1),
    "adaptive": nn.AdaptiveMaxPool2d(2),
    "global": lambda x: x.amax((2, 3)),
    "after relu": lambda x: F.max_pool2d(F.relu(x), 2),
}
# The largest of k is taken as Gaussian by what follows, and windows at the border hold fewer values.
LOOSE = {
    "relu after": lambda x: F.relu(F.max_pool2d(x, 2)),
    "padded": nn.MaxPool2d(3, 2, 1),
    "ceil": nn.MaxPool2d(2, ceil_mode=True),
    "twice": lambda x: F.max_pool2d(F.max_pool2d(x, 2), 2),
    "of a swish": lambda x: F.max_pool2d(F.silu(x), 2),
    "of a square": lambda x: F.max_pool2d(x * x, 2),
    "without padding": nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    "lp": nn.LPPool2d(2, 2),
    "uneven": nn.AdaptiveAvgPool2d((3, 5)),
}


@HOW
def test_averages(how):
    check(AVERAGES, (4, 6, 6), how=how, samples=3000, var=0.0, mean=1e-9)


@HOW
def test_maxima(how):
    check(MAXIMA, (4, 6, 6), how=how, samples=3000, var=0.015, mean=0.01)


@HOW
def test_what_is_approximate(how):
    check(LOOSE, (4, 7, 7), how=how, samples=3000, var=0.25, mean=0.2)


@HOW
def test_other_dimensions(how):
    check(
        {
            "max": nn.MaxPool1d(2),
            "avg": nn.AvgPool1d(3, 3),
            "adaptive": nn.AdaptiveAvgPool1d(3),
            "lp": nn.LPPool1d(1, 3),
        },
        (4, 9),
        how=how,
        var=0.0,
        mean=1e-3,
    )
    check(
        {
            "max": nn.MaxPool3d(2),
            "avg": nn.AvgPool3d(2),
            "adaptive": nn.AdaptiveAvgPool3d(1),
            "m": nn.AdaptiveMaxPool3d(1),
        },
        (4, 4, 4, 4),
        how=how,
        samples=2000,
        var=0.01,
        mean=0.01,
    )
