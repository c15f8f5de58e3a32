import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normprop import models
from normprop.diagnostics import covariate_shift as C
from normprop.diagnostics.diagnosis import Subject
from normprop.diagnostics.input_history import History, InputRecorder
from normprop.errors import ConfigError


def network():
    return nn.Sequential(nn.Linear(4, 3), nn.Identity(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))


def test_nothing_moves_without_updates():
    model = models.create("nin", (3, 8, 8), 4, "normprop", width=0.05)
    recorder = InputRecorder(model, torch.randn(8, 3, 8, 8))
    for step in range(3):
        recorder.record(step)
    for layer in C.shift(recorder.history):
        assert layer.drift == (0.0, 0.0, 0.0)
        assert layer.spread == (0.0, 0.0, 0.0)
        assert layer.pace == (0.0, 0.0)


def test_a_shift_by_hand():
    """Moving the bias by one standard deviation of the unit drifts that far, in the next layer's input alone."""
    model, probe = network(), torch.randn(500, 4)
    recorder = InputRecorder(model, probe)
    recorder.record(0)
    std = model[0](probe).std(0, correction=0)
    with torch.no_grad():
        model[0].bias += torch.tensor([1.0, -2.0, 0.0]) * std
        model[4].weight += 1.0
    recorder.record(1)
    first, second = C.shift(recorder.history)
    assert (first.layer, second.layer) == ("2", "4")
    assert first.drift[1] == pytest.approx(math.sqrt((1 + 4 + 0) / 3), rel=1e-4)
    assert first.pace == (first.drift[1],)
    assert first.spread[1] == pytest.approx(0, abs=1e-5)
    assert first.mean[1] - first.mean[0] == pytest.approx(std[0].item(), rel=1e-4)
    assert second.drift[1] > 0
    assert C.shift(recorder.history, unit=4)[0].mean == C.shift(recorder.history, unit=1)[0].mean


def test_a_change_of_scale_by_hand():
    model, probe = network(), torch.randn(500, 4)
    nn.init.zeros_(model[0].bias)
    recorder = InputRecorder(model, probe - probe.mean(0))
    recorder.record(0)
    with torch.no_grad():
        model[0].weight *= 2
    recorder.record(1)
    with torch.no_grad():
        model[0].weight.zero_()
    recorder.record(2)
    first = C.shift(recorder.history)[0]
    assert first.drift == pytest.approx((0, 0, 0), abs=1e-6)
    assert first.spread == pytest.approx((0, 0.6, 1), rel=1e-5)  # (4 - 1) / (4 + 1); silent


