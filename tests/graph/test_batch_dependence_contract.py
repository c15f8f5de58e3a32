"""What batch_dependence tells apart, leaves alone, prints and refuses."""

import copy
import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from normprop.errors import ConfigError
from normprop.graph.batch_dependence import batch_dependence
from tests.graph.test_batch_dependence import IMAGES, VECTORS, Backward, Code, conv, named


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_a_gradient_that_mixes_samples_is_found_where_outputs_do_not():
    model = nn.Sequential(nn.Linear(6, 6), Code(lambda m, x: Backward.apply(x)), nn.Linear(6, 3))
    found = batch_dependence(model, VECTORS)
    assert (found.output, found.gradient, found.state) == (False, True, False)
    assert [(entry.path, entry.kind) for entry in found.modules] == [("1", "gradient")]


def test_the_gradient_of_the_parameters_counts_where_that_of_the_input_is_clean():
    model = nn.Sequential(nn.Linear(6, 6), Code(lambda m, x: x - x.mean(0).detach()), nn.Linear(6, 3))
    found = batch_dependence(model, VECTORS)
    assert (found.output, found.gradient) == (True, True)
    assert named(found, "output") == ["1"]


def test_state_is_what_depends_on_the_samples():
    unused = Code(lambda m, x: (m.norm(x), m.a(x))[1], a=conv(), norm=nn.BatchNorm2d(3))
    found = batch_dependence(unused, IMAGES)
    assert (found.output, found.gradient, found.state, bool(found)) == (False, False, True, True)
    assert [(entry.path, entry.kind) for entry in found.modules] == [("norm", "state")]
    both = Code(lambda m, x: (m.norm(x), Backward.apply(m.a(x)))[1], a=conv(), norm=nn.BatchNorm2d(3))
    found = batch_dependence(both, IMAGES)
    assert [(entry.path, entry.kind) for entry in found.modules] == [("", "gradient"), ("norm", "state")]
    counter = Code(lambda m, x: m.a(x) + 0 * m.a.calls.add_(1), a=nn.Linear(6, 3))
    counter.a.register_buffer("calls", torch.zeros(()))
    assert not batch_dependence(counter, VECTORS)


def test_the_effect_is_relative_to_the_outputs_of_the_module():
    """x + share * mean: the held half changes by share times half the change of the others, whatever the scale."""
    effects = []
    for share in (1e-6, 1e-3):
        for scale in (1.0, 1e6):
            model = nn.Sequential(Code(lambda m, x, by=share, s=scale: s * (x + by * x.mean(0))))
            effects.append(next(entry.effect for entry in batch_dependence(model, VECTORS).modules))
    assert effects[0] == pytest.approx(effects[1], rel=1e-6)
    assert effects[2] == pytest.approx(effects[3], rel=1e-6)
    assert effects[2] / effects[0] == pytest.approx(1000, rel=1e-2)
    assert 1e-8 < effects[0] < 1e-6


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts_are_judged_as_others(reentrant):
    part = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), conv(8))
    model = Code(
        lambda m, x: m.c(checkpoint(m.part, m.a(x), use_reentrant=reentrant)), a=conv(), part=part, c=conv(8, 3)
    )
    found = batch_dependence(model, IMAGES)
    assert named(found, "output") == named(found, "gradient") == ["part.0"]


def test_a_statistic_passed_between_modules_counts_for_the_module_around_both():
    """Neither alone can be tested: the one returns, the other takes a tensor without an axis of samples."""
    children = {"measure": Code(lambda m, x: x.mean(0)), "use": Code(lambda m, x, mean: x - mean)}
    inner = Code(lambda m, x: m.use(x, m.measure(x)), **children)
    for features in (6, 4):  # 4 is also the number of samples
        found = batch_dependence(nn.Sequential(nn.Linear(6, features), inner), VECTORS)
        assert named(found, "output") == named(found, "gradient") == ["1"]
        assert found.untested == ("1.measure", "1.use")
        assert "not testable alone: 1.measure, 1.use" in str(found)


def test_a_module_that_takes_no_hooks_counts_for_the_one_around_it():
    with pytest.warns(DeprecationWarning, match=r"torch\.jit\.script"):
        script = torch.jit.script(nn.BatchNorm1d(6))
    found = batch_dependence(nn.Sequential(nn.Linear(6, 6), nn.Sequential(script, nn.ReLU()), nn.Linear(6, 3)), VECTORS)
    assert named(found, "output") == named(found, "gradient") == ["1"]


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


def test_outputs_may_be_nested_and_a_mean_among_them_is_left_out():
    model = Code(lambda m, x: (lambda y: Output(y.square().mean(), y))(m.a(x)), a=nn.Linear(6, 3))
    found = batch_dependence(model, VECTORS)
    assert not found
    assert found.untested == ("output 0 of shape ()",)
    model = Code(lambda m, x: {"a": [m.a(x)], "b": Output(m.b(x), m.a(x))}, a=nn.Linear(6, 3), b=nn.BatchNorm1d(6))
    assert named(batch_dependence(model, VECTORS), "output") == ["b"]


