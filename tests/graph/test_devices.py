"""Moments on a device: everything that propagation makes stands where the network's parameters are."""

import pytest
import torch
from torch import Tensor, nn

import normprop
from normprop.graph.capture import capture, in_training
from normprop.graph.contract import calls, contract
from normprop.graph.node import Graph
from normprop.graph.propagate import propagate
from normprop.graph.rules import module_rule
from normprop.graph.signal import Signal
from normprop.nn import DataNorm
from normprop.nn.predicted import Predicted
from tests.graph.families import FAMILIES
from tests.graph.remote import Remote, available, local, send


class Assorted(nn.Module):
    """What is made anew in a forward pass, and moved by an index that the network holds."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.table = nn.Embedding(10, 4)
        self.data = DataNorm((4,), mode="batch")
        self.register_buffer("order", torch.tensor([3, 1, 2, 0]))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = torch.cat([x, self.conv(x)], 1)[:, self.order]
        x = nn.functional.pad(x, (1, 1), value=0.5) + torch.zeros_like(x[..., :1])
        x = x * torch.rand_like(x) + self.table(ids).transpose(1, 2)
        x = nn.functional.dropout(torch.where(x > 0, x, x.new_ones(())), 0.2)
        return self.data(x.mean(2))


def graph_of(model: nn.Module, args: tuple[Tensor, ...]) -> Graph:
    with in_training(model):
        graph = capture(model, args)
    return contract(graph, calls(graph, lambda module: module_rule(module) is not None))


def check(graph: Graph) -> None:
    here = propagate(graph)
    send(graph.model)
    with available():
        there = propagate(graph)
    compared = 0
    for index, signal in here.values.items():
        if isinstance(signal, Signal):
            found = there.signal(index)
            assert found is not None
            assert isinstance(found.mean, Remote), graph.nodes[index]
            assert isinstance(found.var, Remote), graph.nodes[index]
            torch.testing.assert_close(local(found.mean), signal.mean)
            torch.testing.assert_close(local(found.var), signal.var)
            compared += 1
    assert compared > 3


# PointNet's forward makes an identity on the device of its input, which is the CPU while it is captured.
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"pointnet"}))
def test_family(name: str) -> None:
    case = FAMILIES[name]()
    check(graph_of(case.model, case.args))


def test_what_a_forward_makes() -> None:
    model = Assorted()
    check(graph_of(model, (torch.randn(6, 4, 9), torch.randint(10, (6, 11)))))


@pytest.mark.parametrize("name", ["densenet", "efficientnet", "pointnet", "shufflenet_v2", "unet_2d"])
def test_live_moments_follow_a_converted_network(name: str) -> None:
    case = FAMILIES[name]()
    net = normprop.convert(case.model, case.args, calibrate=None)
    layers = [module for module in net.modules() if isinstance(module, Predicted) and module.source is not None]
    here = [layer.predicted() for layer in layers]
    send(net)
    with available():
        there = [layer.predicted() for layer in layers]
    assert len(layers) > 3
    for expected, found in zip(here, there, strict=True):
        assert all(isinstance(part, Remote) for part in found)
        torch.testing.assert_close(tuple(map(local, found)), tuple(part.detach() for part in expected))
