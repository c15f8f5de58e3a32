import math

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from normprop.errors import ConfigError
from normprop.training import schedules


def torch_factors(make, steps):
    """Factors that one of torch's own schedulers gives, as independent truth."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    factors = []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


def test_constant():
    schedule = schedules.create("constant", steps=100, warmup=10)
    assert {schedule(step) for step in range(100)} == {1.0}


@pytest.mark.parametrize("every", [1, 3, 10])
def test_halving_equals_torch(every):
    schedule = schedules.create("halving", steps=40, halve_every=every)
    expected = torch_factors(lambda optimizer: lr_scheduler.StepLR(optimizer, every, 0.5), 40)
    np.testing.assert_allclose([schedule(step) for step in range(40)], expected, rtol=1e-12)


def test_linear_decay_equals_torch():
    schedule = schedules.create("linear", steps=25)
    expected = torch_factors(lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 25), 25)
    np.testing.assert_allclose([schedule(step) for step in range(25)], expected, rtol=1e-10)


def test_cosine_equals_torch():
    schedule = schedules.create("cosine", steps=25)
    expected = torch_factors(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 25), 25)
    np.testing.assert_allclose([schedule(step) for step in range(25)], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (7, 6), (10, 0), (1, 0)])
def test_ends(name, steps, warmup):
    factors = [schedules.create(name, steps, warmup)(step) for step in range(steps)]
    assert factors[warmup] == 1.0
    assert factors.index(max(factors)) == warmup
    assert all(0 < factor <= 1 for factor in factors)
    np.testing.assert_allclose(factors[:warmup], np.arange(1, warmup + 1) / (warmup + 1))
    assert schedules.create(name, steps, warmup)(steps) == pytest.approx(0, abs=1e-15)
    assert schedules.create(name, steps, warmup)(steps + 5) == pytest.approx(0, abs=1e-15)


def test_area_under_the_curves():
    """Without warm-up the mean factor is 1/2, up to the half step that the first update is early."""
    for name in ("linear", "cosine"):
        schedule = schedules.create(name, steps=1000)
        assert math.fsum(schedule(step) for step in range(1000)) == pytest.approx(500.5, abs=1e-9)


def test_unknown_name():
    with pytest.raises(ConfigError, match="unknown schedule 'step'; there are constant, halving, linear, cosine"):
        schedules.create("step", steps=10)
