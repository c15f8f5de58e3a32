"""A layer as one function, before and after the constraint has measured its filters, against ordinary operators."""

import copy
import pickle

import pytest
import torch

from normprop import moments as M
from normprop import nn
from normprop.training import constrain
from tests.nn.cases import CASES, RECIPES, Case
from tests.nn.test_layers import trained
from tests.nn.textbook import textbook

WIDE = [  # the output is scaled, not the weight
    Case("linear-wide", nn.Linear, torch.nn.Linear, (40, 30), (40,)),
    Case("conv2d-wide", nn.Conv2d, torch.nn.Conv2d, (16, 12, 3), (16, 3, 3), {"padding": 1}),
]
cases = pytest.mark.parametrize("case", [*CASES, *WIDE], ids=lambda case: case.name)
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


def constrained(layer):
    constrain(torch.optim.SGD(layer.parameters(), lr=0.1), layer)
    return layer


def composed(layer, input, monkeypatch):
    """The output as in an export: made of ordinary operators."""
    with monkeypatch.context() as context:
        context.setattr(torch.compiler, "is_compiling", lambda: True)
        context.setattr(torch.compiler, "is_exporting", lambda: True)
        return layer(input)


def differentiated(output, layer, input):
    """Gradients of a nonlinear loss by input and parameters."""
    return torch.autograd.grad(output.sin().sum(), [input, *layer.parameters()])


@cases
@recipes
@pytest.mark.parametrize("activation", ["relu", "gelu", None])
@pytest.mark.parametrize("known", [False, True])
def test_output_and_gradients_are_those_of_ordinary_operators(case, recipe, activation, known, monkeypatch):
    layer = trained(case.build(activation=activation, dtype=torch.float64, **recipe))
    layer = constrained(layer) if known else layer
    input = case.input(2, dtype=torch.float64, requires_grad=True)
    output, expected = layer(input), composed(layer, input, monkeypatch)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output, textbook(layer, case.build_plain(), input), rtol=2e-12, atol=2e-12)
    pairs = zip(differentiated(output, layer, input), differentiated(expected, layer, input), strict=True)
    for own, reference in pairs:
        torch.testing.assert_close(own, reference, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("frozen", [("weight",), ("gain", "bias"), ("weight", "gain"), ("bias",), ("input",)])
@pytest.mark.parametrize("case", [CASES[0], CASES[3], *WIDE], ids=lambda case: case.name)
@recipes
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(case, recipe, frozen, monkeypatch):
    layer = constrained(trained(case.build(activation="relu", dtype=torch.float64, **recipe)))
    input = case.input(2, dtype=torch.float64, requires_grad="input" not in frozen)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name not in frozen)
    wanted = [leaf for leaf in (input, *layer.parameters()) if leaf.requires_grad]
    own = torch.autograd.grad(layer(input).sin().sum(), wanted)
    expected = torch.autograd.grad(composed(layer, input, monkeypatch).sin().sum(), wanted)
    for value, reference in zip(own, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("case", [CASES[0], CASES[3], *WIDE], ids=lambda case: case.name)
@recipes
def test_second_derivatives(case, recipe, known, monkeypatch):
    layer = trained(case.build(activation="relu", dtype=torch.float64, **recipe))
    layer = constrained(layer) if known else layer
    input = case.input(2, dtype=torch.float64, requires_grad=True)
    leaves = [input, *layer.parameters()]

    def second(output):
        first = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in first), leaves)

    for own, reference in zip(second(layer(input)), second(composed(layer, input, monkeypatch)), strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["gelu", "tanh", "silu", "erf", "hardswish"])
@pytest.mark.parametrize("bias", [False, True])
def test_live_moments_that_are_worked_out_together_serve_and_are_differentiated(activation, bias, monkeypatch):
    layers = [trained(nn.Linear(5, n, activation=activation, bias=bias, dtype=torch.float64)) for n in (4, 3)]
    network = constrained(torch.nn.Sequential(*layers[:1], torch.nn.Linear(4, 5).double(), *layers[1:]))
    input = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    leaves = [input, *network.parameters()]
    expected = composed(network, input, monkeypatch)
    reference = torch.autograd.grad(expected.sin().sum(), leaves, create_graph=True)
    with monkeypatch.context() as context:
        context.setattr(M.Rule, "moments", None)  # nothing is worked out anew
        output = network(input)
        first = torch.autograd.grad(output.sin().sum(), leaves)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for own, other in zip(first, reference, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-11)
    twice = torch.autograd.grad(network(input).sin().sum(), leaves, create_graph=True)
    for own, other in zip(
        *(torch.autograd.grad(sum(part.square().sum() for part in parts), leaves) for parts in (twice, reference)),
        strict=True,
    ):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-10)


def test_people_s_functions_are_worked_out_at_every_call():
    layer = constrained(nn.Linear(5, 4, activation=lambda x: x.sin()))
    assert not layer.knowable
    assert layer._known is None


