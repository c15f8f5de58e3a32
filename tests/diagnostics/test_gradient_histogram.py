import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normprop import models
from normprop.diagnostics import gradient_histogram as gh
from normprop.diagnostics.diagnosis import Subject
from normprop.errors import ConfigError


def snapshot(model):
    tensors = {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    modes = [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        for module in model.modules()
    ]
    needs = [p.requires_grad for p in model.parameters()]
    return {**tensors, "rng": torch.get_rng_state()}, grads, (modes, needs)


def assert_same(before, after):
    for a, b in zip(before[:2], after[:2], strict=True):
        assert a.keys() == b.keys()
        assert all((a[k] is None and b[k] is None) or torch.equal(a[k], b[k]) for k in a)
    assert before[2] == after[2]


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def subject(norm="batch", name="resnet8", shape=(3, 8, 8), samples=12):
    model = models.create(name, shape, 10, norm=norm, width=0.25)
    return Subject(norm, model, torch.randn(samples, *shape), torch.randint(0, 10, (samples,)))


@pytest.mark.parametrize(
    ("draw", "kurtosis", "error"),
    [
        (torch.randn, 3.0, math.sqrt(24)),
        (torch.rand, 1.8, math.sqrt(0.366)),  # asymptotic variance of a uniform sample's kurtosis is below this
    ],
)
def test_kurtosis_of_known_distributions(draw, kurtosis, error):
    found = gh.histogram(draw(200_000) * 1e-6 + 3e-6)
    assert found.kurtosis == pytest.approx(kurtosis, abs=5 * error / math.sqrt(200_000))


def test_numbers_against_numpy_for_odd_and_even_counts():
    for count in (7, 10):
        values = torch.randn(count, dtype=torch.float64).numpy()
        found = gh.histogram(torch.tensor(values))
        deviations = values - values.mean()
        assert found.std == pytest.approx(values.std())
        assert found.kurtosis == pytest.approx((deviations**4).mean() / (deviations**2).mean() ** 2)
        assert found.peak == pytest.approx(np.abs(values).max() / np.median(np.abs(values)))


def test_the_histogram_is_a_density_and_that_of_normal_values_is_normal():
    values = torch.randn(400_000, dtype=torch.float64)
    found = gh.histogram(values, bins=61)
    width = found.centres[1] - found.centres[0]
    assert sum(found.density) * width == pytest.approx(1.0, abs=1e-12)
    for x, density in zip(found.centres, found.density, strict=True):
        mass = 0.5 * (math.erf((x + width / 2) / math.sqrt(2)) - math.erf((x - width / 2) / math.sqrt(2)))
        assert density * width == pytest.approx(mass, abs=5 * math.sqrt(mass / len(values)) + 2e-5)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e200])
def test_shape_does_not_depend_on_scale(scale):
    values = torch.randn(1001, dtype=torch.float64)
    expected, found = gh.histogram(values), gh.histogram(values * scale)
    assert found.kurtosis == pytest.approx(expected.kurtosis, rel=1e-6)
    assert found.peak == pytest.approx(expected.peak, rel=1e-6)
    assert found.std / scale == pytest.approx(expected.std, rel=1e-6)


