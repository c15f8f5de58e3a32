import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.rules.monte_carlo import CAPTURES, check

HOW = pytest.mark.parametrize("how", CAPTURES)

# Every activation of torch.nn that acts on elements alone; thresholds as they come and off them.
MODULES = {
    type(module).__name__ + str(i): module
    for i, module in enumerate(
        [
            nn.ReLU(),
            nn.ReLU(inplace=True),
            nn.ReLU6(),
            nn.LeakyReLU(0.2),
            nn.PReLU(),
            nn.PReLU(4),
            nn.ELU(1.3),
            nn.CELU(0.7),
            nn.SELU(),
            nn.GELU(),
            nn.GELU("tanh"),
            nn.SiLU(inplace=True),
            nn.Mish(),
            nn.Hardswish(),
            nn.Hardsigmoid(),
            nn.Hardtanh(-0.37, 1.21),
            nn.Hardshrink(0.43),
            nn.Softshrink(0.43),
            nn.Tanhshrink(),
            nn.Softplus(beta=2.0),
            nn.Softsign(),
            nn.LogSigmoid(),
            nn.Sigmoid(),
            nn.Tanh(),
            nn.Threshold(0.3, -0.7),
            nn.RReLU(0.1, 0.9),
            nn.Identity(),
        ]
    )
}


@HOW
def test_modules(how):
    check(MODULES, (4, 3, 3), how=how, samples=4000)


@HOW
def test_modules_in_evaluation(how):
    check(
        {"rrelu": nn.RReLU(), "dropout": nn.Dropout(0.5), "alpha": nn.AlphaDropout(0.5)}, (4, 3), how=how, train=False
    )


FUNCTIONS = {
    "relu": F.relu,
    "relu_": torch.relu_,
    "method": lambda x: x.relu().sigmoid_(),
    "leaky_relu_": lambda x: F.leaky_relu_(x, 0.1),
    "elu": lambda x: F.elu(x, 0.5),
    "abs": torch.abs,
    "square": lambda x: x**2,
    "cube": lambda x: x.pow(3),
    "exp": lambda x: (0.5 * x).exp(),
    "sin": torch.sin,
    "erf": torch.erf,
    "clamp": lambda x: x.clamp(-0.3, 0.9),
    "clamp_min": lambda x: x.clamp_min(0.25),
    "sqrt": lambda x: (x * x + 1).sqrt(),
    "neg": lambda x: -x,
    "hard": lambda x: F.hardtanh_(x, -0.6, 0.6),
}
BY_HAND = {
    "swish": lambda x: x * torch.sigmoid(x),
    "swish with a scale": lambda x: x * torch.sigmoid(1.7 * x),
    "hard swish": lambda x: x * F.relu6(x + 3) / 6,
    "tanh gelu": lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3))),
    "gelu": lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5)),
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "relu less a line": lambda x: F.relu(x) - 0.5 * x,
    "gate by comparison": lambda x: x * (x > 0.5),
    "choice": lambda x: torch.where(x > 0, x, 0.1 * x),
    "complement": lambda x: 1 - torch.sigmoid(x),
    "quotient": lambda x: x / (1 + x.abs()),
    "relu of a line": lambda x: F.relu(2 * x - 1.3),
    "both signs": lambda x: torch.maximum(x, -0.3 * x),
    "tanh by exp": lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)),
    "comparison": lambda x: (x > 0.2).double(),
    "fill": lambda x: x.masked_fill(x < 0.1, 0.0),
    "squared relu": lambda x: F.relu(x) ** 2,
    "in place": lambda x: F.relu(x, inplace=True).mul_(2).add_(1),
}


@HOW
@pytest.mark.parametrize("cases", [FUNCTIONS, BY_HAND], ids=["functions", "by hand"])
def test_functions(how, cases):
    check(cases, (4, 3, 3), how=how, samples=4000)


class Learned(nn.Module):
    def __init__(self, function, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(shape) + 0.5)
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight)


@HOW
def test_learned_constants_inside(how):
    cases = {
        "one": Learned(lambda x, w: x * torch.sigmoid(w * x), 1),
        "per channel": Learned(lambda x, w: x * torch.sigmoid(w * x), 4, 1, 1),
        "bounds": Learned(lambda x, w: x.clamp(max=w), 4, 1, 1),
        "larger": Learned(lambda x, w: torch.maximum(x, w), 4, 1, 1),
        "line, then relu": Learned(lambda x, w: F.relu(torch.addcmul(w, x, w)), 4, 1, 1),
        "tanh of a line": Learned(lambda x, w: torch.tanh(w * x) * w + w, 4, 1, 1),
        "pool of a line": Learned(lambda x, w: F.max_pool2d(F.relu(w * x + w), 3), 4, 1, 1),
        "view of a line": Learned(lambda x, w: F.relu(w * x + w).flatten(1).sigmoid(), 4, 1, 1),
        "lerp": Learned(lambda x, w: torch.lerp(x, w, 0.3), 4, 1, 1),
    }
    check(cases, (4, 3, 3), how=how, var=0.01, mean=0.01)
