"""Inspection of operators of every kind, of what goes wrong, and what it prints."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normprop.errors import ConfigError, GraphError, UnknownOperatorError
from normprop.graph.capture import capture
from normprop.graph.inspect import inspect
from normprop.graph.measure import measure
from normprop.graph.node import Graph
from normprop.testing import assert_moments
from tests.graph.inspect_networks import channels, flat_images, make


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
