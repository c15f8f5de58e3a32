"""Inspection measures what hooks and scipy do, predicts, and leaves everything as it was."""

import copy
import random

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import normprop
from normprop.errors import ConfigError
from normprop.graph.capture import capture
from normprop.graph.contract import calls, contract
from normprop.graph.inspect import inspect
from normprop.graph.measure import measure
from normprop.graph.rules import registry, rule
from normprop.moments import Moments
from tests.graph.inspect_networks import NETS, Net, channels, flat_images, hooked, loss, make


@pytest.mark.parametrize("kind", NETS)
def test_measures_what_hooks_on_the_modules_see(kind):
    model, x = make(kind)
    torch.manual_seed(7)
    report = inspect(model, x, loss=loss)
    assert report.how == ("export" if kind is Net else "recorded")
    torch.manual_seed(7)  # the same dropout
    seen = hooked(model, x)
    assert sorted(seen) == ["act", "body.0", "body.1", "drop", "head", "norm", "stem"]
    for path, truths in seen.items():
        for call, truth in enumerate(truths):
            # A module may call several operators; its last one returns its output.
            site = [site for site in report.sites if (site.path, site.call) == (path, call)][-1]
            value = truth["output"].double()
            assert site.shape == tuple(value.shape)
            assert site.measured.mean == pytest.approx(value.mean().item(), rel=1e-4, abs=1e-6)
            assert site.measured.std == pytest.approx(value.std(correction=0).item(), rel=1e-5)
            rows = channels(value)
            assert site.measured.within == pytest.approx(rows.var(1, correction=0).mean().sqrt().item(), rel=1e-5)
            assert site.measured.between == pytest.approx(rows.mean(1).std(correction=0).item(), rel=1e-4, abs=1e-6)
            gradient = truth["gradient"].double().square().mean().sqrt().item()
            assert site.gradient == pytest.approx(gradient, rel=1e-4)


@pytest.mark.parametrize("kind", NETS)
def test_shape_of_what_goes_into_activations_is_scipys(kind):
    model, x = make(kind)
    torch.manual_seed(7)
    report = inspect(model, x)
    torch.manual_seed(7)
    seen = hooked(model, x)
    # The norm's output goes into the ReLU in place, the convolution's into SiLU.
    expected = {("norm", 0): seen["act"][0], ("body.0", 0): seen["body.1"][0], ("body.0", 1): seen["body.1"][1]}
    found = {(site.path, site.call): site for site in report.sites if site.skew is not None}
    assert found.keys() == expected.keys()
    for place, call in expected.items():
        value = call["input"].double().flatten().numpy()
        assert found[place].skew == pytest.approx(stats.skew(value), abs=1e-5)
        assert found[place].kurtosis == pytest.approx(stats.kurtosis(value), abs=1e-4)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("asked", [None, loss])
def test_leaves_everything_as_it_was(kind, asked):
    model, x = make(kind)
    model.drop.eval()
    model.stem.weight.requires_grad_(False)
    loss(model(x)).backward()
    model.body[0].register_forward_hook(lambda *args: None)
    before = copy.deepcopy(model.state_dict())
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    wants = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    hooks = [
        (dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks), sorted(vars(m)))
        for m in model.modules()
    ]
    kept, version = x.clone(), x._version
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    inspect(model, x, loss=asked)
    measure(capture(model, x), x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == wants[name]
        assert (parameter.grad is None) == (gradients[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])
    assert [module.training for module in model.modules()] == modes
    assert hooks == [
        (dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks), sorted(vars(m)))
        for m in model.modules()
    ]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert torch.equal(x, kept)
    assert x._version == version
    assert not x.requires_grad


@pytest.mark.parametrize("how", [torch.no_grad, torch.enable_grad])
def test_frozen_networks_have_gradients_too(how):
    model, x = make()
    with how():
        report = inspect(model.requires_grad_(False), x)
    assert all(site.gradient > 0 for site in report.sites)


def test_default_loss_has_a_gradient_of_norm_one_for_each_output():
    model, x = make()
    report = inspect(model, x)
    logits = next(site for site in report.sites if site.path == "head")
    assert logits.gradient == pytest.approx(30**-0.5)
    torch.manual_seed(11)
    report = inspect(model, x)
    torch.manual_seed(11)
    again = inspect(model, x)
    assert report == again


def test_gradient_only_where_the_loss_depends():
    model, x = make()
    report = inspect(model, x, loss=lambda output: output["pooled"].sum())
    assert [site.path for site in report.sites if site.gradient is None] == ["head"]


