import json
import math
from itertools import combinations

import pytest
import torch
from torch import nn

from normprop import models
from normprop.diagnostics import gradient_noise as gn
from normprop.diagnostics.diagnosis import Subject
from normprop.diagnostics.loss import gradients
from normprop.errors import ConfigError


def subject(norm="batch", name="mlp", shape=(5,), samples=12):
    model = models.create(name, shape, 10, norm=norm, width=0.1)
    return Subject(norm, model, torch.randn(samples, *shape), torch.randint(0, 10, (samples,)))


def squared(a, b):
    return sum((a[name] - b[name]).square().sum().item() for name in a)


@pytest.mark.parametrize("norm", ["none", "normprop", "layer", "weight"])
def test_deviation_against_single_images(norm):
    case = subject(norm, samples=11)  # more than one chunk, the last one not full
    model, inputs = case.model.double(), case.inputs.double()
    _, whole = gradients(model, inputs, case.labels)
    singles = [gradients(model, inputs[k : k + 1], case.labels[k : k + 1])[1] for k in range(11)]
    found = gn.sample_deviation(model, inputs, case.labels, whole)
    assert found == pytest.approx(sum(squared(own, whole) for own in singles) / 11, rel=1e-9)


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_predicted_noise_is_the_mean_over_all_batches(size):
    case = subject("none", samples=6)
    model, inputs = case.model.double(), case.inputs.double()
    _, whole = gradients(model, inputs, case.labels)
    found = gn.gradient_noise(model, inputs, case.labels, sizes=(1,), repeats=2)
    batches = [list(batch) for batch in combinations(range(6), size)]
    noise = [squared(gradients(model, inputs[batch], case.labels[batch])[1], whole) for batch in batches]
    assert found.predicted(size) == pytest.approx(sum(noise) / len(noise), rel=1e-9)
    assert found.predicted(size) <= found.deviation / size * (1 + 1e-12)
    assert found.gradient == pytest.approx(sum(value.square().sum().item() for value in whole.values()), rel=1e-9)


def test_measured_noise_agrees_with_the_formula():
    case = subject("normprop", samples=20)
    found = gn.measure(case, sizes=(1, 10), repeats=100)
    assert found.per_sample
    for size, noise, error in zip(found.sizes, found.noise, found.errors, strict=True):
        assert noise == pytest.approx(found.predicted(size), abs=4 * error)
        assert error < 0.2 * noise


def test_batch_norm_has_no_gradients_of_single_images():
    case = subject("batch", "resnet8", (3, 8, 8), 16)
    found = gn.measure(case, repeats=4)
    assert not found.per_sample
    assert found.sizes == (2, 4, 8)
    assert found.predicted(8) == pytest.approx(found.noise[-1])
    assert found.deviation == pytest.approx(found.noise[-1] * 8 * 15 / 8)
    case.model.eval()
    assert gn.measure(case, repeats=2).per_sample


def test_a_batch_statistic_without_buffers_is_noticed():
    # vmap maps this without complaint, one image at a time; only its gradients tell.
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    inputs, labels = torch.randn(8, 3, 8, 8), torch.arange(8)
    assert gn.sample_deviation(model, inputs, labels, gradients(model, inputs, labels)[1]) is None
    assert gn.sample_deviation(model[:1].append(model[3]), inputs, labels, {}) == 0.0


@pytest.mark.parametrize("norm", ["none", "normprop", "batch", "cross-iteration"])
def test_the_network_stays_as_it_is(norm, unchanged):
    case = subject(norm, "resnet8", (3, 8, 8), 8)
    case.model.append(nn.Dropout(0.3))
    with unchanged(case.model):
        with torch.no_grad():
            first, second = gn.measure(case, (2, 4), 2), gn.measure(case, (2, 4), 2)
        assert first == second
        assert gn.measure(case, (2, 4), 2, seed=1).noise != first.noise


def test_float32_agrees_with_float64():
    case = subject("normprop")
    single = gn.measure(case, (2,), 2)
    case.model.double()
    double = gn.measure(Subject("a", case.model, case.inputs.double(), case.labels), (2,), 2)
    assert single.deviation == pytest.approx(double.deviation, rel=1e-4)
    assert single.noise == pytest.approx(double.noise, rel=1e-4)


def test_errors_are_one_line():
    case = subject()
    few = Subject("a", case.model, case.inputs[:2], case.labels[:2])
    for call, words in [
        (lambda: gn.measure(Subject("a", case.model, case.inputs)), "a: the loss needs labels"),
        (lambda: gn.measure(few), "at least 3 images"),
        (lambda: gn.measure(case, repeats=1), "repeats=1"),
        *((lambda sizes=sizes: gn.measure(case, sizes), "sizes") for sizes in [(), (0, 1), (2, 12), (4, 2), (2, 2)]),
    ]:
        with pytest.raises(ConfigError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_describe_one_and_more():
    a = gn.GradientNoise(9, 0.5, (1, 2), (4.4, 1.4), (0.1, 0.1), 4.0, True, 2.0)
    b = gn.GradientNoise(9, 0.5, (2, 4), (7.0, 2.5), (0.1, 0.1), 16.0, False, 4.0)
    one = gn.describe({"none": a})
    assert one.found == (
        "none: the mean squared distance of an image's gradient from that of all images is 2 times the squared length "
        "of the latter. Batches have 0.8 to 1.1 times the noise that this predicts."
    )
    lost = gn.GradientNoise(9, 0.5, (1, 2), (math.nan,) * 2, (math.nan,) * 2, math.nan, True, math.nan)
    flat = gn.GradientNoise(9, 0.5, (1, 2), (0.0,) * 2, (0.0,) * 2, 0.0, True, 0.0)
    more = gn.describe({"none": a, "batch": b, "lost": lost, "flat": flat})
    first, second, *rest = more.found.splitlines()
    assert first == one.found
    assert "is 4 times the squared length of the latter, as batches of 4 imply; no image has" in second
    assert rest == ["lost: not known, as gradients are not finite.", "flat: not known, as the gradient is 0."]
    json.dumps(more.numbers, allow_nan=False)
    measured, theory = more.figures[0].lines[:2]
    assert (measured.name, theory.name, theory.style) == ("none", "none", "theory")
    assert list(measured.y) == pytest.approx([0.25 * 4.4, 0.25 * 1.4])
    assert list(theory.y) == pytest.approx([0.25 * 4.0, 0.25 * 2.0 * 7 / 8])
    assert list(more.figures[1].lines[1].y) == pytest.approx([7 / 4, 2.5 / 4])
    assert "0.5" in more.figures[0].title
