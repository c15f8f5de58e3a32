import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.rules.monte_carlo import CAPTURES, check

HOW = pytest.mark.parametrize("how", CAPTURES)

torch.manual_seed(0)
W = torch.randn(4, 1).double()

ONE = {
    "shift": lambda x: x + 3,
    "rsub": lambda x: 1 - 2 * x,
    "per channel": lambda x: x * W + W,
    "div": lambda x: x / W,
    "alpha": lambda x: torch.add(x, x, alpha=2),
    "less itself": lambda x: x - x,
    "skip": lambda x: x + F.relu(x),
    "twice the same skip": lambda x: (x + 2) + (x * W) + x,
    "addcmul": lambda x: torch.addcmul(W, x, W, value=0.5),
    "addcdiv": lambda x: torch.addcdiv(W, x, 2 + W * W, value=0.5),
    "square by addcmul": lambda x: torch.addcmul(x, x, x),
    "lerp": lambda x: x.lerp(W.expand(4, 5), 0.25),
    "in place": lambda x: x.add_(1).mul_(2).sub_(x.detach().clone(), alpha=0.5),
    "sum": lambda x: x.sum(1),
    "mean of all": lambda x: x.mean((1, 2)),
    "cumsum": lambda x: x.cumsum(1),
    "prod": lambda x: (1 + 0.3 * x).prod(1),
}
TWO = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: torch.sub(x, y, alpha=2),
    "gate": lambda x, y: x * torch.sigmoid(y),
    "broadcast": lambda x, y: x * y[:, :, :1],
    "residual": lambda x, y: (x + y) + 0.5 * x,
    "addcmul": lambda x, y: torch.addcmul(x, y, W),
    "lerp": lambda x, y: x.lerp(y, 0.25),
    "lerp by a signal": lambda x, y: torch.lerp(torch.zeros_like(x), y, x),
    "larger": torch.maximum,
    "smaller": torch.minimum,
    "mixture": lambda x, y: torch.where(x > 0, y, torch.zeros_like(y)),
    "log of sums": torch.logaddexp,
    "clamp": lambda x, y: x.clamp(min=y),
    "hypotenuse": lambda x, y: torch.hypot(x, y + 5),
    "glu": lambda x, y: F.glu(torch.cat([x, y], 1), 1),
    "geglu": lambda x, y: x * F.gelu(y),
    "quotient": lambda x, y: x / (8 + y),
}


@HOW
def test_one_signal(how):
    check(ONE, (4, 5), how=how, var=1e-6, mean=1e-6)


@HOW
def test_two_signals(how):
    check(TWO, (4, 5), (4, 5), how=how, var=0.005, mean=0.005)


# Statistics of Gaussians; their roots are taken as log-normal, the values of a norm or maximum as one mixture.
STATISTICS = {
    "var": lambda x: x.var(2),
    "biased": lambda x: x.var(2, correction=0),
    "std": lambda x: x.std(2, keepdim=True),
    "var_mean": lambda x: torch.var_mean(x, 2)[0],
    "std_mean": lambda x: torch.std_mean(x, 2)[1],
    "norm": lambda x: x.norm(dim=2),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=2),
    "absolute": lambda x: x.norm(p=1, dim=2),
    "amax": lambda x: x.amax(2),
    "amin": lambda x: x.amin(2),
    "max": lambda x: x.max(2).values,
    "min": lambda x: x.min(2)[0],
    "max of a square": lambda x: (x * x).amax(2),
    "logsumexp": lambda x: torch.logsumexp(0.5 * x, 2),
    "root mean square": lambda x: x.square().mean(2).sqrt(),
    "log": lambda x: (3 + x.square().mean(2)).log(),
    "reciprocal": lambda x: 1 / (2 + x.square().mean(2)),
}


@HOW
def test_statistics(how):
    check(STATISTICS, (4, 24), how=how, samples=4000, var=0.06, mean=0.06)


@HOW
def test_division_by_its_own_norm(how):
    # The norm is taken as independent of the values, which is one part in their number off.
    check({"normalize": lambda x: F.normalize(x, dim=2)}, (4, 24), how=how, samples=4000, var=0.2, mean=0.05)


@HOW
def test_ranks(how):
    cases = {
        "topk": lambda x: x.topk(3, 2).values,
        "sorted": lambda x: x.sort(2).values[:, :, 4:20],
        "median": lambda x: x.median(2).values,
        "of a square": lambda x: (x * x).topk(4, 2)[0],
    }
    check(cases, (4, 24), how=how, samples=4000, var=0.03, mean=0.03)


@HOW
def test_positions_have_no_moments(how):
    check({"used": lambda x: x * (x.argmax(2, keepdim=True) >= 0)}, (4, 24), how=how)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x):
        return x + self.branch(x)


@HOW
def test_residual_branch_of_its_own_input(how):
    # x and the branch are correlated through what the weights leave over, one part in the width.
    check({"residual": Residual()}, (64,), how=how, var=0.5, mean=0.01, samples=4000)