def trained_history(scale, offset):
    """The same run, with the first layer's output scaled and shifted and the second layer undoing it."""
    torch.manual_seed(1)
    model, probe, labels = network(), torch.randn(64, 4), torch.arange(64) % 2
    factor, shift = torch.tensor(scale), torch.tensor(offset)

    class Affine(nn.Module):
        def forward(self, x):
            return x * factor + shift

    class Undo(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear((x - shift) / factor)

    model[1], model[2] = Affine(), Undo(model[2])
    recorder = InputRecorder(model, probe, every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(11):
        recorder.record(step)
        optimizer.zero_grad()
        F.cross_entropy(model(probe), labels).backward()
        optimizer.step()
    return recorder.history


def test_drift_does_not_depend_on_scale_and_offset_and_the_papers_means_do():
    plain = C.shift(trained_history([1.0, 1.0, 1.0], [0.0, 0.0, 0.0]))
    other = C.shift(trained_history([4.0, 0.25, 10.0], [1.0, -2.0, 3.0]))
    assert plain[0].steps == (0, 2, 4, 6, 8, 10)
    for one, two in zip(plain, other, strict=True):
        assert one.drift[-1] > 0.05
        assert two.drift == pytest.approx(one.drift, rel=1e-3, abs=1e-5)
        assert two.spread == pytest.approx(one.spread, rel=1e-3, abs=1e-5)
        assert two.pace == pytest.approx(one.pace, rel=1e-3, abs=1e-5)
    assert other[0].mean == pytest.approx([4 * value + 1 for value in plain[0].mean], rel=1e-3)
    assert other[0].magnitude != pytest.approx(plain[0].magnitude, rel=0.1)


def test_units_that_never_move_or_fall_silent():
    means = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    zero = torch.zeros(2, 2)
    (layer,) = C.shift(History((0, 1), {"a": means}, {"a": zero}))
    assert layer.drift == (0.0, math.inf)
    assert layer.spread == (0.0, 0.0)


def test_distances_from_a_later_record():
    means, stds = torch.tensor([[5.0], [1.0], [3.0]]), torch.ones(3, 1)
    (layer,) = C.shift(History((0, 10, 20), {"a": means}, {"a": stds}), start=1)
    assert layer.drift == (4.0, 0.0, 2.0)
    assert layer.pace == (4.0, 2.0)


@pytest.mark.parametrize("name", ["batch", "kalman-batch", "normprop"])
def test_the_network_stays_as_it_is(name):
    model = nn.Sequential(nn.Dropout(), models.create("nin", (3, 8, 8), 4, name, width=0.05)).train()
    model[1][0].eval()
    inputs, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
    model(inputs).sum().backward()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    InputRecorder(model, inputs).record(0)
    C.measure(Subject(name, model, inputs, labels), steps=2, batch_size=8)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert gradient is None if parameter.grad is None else torch.equal(parameter.grad, gradient)


def test_measure_trains_and_moves():
    inputs = torch.randn(128, 6)
    labels = (inputs[:, 0] > 0).long()
    model = models.create("mlp", (6,), 2, norm="batch", width=0.1)
    found = C.measure(Subject("batch", model, inputs, labels), steps=20)
    assert found[0].steps == (0, 5, 10, 15, 20)
    assert all(layer.drift[0] == 0 and layer.drift[-1] > 0.05 for layer in found)
    still = C.measure(Subject("batch", model, inputs, labels), steps=20, rate=0.0)
    # At a rate of 0 only what is left of the running statistics' start moves.
    assert max(layer.drift[-1] for layer in still) < 0.02


def test_errors_are_one_line():
    with pytest.raises(ConfigError, match=r"^net: the loss needs labels, but the subject has none; .*$"):
        C.measure(Subject("net", network(), torch.ones(4, 4)))
    with pytest.raises(ConfigError, match=r"^covariate-shift: no record 0 among 0; .*$"):
        C.shift(InputRecorder(network(), torch.ones(4, 4)).history)


def layer(name, mean, drift):
    return C.LayerShift(name, (0, 10), mean, drift, drift, (drift[1],))


def test_describe():
    batch = [layer("1", (0.5, 1.5), (0.0, 3.0)), layer("2", (0.0, -2.0), (0.0, 4.0))]
    one = C.describe({"batch": batch})
    assert one.found.startswith("batch: by the end of training the means of hidden inputs have moved by 3.5 of")
    assert one.found.endswith("have an average size of 1.")
    two = C.describe({"batch": batch, "normprop": [layer("1", (0.1, 0.1), (0.0, 0.25))]})
    assert two.found.splitlines()[0] == one.found
    assert "normprop: by the end of training the means of hidden inputs have moved by 0.25 of" in two.found
    assert two.found.endswith("have an average size of 0.1.")
    assert [line.name for line in two.figures[0].lines] == ["batch", "normprop"]
    assert two.figures[0].lines[0].y == pytest.approx([0, math.sqrt(12.5)])
    assert [line.name for line in two.figures[2].lines] == ["batch", "batch", "normprop"]
    assert two.numbers["batch"][1]["pace"] == [4.0]
    json.dumps(two.numbers, allow_nan=False)


def test_describe_bears_what_is_not_finite_or_missing():
    found = C.describe({"none": [layer("1", (0.5, math.nan), (0.0, math.inf))], "empty": []})
    assert (
        "none: by the end of training the means of hidden inputs have moved by more than can be measured" in found.found
    )
    json.dumps(found.numbers, allow_nan=False)
    assert C.describe({}).found == "No layers were followed."


def test_a_diverging_run_is_described():
    inputs, labels = torch.randn(64, 6) * 100, torch.arange(64) % 2
    model = models.create("mlp", (6,), 2, norm="none", width=0.1)
    found = C.measure(Subject("none", model, inputs, labels), steps=10, rate=1e6)
    assert not math.isfinite(found[-1].drift[-1])
    described = C.describe({"none": found})
    assert "have moved by more than can be measured in their own standard deviations" in described.found
    json.dumps(described.numbers, allow_nan=False)
