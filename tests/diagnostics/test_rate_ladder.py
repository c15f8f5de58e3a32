import copy
import dataclasses
import json
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from normprop.data import Dataset, Split
from normprop.diagnostics.rate_ladder import RATES, Ladder, Rung, describe, rate_ladder
from normprop.errors import ConfigError
from normprop.models.mlp import mlp
from normprop.training import TrainConfig
from normprop.training.loop import fit

CONFIG = TrainConfig(epochs=5, batch_size=16, schedule="constant", momentum=0.0, weight_decay=0.0, accelerator="cpu")
GRID = [0.01, 0.1, 10**-0.5, 1.0, 10**0.5, 1e3]


def dataset():
    """Three classes told apart by where their means are."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(160) % 3
    images = torch.randn(160, 8, generator=generator) + 3 * torch.eye(3, 8)[labels]
    whole = Split(images, labels)
    return Dataset("blobs", ("a", "b", "c"), whole[:120], whole[120:]).split(train=96, validation=24)


def build(norm):
    return lambda: mlp((8,), 3, norm=norm, depth=8, hidden_features=32)


@pytest.fixture(scope="module")
def ladders():
    return {norm: rate_ladder(build(norm), dataset(), GRID, CONFIG, seeds=(0, 1)) for norm in ("none", "batch")}


def test_rungs_are_what_fit_says(ladders):
    for norm, ladder in ladders.items():
        assert [(rung.rate, rung.seed) for rung in ladder.rungs] == [(rate, seed) for rate in GRID for seed in (0, 1)]
        rung = ladder.rungs[3]
        last = fit(build(norm), dataset(), dataclasses.replace(CONFIG, lr=0.1, seed=1)).curve[-1]
        assert rung.accuracy == 1 - last.test_error
        assert rung.validation == 1 - last.validation_error
        assert ladder.classes == 3
        assert ladder.epochs == 5


def test_without_a_norm_the_limit_is_lower(ladders):
    assert ladders["none"].limit <= 1.0 < ladders["batch"].limit < 1e3
    best = ladders["batch"].best
    assert ladders["batch"].accuracy(best) > 0.8
    assert ladders["batch"].accuracy(best) > ladders["batch"].accuracy(0.01)
    document = describe(ladders)
    assert f"none: stays finite for 5 epochs up to a rate of {ladders['none'].limit:.3g}" in document.found
    ratio = ladders["batch"].limit / ladders["none"].limit
    assert f"The limit of batch is {ratio:.3g} times that of none." in document.found
    accuracy = 100 * ladders["batch"].accuracy(best)
    assert f"its best test accuracy is {accuracy:.1f} %, at a rate of {best:.3g}" in document.found
    json.dumps(document.numbers, allow_nan=False)


def test_diverging_runs_have_no_accuracy(ladders):
    lost = [rung for ladder in ladders.values() for rung in ladder.at(1e3)]
    assert len(lost) == 4
    for rung in lost:
        assert math.isnan(rung.accuracy)
        assert math.isnan(rung.validation)
        assert "loss" in rung.reason or "outputs" in rung.reason


def test_a_network_that_bears_all_rates():
    """One binary feature: a step of any size along its gradient classifies better."""
    labels = torch.arange(32) % 2
    part = Split((2.0 * labels - 1).reshape(-1, 1), labels)
    data = Dataset("sign", ("a", "b"), part, part, part)
    config = dataclasses.replace(CONFIG, batch_size=32, data_norm="none", epochs=5)
    ladder = rate_ladder(lambda: nn.Linear(1, 2), data, [10.0, 0.1, 1.0, 0.1], config)
    assert ladder.rates == (0.1, 1.0, 10.0)  # sorted, each once
    assert ladder.limit == 10.0
    assert ladder.accuracy(10.0) == 1.0


def test_random_state_is_left_alone():
    torch.manual_seed(4)
    state = torch.get_rng_state()
    rate_ladder(lambda: nn.Linear(8, 3), dataset(), [0.1], dataclasses.replace(CONFIG, epochs=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_default_grid_is_a_ladder_of_square_roots_of_ten():
    assert RATES[0] == pytest.approx(1e-4)
    assert RATES[-1] == pytest.approx(10.0)
    assert [b / a for a, b in pairwise(RATES)] == pytest.approx([math.sqrt(10)] * (len(RATES) - 1))


def rung(rate, accuracy, seed=0, validation=None):
    """A run; without accuracy one that diverged."""
    if accuracy is None:
        return Rung(rate, seed, "loss was nan at step 3", math.nan, math.nan)
    return Rung(rate, seed, None, accuracy if validation is None else validation, accuracy)


def test_limit_lies_below_the_first_divergence():
    """Far above the limit a step may kill all units, and the run is finite again; one seed that diverges is enough."""
    dead = Ladder((rung(0.1, 0.5), rung(1.0, None), rung(10.0, 0.1)), 1, 10)
    assert dead.limit == 0.1
    assert dead.best == 0.1
    seeds = Ladder((rung(0.1, 0.5, 0), rung(0.1, 0.7, 1), rung(1.0, 0.9, 0), rung(1.0, None, 1)), 1, 10)
    assert seeds.limit == 0.1
    assert seeds.best == 0.1
    assert seeds.accuracy(0.1) == pytest.approx(0.6)
    assert math.isnan(seeds.accuracy(1.0))
    lost = Ladder((rung(0.1, None), rung(1.0, None)), 1, 10)
    assert lost.limit is None
    assert lost.best is None


def test_best_rate_is_chosen_on_validation_images():
    ladder = Ladder((rung(0.1, 0.5, validation=0.9), rung(1.0, 0.8, validation=0.6)), 1, 10)
    assert ladder.best == 0.1


def test_describe_one_and_two():
    none = Ladder((rung(0.1, 0.75), rung(1.0, None), rung(10.0, None)), 2, 10)
    batch = Ladder((rung(0.1, 0.75, 0), rung(0.1, 0.77, 1), rung(1.0, 0.8, 0), rung(1.0, 0.9, 1)), 1, 10)
    lost = Ladder((rung(0.5, None),), 1, 4)
    one = describe({"none": none})
    assert one.found == (
        "none: stays finite for 2 epochs up to a rate of 0.1; its best test accuracy is 75.0 %, at a rate of 0.1."
    )
    two = describe({"none": none, "batch": batch, "lost": lost})
    assert "batch: stays finite for 1 epoch up to a rate of 1, the largest tried" in two.found
    assert "its best test accuracy is 85.0 %, at a rate of 1.\n" in two.found
    assert "lost: diverges within 1 epoch at a rate of 0.5, the smallest tried." in two.found
    assert two.found.endswith("\nThe limit of batch is at least 10 times that of none.")
    assert [line.name for line in two.figures[0].lines] == ["none", "batch", "lost"]
    none_line, batch_line, _ = two.figures[0].lines
    assert none_line.y[0] == 75.0
    assert math.isnan(none_line.y[1])
    assert none_line.low is None
    assert (batch_line.low, batch_line.high) == ([75.0, 80.0], [77.0, 90.0])
    assert [reference.value for reference in two.figures[0].references] == [10.0, 25.0]
    assert list(two.figures[1].lines[0].y) == [100.0, 0.0, 0.0]
    numbers = json.loads(json.dumps(two.numbers, allow_nan=False))
    assert numbers["none"]["accuracy"] == [0.75, None, None]
    assert numbers["lost"]["limit"] is None
    assert numbers["batch"]["best accuracy"] == pytest.approx(0.85)
    assert two.title.endswith("?")


def test_bands_have_gaps_where_a_seed_diverged():
    ladder = Ladder((rung(0.1, 0.5, 0), rung(0.1, 0.7, 1), rung(1.0, 0.9, 0), rung(1.0, None, 1)), 1, 10)
    (line,) = describe({"net": ladder}).figures[0].lines
    assert (line.low[0], line.high[0]) == (50.0, 70.0)
    assert all(math.isnan(values[1]) for values in (line.y, line.low, line.high))
    assert list(describe({"net": ladder}).figures[1].lines[0].y) == [100.0, 50.0]
    assert "limit of" not in describe({"a": ladder, "b": copy.copy(ladder)}).found  # equal limits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": []}, "0 rates and 1 seeds"),
        ({"rates": [0.1], "seeds": ()}, "1 rates and 0 seeds"),
        ({"rates": [-0.1]}, "lr must be a finite number above 0, got -0.1"),
        ({"rates": [math.inf]}, "lr must be a finite number above 0, got inf"),
    ],
)
def test_errors_are_one_line(options, message):
    with pytest.raises(ConfigError) as raised:
        rate_ladder(lambda: nn.Linear(8, 3), dataset(), config=CONFIG, **options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
