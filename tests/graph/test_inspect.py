import copy
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import normprop
from normprop.errors import ConfigError, GraphError, UnknownOperatorError
from normprop.graph.capture import capture
from normprop.graph.contract import calls, contract
from normprop.graph.inspect import inspect
from normprop.graph.measure import measure
from normprop.graph.node import Graph
from normprop.graph.rules import registry, rule
from normprop.moments import Moments
from normprop.testing import assert_moments


class Net(nn.Module):
    """Convolutions, one of them shared, batch norm, activations in place, dropout, a residual sum, a dict."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU())
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.body(self.body(x)) + x
        pooled = self.drop(x.mean((2, 3)))
        return {"logits": self.head(pooled), "pooled": pooled}


class Stubborn(Net):
    """The same in a form that can only be recorded: a part without gradients is a graph of its own to torch.export."""

    def forward(self, x):
        with torch.no_grad():
            x = x * 1.5
        return super().forward(x)


NETS = [Net, Stubborn]


def make(kind=Net, seed=0):
    torch.manual_seed(seed)
    return kind().train(), torch.randn(6, 3, 8, 8)


def loss(output):
    return output["logits"].square().sum() + output["pooled"].sum()


def hooked(model, x):
    """Outputs, inputs and gradients of the leaf modules' calls, from the model itself."""
    calls, handles = {}, []

    def before(module, args):
        module.given = args[0].detach().clone()

    def after(module, args, output):
        path = paths[id(module)]
        call = {"output": output.detach().clone(), "input": module.given, "gradient": None}
        calls.setdefault(path, []).append(call)
        output.register_hook(lambda gradient: call.update(gradient=gradient.clone()))

    model = copy.deepcopy(model)
    paths = {id(module): path for path, module in model.named_modules()}
    for module in model.modules():
        if not [*module.children()]:
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    loss(model(x.clone())).backward()
    for handle in handles:
        handle.remove()
    return calls


def channels(value):
    return value.double().transpose(0, 1).flatten(1)


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


def flat_images():
    """Images of one colour, which a prediction cannot know: the mean of nine equal pixels has the pixel's spread."""
    torch.manual_seed(0)
    mean = nn.Conv2d(1, 1, 3, bias=False)
    nn.init.constant_(mean.weight, 1 / 9)
    return nn.Sequential(nn.Identity(), mean), torch.randn(100, 1, 1, 1).expand(100, 1, 8, 8).contiguous()


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


class Operators(nn.Module):
    """Much that is no activation, with one that is at the end."""

    def __init__(self, act):
        super().__init__()
        self.act = act
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.norm = nn.BatchNorm2d(4).eval()
        self.layer = nn.LayerNorm(6)
        self.mix = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x):
        x = self.norm(x * self.scale + 1.0).flip(-1).cumsum(-1)
        x = F.avg_pool2d(self.layer(self.mix(x)), 3, 1, 1).softmax(1).clone().transpose(2, 3)
        return self.act(F.dropout(x, 0.5) * 3 - x)


@pytest.mark.parametrize(
    "act", [nn.ReLU(True), nn.PReLU(4), nn.GELU(), nn.Hardswish(True), nn.LogSigmoid(), nn.Tanh(), nn.LeakyReLU(0.5)]
)
def test_finds_activations_by_what_they_do(act):
    torch.manual_seed(0)
    report = inspect(Operators(act), torch.randn(8, 4, 6, 6), on_unknown="measure")
    assert [site.path for site in report.sites if site.zeros is not None] == ["act"]


class Unknown(nn.Module):
    def forward(self, x):
        return torch.renorm(x, 2, 0, 1.0) * 2.0