@recipes
@pytest.mark.parametrize("frozen", [("gain", "bias"), ("bias",)], ids=",".join)
def test_second_derivatives_of_what_is_not_frozen(recipe, frozen, monkeypatch):
    layer = trained(nn.Linear(5, 4, activation="relu", dtype=torch.float64, **recipe))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name not in frozen)
    input = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    leaves = [input, layer.weight]

    def second(output):
        first = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in first), leaves)

    for own, reference in zip(second(layer(input)), second(composed(layer, input, monkeypatch)), strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-10, atol=1e-10)


@recipes
def test_gradients_are_those_of_finite_differences(recipe):
    layer = trained(nn.Conv2d(2, 3, 2, activation="relu", dtype=torch.float64, **recipe))
    parameters = {name: parameter.detach().clone().requires_grad_() for name, parameter in layer.named_parameters()}
    input = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(input, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (input,))

    assert torch.autograd.gradcheck(run, (input, *parameters.values()))


@recipes
@pytest.mark.parametrize("known", [False, True])
def test_zero_filters_stay_silent_and_get_no_gradient(recipe, known):
    layer = nn.Linear(6, 4, activation="relu", **recipe)
    with torch.no_grad():
        layer.weight[1] = 0.0
        layer.weight[2] = 0.3 if recipe["center"] else 0.0
    layer = constrained(layer) if known else layer
    output = layer(torch.randn(5, 6))
    output.square().sum().backward()
    assert not layer.weight.grad[1:3].any()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())
    assert (output[:, 1:3] == output[0, 1]).all()


def test_channels_last_keeps_layouts_and_values():
    layer = trained(nn.Conv2d(8, 6, 3, padding=1, activation="relu"))
    input = torch.randn(2, 8, 6, 6, requires_grad=True)
    expected = layer(input)
    gradients = differentiated(expected, layer, input)
    layer = constrained(layer.to(memory_format=torch.channels_last))
    output = layer(input.to(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    found = differentiated(output, layer, input)
    length = (layer.weight.detach() ** 2).sum((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(length, torch.ones_like(length))
    for own, reference in zip(found[2:], gradients[2:], strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0], gradients[0], rtol=1e-4, atol=1e-4)


@recipes
@pytest.mark.parametrize("known", [False, True])
def test_autocast_runs_the_linear_map_in_half_precision(recipe, known):
    layer = trained(nn.Conv2d(4, 6, 3, activation="relu", **recipe))
    layer = constrained(layer) if known else layer
    input = torch.randn(2, 4, 6, 6, requires_grad=True)
    full = layer(input)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(input)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.02, atol=0.03)
    half_grads, full_grads = differentiated(half.float(), layer, input), differentiated(full, layer, input)
    for own, reference in zip(half_grads, full_grads, strict=True):
        assert own.dtype == torch.float32
        assert float((own - reference).norm() / reference.norm()) < 0.03


def test_an_input_of_another_type_is_refused_as_by_a_plain_layer():
    for layer in (nn.Linear(4, 2), nn.Conv2d(1, 2, 2)):
        with pytest.raises(RuntimeError, match=r"dtype|type"):
            layer(torch.ones(1, 1, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize("change", ["weight", "gain", "bias"])
def test_what_was_known_of_changed_parameters_is_forgotten(change):
    layer = constrained(trained(nn.Linear(6, 4, activation="relu")))
    input = torch.randn(3, 6)
    layer(input)
    with torch.no_grad():
        getattr(layer, change).mul_(1.5).add_(0.1)
    assert torch.equal(layer(input), layer.eval()(input))


def test_copies_and_evaluation_rely_on_nothing_that_was_known():
    layer = constrained(trained(nn.Linear(6, 4, activation="relu")))
    input = torch.randn(3, 6)
    expected = layer(input)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._known is None
        torch.testing.assert_close(other(input), expected)
    # An average that is swapped in through .data raises no version; evaluation measures it all the same.
    layer.weight.data.mul_(0.7)
    torch.testing.assert_close(layer.eval()(input), expected)


def test_unused_outputs_and_partial_losses():
    first, second = (constrained(trained(nn.Linear(6, 4, activation="relu"))) for _ in range(2))
    input = torch.randn(3, 6)
    second(input)
    (first(input)[:, :1] * 0.0).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in first.parameters())


@pytest.mark.parametrize("owner", [False, True])
def test_layers_that_share_a_weight_and_centre_it_differently_keep_their_functions(owner):
    first = nn.Linear(6, 4, activation="relu", center=owner)
    second = nn.Linear(6, 4, activation="relu", center=not owner)
    second.weight = first.weight
    network = constrained(torch.nn.ModuleList([first, second]))
    input = torch.randn(3, 6)
    for layer in network:
        torch.testing.assert_close(layer.train()(input), layer.eval()(input))


def test_a_module_that_changes_its_type_is_measured_anew():
    layer = constrained(trained(nn.Linear(6, 4, activation="relu")))
    input = torch.randn(3, 6)
    expected = layer(input)
    output = layer.double()(input.double())
    assert output.dtype == torch.float64
    torch.testing.assert_close(output, layer.eval()(input.double()), rtol=0, atol=0)
    torch.testing.assert_close(output.float(), expected)
