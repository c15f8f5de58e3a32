import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normprop import models
from normprop.diagnostics.diagnosis import Subject
from normprop.diagnostics.loss import batches_of, gradients
from normprop.errors import ConfigError


def subject(norm="batch"):
    model = models.create("mlp", (5,), 10, norm=norm, width=0.25)
    return Subject(norm, model, torch.randn(9, 5), torch.randint(0, 10, (9,)))


@pytest.mark.parametrize("norm", ["none", "normprop", "batch"])
def test_gradients_against_finite_differences(norm):
    case = subject(norm)
    model, inputs = case.model.double(), case.inputs.double()
    loss, found = gradients(model, inputs, case.labels)
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


def test_frozen_parameters_have_none():
    case = subject()
    frozen = nn.Sequential(nn.Linear(5, 4).requires_grad_(False), nn.Linear(4, 10))
    assert list(gradients(frozen, case.inputs, case.labels)[1]) == ["1.weight", "1.bias"]


def test_batches_are_whole_unless_there_is_one_only():
    case = subject()
    assert [len(labels) for _, labels in batches_of(case, 4)] == [4, 4]
    ((inputs, labels),) = batches_of(case, 20)
    assert torch.equal(inputs, case.inputs)
    assert torch.equal(labels, case.labels)
    with pytest.raises(ConfigError, match=r"^net: the loss needs labels, but the subject has none; give it labels$"):
        batches_of(Subject("net", case.model, case.inputs), 4)


def test_errors_are_one_line():
    case = subject("none")
    model, inputs, labels = case.model, case.inputs, case.labels
    cases = [
        (lambda: gradients(model, inputs, labels[:3]), "labels of shape"),
        (lambda: gradients(model, inputs, labels.float()), "whole-number"),
        (lambda: gradients(model, inputs, labels + 10), "10 classes, 0 to 9"),
        (lambda: gradients(model, inputs[:0], labels[:0]), "empty batch"),
        (lambda: gradients(nn.Flatten(0), inputs, labels), "no parameter requires a gradient"),
        (lambda: gradients(nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), inputs, labels), "one tensor of logits"),
        (lambda: gradients(model, inputs[:, :4], labels), r"does not take inputs of shape \(9, 4\)"),
    ]
    for call, words in cases:
        with pytest.raises(ConfigError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