def test_operators_without_a_rule():
    torch.manual_seed(0)
    x = torch.randn(16, 9, 3)
    with pytest.raises(UnknownOperatorError, match="renorm"):
        inspect(Unknown(), x)
    report = inspect(Unknown(), x, on_unknown="measure")
    renorm, double = report.sites
    assert renorm.predicted.std == pytest.approx(renorm.measured.std, rel=1e-5)
    assert double.ratio == pytest.approx(1.0, rel=1e-5)
    assert "renorm" in report.notes[0]
    assert report.notes[0] in " ".join(str(report).split())


def test_measure_gives_moments_per_channel():
    model, x = make()
    model.eval()
    found = measure(capture(model, x), x)
    graph = capture(model, x)
    stem = next(node.index for node in graph.nodes if node.path == "stem")
    truth = channels(model.stem(x))
    torch.testing.assert_close(found[stem].mean, truth.mean(1).float())
    torch.testing.assert_close(found[stem].var, truth.var(1, correction=0).float())
    with pytest.raises(ConfigError, match=r"captured were \[\(6, 3, 8, 8\)\]"):
        measure(graph, x[:2])


class Tokens(nn.Module):
    """Two inputs by name, one of them of integers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 16)
        self.map = nn.Linear(16, 16)

    def forward(self, tokens, gain):
        return self.map(torch.relu(self.embed(tokens))) * gain


def test_inputs_by_name_and_of_integers():
    torch.manual_seed(0)
    model, gain, tokens = Tokens(), torch.rand(9, 1, 1) + 1, torch.randint(0, 7, (9, 5))
    report = inspect(model, {"gain": gain, "tokens": tokens}, on_unknown="measure", loss=lambda y: y.sum())
    sites = {site.op: site for site in report.sites}
    value = model.map(torch.relu(model.embed(tokens)))
    assert sites["mul"].measured.std == pytest.approx((value * gain).std(correction=0).item(), rel=1e-5)
    assert sites["linear"].gradient == pytest.approx(gain.square().mean().sqrt().item(), rel=1e-5)
    assert sites["embedding"].measured.std > 0
    assert sites["embedding"].gradient > 0


class Writes(nn.Module):
    """Works in place on its own input, and draws a mask of its input's type."""

    def forward(self, x):
        x.mul_(2.0)
        keep = x.new_empty(x.shape[0], 1).bernoulli_(0.5)
        return torch.tanh(x) * keep


def test_in_place_on_the_input_and_masks_that_read_no_values():
    torch.manual_seed(0)
    x = torch.randn(50, 40)
    kept = x.clone()
    report = inspect(Writes(), x, on_unknown="measure")
    assert torch.equal(x, kept)
    doubled, tanh, out = report.sites
    assert doubled.measured.std == pytest.approx(2 * x.std(correction=0).item(), rel=1e-5)
    assert tanh.measured.std == pytest.approx(torch.tanh(2 * x).std(correction=0).item(), rel=1e-5)
    assert out.op == "mul"


class Overwrites(nn.Module):
    """Works in place on a view that nobody reads otherwise, then on what a derivative needs."""

    def forward(self, x):
        y = torch.exp(x).flatten(1).mul_(3.0)
        return torch.sigmoid(y).add_(1.0)


def test_in_place_where_autograd_would_not_survive_it():
    torch.manual_seed(0)
    x = torch.randn(20, 3, 4, requires_grad=True)
    report = inspect(Overwrites(), x)
    exp, flat, scaled, _, out = report.sites
    y = torch.exp(x)
    value = torch.sigmoid(3.0 * y) + 1.0
    assert out.measured.mean == pytest.approx(value.double().mean().item(), rel=1e-5)
    assert exp.measured.mean == pytest.approx(y.double().mean().item(), rel=1e-5)
    slope = torch.autograd.grad(value.sum(), y)[0].square().mean().sqrt().item() / value.numel() ** 0.5
    assert exp.gradient == flat.gradient == pytest.approx(slope, rel=1e-4)  # signs do not change a root mean square
    assert scaled.gradient == pytest.approx(slope / 3.0, rel=1e-4)


class Aliases(nn.Module):
    def forward(self, x):
        y = x * 2.0
        y[:, :3].add_(5.0)
        return y + 1.0


