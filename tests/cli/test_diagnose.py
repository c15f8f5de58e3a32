"""`normprop diagnose`: networks in, one page out."""

import json
import sys

import pytest
import torch

from normprop.diagnostics.checks import NAMES, ask
from normprop.diagnostics.diagnosis import Subject
from normprop.errors import ConfigError

MODULE = """
from torch import nn
from normprop import norms

def own(norm="batch"):
    block = norms.block(norm)
    return nn.Sequential(block(1, 4, 3), block(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
"""
QUICK = ["--checks", "depth-moments,power", "--samples", "16", "--out", "page.html"]


@pytest.fixture
def own(tmp_path):
    (tmp_path / "diagnosed.py").write_text(MODULE)
    yield "diagnosed:own"
    sys.modules.pop("diagnosed", None)


def test_compares_methods_on_a_reference_network(here, tmp_path):
    done = here(
        "diagnose", "resnet8", "--width", "0.25", "--methods", "batch,normprop", "--json", "numbers.json", *QUICK
    )
    assert done.returncode == 0, done.err
    assert done.out.endswith("page.html\n")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") >= 2
    assert "resnet8 at 0.25 of its width" in page
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert {"depth-moments", "power", "command", "left_out"} == set(numbers)
    assert numbers["left_out"] == []


def test_own_networks_with_and_without_methods(here, own, tmp_path):
    for more in ([], ["--methods", "batch,group"]):
        done = here("diagnose", own, *more, *QUICK)
        assert done.returncode == 0, done.err
    assert "group" in (tmp_path / "page.html").read_text()


def test_questions_about_labels_are_left_out_of_random_inputs(here, own, tmp_path):
    arguments = ["--input", "8x1x12x12", "--out", "page.html", "--checks", "output-gradients,depth-moments"]
    done = here("diagnose", own, *arguments)
    assert done.returncode == 0, done.err
    assert "Left out: output-gradients, diagnosed:own: " in done.out
    assert "random numbers" in (tmp_path / "page.html").read_text()
    done = here("diagnose", own, *arguments[:-1], "output-gradients")
    assert (done.returncode, done.err.count("\n")) == (2, 1)
    assert "no question could be asked: output-gradients" in done.err


def test_lists_its_questions(here):
    assert here("diagnose", "nin", "--checks", "list").out.split() == list(NAMES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nin", "--checks", "depth"], "--checks: no diagnosis 'depth'; there are depth-moments"),
        (["nin", "--weights", "a.pt"], "--weights are those of one network; give one method"),
        (["nim"], "no model 'nim'"),
        (["nin", "--methods", "batsh"], "batsh"),
        (["diagnosed:own", "--input", "ids=2x3:10"], "a single input tensor"),
    ],
)
def test_bad_input_gets_one_line(here, own, arguments, words):
    done = here("diagnose", *arguments)
    assert done.returncode == 2
    assert done.err.count("\n") == 1
    assert words in done.err


@pytest.mark.parametrize("name", NAMES)
def test_every_question_answers_for_two_networks_and_leaves_them_alone(name):
    from normprop import models

    torch.manual_seed(0)
    inputs, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    subjects = []
    for method in ("batch", "normprop"):
        network = models.create("mlp", (1, 8, 8), 10, norm=method, width=0.1)
        subjects.append(Subject(method, network, inputs, labels))
    before = [{key: value.clone() for key, value in subject.model.state_dict().items()} for subject in subjects]
    generator = torch.get_rng_state()
    found = ask(name, subjects)
    assert torch.equal(torch.get_rng_state(), generator)
    for subject, state in zip(subjects, before, strict=True):
        assert subject.model.training
        assert all(parameter.grad is None for parameter in subject.model.parameters())
        for key, value in subject.model.state_dict().items():
            assert torch.equal(value, state[key]), key
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject.model.modules())
    (diagnosis,) = found.diagnoses
    assert diagnosis.name == name
    assert diagnosis.title.endswith("?")
    assert diagnosis.look_for.endswith(".")
    assert "batch" in diagnosis.found
    assert diagnosis.figures
    json.dumps(diagnosis.numbers, allow_nan=False)


def test_a_name_that_does_not_exist():
    with pytest.raises(ConfigError, match="no diagnosis 'x'; there are depth-moments, "):
        ask("x", [])
