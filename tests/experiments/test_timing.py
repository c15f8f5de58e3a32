"""Step times, on networks whose cost is known."""

import time

import pytest
import torch
from torch import nn

from normprop.errors import ConfigError
from normprop.experiments.timing import step_times


class Sleeps(nn.Module):
    """A linear map that takes a known time."""

    def __init__(self, seconds):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return self.linear(x)


def test_ratios_of_known_times():
    networks = {"slow": Sleeps(0.030), "none": Sleeps(0.010)}
    slow, none = step_times(networks, torch.randn(3, 4), torch.tensor([0, 1, 0]), seconds=0.5)
    assert (slow.method, slow.batch_size) == ("slow", 3)
    # A sleep lasts at least its time and on a busy machine longer, which mostly pulls ratios towards 1.
    assert 1.3 < slow.ratio < 3.5
    assert slow.milliseconds >= 30
    assert slow.low <= slow.ratio <= slow.high
    assert (none.ratio, none.low, none.high) == (1, 1, 1)


def test_time_budget_is_kept():
    start = time.perf_counter()
    step_times({"none": Sleeps(0.001)}, torch.randn(3, 4), torch.tensor([0, 1, 0]), seconds=0.3)
    assert 0.3 <= time.perf_counter() - start < 3


def test_baseline_is_required():
    with pytest.raises(ConfigError, match="'none'"):
        step_times({"batch": Sleeps(0)}, torch.randn(3, 4), torch.tensor([0, 1, 0]), seconds=0.1)