def test_runs_in_place_what_is_read_under_another_name(monkeypatch):
    monkeypatch.setattr(Graph, "settled", lambda graph: graph)  # which would refuse it
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    graph = capture(Aliases(), x)
    found = measure(graph, x)
    torch.testing.assert_close(found[graph.outputs[0]].mean, Aliases()(x).mean(0))


class Underived(nn.Module):
    """An operator whose derivative torch does not have."""

    def forward(self, x):
        return torch.special.gammainc(torch.exp(x), torch.ones_like(x))


def test_says_why_there_are_no_gradients():
    report = inspect(Underived(), torch.zeros(8, 16), on_unknown="measure")
    assert {site.gradient for site in report.sites} == {None}
    assert any(note.startswith("no gradients: the derivative for") for note in report.notes)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [(lambda y: 1.0, "got float"), (lambda y: y["logits"], "shape"), (lambda y: torch.zeros(()), "depends")],
)
def test_refuses_losses_that_are_none(wrong, match):
    model, x = make()
    with pytest.raises(ConfigError, match=match):
        inspect(model, x, loss=wrong)


def test_a_model_that_fails_is_named():
    with pytest.raises(GraphError, match="Sequential cannot run"):
        inspect(nn.Sequential(nn.Linear(3, 3)), torch.zeros(2, 4))


def test_document_is_json_whatever_was_measured():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16))
    nn.init.constant_(model[0].weight, 1e30)
    nn.init.constant_(model[1].weight, 1e30)
    report = inspect(model, torch.randn(8, 8))
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["sites"][1]["measured"]["std"] == "nan"
    assert document["sites"][1]["flagged"]
    assert not math.isfinite(report.sites[1].measured.std)
    assert "nan" in str(report)


def test_text_lists_every_call_in_120_columns():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    for _ in range(9):
        inner = nn.ModuleDict({"a_rather_long_name": inner})["a_rather_long_name"]
        inner = nn.Sequential(inner)
    report = inspect(inner, torch.randn(4, 3, 64, 64))
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 120
    assert sum("conv2d" in line or "relu" in line for line in lines) >= 2
    model, x = make()
    text = str(inspect(model, x))
    assert text.startswith("Net in training mode on 6×3×8×8: ")
    for name in ("stem: conv2d", "norm: batch_norm", "act: relu", "1 #2: silu", "head: linear", "add", "mean"):
        assert sum(line[3:].startswith(name) for line in text.splitlines()) == 1, name
    assert "Net in mixed mode" in str(inspect((model.norm.eval(), model)[1], x))


def test_assert_moments_passes_and_names_what_is_off():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))
    report = assert_moments(model, torch.randn(16, 3, 12, 12))
    assert [site.path for site in report.sites] == ["0", "1", "2", "3"]
    with pytest.raises(AssertionError, match=r"1 of 1 calls are off:\n  1: conv2d: std off: predicted mean .*, std"):
        assert_moments(*flat_images())
    assert_moments(*flat_images(), rtol=2.1)
    with pytest.raises(ConfigError, match="must be positive"):
        assert_moments(*flat_images(), rtol=0.0)


def test_assert_moments_looks_at_means():
    # Signs: after a rectifier their mean is 1/2, that of a Gaussian 0.399, with a root mean square of 0.707.
    x = torch.tensor([1.0, -1.0]).repeat(200)[:, None]
    assert_moments(nn.ReLU(), x, atol=0.15)
    with pytest.raises(AssertionError, match=r"relu: mean off: predicted mean 0.39.*, measured mean 0.5, std 0.5"):
        assert_moments(nn.ReLU(), x, atol=0.14)


def test_assert_moments_does_not_pass_what_is_not_finite():
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    nn.init.constant_(model[0].weight, math.inf)
    with pytest.raises(AssertionError, match="not finite"):
        assert_moments(model, torch.randn(16, 8))
