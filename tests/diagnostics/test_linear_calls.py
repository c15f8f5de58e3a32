import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normprop import models, norms
from normprop.diagnostics.linear_calls import Watching, linear_calls
from normprop.errors import ConfigError
from normprop.nn import Linear


class Net(nn.Module):
    """Linear maps in modules, in functions and twice, and one that is transposed."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv1d(4, 6, 3, groups=2), nn.ConvTranspose1d(6, 4, 2)
        self.block = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True))

    def forward(self, x):
        x = self.up(self.conv(x))
        x = self.block(F.linear(F.linear(x, torch.ones(3, 6)), torch.ones(6, 3)))
        return self.block[0](F.linear(x, torch.ones(6, 5)))


def test_calls_know_the_layer_the_module_and_the_number_of_the_call():
    calls = []
    net = Net()
    with torch.no_grad(), Watching(net, calls.append):
        output = net(torch.randn(2, 4, 7))
    assert [(call.name, call.layer) for call in calls] == [
        ("conv", "conv"), ("Net", ""), ("Net#2", ""), ("block.0", "block"), ("Net#3", ""), ("block.0", ""),
    ]  # fmt: skip
    assert [call.groups for call in calls] == [2, 1, 1, 1, 1, 1]
    assert calls[0].module is net.conv
    assert torch.equal(calls[-1].output, output)
    assert torch.equal(calls[0].again(bias=None), F.conv1d(calls[0].arguments["input"], net.conv.weight, groups=2))
    assert (calls[3].output < 0).any()  # before the activation overwrote it


@pytest.mark.parametrize("name", norms.names())
def test_watching_changes_nothing_and_sees_the_weights_of_every_method(name):
    net = models.create("resnet8", (3, 8, 8), 10, norm=name, width=0.25).eval()
    x, found = torch.randn(4, 3, 8, 8), []
    with torch.no_grad():
        expected = net(x)
        with Watching(net, found.append):
            torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
    convolutions = [call for call in found if len(call.arguments["input"]) == 4]
    assert len(convolutions) >= 10
    assert all(call.layer for call in convolutions)


def test_effective_weights_can_be_differentiated_by():
    net = Linear(4, 3, activation="relu", gain=0.5)
    x = torch.randn(6, 4)

    def then(output, calls):
        (call,) = calls
        return torch.autograd.grad(output.sum(), call.output)[0], call.arguments["weight"]

    gradient, weight = linear_calls(net, x, then)
    assert gradient.shape == (6, 3)
    assert bool((gradient >= 0).all())
    torch.testing.assert_close(weight.sum(1), torch.zeros(3), atol=1e-6, rtol=0)  # centred
    rows = weight.norm(dim=1)
    torch.testing.assert_close(rows, rows[:1].expand(3))


def test_the_network_stays_as_it_is(unchanged):
    net, x = nn.Sequential(Net(), nn.Dropout()).train(), torch.randn(2, 4, 7)
    with unchanged(net):
        linear_calls(net, x, lambda output, calls: output)


def test_a_network_that_cannot_run_gets_one_line():
    with pytest.raises(ConfigError, match=r"^Linear: the network cannot run under torch\.func: .*$") as caught:
        linear_calls(nn.Linear(3, 2), torch.ones(2, 4), lambda output, calls: output)
    assert "\n" not in str(caught.value)
