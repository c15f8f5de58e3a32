import math

import pytest
import torch

from normprop.training.divergence import LossWatch


def feed(watch, losses, samples=1):
    """Feed losses until the watch has read a reason; return it."""
    for loss in losses:
        if reason := watch.add(torch.tensor(float(loss)), samples):
            return reason
    return watch.read()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [1, 31, 50, 51, 120])
def test_names_the_first_step_that_is_not_finite(bad, step):
    losses = [1.0] * (step - 1) + [bad] + [math.nan] * 70
    assert feed(LossWatch(limit=23.0), losses) == f"loss was {bad} at step {step}"


def test_counts_steps_from_where_the_epoch_starts():
    watch = LossWatch(limit=23.0)
    watch.start(step=400)
    assert feed(watch, [1.0, math.nan]) == "loss was nan at step 402"


def test_running_mean_above_the_limit():
    reason = feed(LossWatch(limit=10.0, span=5), [1.0] * 20 + [30.0] * 20)
    # (3 * 1 + 2 * 30) / 5 = 12.6 is the first mean of five above 10.
    assert reason == "loss averaged 12.6 over 5 steps up to step 22, above the limit of 10"


def test_single_outliers_and_the_warm_up_do_not_count():
    assert feed(LossWatch(limit=10.0, span=5), ([1.0] * 4 + [40.0]) * 20) is None
    assert feed(LossWatch(limit=10.0, span=5, warmup=30), [100.0] * 30 + [1.0] * 10) is None
    assert feed(LossWatch(limit=10.0, span=5, warmup=30), [100.0] * 35) is not None


def test_running_mean_goes_on_across_epochs_and_resumed_runs():
    watch = LossWatch(limit=10.0, span=4)
    assert feed(watch, [20.0] * 3) is None
    watch.start(step=3)
    assert feed(watch, [20.0]) is not None
    resumed = LossWatch(limit=10.0, span=4)
    resumed.start(step=3, recent=[20.0] * 3)
    assert feed(resumed, [20.0]) is not None


def test_mean_weighs_batches_by_their_samples():
    watch = LossWatch(limit=23.0)
    watch.add(torch.tensor(1.0), samples=8)
    watch.add(torch.tensor(4.0), samples=2)
    watch.read()
    assert watch.mean == pytest.approx(1.6)
