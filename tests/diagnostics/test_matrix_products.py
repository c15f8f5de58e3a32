import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from normprop import models
from normprop.diagnostics import matrix_products as mp
from normprop.diagnostics.diagnosis import Subject
from normprop.errors import ConfigError


def test_fuss_catalan_numbers():
    # Generating function B = 1 + z B^(M + 1), term by term.
    for factors in (1, 2, 3, 5):
        series = [1]
        for order in range(1, 9):
            power = [1] + [0] * (order - 1)
            for _ in range(factors + 1):
                power = [sum(power[j] * series[k - j] for j in range(k + 1)) for k in range(order)]
            series.append(power[order - 1])
        assert [mp.fuss_catalan(factors, n) for n in range(9)] == series


@pytest.mark.parametrize("factors", [1, 2, 3, 5, 8])
def test_moments_of_the_density(factors):
    # Over p the integrand is bounded, unlike over x, whose density is infinite at 0.
    points = 100_001
    x, rho = mp.density(factors, points)
    step = math.pi / (factors + 1) / (points + 1)
    p = step * torch.arange(1, points + 1, dtype=torch.float64)
    slope = x * ((factors + 1) ** 2 / ((factors + 1) * p).tan() - 1 / p.tan() - factors**2 / (factors * p).tan())
    for order in range(6):
        assert -(x**order * rho * slope).sum().item() * step == pytest.approx(mp.fuss_catalan(factors, order), rel=1e-4)


@pytest.mark.parametrize(("factors", "value"), [(1, 4.0), (2, 6.75), (3, 256 / 27), (5, 6**6 / 5**5)])  # 9.48 and 14.93
def test_edge(factors, value):
    assert mp.edge(factors) == pytest.approx(value, rel=1e-13)
    x, rho = mp.density(factors, points=20_000)
    assert x[0].item() == pytest.approx(value, rel=1e-6)
    assert bool((x.diff() < 0).all())
    assert bool((rho > 0).all())
    # Moments grow like the edge's powers.
    assert mp.fuss_catalan(factors, 2001) / mp.fuss_catalan(factors, 2000) == pytest.approx(value, rel=2e-3)


@pytest.mark.parametrize(
    ("factors", "largest", "median", "condition"),
    [(1, 3.99, 0.65, 1.6e3), (2, 6.55, 0.31, 2e5), (3, 9.17, 0.15, 1.9e7), (5, 14.8, 0.035, 9e11)],
)
def test_gaussian_products_of_size_400(factors, largest, median, condition):
    found = [mp.gaussian_product(factors, size=400, seed=seed) for seed in range(16)]
    for spectrum in found[:3]:
        assert spectrum.squared[0] * spectrum.scale == pytest.approx(largest, rel=0.03 * (factors + 1))
        assert spectrum.squared[0] * spectrum.scale < mp.edge(factors) * 1.1
        assert np.median(spectrum.squared) * spectrum.scale == pytest.approx(median, rel=0.08)
        assert spectrum.scale == pytest.approx(1.0, abs=0.05)
    # The smallest singular value, and with it the condition number, scatters by orders of magnitude.
    conditions = [spectrum.condition for spectrum in found]
    assert min(conditions) < condition < max(conditions)


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_gaussian_products_have_the_moments_and_the_median_of_the_density(factors):
    found = mp.gaussian_product(factors, size=300, seed=7)
    values = torch.tensor(found.squared, dtype=torch.float64) * found.scale
    for order in (1, 2, 3):
        assert values.pow(order).mean().item() == pytest.approx(mp.fuss_catalan(factors, order), rel=0.06)
    x, rho = mp.density(factors, points=100_001)
    above = torch.cumulative_trapezoid(rho, -x)
    median = x[int((above < 0.5).sum())].item()
    assert values.median().item() == pytest.approx(median, rel=0.08)


def test_order_of_the_factors_and_scale():
    a, b = torch.randn(6, 6), torch.randn(6, 6)
    found = mp.spectrum([a, b])
    values = np.linalg.svd(b.double().numpy() @ a.double().numpy(), compute_uv=False)
    assert found.scale == pytest.approx((values**2).mean())
    assert found.squared == pytest.approx(values**2 / (values**2).mean())
    assert found.condition == pytest.approx(values[0] / values[-1])
    assert mp.spectrum([3 * a, b]).squared == pytest.approx(found.squared)


def test_weights_of_a_plain_network():
    model = models.create("mlp", (5,), 3, norm="none", width=0.1)
    found = mp.measure(Subject("none", model, torch.randn(2, 5)))
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)][1:-1]
    assert found == mp.spectrum(weights)
    assert found.factors == 3