def test_values_that_could_break_it():
    zeros = gh.histogram(torch.zeros(5))
    assert math.isnan(zeros.peak)
    assert math.isnan(zeros.kurtosis)
    equal = gh.histogram(torch.full((5,), 0.1))
    assert equal.peak == 1.0
    assert math.isnan(equal.kurtosis)
    sparse = gh.histogram(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert math.isinf(sparse.peak)
    assert sparse.kurtosis == pytest.approx((3 * 0.25**4 + 0.75**4) / 4 / (3 / 16) ** 2)
    broken = gh.histogram(torch.tensor([1.0, math.nan, -1.0, math.inf]))
    assert (broken.count, broken.not_finite, broken.kurtosis) == (4, 2, pytest.approx(1.0))
    lost = gh.histogram(torch.tensor([math.nan]))
    results = {"zeros": zeros, "equal": equal, "sparse": sparse, "broken": broken, "lost": lost}
    diagnosis = gh.describe(results)
    json.dumps(diagnosis.numbers, allow_nan=False)
    for words in ("zeros has gradients of 0 only", "equal has equal", "infinite", "2 of 4 not finite", "lost has no"):
        assert words in diagnosis.found
    assert [line.name for line in diagnosis.figures[0].lines] == ["sparse", "broken", "normal distribution"]
    with pytest.raises(ConfigError, match="no values"):
        gh.histogram(torch.zeros(0))


@pytest.mark.parametrize("norm", ["none", "normprop", "batch"])
def test_gradients_against_finite_differences(norm):
    case = subject(norm, "mlp", (5,), 9)
    model, inputs = case.model.double(), case.inputs.double()
    loss, found = gh.gradients(model, inputs, case.labels)
    with torch.no_grad():
        assert loss == pytest.approx(F.cross_entropy(model(inputs), case.labels).item())
        for name, parameter in model.named_parameters():
            flat = parameter.view(-1)
            for k in (0, len(flat) // 2):
                start, step = flat[k].item(), 1e-6
                ends = []
                for sign in (1, -1):
                    flat[k] = start + sign * step
                    ends.append(F.cross_entropy(model(inputs), case.labels).item())
                flat[k] = start
                assert found[name].flatten()[k].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("norm", ["none", "normprop", "batch", "cross-iteration"])
@pytest.mark.parametrize("training", [True, False])
def test_the_network_stays_as_it_is(norm, training):
    case = subject(norm)
    case.model.append(nn.Dropout(0.3)).train(training)
    next(case.model.parameters()).grad = torch.ones_like(next(case.model.parameters()))
    before = snapshot(case.model)
    with torch.no_grad():
        first, second = gh.measure(case), gh.measure(case)
    assert first == second
    assert_same(before, snapshot(case.model))


def test_weights_by_name():
    case = subject("none", "mlp", (5,))
    everything = gh.measure(case, "all")
    assert everything.count == sum(p.numel() for p in case.model.parameters())
    assert gh.measure(case).weight == gh.middle_weight(case.model) == "3.linear.weight"
    assert gh.measure(case, "1.linear.bias").count == 64
    assert gh.middle_weight(subject("normprop").model).endswith(".weight")
    frozen = nn.Sequential(nn.Linear(5, 4).requires_grad_(False), nn.Linear(4, 10))
    assert list(gh.gradients(frozen, case.inputs, case.labels)[1]) == ["1.weight", "1.bias"]


def test_errors_are_one_line():
    case = subject("none", "mlp", (5,))
    model, inputs, labels = case.model, case.inputs, case.labels
    cases = [
        (lambda: gh.measure(Subject("a", model, inputs)), "a: the loss needs labels"),
        (lambda: gh.measure(case, "9.weight"), "no parameter '9.weight'"),
        (lambda: gh.gradients(model, inputs, labels[:3]), "labels of shape"),
        (lambda: gh.gradients(model, inputs, labels.float()), "whole-number"),
        (lambda: gh.gradients(model, inputs, labels + 10), "10 classes, 0 to 9"),
        (lambda: gh.gradients(model, inputs[:0], labels[:0]), "empty batch"),
        (lambda: gh.gradients(nn.Flatten(0), inputs, labels), "no parameter of the network"),
        (lambda: gh.gradients(nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), inputs, labels), "one tensor of logits"),
        (lambda: gh.middle_weight(nn.ReLU()), "no linear map"),
    ]
    for call, words in cases:
        with pytest.raises(ConfigError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_describe_one_and_two():
    heavy, light = torch.randn(4000) ** 3, torch.randn(4000)
    results = {"none": gh.histogram(heavy, "a.weight"), "batch": gh.histogram(light, "b.weight")}
    one = gh.describe({"none": results["none"]})
    assert f"none {results['none'].peak:.3g} and {results['none'].kurtosis:.3g} (a.weight)." in one.found
    both = gh.describe(results)
    assert f"batch {results['batch'].peak:.3g} and {results['batch'].kurtosis:.3g} (b.weight)." in both.found
    assert both.numbers["none"]["kurtosis"] > 10 > both.numbers["batch"]["kurtosis"]
    assert both.title.endswith("?")
    assert both.figures[0].y_scale == "log"
    assert [line.style for line in both.figures[0].lines] == ["line", "line", "theory"]
