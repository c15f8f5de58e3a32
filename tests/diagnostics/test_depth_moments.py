import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn

from normprop import models, norms
from normprop.diagnostics import depth_moments as D
from normprop.diagnostics.channels import channel_moments
from normprop.diagnostics.diagnosis import Subject
from normprop.errors import ConfigError
from normprop.models.mlp import mlp


def test_channel_moments():
    values = torch.randn(5, 4, 3, 2, dtype=torch.float64) + 2
    channels = values.transpose(0, 1).flatten(1)
    found = D.averages(channel_moments(values))
    assert found.mean_size == pytest.approx(channels.mean(1).abs().mean().item())
    assert found.squared_mean == pytest.approx(channels.mean(1).square().mean().item())
    assert found.variance == pytest.approx(channels.var(1, correction=0).mean().item())
    assert found.second == pytest.approx(values.square().mean().item())
    last = D.averages(channel_moments(values.movedim(1, -1), axis=-1))
    assert vars(last) == pytest.approx(vars(found))


def test_second_moment_stays_in_a_plain_network_at_the_start_of_he():
    """E[y^2] = 1 after every ReLU layer, while the means take over: the correlation map of He's ReLU tends to 1."""
    depth, width, nets = 10, 256, 6
    rows = []
    for _ in range(nets):
        found = D.measure(
            Subject("none", mlp(width, 10, "none", depth=depth, hidden_features=width), torch.randn(256, width))
        )
        rows.append([station.output for station in found[:depth]])
    second = torch.tensor([[output.second for output in row] for row in rows]).double()
    # Of one network ln E[y^2] at layer l wanders by sqrt(5 l / width), so its mean over networks by this much:
    error = (5 * torch.arange(1, depth + 1) / width / nets).sqrt()
    assert ((second.log().mean(0)).abs() < 3 * error + 0.05).all()
    share = [
        sum(row[layer].squared_mean for row in rows) / sum(row[layer].second for row in rows) for layer in (0, 4, 9)
    ]
    # At the first layer the inputs are independent: squared mean c2^2 over second moment 1/2, 1/pi.
    assert share[0] == pytest.approx(1 / math.pi, rel=0.05)
    assert share[0] < share[1] < share[2]


@pytest.mark.parametrize("name", ["batch", "normprop"])
def test_moments_stay_level_with_a_normaliser(name):
    model = mlp(128, 10, name, depth=8, hidden_features=256).train()
    found = D.measure(Subject(name, model, torch.randn(256, 128)))[:8]
    variances = [station.output.variance for station in found]
    assert max(variances) / min(variances) < 1.25
    expected = 0.5 * (1 - 1 / math.pi) if name == "batch" else 1.0
    assert variances[0] == pytest.approx(expected, rel=0.05)


def test_second_moment_doubles_with_every_residual_block_without_norm():
    build, add = norms.block("none", dims=0), norms.residual("none", dims=0)
    width, depth = 512, 6
    blocks = [
        add(nn.Sequential(build(width, width), build(width, width, activation=None)), activation=None)
        for _ in range(depth)
    ]
    found = D.measure(Subject("none", nn.Sequential(*blocks), torch.randn(256, width)))
    assert [station.name for station in found] == [str(index) for index in range(depth)]
    ratios = [after.output.second / before.output.second for before, after in itertools.pairwise(found)]
    assert ratios == pytest.approx([2] * (depth - 1), rel=0.15)
    assert found[0].output.second == pytest.approx(2, rel=0.1)
    before = [1.0, *(station.output.second for station in found)]
    branch = [station.branch.second for station in found]
    assert branch == pytest.approx(before[:-1], rel=0.2)  # a branch is as strong as what goes into it


def test_norm_free_blocks_grow_by_alpha_squared():
    name, width = "scaled-weight-standardized", 256
    build, add = norms.block(name, dims=0), norms.residual(name, dims=0)

    def block():
        return add(nn.Sequential(build(width, width), build(width, width, activation=None)))

    model = norms.finish(name, nn.Sequential(build(width, width, activation=None), *[block() for _ in range(6)]))
    found = D.measure(Subject("nf", model, torch.randn(512, width)))
    # The last block ends in an activation of its own.
    assert [station.output.second for station in found[:6]] == pytest.approx([1 + 0.04 * k for k in range(6)], abs=0.04)
    assert [station.branch.second for station in found[1:]] == pytest.approx([1] * 6, rel=0.1)  # before alpha = 0.2