def test_prediction_starts_from_the_inputs_channels():
    torch.manual_seed(0)
    x = torch.randn(400, 2, 8, 8) * torch.tensor([0.5, 3.0]).reshape(2, 1, 1) + torch.tensor([1.0, -2.0]).reshape(
        2, 1, 1
    )
    conv = nn.Conv2d(2, 4, 3)
    (site,) = inspect(nn.Sequential(conv), x).sites
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    means = conv.bias + conv.weight.sum((2, 3)) @ mean
    within = (conv.weight.square().sum((2, 3)) @ var).mean()
    assert site.predicted.mean == pytest.approx(means.mean().item(), rel=1e-4)
    assert site.predicted.within == pytest.approx(within.sqrt().item(), rel=1e-4)
    assert site.predicted.between == pytest.approx(means.std(correction=0).item(), rel=1e-4)
    assert site.predicted.std**2 == pytest.approx(site.predicted.within**2 + site.predicted.between**2, rel=1e-6)
    # 57,600 values that share inputs with their 8 neighbours.
    assert site.ratio == pytest.approx(1.0, abs=0.03)


def test_flags_what_is_predicted_badly():
    report = inspect(*flat_images())
    (site,) = report.sites
    assert report.worst is site
    assert report.flagged == (site,)
    assert site.ratio == pytest.approx(1 / 3, rel=1e-4)
    assert site.error == pytest.approx(3, rel=1e-4)
    assert inspect(*flat_images(), threshold=3.01).flagged == ()
    assert str(report).count("!") == 2
    with pytest.raises(ConfigError, match="threshold must be above 1"):
        inspect(*flat_images(), threshold=1.0)


class Doubling(nn.Module):
    """Has a rule of its own, a wrong one on purpose, so that it shows."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.act(x * 2.0)


@pytest.fixture
def doubling_rule():
    rule(Doubling)(lambda call: Moments(7.0, 4.0))
    yield
    del registry._MODULES[Doubling]


def test_a_module_with_a_rule_is_one_call(doubling_rule):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Identity(), nn.Linear(8, 16), Doubling(), nn.Linear(16, 16)), torch.randn(100, 8)
    report = inspect(model, x)
    before, doubling, after = report.sites
    assert (doubling.path, doubling.op, doubling.module, doubling.group) == ("2", "Doubling", "Doubling", "")
    assert (doubling.predicted.mean, doubling.predicted.std) == (7.0, 2.0)
    value = model[1](x)
    out = 2 * value.relu()
    assert doubling.measured.mean == pytest.approx(out.mean().item(), rel=1e-5)
    assert doubling.zeros == pytest.approx((out == 0).float().mean().item())
    # What goes into the activation inside.
    assert doubling.skew == pytest.approx(stats.skew(value.detach().double().flatten().numpy()), abs=1e-5)
    assert before.skew is None
    assert doubling.gradient > 0
    assert after.predicted.between == pytest.approx(
        (model[3](torch.full((16,), 7.0))).std(correction=0).item(), rel=1e-4
    )
    # The contracted graph can be measured too, as far as its modules take what enters as their arguments.
    graph = capture(model, x)
    found = measure(contract(graph, calls(graph, lambda module: isinstance(module, Doubling))), x)
    assert len(found) == 4
    torch.testing.assert_close(found[2].mean, out.mean(0))
    assert model[2].calls == 0


def test_networks_of_normprop_layers():
    torch.manual_seed(0)
    model = nn.Sequential(normprop.nn.Conv2d(3, 16, 3, activation="relu"), nn.Flatten(), normprop.nn.Linear(576, 8))
    report = inspect(model, torch.randn(64, 3, 8, 8))
    assert [site.op for site in report.sites] == ["Conv2d", "flatten", "Linear"]
    assert report.worst.error < 1.1
    assert report.sites[0].dead == 0.0


def test_judges_nothing_from_few_values():
    model, x = flat_images()
    (site,) = inspect(model, x[:1]).sites
    assert site.ratio is None
    assert not site.flagged


def test_says_which_units_are_dead():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 10), nn.Hardtanh())
    with torch.no_grad():
        model[0].bias[:3] = -100.0
        model[2].bias[:4] = 100.0
    relu, hardtanh = (site for site in inspect(model, torch.randn(500, 4)).sites if site.zeros is not None)
    assert (relu.op, hardtanh.op) == ("relu", "hardtanh")
    assert relu.dead == pytest.approx(0.3)
    assert 0.3 < relu.zeros < 1
    assert hardtanh.dead == pytest.approx(0.4)  # constant, and not zero
    assert hardtanh.zeros == 0.0
