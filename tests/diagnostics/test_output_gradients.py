import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normprop import models
from normprop.diagnostics import output_gradients as og
from normprop.diagnostics.diagnosis import Subject
from normprop.diagnostics.loss import gradients
from normprop.errors import ConfigError


def subject(norm="batch", name="resnet8", shape=(3, 8, 8), samples=12):
    model = models.create(name, shape, 10, norm=norm, width=0.25)
    return Subject(norm, model, torch.randn(samples, *shape), torch.randint(0, 10, (samples,)))


def test_closed_form():
    logits, labels = torch.randn(30, 7, dtype=torch.float64) * 3, torch.randint(0, 7, (30,))
    found = og.output_gradients(logits, labels)
    expected = logits.softmax(1) - F.one_hot(labels, 7)
    torch.testing.assert_close(found.gradients, expected)
    torch.testing.assert_close(torch.tensor(found.class_means, dtype=torch.float64), expected.mean(0))
    columns = expected.mean(0)
    assert found.between == pytest.approx((columns.var(correction=0) / expected.var(correction=0)).item())
    assert found.between == pytest.approx((columns.square().sum() / expected.square().sum(1).mean()).item())
    assert found.share == pytest.approx((columns.square().max() / columns.square().sum()).item())
    assert found.dominating == int(columns.abs().argmax())


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_a_sure_network_that_always_says_the_same(classes):
    # d is 1 for the class said and -1 for the right one: of 2 (C - 1) / C in all, (C - 1) / C is between the columns.
    labels = torch.arange(4 * classes) % classes
    logits = torch.zeros(len(labels), classes)
    logits[:, 1] = 100.0
    found = og.output_gradients(logits, labels)
    assert found.between == pytest.approx(0.5)
    assert found.dominating == 1 or classes == 2
    assert found.share == pytest.approx(1 - 1 / classes)
    assert found.predicted == 1.0


def test_equal_outputs_leave_nothing_between_columns():
    labels = torch.arange(20) % 5
    found = og.output_gradients(torch.zeros(20, 5), labels)
    assert found.between == pytest.approx(0.0, abs=1e-12)


def test_the_means_are_the_gradient_of_the_last_bias():
    case = subject("normprop", "mlp", (5,), 20)
    model = case.model.double()
    inputs = case.inputs.double()
    bias = [name for name, _ in model.named_parameters() if name.endswith("bias")][-1]
    found = og.measure(Subject("a", model, inputs, case.labels))
    _, own = gradients(model, inputs, case.labels)
    assert len(own[bias]) == 10
    torch.testing.assert_close(torch.tensor(found.class_means, dtype=torch.float64), own[bias])


@pytest.mark.parametrize("norm", ["none", "normprop", "batch", "cross-iteration"])
@pytest.mark.parametrize("training", [True, False])
def test_the_network_stays_as_it_is(norm, training, unchanged):
    case = subject(norm)
    case.model.append(nn.Dropout(0.3)).train(training)
    with unchanged(case.model):
        first, second = og.measure(case), og.measure(case)
        assert torch.equal(first.gradients, second.gradients)
    assert not first.gradients.requires_grad


def test_batch_norm_gives_images_answers_of_their_own():
    deep = "resnet20"
    plain, normed = (og.measure(subject(norm, deep, (3, 16, 16), 64)) for norm in ("none", "batch"))
    assert plain.predicted > 0.9 > normed.predicted


def test_outputs_that_could_break_it():
    labels = torch.tensor([0, 1])
    lost = og.output_gradients(torch.full((2, 2), math.nan), labels)
    sure = og.output_gradients(torch.tensor([[1e9, 0.0], [0.0, 1e9]]), labels)
    assert math.isnan(lost.between)
    assert math.isnan(sure.between)
    diagnosis = og.describe({"lost": lost, "sure": sure})
    assert diagnosis.found.count("not known") == 2
    assert len(diagnosis.figures) == 1
    json.dumps(diagnosis.numbers, allow_nan=False)


def test_errors_are_one_line():
    case = subject("none", "mlp", (5,))
    for call, words in [
        (lambda: og.measure(Subject("a", case.model, case.inputs)), "a: the loss needs labels"),
        (lambda: og.output_gradients(torch.zeros(2, 3, 4), torch.zeros(2)), r"got \(2, 3, 4\)"),
        (lambda: og.output_gradients(torch.zeros(2, 1), torch.zeros(2)), "two or more logits"),
        (lambda: og.output_gradients(torch.zeros(2, 3), torch.tensor([0, 3])), "3 classes"),
    ]:
        with pytest.raises(ConfigError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_describe_one_and_more():
    labels = torch.arange(40) % 4
    stuck = torch.zeros(40, 4)
    stuck[:, 2] = 100.0
    results = {
        "stuck": og.output_gradients(stuck, labels),
        "middling": og.output_gradients(stuck / 100, labels),
        "even": og.output_gradients(torch.zeros(40, 4), labels),
    }
    one = og.describe({"stuck": results["stuck"]})
    assert one.found == (
        "stuck: 50.0% of the variance of the output gradients lies between the classes, the same for every image; "
        "class 2 has 75% of the squared mean gradient, and 100% of the images are given one class."
    )
    assert len(one.figures) == 2
    more = og.describe(results)
    assert [figure.title for figure in more.figures[:2]] == [f"Gradient by the outputs, {n}" for n in ("stuck", "even")]
    assert [line.name for line in more.figures[2].lines] == list(results)
    right = [row.index(min(row)) for row in more.figures[1].values]
    assert right == sorted(right)  # images sorted by class
    assert "even: 0.0% of the variance" in more.found
    json.dumps(more.numbers, allow_nan=False)
