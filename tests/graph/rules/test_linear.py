import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.rules.monte_carlo import CAPTURES, check

HOW = pytest.mark.parametrize("how", CAPTURES)

CASES = {
    "linear": ((6,), {"bias": nn.Linear(6, 5), "no bias": nn.Linear(6, 5, bias=False), "bilinear": nn.Linear(6, 1)}),
    "linear on tokens": ((5, 6), {"linear": nn.Linear(6, 5)}),
    "1-D": (
        (4, 9),
        {
            "zeros": nn.Conv1d(4, 6, 3, padding=2),
            "same": nn.Conv1d(4, 6, 4, padding="same", dilation=2),
            "stride": nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
            "circular": nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"),
            "transposed": nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1),
        },
    ),
    "2-D": (
        (4, 6, 5),
        {
            "valid": nn.Conv2d(4, 6, 3),
            "zeros": nn.Conv2d(4, 6, 3, padding=1),
            "rectangular": nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
            "same": nn.Conv2d(4, 6, 3, padding="same"),
            "depthwise": nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False),
            "pointwise": nn.Conv2d(4, 6, 1),
            "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
            "transposed": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
            "transposed, dilated": nn.ConvTranspose2d(4, 6, 2, dilation=2),
        },
    ),
    "3-D": (
        (4, 4, 3, 3),
        {
            "zeros": nn.Conv3d(4, 6, 3, padding=1),
            "grouped": nn.Conv3d(4, 6, (1, 3, 3), stride=(2, 1, 1), padding=(0, 1, 1), groups=2),
            "transposed": nn.ConvTranspose3d(4, 6, 2, stride=2),
        },
    ),
}


@HOW
@pytest.mark.parametrize("name", CASES)
def test_modules(how, name):
    shape, cases = CASES[name]
    if how == "record":  # what circular padding is made of overwrites parts of a tensor
        cases = {key: case for key, case in cases.items() if key != "circular"}
    check(cases, shape, how=how, samples=3000, var=0.0, mean=0.0)


@HOW
@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_by_the_border(how, mode):
    # A filter at the border sees some values twice, which the rule takes as independent.
    check({mode: nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode)}, (4, 8, 8), how=how, samples=2000, var=0.2, mean=0.0)


torch.manual_seed(0)
A, B, C = torch.randn(5, 6).double(), torch.randn(3, 4).double(), torch.randn(3, 5).double()
PRODUCTS = {
    "@": lambda x: x @ A.T,
    "on the left": lambda x: B.T @ x[:, :3],
    "einsum": lambda x: torch.einsum("ntc,dc->ntd", x, A),
    "einsum over tokens": lambda x: torch.einsum("ntc,tk->nkc", x[:, :3], B),
    "einsum sum": lambda x: torch.einsum("ntc->nc", x),
    "vector": lambda x: x @ A[0],
    "addmm": lambda x: torch.addmm(C[0], x[:, 0], A.T, beta=0.5, alpha=2.0),
    "baddbmm": lambda x: torch.baddbmm(C[:, None, :], x, A.T.expand(x.shape[0], 6, 5)) if x.shape[0] == 3 else x @ A.T,
    "outer": lambda x: x[:, 0, :, None] * A[0],
}
PAIRS = {
    "@": lambda x, y: x @ y.mT,
    "bmm": lambda x, y: torch.bmm(x, y.transpose(1, 2)),
    "einsum": lambda x, y: torch.einsum("nqc,nkc->nqk", x, y),
    "sum of products": lambda x, y: (x * y).sum(-1),
    "einsum by elements": lambda x, y: torch.einsum("ntc,ntc->nc", x, y),
    "linear on both": lambda x, y: F.linear(x, A) + F.linear(y, A),
}


@HOW
def test_products_with_constants(how):
    cases = {name: case for name, case in PRODUCTS.items() if name != "baddbmm"}
    check(cases, (4, 6), how=how, samples=4000, var=0.0, mean=0.0)


@HOW
def test_products_of_signals(how):
    check(PAIRS, (4, 6), (4, 6), how=how, samples=8000, var=0.0, mean=0.0)