def test_weights_of_normprop_are_the_effective_ones():
    model = models.create("mlp", (5,), 3, norm="normprop-paper", width=0.1)
    inputs = torch.randn(2, 5)
    weights = [layer.gain[:, None] * layer.weight / layer.weight.norm(dim=1, keepdim=True) for layer in model[2:-1]]
    found = mp.measure(Subject("normprop-paper", model, inputs))
    expected = mp.spectrum(weights)
    assert found.squared == pytest.approx(expected.squared, rel=1e-3, abs=1e-6)
    # Centred filters do not see a constant input: the product is singular.
    centred = mp.measure(Subject("normprop", models.create("mlp", (5,), 3, norm="normprop", width=0.1), inputs))
    assert centred.condition > 1e6 * found.condition or centred.squared[-1] < 1e-12


@pytest.mark.parametrize("norm", ["none", "normprop", "batch"])
def test_the_network_stays_as_it_is(norm, unchanged):
    model = nn.Sequential(models.create("mlp", (5,), 10, norm=norm, width=0.1), nn.Dropout(0.3))
    with unchanged(model):
        assert mp.measure(Subject("a", model, torch.randn(4, 5, generator=torch.Generator()))).factors == 3


def test_products_that_could_break_it():
    zero = mp.spectrum([torch.zeros(3, 3)])
    flat = mp.spectrum([torch.diag(torch.tensor([1.0, 1.0, 0.0]))])
    same = mp.spectrum([torch.eye(3)] * 4)
    one = mp.spectrum([torch.tensor([[2.0]])])
    assert math.isinf(flat.condition)
    assert same.condition == 1.0
    diagnosis = mp.describe({"zero": zero, "flat": flat, "same": same, "one": one})
    zeros, flats, *_ = diagnosis.found.splitlines()
    assert zeros == "zero: the product is 0."
    assert flats == (
        "flat: of the product of 1 matrix of size 3, the largest squared singular value is 1.5 times the mean (large "
        "Gaussian matrices: 4), the median one 1.5 times; the condition number is above 1e+15."
    )
    json.dumps(diagnosis.numbers, allow_nan=False)


def test_errors_are_one_line():
    eye, image = torch.eye(2), torch.ones(1, 5)
    mixed = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2), nn.Linear(2, 2))
    for call, words in [
        (lambda: mp.spectrum([]), r"got shapes \[\]"),
        (lambda: mp.spectrum([eye, torch.eye(3)]), "of one size"),
        (lambda: mp.spectrum([torch.ones(2, 3)]), "square"),
        (lambda: mp.spectrum([eye * math.nan]), "not finite"),
        (lambda: mp.gaussian_product(0), "at least 1 factor, got 0"),
        (lambda: mp.gaussian_product(2, size=0), "at least 1 row"),
        (lambda: mp.fuss_catalan(1, -1), "negative"),
        (lambda: mp.density(0), "at least 1 factor"),
        (lambda: mp.edge(-1), "at least 1 factor"),
        (lambda: mp.measure(Subject("a", nn.Linear(5, 3), image)), "a: .*there are none"),
        (lambda: mp.measure(Subject("a", mixed, image)), "some of sizes 2, 5"),
    ]:
        with pytest.raises(ConfigError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_describe_one_and_two():
    results = {"one": mp.gaussian_product(1, 60), "five": mp.gaussian_product(5, 60)}
    found = mp.describe(results)
    for line, (name, spectrum) in zip(found.found.splitlines(), results.items(), strict=True):
        assert line.startswith(f"{name}: of the product of ")
        largest = f"{spectrum.squared[0]:.3g} times the mean (large Gaussian matrices: {mp.edge(spectrum.factors):.3g})"
        assert largest in line
    density, order = found.figures
    assert [line.style for line in density.lines] == ["points", "points", "theory", "theory"]
    assert found.numbers["five"]["median"] == pytest.approx(np.median(results["five"].squared))
    assert mp.describe({"one": results["one"]}).numbers["one"]["edge"] == 4.0
    # The histogram holds all values within 5 powers of ten of the largest.
    for line, spectrum in zip(density.lines[:2], results.values(), strict=True):
        ratio = line.x[1] / line.x[0]
        mass = sum(y * x * (ratio**0.5 - ratio**-0.5) for x, y in zip(line.x, line.y, strict=True) if y == y)
        kept = sum(value > spectrum.squared[0] * 1e-5 for value in spectrum.squared) / 60
        assert mass == pytest.approx(kept, rel=1e-6)
    assert len(order.lines) == 2
