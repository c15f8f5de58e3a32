"""Capture: both ways see the same calls, in-place writing is undone, state and modes stay."""

import copy

import pytest
import torch
from torch import Tensor, nn

from normprop.errors import ConfigError, GraphError
from normprop.graph.capture import capture
from normprop.graph.measure import measure
from normprop.graph.propagate import propagate
from normprop.graph.record import record
from tests.graph.families import FAMILIES, TRAPS


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def written_rows(x: Tensor) -> Tensor:
    y = x * 2.0
    y[:, :3].add_(5.0)
    return y + 1.0


def written_column(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape)
    y[:, 1] = x[:, 0] * 3.0 + 1.0
    y[:, 2:4][:, 0] = x[:, 3]
    return y * 2.0


def written_twice(x: Tensor) -> Tensor:
    y = x.clone()
    z = y
    y.mul_(3.0)
    z.add_(1.0)
    torch.relu_(y)
    return z


def mask_of_constants(x: Tensor) -> Tensor:
    mask = torch.zeros(x.shape[1])
    mask[1:3] = 2.0
    mask.mul_(2.0)
    return x + mask


@pytest.mark.parametrize("function", [written_rows, written_column, written_twice, mask_of_constants])
@pytest.mark.parametrize("how", ["export", "recorded"])
def test_writing_in_place_is_seen_by_every_later_reader(function, how):
    x = torch.randn(20_000, 6, generator=torch.Generator().manual_seed(0))
    graph = _captured(function, x, how)
    assert graph.how == how
    predicted = propagate(graph).signal(graph.outputs[0])
    mean, var = predicted.channels(1)
    output = function(x.clone())
    error = output.std(0) / len(x) ** 0.5
    assert bool(((output.mean(0) - mean).abs() <= 5 * error + 1e-6).all())
    torch.testing.assert_close(var.sqrt(), output.std(0), rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("how", ["export", "recorded"])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(-1),
        lambda x: x.flatten(0),
        lambda x: x.reshape(-1),
        lambda x: x.detach(),
        lambda x: x.chunk(2, 1)[0],
        lambda x: x.unbind(1)[2],
        lambda x: x.view(6, 4).view(24)[:3],
        lambda x: x.t().contiguous().t().flatten(),
    ],
)
def test_a_view_that_cannot_be_undone_is_refused(view, how):
    def through_a_view(x):
        y = x * 1.0
        view(y).add_(1.0)
        return y

    x = torch.zeros(4, 6)
    if torch.equal(through_a_view(x), x):  # it was a copy
        assert propagate(_captured(through_a_view, x, how)).signal(1).mean == 0.0
    else:
        with pytest.raises(GraphError, match="overwrites a part of a tensor that is read again"):
            _captured(through_a_view, x, how)


def _captured(function, x, how):
    model = Function(function)
    return capture(model, x) if how == "export" else record(model, (x,), {}).settled()


def test_copies_and_sizes_of_what_is_overwritten_may_be_read():
    def forward(x):
        y = x * 1.0
        copy = y.transpose(1, 2).contiguous().mul_(3.0)
        return copy.transpose(1, 2) + y, y.reshape(len(y), -1).clone().mul_(2.0)

    graph = capture(Function(forward), torch.zeros(4, 6, 5))
    deviations = [float(propagate(graph).signal(index).var.sqrt()) for index in graph.outputs]
    assert deviations == pytest.approx([10**0.5, 2.0])


@pytest.mark.parametrize("name", ["resnet_v1_basic", "shufflenet_v2", "unet_2d", "pointnet"])
def test_export_and_recording_predict_the_same(name):
    case = FAMILIES[name]()
    ways = capture(case.model, case.args), record(case.model, case.args, {}).settled()
    assert [graph.how for graph in ways] == ["export", "recorded"]
    for pair in zip(*(graph.outputs for graph in ways), strict=True):
        one, other = (propagate(graph).signal(index).overall() for graph, index in zip(ways, pair, strict=True))
        assert one.mean == pytest.approx(other.mean, rel=1e-3, abs=1e-5)
        assert one.var == pytest.approx(other.var, rel=1e-3)


def test_what_export_cannot_take_is_recorded_with_the_reason():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x)) if float(x.sum()) > -1e9 else x

    graph = capture(Choosing(), torch.randn(2, 3, 8, 8))
    assert graph.how == "recorded"
    assert graph.note
    assert {"conv", "norm"} <= {node.path for node in graph.nodes}


def test_the_model_stays_as_it_is():
    case = TRAPS["cumulative_average"]()
    state, seed = copy.deepcopy(case.model.state_dict()), torch.random.get_rng_state()
    hooks = [len(module._forward_hooks) for module in case.model.modules()]
    capture(case.model, case.args)
    assert all(torch.equal(value, state[key]) for key, value in case.model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert [len(module._forward_hooks) for module in case.model.modules()] == hooks
    assert all(module.training for module in case.model.modules())


def test_what_a_forward_pass_writes_into_its_modules_is_put_back():
    class Writer(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.shared = shared

        def forward(self, x):
            self.shared[0] = x * 2.0
            return x

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = [torch.zeros(1)]
            self.writer = Writer(self.shared)

        def forward(self, x):
            return self.writer(x) + self.shared[0]

    model = Reader()
    capture(model, torch.randn(2, 3))
    assert model.shared is model.writer.shared
    assert type(model.shared[0]) is Tensor
    assert torch.equal(model.shared[0], torch.zeros(1))
    assert torch.equal(model(torch.ones(2, 3)), torch.full((2, 3), 3.0))


def test_errors_name_the_place():
    with pytest.raises(ConfigError, match="holds no tensor, got int"):
        capture(nn.Linear(2, 2), 3)
    with pytest.raises(GraphError, match=r"Sequential cannot run on the example input: 1: mat1 and mat2"):
        capture(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), torch.zeros(1, 3))


def test_unknown_operators():
    class Inverting(nn.Module):
        def forward(self, x):
            return torch.linalg.inv(x)

    from normprop.graph.propagate import UnknownOperatorError

    x = torch.randn(4, 6, 6)
    graph = capture(Inverting(), x)
    with pytest.raises(
        UnknownOperatorError, match=r"linalg_inv in \(the model itself\) \[.*test_capture.py:\d+: return torch"
    ):
        propagate(graph)
    measured = propagate(graph, on_unknown="measure", measure=lambda node: measure(graph, x)[node.index])
    assert measured.unknown
