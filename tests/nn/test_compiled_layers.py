"""Layers under torch.compile on a CPU: operators of ours against the eager layer, and where they must not appear."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, vmap

from normprop import nn, operator, recipes

RECIPES = {"paper": recipes.PAPER, "default": recipes.DEFAULT}
recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    torch.manual_seed(0)


def network(dtype=torch.float64, **settings):
    """Layers of several kinds, with parameters as after some training: one filter zero, one constant, gains of 0."""
    made = torch.nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, activation="relu", **settings),
        torch.nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 3, groups=2, activation="relu", bias=False, **settings),
        nn.Conv2d(8, 6, 1, activation="tanh", **settings),
        torch.nn.Flatten(),
        nn.Linear(6 * 4, 5, activation="relu", **settings),
        nn.Linear(5, 4, **settings),
    ).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        made[0].weight[1], made[0].weight[2] = 0.0, 0.3
        if settings["moments"] == "fixed":  # live moments of a gain of 0 are those of a constant, where rounding rules
            made[0].gain[3] = made[5].gain[0] = 0.0
        made[2].gain[1] *= -1.0
    return made


def gradients(model, input):
    return torch.autograd.grad(model(input).sin().sum(), [input, *model.parameters()])


@quiet
@recipe
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_generated_code_agrees_with_eager_layers(recipe, layout):
    model = network(**recipe).to(memory_format=layout)
    input = torch.randn(3, 3, 8, 8, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(input), model(input))
    torch.testing.assert_close(gradients(compiled, input), gradients(model, input))


@quiet
@recipe
def test_compiled_layers_learn_as_eager_ones_under_the_constraint(recipe):
    from normprop.training import constrain

    models = [network(**recipe)]
    models.append(copy.deepcopy(models[0]))
    input = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for model, apply in zip(models, (models[0], torch.compile(models[1], backend="aot_eager")), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        constrain(optimizer, model)
        for _ in range(3):
            optimizer.zero_grad()
            apply(input).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(dict(models[1].named_parameters()), dict(models[0].named_parameters()))


@quiet
@recipe
def test_autocast(recipe):
    model = network(torch.float32, **recipe)
    input = torch.randn(3, 3, 8, 8, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = gradients(compiled, input), gradients(model, input)
        assert compiled(input).dtype == model(input).dtype == torch.bfloat16
    exact = gradients(model, input)
    for name, own, eager, truth in zip(["input", *dict(model.named_parameters())], found, expected, exact, strict=True):
        # Both round to eight bits on the way, at different places.
        error, reference = (float((value.float() - truth).norm()) for value in (own, eager))
        assert error <= 3 * reference + 0.02 * float(truth.norm()), name


@quiet
@recipe
def test_gradients_per_sample_inside_a_compiled_function(recipe):
    model = network(**recipe)
    parameters = dict(model.named_parameters())
    input = torch.randn(3, 3, 8, 8, dtype=torch.float64)

    def loss(parameters, sample):
        return functional_call(model, parameters, (sample[None],)).sin().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))
    compiled = torch.compile(per_sample, backend="aot_eager")
    torch.testing.assert_close(compiled(parameters, input), per_sample(parameters, input))


@quiet
@recipe
def test_an_exported_program_holds_ordinary_operators_alone(recipe):
    input = torch.randn(3, 3, 8, 8)
    model = network(torch.float32, **recipe)
    for strict in (False, True):
        program = torch.export.export(model, (input,), strict=strict)
        assert not [node for node in program.graph.nodes if "normprop" in str(node.target)]
        torch.testing.assert_close(program.module()(input), model(input))


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 5), (4, 3, 2, 3), (4, 3, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_operators_keep_the_rules_of_torch(center, shape, last):
    weight = torch.randn(shape, dtype=torch.float64)
    if last and len(shape) == 4:
        weight = weight.to(memory_format=torch.channels_last)
    scale = torch.randn(4, dtype=torch.float64)
    leaves = weight.requires_grad_(), scale.requires_grad_()
    torch.library.opcheck(torch.ops.normprop.normalize_filters.default, (*leaves, center))
    torch.library.opcheck(torch.ops.normprop.computed.default, (scale,))
    assert torch.autograd.gradcheck(lambda w, s: operator.normalize_filters(w, s, center), leaves)


def test_threshold_has_the_gradients_of_a_relu():
    """Of relu(x) - m, for an input that has taken in -m: see the eager layer."""
    sums = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    mean = torch.rand(4, 1, dtype=torch.float64, requires_grad=True)
    output = operator.Threshold.apply(sums - mean.detach(), mean)
    expected = sums.relu() - mean
    torch.testing.assert_close(output, expected)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(output, (sums, mean), weight), torch.autograd.grad(expected, (sums, mean), weight)
    )
    torch.testing.assert_close(operator.Threshold.apply(sums - 0.5, 0.5), sums.relu() - 0.5)