def test_blocks_stand_for_the_layers_inside():
    model = models.create("resnet8", (3, 8, 8), 10, norm="batch", width=0.25)
    found = D.measure(Subject("batch", model, torch.randn(8, 3, 8, 8)))
    assert [(station.name, station.branch is not None) for station in found] == [
        ("0", False), ("1", True), ("2", True), ("3", True), ("6", False)
    ]  # fmt: skip
    twin = copy.deepcopy(model)
    seen = {}
    twin[2].branch.register_forward_hook(lambda module, args, output: seen.update(branch=output.detach()))
    x = torch.randn(8, 3, 8, 8)
    output = twin[:3](x).detach()
    station = D.measure(Subject("batch", model, x))[2]
    assert station.output.variance == pytest.approx(channel_moments(output)[1].mean().item())
    assert station.branch.variance == pytest.approx(channel_moments(seen["branch"])[1].mean().item())
    assert station.branch.variance == pytest.approx(1, rel=1e-3)  # batch norm ends the branch


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.residual = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x):
        return x + self.residual(x)


def test_branches_by_path():
    model = nn.Sequential(nn.Linear(4, 4), Block(), Block())
    x = torch.randn(8, 4)
    found = D.measure(Subject("net", model, x), branches=["1.residual"])
    assert [(station.name, station.branch is None) for station in found] == [
        ("0", True), ("1", False), ("2.residual.0", True), ("2.residual.2", True)
    ]  # fmt: skip
    assert found[1].output.second == pytest.approx(model[:2](x).square().mean().item())
    with pytest.raises(ConfigError, match=r"^depth-moments: no module '3.residual' in Sequential; give a branch's .*$"):
        D.measure(Subject("net", model, x), branches=["3.residual"])


def test_channels_of_tokens_are_last():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    x = torch.randn(5, 7, 4)
    (found,) = D.measure(Subject("net", model, x))
    values = model[0](x).detach().flatten(0, 1)
    assert found.output.squared_mean == pytest.approx(values.mean(0).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["batch", "kalman-batch", "normprop"])
def test_the_network_stays_as_it_is(name):
    model = nn.Sequential(nn.Dropout(), models.create("resnet8", (3, 8, 8), 4, name, width=0.25)).train()
    x = torch.randn(8, 3, 8, 8)
    state, random, image = copy.deepcopy(model.state_dict()), torch.get_rng_state(), x.clone()
    D.measure(Subject(name, model, x))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, image)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_no_layers():
    with pytest.raises(ConfigError, match=r"^depth-moments: net has no linear map to look behind; give one that has$"):
        D.measure(Subject("net", nn.ReLU(), torch.ones(2, 3)))


def station(name, mean, variance, branch=None):
    added = None if branch is None else D.ChannelMoments(0.0, 0.0, branch)
    return D.Station(name, D.ChannelMoments(mean, mean**2, variance), added)


def test_describe():
    plain = [station("a", 0.5, 0.25), station("b", 2.0, 0.125)]
    one = D.describe({"none": plain})
    assert one.found == (
        "none: from layer or block a to b the average variance of a channel goes from 0.25 to 0.125, and the mean size "
        "of the channel means from 0.5 to 2."
    )
    assert len(one.figures) == 2
    deep = [station("a", 0.5, 1.0), station("b", 0.5, 2.0, 1.0), station("c", 0.5, 4.0, 0.0)]
    two = D.describe({"none": plain, "residual": deep})
    assert two.found.splitlines()[0] == one.found
    assert two.found.splitlines()[1].startswith("residual: from layer or block a to c ")
    assert [line.name for line in two.figures[1].lines] == ["none", "residual"]
    assert two.figures[1].lines[1].y == [1.0, 2.0, 4.0]
    (line,) = two.figures[2].lines
    assert line.name == "residual"
    assert line.x == [2, 3]
    assert line.y[0] == 1.0
    assert math.isnan(line.y[1])
    assert two.numbers["residual"][1]["branch"]["variance"] == 1.0
    json.dumps(two.numbers, allow_nan=False)


def test_describe_bears_what_is_not_finite_or_missing():
    found = D.describe({"none": [station("a", 1.0, 1.0), station("b", math.inf, math.nan)], "empty": []})
    assert "goes from 1 to nan, and the mean size of the channel means from 1 to inf." in found.found
    json.dumps(found.numbers, allow_nan=False)
    assert D.describe({}).found == "No layers were looked at."
