import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from normprop import models
from normprop.diagnostics import gradient_histogram as gh
from normprop.diagnostics.diagnosis import Subject
from normprop.errors import ConfigError


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
    for words in (
        "zeros: the gradients of one weight are all 0.",
        "equal: the gradients of one weight are all equal.",
        "sparse: the largest gradient of one weight is infinitely many times the median one",
        "(2 of 4 are not finite).",
        "lost: one weight has no finite gradient.",
    ):
        assert words in diagnosis.found
    assert [line.name for line in diagnosis.figures[0].lines] == ["sparse", "broken", "normal distribution"]
    with pytest.raises(ConfigError, match="no values"):
        gh.histogram(torch.zeros(0))


@pytest.mark.parametrize("norm", ["none", "normprop", "batch", "cross-iteration"])
@pytest.mark.parametrize("training", [True, False])
def test_the_network_stays_as_it_is(norm, training, unchanged):
    case = subject(norm)
    case.model.append(nn.Dropout(0.3)).train(training)
    next(case.model.parameters()).grad = torch.ones_like(next(case.model.parameters()))
    with unchanged(case.model):
        with torch.no_grad():
            first, second = gh.measure(case), gh.measure(case)
        assert first == second


def test_weights_by_name():
    case = subject("none", "mlp", (5,))
    everything = gh.measure(case, "all")
    assert everything.count == sum(p.numel() for p in case.model.parameters())
    assert gh.measure(case).weight == gh.middle_weight(case.model) == "3.linear.weight"
    assert gh.measure(case, "1.linear.bias").count == 64
    assert gh.middle_weight(subject("normprop").model).endswith(".weight")


def test_errors_are_one_line():
    case = subject("none", "mlp", (5,))
    cases = [
        (lambda: gh.measure(Subject("a", case.model, case.inputs)), "a: the loss needs labels"),
        (lambda: gh.measure(case, "9.weight"), "no parameter '9.weight'"),
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
    heavy = results["none"]
    assert one.found == (
        f"none: the largest gradient of a.weight is {heavy.peak:.3g} times the median one, and the kurtosis is "
        f"{heavy.kurtosis:.3g}, where a normal distribution has 3."
    )
    both = gh.describe(results)
    assert both.found.splitlines()[0] == one.found
    assert both.found.splitlines()[1].startswith("batch: the largest gradient of b.weight is ")
    assert both.numbers["none"]["kurtosis"] > 10 > both.numbers["batch"]["kurtosis"]
    assert both.title.endswith("?")
    assert both.figures[0].y_scale == "log"
    assert [line.style for line in both.figures[0].lines] == ["line", "line", "theory"]
