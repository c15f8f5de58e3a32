import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normprop import models
from normprop.diagnostics import line_profile as lp
from normprop.diagnostics.diagnosis import Subject
from normprop.errors import ConfigError


def subject(norm="batch", name="resnet8", shape=(3, 8, 8), samples=12):
    model = models.create(name, shape, 10, norm=norm, width=0.25)
    return Subject(norm, model, torch.randn(samples, *shape), torch.randint(0, 10, (samples,)))


class Scores(nn.Module):
    """Two logits, w and 0, whatever the image."""

    def __init__(self, start):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, x):
        return torch.stack([self.w.expand(len(x)), self.w.new_zeros(len(x))], 1)


def test_closed_form_of_one_parameter():
    # A quarter of class 0: L(w) = log(1 + e^w) - w / 4, lowest at w = -log 3.
    start = 2.0
    labels = torch.tensor([0, 1, 1, 1])
    slope = 1 / (1 + math.exp(-start)) - 0.25
    steps = [0.1 * k for k in range(1, 200)]
    found = lp.line_profile(Scores(start), torch.zeros(4, 1, dtype=torch.float64), labels, steps)
    assert found.gradient_norm == pytest.approx(slope, rel=1e-12)

    def loss(t):
        return math.log1p(math.exp(start - t * slope)) - (start - t * slope) / 4

    assert found.start == pytest.approx(loss(0))
    assert found.losses == pytest.approx([loss(t) for t in steps])
    assert found.best == pytest.approx((start + math.log(3)) / slope, abs=0.05)
    assert found.rise == next(t for t in steps if loss(t) > loss(0))
    assert math.isfinite(found.rise)


@pytest.mark.parametrize("norm", ["none", "batch", "normprop"])
def test_losses_against_steps_taken_by_hand(norm):
    case = subject(norm)
    model, inputs = case.model.double(), case.inputs.double()
    found = lp.line_profile(model, inputs, case.labels, (1e-3, 0.3))
    for step, expected in zip(found.steps, found.losses, strict=True):
        other = models.create("resnet8", (3, 8, 8), 10, norm=norm, width=0.25).double()
        other.load_state_dict(model.state_dict())
        optimizer = torch.optim.SGD(other.parameters(), lr=step)
        F.cross_entropy(other(inputs), case.labels).backward()
        optimizer.step()
        assert F.cross_entropy(other(inputs), case.labels).item() == pytest.approx(expected, rel=1e-9)


def test_small_steps_follow_the_gradient():
    case = subject("batch")
    found = lp.line_profile(case.model.double(), case.inputs.double(), case.labels, (1e-6,))
    assert (found.start - found.losses[0]) / 1e-6 == pytest.approx(found.gradient_norm**2, rel=1e-3)


def test_rounding_is_no_rise():
    case = subject("none", "mlp", (5,))
    found = lp.measure(case, (1e-12, 1e-11, 1e-10))
    assert math.isinf(found.rise)
    assert found.best == 0.0
    words = "none: the loss stays at its start or below up to a step of 1e-10; no step lowers it."
    assert lp.describe({"none": found}).found == words


def test_losses_that_are_not_finite_count_as_a_rise():
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    found = lp.line_profile(model, torch.randn(6, 3), torch.arange(6) % 4, (0.1, 1e30))
    assert not math.isfinite(found.losses[-1])
    assert found.rise == 1e30
    assert found.best == 0.1
    json.dumps(lp.describe({"deep": found}).numbers, allow_nan=False)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    lost = lp.line_profile(model, torch.randn(6, 3), torch.arange(6) % 4)
    assert lost.best == 0.0
    diagnosis = lp.describe({"lost": lost, "deep": found})
    assert "lost: the loss is not finite before the step." in diagnosis.found
    assert "deep: the loss is above its start from a step of 1e+30 on; it is lowest after a step of 0.1." in (
        diagnosis.found
    )
    json.dumps(diagnosis.numbers, allow_nan=False)


@pytest.mark.parametrize("norm", ["none", "normprop", "batch", "cross-iteration"])
@pytest.mark.parametrize("training", [True, False])
def test_the_network_stays_as_it_is(norm, training, unchanged):
    case = subject(norm)
    case.model.append(nn.Dropout(0.3)).train(training)
    with unchanged(case.model):
        with torch.no_grad():
            first, second = lp.measure(case, (1e-3, 0.1)), lp.measure(case, (1e-3, 0.1))
        assert first == second


def test_dropout_is_the_same_at_all_steps():
    model = nn.Sequential(nn.Linear(50, 50), nn.Dropout(0.5), nn.Linear(50, 10))
    found = lp.line_profile(model, torch.randn(8, 50), torch.arange(8), (1e-9, 2e-9, 3e-9))
    assert found.losses == pytest.approx([found.start] * 3, rel=1e-6)


def test_frozen_parameters_do_not_move():
    model = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 5))
    inputs, labels = torch.randn(6, 3), torch.arange(6) % 5
    head = nn.Sequential(model[1])
    assert lp.line_profile(model, inputs, labels).losses == pytest.approx(
        lp.line_profile(head, model[0](inputs).detach(), labels).losses
    )


@pytest.mark.parametrize("steps", [(), (0.0, 1.0), (-1.0,), (1.0, 0.5), (1.0, 1.0), (math.nan,)])
def test_steps_that_cannot_work(steps):
    with pytest.raises(ConfigError, match="steps must increase") as caught:
        lp.measure(subject(), steps)
    assert "\n" not in str(caught.value)


def test_labels_are_needed():
    case = subject()
    with pytest.raises(ConfigError, match="batch: the loss needs labels"):
        lp.measure(Subject("batch", case.model, case.inputs))


def test_describe_one_and_two():
    a = lp.LineProfile(2.0, 3.0, (0.1, 1.0), (1.0, 4.0), 1.0, 0.1)
    b = lp.LineProfile(4.0, 3.0, (0.1, 1.0), (3.0, 1.0), math.inf, 1.0)
    one = "a: the loss is above its start from a step of 1 on; it is lowest after a step of 0.1."
    assert lp.describe({"a": a}).found == one
    both = lp.describe({"a": a, "b": b})
    two = "b: the loss stays at its start or below up to a step of 1; it is lowest after a step of 1."
    assert both.found == f"{one}\n{two}"
    assert both.numbers["b"]["rise"] is None
    (plot,) = both.figures
    assert [list(line.y) for line in plot.lines] == [[0.5, 2.0], [0.75, 0.25]]
    assert [line.name for line in plot.lines] == ["a", "b"]
