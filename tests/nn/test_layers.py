"""Contracts of every NormProp layer class."""

import copy
import io
import pickle

import pytest
import torch
from torch.func import functional_call, grad, vmap

from normprop import nn
from tests.nn.cases import CASES, RECIPES
from tests.nn.textbook import textbook, unit_filters

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


def trained(layer, seed=1):
    """Move gain and bias away from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.gain.mul_(1 + 0.5 * torch.rand(layer.gain.shape, generator=generator, dtype=layer.gain.dtype))
        if layer.bias is not None:
            layer.bias.add_(0.5 * torch.randn(layer.bias.shape, generator=generator, dtype=layer.bias.dtype))
    return layer


@cases
@recipes
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "gelu", None])
def test_equals_the_textbook_form_in_float64(case, recipe, activation):
    layer = trained(case.build(activation=activation, dtype=torch.float64, **recipe))
    input = case.input(3, dtype=torch.float64)
    # Closed forms to rounding; inside a layer tanh is integrated by a fixed rule.
    tolerance = 1e-9 if activation == "tanh" else 2e-12
    expected = textbook(layer, case.build_plain(), input)
    torch.testing.assert_close(layer(input), expected, rtol=tolerance, atol=tolerance)


@cases
@recipes
def test_parameters_are_weight_gain_bias(case, recipe):
    layer = case.build(activation="relu", **recipe)
    assert {name for name, _ in layer.named_parameters()} == {"weight", "gain", "bias"}
    assert not list(layer.buffers())
    assert isinstance(layer, case.plain)
    assert isinstance(layer, nn.NormPropLayer)
    assert layer.weight.shape == case.build_plain().weight.shape
    assert "bias" not in dict(case.build(activation="relu", bias=False).named_parameters())


@cases
@recipes
@pytest.mark.parametrize("batch", [0, 1, 2, 7])
def test_any_batch_size_train_equals_eval_and_samples_are_independent(case, recipe, batch):
    layer = trained(case.build(activation="relu", **recipe))
    input = case.input(batch)
    output = layer(input)
    assert output.shape == case.build_plain()(input).shape
    assert torch.equal(layer.eval()(input), output)
    if batch > 1:
        other = input.clone()
        other[1:] = 100 * torch.randn_like(other[1:])
        torch.testing.assert_close(layer(other)[0], output[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer(input[:1])[0], output[0], rtol=1e-5, atol=1e-6)


@cases
def test_unbatched_input(case):
    layer = trained(case.build(activation="relu"))
    input = case.input(1)
    torch.testing.assert_close(layer(input[0]), layer(input)[0])


@cases
@recipes
def test_micro_batches_accumulate_to_the_full_batch(case, recipe):
    layer = trained(case.build(activation="relu", dtype=torch.float64, **recipe))
    input = case.input(7, dtype=torch.float64)
    layer(input).square().sum().backward()
    full = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    for part in input.split([1, 2, 4]):
        layer(part).square().sum().backward()
    for expected, parameter in zip(full, layer.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-11, atol=1e-12)


@cases
@recipes
def test_scale_of_the_weight_does_not_matter(case, recipe):
    layer = trained(case.build(activation="relu", dtype=torch.float64, **recipe))
    input = case.input(4, dtype=torch.float64)
    output = layer(input)
    (output**3).sum().backward()
    gradient = layer.weight.grad.clone()
    unit = unit_filters(layer)
    # Filter by filter: unit filters are nonzero only on their own rows, so one sum per unit axis would hide errors.
    axes = tuple(range(2, gradient.ndim))
    product = layer.weight.detach() * gradient
    inner = product.sum(axes) if axes else product
    transposed = isinstance(layer, torch.nn.modules.conv._ConvTransposeNd)
    groups = getattr(layer, "groups", 1)
    per_filter = inner.reshape(groups, -1, inner.shape[1]).sum(1) if transposed else inner.sum(1)
    assert per_filter.abs().max() < 1e-11 * gradient.abs().max()
    assert gradient.abs().max() > 1e-3
    with torch.no_grad():
        layer.weight.mul_(37.0)
    layer.zero_grad()
    (layer(input) ** 3).sum().backward()
    torch.testing.assert_close(layer(input), output)
    torch.testing.assert_close(layer.weight.grad, gradient / 37.0, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(unit_filters(layer), unit)


@cases
@recipes
def test_normalize_weight_keeps_the_function_and_makes_unit_filters(case, recipe):
    layer = trained(case.build(activation="relu", dtype=torch.float64, **recipe))
    input = case.input(2, dtype=torch.float64)
    before = layer(input)
    with torch.no_grad():
        layer.weight.mul_(3.0).add_(0.1 if layer.center else 0.0)
    layer.normalize_weight_()
    torch.testing.assert_close(layer(input), before)
    stride = layer.stride if hasattr(layer, "transposed") and layer.transposed else (1,)
    expected = unit_filters(layer) / torch.tensor(stride, dtype=torch.float64).prod().sqrt()
    torch.testing.assert_close(layer.weight.detach(), expected)


@cases
@pytest.mark.parametrize("center", [True, False])
def test_zero_filters_give_zeros_and_finite_gradients(case, center):
    layer = case.build(activation=None, center=center)
    with torch.no_grad():
        layer.weight.fill_(0.3 if center else 0.0)
    output = layer(case.input(2))
    output.square().sum().backward()
    assert torch.equal(output, torch.zeros_like(output))
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    layer.normalize_weight_()
    assert torch.equal(layer.weight, torch.zeros_like(layer.weight))
    dead = case.build(activation="relu", moments="fixed", center=False)
    with torch.no_grad():
        dead.weight.zero_()
    torch.testing.assert_close(dead(case.input(1)).unique(), torch.tensor([-0.6833316961]))


@cases
@recipes
def test_deepcopy_pickle_save_and_state_dict(case, recipe):
    layer = trained(case.build(activation="relu", **recipe))
    input = case.input(2)
    expected = layer(input)
    assert torch.equal(copy.deepcopy(layer)(input), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(input), expected)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(input), expected)
    other = case.build(activation="relu", **recipe)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(input), expected)


def test_a_copy_with_a_learnable_activation_is_independent():
    layer = nn.Linear(3, 2, activation=torch.nn.PReLU())
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.activation.weight.fill_(0.9)
    input = torch.randn(5, 3)
    assert not torch.allclose(copied(input), layer(input))
    layer(input).sum().backward()
    assert copied.activation.weight.grad is None


@cases
def test_a_plain_state_dict_keeps_its_function(case):
    plain = case.build_plain()
    layer = case.build(activation=None, center=False)
    layer.load_state_dict(plain.state_dict(), strict=True)
    input = case.input(3)
    torch.testing.assert_close(layer(input), plain(input), rtol=1e-4, atol=1e-5)


def test_a_plain_state_dict_inside_a_network():
    plain = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    layers = torch.nn.Sequential(nn.Linear(4, 5, center=False), torch.nn.ReLU(), nn.Linear(5, 2, center=False))
    layers.load_state_dict(plain.state_dict())
    input = torch.randn(3, 4)
    torch.testing.assert_close(layers(input), plain(input))


def test_a_centred_layer_takes_centred_plain_weights_and_refuses_others():
    plain, layer = torch.nn.Linear(6, 4), nn.Linear(6, 4, center=True)
    with pytest.raises(RuntimeError, match=r"center=True cannot keep .* center=False"):
        layer.load_state_dict(plain.state_dict())
    with torch.no_grad():
        plain.weight.sub_(plain.weight.mean(1, keepdim=True))
    layer.load_state_dict(plain.state_dict())
    input = torch.randn(3, 6)
    torch.testing.assert_close(layer(input), plain(input))


@cases
@recipes
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiles_without_graph_breaks(case, recipe):
    torch.compiler.reset()
    layer = trained(case.build(activation="relu", **recipe))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    input = case.input(3)
    compiled(input).square().sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(input).square().sum().backward()
    torch.testing.assert_close(compiled(input), layer(input))
    for expected, parameter in zip(gradients, layer.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-4)


@cases
@recipes
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exports(case, recipe):
    layer = trained(case.build(activation="relu", **recipe))
    input = case.input(3)
    program = torch.export.export(layer, (input,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    other = case.input(5)
    torch.testing.assert_close(program.module()(other), layer(other))


@cases
@recipes
def test_per_sample_gradients(case, recipe):
    layer = trained(case.build(activation="relu", dtype=torch.float64, **recipe))
    input = case.input(3, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, sample):
        return functional_call(layer, parameters, (sample.unsqueeze(0),)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, input)
    for index, sample in enumerate(input):
        layer.zero_grad()
        layer(sample.unsqueeze(0)).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(per_sample[name][index], parameter.grad, rtol=1e-9, atol=1e-10)


@cases
def test_activation_checkpointing(case):
    layer = trained(case.build(activation="relu"))
    input = case.input(2).requires_grad_()
    layer(input).square().sum().backward()
    expected = [input.grad.clone(), *(p.grad.clone() for p in layer.parameters())]
    layer.zero_grad()
    input.grad = None
    torch.utils.checkpoint.checkpoint(layer, input, use_reentrant=False).square().sum().backward()
    for got, want in zip([input.grad, *(p.grad for p in layer.parameters())], expected, strict=True):
        assert torch.equal(got, want)


@cases
@recipes
def test_meta_device_then_real(case, recipe):
    layer = case.build(activation="relu", device="meta", **recipe)
    assert layer(case.input(2, device="meta")).shape == case.build_plain()(case.input(2)).shape
    real = layer.to_empty(device="cpu")
    torch.manual_seed(3)
    real.reset_parameters()
    torch.manual_seed(3)
    assert torch.equal(case.build(activation="relu", **recipe).weight, real.weight)
    assert torch.isfinite(real(case.input(2))).all()


@cases
@recipes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_finite_and_close(case, recipe, dtype):
    layer = trained(case.build(activation="relu", **recipe))
    with torch.no_grad():
        layer.weight.mul_(1e-4)  # squares underflow in float16
    input = case.input(2)
    exact = layer(input)
    with torch.autocast("cpu", dtype):
        output = layer(input)
    assert output.dtype == dtype
    output.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    error = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-11
    torch.testing.assert_close(output.float(), exact, rtol=8 * error, atol=16 * error)


@cases
@recipes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_take_norms_in_float32(case, recipe, dtype):
    layer = case.build(activation="relu", **recipe)
    with torch.no_grad():
        layer.weight.mul_(300.0)  # squares overflow in float16
    half = copy.deepcopy(layer).to(dtype)
    input = case.input(2)
    output = half(input.to(dtype))
    assert output.dtype == dtype
    error = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-11
    torch.testing.assert_close(output.float(), layer(input), rtol=8 * error, atol=16 * error)
    half.normalize_weight_()
    assert half.weight.dtype == dtype
    assert torch.isfinite(half.weight).all()


@cases
@recipes
def test_gradcheck(case, recipe):
    layer = trained(case.build(activation="tanh", dtype=torch.float64, **recipe))
    input = case.input(2, dtype=torch.float64).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def function(input, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (input,))

    assert torch.autograd.gradcheck(function, (input, *layer.parameters()), fast_mode=True)


@recipes
def test_relu_gradcheck_and_second_derivatives(recipe):
    layer = trained(nn.Conv2d(2, 3, 2, activation="relu", dtype=torch.float64, **recipe))
    input = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def function(input, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (input,))

    assert torch.autograd.gradcheck(function, (input, *layer.parameters()))
    assert torch.autograd.gradgradcheck(function, (input, *layer.parameters()), atol=1e-4)


@pytest.mark.parametrize("case", [c for c in CASES if not c.options.get("padding") and "transposed" not in c.name])
@pytest.mark.parametrize("activation", ["relu", "tanh", torch.nn.PReLU(), torch.nn.SiLU(), torch.sin, None])
@recipes
def test_white_input_gives_mean_0_and_variance_1(case, activation, recipe):
    """At gain 1, over 400 random layers; the mean of 400 layer means has a standard error of about 0.02."""
    with torch.no_grad():
        outputs = [case.build(activation=activation, **recipe | {"gain": 1.0})(case.input(64)) for _ in range(400)]
    values = torch.stack([output.flatten().double() for output in outputs])
    assert abs(values.mean()) < 0.1
    assert values.var() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(4, 2, 1), (3, 2, 1), (3, 1, 2), (5, 3, 2)])
def test_transposed_convolutions_keep_the_variance_over_their_phases(kernel, stride, dilation):
    layer = nn.ConvTranspose1d(64, 32, kernel, stride=stride, dilation=dilation, activation=None)
    with torch.no_grad():
        output = layer(torch.randn(256, 64, 24))
    reach = dilation * (kernel - 1)
    interior = output[..., reach : output.shape[-1] - reach]
    whole = interior[..., : interior.shape[-1] // stride * stride]
    assert whole.var() == pytest.approx(1.0, abs=0.02)