def test_several_inputs_and_arguments_by_name():
    model = Code(
        lambda m, x, tokens, scale=None: m.b(m.a(x) + m.e(tokens) * scale),
        a=nn.Linear(6, 6),
        e=nn.Embedding(9, 6),
        b=nn.BatchNorm1d(6),
    )
    x = (VECTORS, torch.arange(4))
    assert named(batch_dependence(model, x, kwargs={"scale": torch.ones(6)}), "output") == ["b"]
    model.b.eval()
    assert not batch_dependence(model, x, kwargs={"scale": torch.ones(6)})


def test_float32_where_a_model_runs_in_that_alone():
    model = Code(lambda m, x: m.b(m.a(x.float())), a=nn.Linear(6, 3), b=nn.BatchNorm1d(3))
    with pytest.raises(ConfigError, match=r"pass dtype=torch\.float32"):
        batch_dependence(model, VECTORS)
    assert named(batch_dependence(model, VECTORS, dtype=torch.float32), "output") == ["b"]
    assert not batch_dependence(model.eval(), VECTORS, dtype=torch.float32)


def test_the_model_and_all_random_states_stay_as_they_are():
    model = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.BatchNorm2d(8).eval(), conv(8))
    model(IMAGES).square().mean().backward()
    model[0].bias.requires_grad_(False)
    x = IMAGES.clone().requires_grad_()
    state = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes, types = [m.training for m in model.modules()], [(p.dtype, p.requires_grad) for p in model.parameters()]
    random.seed(5)
    np.random.seed(5)
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for inference in (False, True):
        with torch.inference_mode(inference):
            assert batch_dependence(model, x).gradient
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    for before, parameter in zip(gradients, model.parameters(), strict=True):
        assert (before is None and parameter.grad is None) or torch.equal(before, parameter.grad)
    assert modes == [m.training for m in model.modules()]
    assert types == [(p.dtype, p.requires_grad) for p in model.parameters()]
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert x.grad is None
    assert torch.equal(x.detach(), IMAGES)
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.get_default_dtype() == torch.float32


def test_what_is_left_after_an_error():
    model = Code(lambda m, x: m.a(x[:, :5]) * torch.rand(1), a=nn.Linear(6, 3))
    state = torch.get_rng_state()
    with pytest.raises(ConfigError, match="Code cannot run on x"):
        batch_dependence(model, VECTORS)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32
    assert not model.a._forward_hooks


def test_text_and_dictionary():
    model = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.BatchNorm2d(8, track_running_stats=False))
    found = batch_dependence(model, IMAGES)
    lines = str(found).splitlines()
    assert lines[0] == "samples influence each other: output, gradient, state"
    assert lines[1].split() == ["module", "class", "output", "gradient", "state"]
    assert [line.split()[:2] for line in lines[2:]] == [["1", "BatchNorm2d"], ["2", "BatchNorm2d"]]
    assert lines[3].split()[-1] == "-"
    values = json.loads(json.dumps(found.to_dict()))
    assert [values[key] for key in ("output", "gradient", "state", "untested")] == [True, True, True, []]
    assert values["modules"][0] == dataclasses.asdict(found.modules[0])
    root = batch_dependence(Code(lambda m, x: x - x.mean(0)), VECTORS)
    assert root.gradient  # of a linear map: the same for all samples, but it reaches the others
    assert str(root).splitlines()[2].startswith("(model)  Code")
    assert str(batch_dependence(model[0], IMAGES)) == "samples do not influence each other"


def weight_norm():
    with pytest.warns(FutureWarning):
        model = nn.utils.weight_norm(nn.Linear(6, 3))
    model(VECTORS)
    return model


REFUSED = {
    "two or more samples": (nn.Linear(6, 3), VECTORS[:1]),
    "same two or more samples along axis 0 of each": (nn.Bilinear(6, 6, 3), (VECTORS, VECTORS[:3])),
    "a tensor or a tuple": (nn.Linear(6, 3), [VECTORS]),
    "samples 1 and 2 of x are the same": (nn.Linear(6, 3), torch.ones(4, 6)),
    r"^batch_dependence: 1 returns NaN": (nn.Sequential(nn.Linear(6, 3), Code(lambda m, x: x.log())), VECTORS),
    r"no output .* shape \(\)": (Code(lambda m, x: m.a(x).mean(), a=nn.Linear(6, 3)), VECTORS),
    "cannot be copied": (weight_norm, VECTORS),
    "mat1 and mat2": (nn.Linear(5, 3), VECTORS),
    "number of outputs": (Code(lambda m, x: [x] * (1 + int(x[0, 0] != VECTORS[0, 0].double()))), VECTORS),
}


@pytest.mark.parametrize("match", REFUSED)
def test_refusals_say_what_to_do_in_one_line(match):
    model, x = REFUSED[match]
    model = model if isinstance(model, nn.Module) else model()
    with pytest.raises(ConfigError, match=match) as caught:
        batch_dependence(model, x)
    assert str(caught.value).startswith("batch_dependence: ")
    assert "\n" not in str(caught.value)


def test_types_other_than_two_are_refused():
    with pytest.raises(ConfigError, match="dtype"):
        batch_dependence(nn.Linear(6, 3), VECTORS, dtype=torch.float16)
