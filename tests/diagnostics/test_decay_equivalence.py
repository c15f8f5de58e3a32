import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normprop import models
from normprop.diagnostics.decay_equivalence import (
    Equivalence,
    decay_equivalence,
    describe,
    measure,
    scale_invariant,
)
from normprop.diagnostics.diagnosis import Subject
from normprop.errors import ConfigError


class Unit(nn.Module):
    """A linear unit behind a batch norm without eps, and a fixed gain of 2."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, features))

    def forward(self, x):
        z = F.linear(x, self.weight).squeeze(1)
        return 2 * (z - z.mean()) / z.std(correction=0)


def logistic(seed):
    """A small logistic problem, in double precision."""
    torch.manual_seed(seed)
    x = torch.randn(200, 10, dtype=torch.float64)
    y = (x @ torch.randn(10, dtype=torch.float64) > 0).double()
    return Unit(10).double(), (x, y)


def perceptron(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8, eps=1e-300), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3)
    ).to(dtype)


def batches(count=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 6, generator=generator, dtype=dtype), torch.randint(3, (16,), generator=generator))
        for _ in range(count)
    ]


def one_minus_cos(angle):
    return 2 * math.sin(angle / 2) ** 2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_exact_rule_is_exact_for_200_steps(seed):
    model, batch = logistic(seed)
    found = decay_equivalence(model, [batch], 0.1, 0.02, 200, loss=F.binary_cross_entropy_with_logits)
    assert one_minus_cos(max(found.exact)) < 1e-20
    assert one_minus_cos(max(found.poster)) > 1e-7
    assert max(found.poster) < max(found.none)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_exact_rule_at_a_rate_at_which_training_amplifies_rounding(seed):
    """Rate 0.5, decay 0.05: filters shrink until a step turns them by a large angle. First exact, then chaos, and in
    the end all runs are in one minimum, so the angles after 200 steps say little about the rules."""
    model, batch = logistic(seed)
    found = decay_equivalence(model, [batch], 0.5, 0.05, 200, loss=F.binary_cross_entropy_with_logits)
    assert max(found.exact[:10]) < 1e-14
    assert min(found.poster[1:10]) > 1e-3
    assert max(found.exact) > 1e6 * max(found.exact[:10])
    assert one_minus_cos(found.exact[-1]) < 1e-6  # what rounding made of it differs between processors


def test_steps_by_hand():
    """All four runs of a unit written out: the same angles, and the growth of the filter."""
    model, (x, y) = logistic(5)
    eta, lam, steps = 0.2, 0.1, 12
    found = decay_equivalence(model, [(x, y)], eta, lam, steps, loss=F.binary_cross_entropy_with_logits)

    def gradient(w):
        w = w.clone().requires_grad_(True)
        z = x @ w
        value = F.binary_cross_entropy_with_logits(2 * (z - z.mean()) / z.std(correction=0), y)
        return torch.autograd.grad(value, w)[0]

    w = model.weight.detach()[0]
    runs = {"exact": w, "poster": w, "none": w}
    for step in range(steps):
        c = {name: (v.norm() / w.norm()) ** 2 for name, v in runs.items()}
        scale = {"exact": c["exact"] / (1 - eta * lam), "poster": c["poster"], "none": 1.0}
        runs = {name: v - eta * scale[name] * gradient(v) for name, v in runs.items()}
        w = (1 - eta * lam) * w - eta * gradient(w)
        for name in ("poster", "none"):
            angle = torch.acos(torch.cosine_similarity(runs[name], w, 0)).item()
            assert getattr(found, name)[step] == pytest.approx(angle, rel=1e-4, abs=2e-8), (name, step)
        assert found.exact[step] < 1e-12
    assert found.growth == pytest.approx(float(runs["exact"].norm() / w.norm()), rel=1e-9)
    # With the exact rule c grows by 1 / (1 - eta lambda) in each step.
    assert found.growth == pytest.approx((1 - eta * lam) ** -steps, rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_network_with_biases_gains_and_dropout(momentum):
    found = decay_equivalence(perceptron(), batches(), 0.1, 0.02, 60, momentum)
    assert found.weights == ("0.weight",)
    assert len(found.exact) == len(found.poster) == len(found.none) == 60
    assert max(found.exact) < 1e-9
    assert found.poster[-1] > 1e3 * found.exact[-1]
    assert found.none[-1] > 1e-3


def test_without_decay_all_runs_are_one():
    found = decay_equivalence(perceptron(), batches(), 0.1, 0.0, 5)
    assert found.none == (0.0,) * 5
    assert max(found.exact + found.poster) < 1e-12
    assert found.growth == pytest.approx(1.0, rel=1e-12)


def test_layers_that_are_not_scale_invariant_part_from_decay():
    """The comparison can fail: the head is not normalised, so no rate stands in for its decay."""
    found = decay_equivalence(perceptron(), batches(), 0.1, 0.2, 40, weights=["4.weight"])
    assert found.exact[-1] > 1e-3


def test_scale_invariant_weights():
    torch.manual_seed(0)
    x, y = torch.randn(12, 3, 8, 8), torch.arange(12) % 10
    names = {
        norm: scale_invariant(models.create("resnet8", (3, 8, 8), 10, norm=norm, width=0.25), x, y)
        for norm in ("batch", "normprop", "weight", "none", "layer")
    }
    assert len(names["batch"]) == 9  # all but the head
    assert len(names["normprop"]) >= 9
    assert len(names["weight"]) >= 9
    assert names["none"] == names["layer"] == ()


def test_scale_invariance_is_of_each_filter_and_what_doubling_says():
    model = perceptron()
    x, y = batches()[0]
    (name,) = scale_invariant(model, x, y)
    for index in range(8):
        doubled = copy.deepcopy(model)
        with torch.no_grad():
            doubled[0].weight[index].mul_(2)
            # A batch norm subtracts the mean, so the bias does not matter.
        model[3].p = doubled[3].p = 0.0
        torch.testing.assert_close(doubled(x), model(x))
    assert name == "0.weight"
    # Layer norm lets the whole weight have any length, but not a single filter.
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8, eps=0.0), nn.Linear(8, 3)).double()
    assert scale_invariant(whole, x, y) == ()
    # Zero filters and dead weights say nothing.
    with torch.no_grad():
        model[0].weight[0].zero_()
    assert scale_invariant(model, x, y) == ()


def test_network_and_random_state_are_left_alone():
    model = perceptron().eval()
    model[1].train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [part.training for part in model.modules()]
    with torch.no_grad():
        decay_equivalence(model, batches(), 0.1, 0.02, 4)
    with torch.inference_mode(False):
        measure(Subject("batch", model, torch.randn(20, 6), torch.arange(20) % 3), steps=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [part.training for part in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(part._forward_hooks for part in model.modules())
    torch.manual_seed(9)
    state = torch.get_rng_state()
    decay_equivalence(model, batches(), 0.1, 0.02, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_single_precision_and_measure_in_double():
    single = decay_equivalence(perceptron(torch.float32), batches(dtype=torch.float32), 0.1, 0.02, 30)
    assert 1e-12 < max(single.exact) < 1e-3
    torch.manual_seed(0)
    subject = Subject("normprop", models.create("mlp", (6,), 3, norm="normprop", width=0.05), torch.randn(70, 6), None)
    subject = Subject(subject.name, subject.model, subject.inputs, torch.arange(70) % 3)
    found = measure(subject, steps=20)
    assert len(found.weights) == 5
    assert max(found.exact) < 1e-10  # NormProp has no eps
    assert found.growth == pytest.approx(0.998**-20)


def test_describe_one_and_two():
    first = Equivalence(0.1, 0.05, ("a",), (2e-15, 1e-15), (3e-5, 1e-5), (4e-2, 1e-2), 1.5)
    second = Equivalence(0.2, 0.01, ("a", "b"), (0.0,), (math.nan,), (0.5,), math.inf)
    one = describe({"batch": first})
    assert one.found == (
        "batch: with learning rates corrected by the exact rule, filters trained without decay are at most 2e-15 rad "
        "from those trained with it (poster's rule 3e-05, no correction 0.04), in 2 steps at rate 0.1 and decay 0.05."
    )
    two = describe({"batch": first, "weight": second})
    assert two.found.splitlines()[0] == one.found
    assert "(poster's rule nan, no correction 0.5), in 1 step at rate 0.2 and decay 0.01." in two.found
    numbers = json.loads(json.dumps(two.numbers, allow_nan=False))
    assert numbers["weight"]["largest angle, poster's rule"] is None
    assert numbers["weight"]["growth of the filters"] is None
    assert numbers["batch"]["no correction"] == [0.04, 0.01]
    assert [plot.title for plot in two.figures] == ["No correction", "Poster's rule", "Exact rule"]
    assert [line.name for line in two.figures[0].lines] == ["batch", "weight"]
    assert list(two.figures[0].lines[0].y) == [0.04, 0.01]
    assert math.isnan(two.figures[2].lines[1].y[0])  # a log axis has no place for 0
    assert two.title.endswith("?")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decay_equivalence(perceptron(), []), "0 batches and 200 steps"),
        (lambda: decay_equivalence(perceptron(), batches(), steps=0), "4 batches and 0 steps"),
        (lambda: decay_equivalence(nn.Linear(6, 3).double(), batches()), "no weight has filters of any length"),
        (lambda: decay_equivalence(perceptron(), batches(), weights=["9.weight"]), "'9.weight' is no weight"),
        (lambda: decay_equivalence(perceptron(), batches(), weights=["0.bias"]), "'0.bias' is no weight"),
        (lambda: decay_equivalence(perceptron(), batches(), rate=2.0, decay=0.6), "decay turns a filter round"),
        (lambda: measure(Subject("net", perceptron(), torch.randn(4, 6))), "net: the loss needs labels"),
    ],
)
def test_errors_are_one_line(call, message):
    with pytest.raises(ConfigError) as raised:
        call()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
