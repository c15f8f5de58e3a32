"""Ablations change one thing of our recipe and nothing of other methods."""

import pytest
import torch

from normprop import models
from normprop.errors import ConfigError
from normprop.experiments import ablations
from normprop.nn import Conv2d, ConvTranspose2d, Linear, NormPropLayer, Residual


def network(norm):
    torch.manual_seed(0)
    return ablations.resnet14(norm=norm)


def biases(net):
    return [layer.bias.detach().clone() for layer in net.modules() if isinstance(layer, NormPropLayer)]


def branch_gains(net):
    return {round(block.branch[-1].gain[0].item(), 4) for block in net.modules() if isinstance(block, Residual)}


def test_without_a_change_it_is_the_reference_network():
    torch.manual_seed(0)
    reference = models.resnet(14, 3, 10)
    assert all(torch.equal(a, b) for a, b in zip(network("normprop").parameters(), reference.parameters(), strict=True))
    assert not any(isinstance(module, NormPropLayer) for module in network("batch").modules())


def test_changes_of_the_start():
    ours = biases(network("normprop"))
    assert max(float(bias.max()) for bias in ours) > 0.5
    assert all(bool((bias == 0).all()) for bias in biases(network("normprop+zero-bias")))
    assert branch_gains(network("normprop+zero-bias")) == {1.0}
    assert branch_gains(network("normprop")) == {0.4082}
    assert branch_gains(network("normprop+branch-gain-0.25")) == {0.25}
    assert branch_gains(network("normprop+branch-gain-1")) == {1.0}
    flat, steep = biases(network("normprop+slope-2")), biases(network("normprop+slope-8"))
    assert float(flat[0][0]) > float(ours[0][0]) > float(steep[0][0])


def test_filters_of_any_angle():
    for norm, asked in (("normprop", True), ("normprop+any-angle", False)):
        layers = [layer for layer in network(norm).modules() if isinstance(layer, NormPropLayer)]
        assert {layer.orthogonal for layer in layers} == {asked}


@pytest.mark.parametrize("change", ["stochastic-depth-0.5", "noise-0.3"])
def test_noise_is_in_training_alone_and_each_samples_own(change):
    plain, noisy = network("normprop"), network(f"normprop+{change}")
    x = torch.randn(6, 3, 16, 16)
    assert torch.equal(noisy.eval()(x), plain.eval()(x))
    noisy.train()
    with torch.no_grad():
        assert not torch.equal(noisy(x), noisy(x))
        same = noisy(x[:1].expand(6, -1, -1, -1))
    assert not torch.allclose(same[0], same[1])


def gradients(net, x, loss):
    net.zero_grad()
    output = net(x)
    loss(output).backward()
    return output.detach(), {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("name", ["nin", "resnet14", "unet", "vit"])
def test_gradients_by_the_batch_change_weights_gradients_alone(name):
    found = []
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for norm in ("normprop", "normprop+batch-gradient"):
        torch.manual_seed(0)
        net = getattr(ablations, name)(norm=norm).double()
        found.append(gradients(net, x, lambda output: output.square().sum()))
    (output, ours), (same, theirs) = found
    torch.testing.assert_close(same, output)
    layers = [name for name, module in net.named_modules() if isinstance(module, NormPropLayer)]
    changed = {key for key in ours if not torch.allclose(ours[key], theirs[key], rtol=1e-6, atol=1e-9)}
    assert changed == {f"{layer}.weight" for layer in layers[:-1]}


@pytest.mark.parametrize("layer", [Conv2d(3, 5, 3), ConvTranspose2d(4, 6, 2, stride=2, groups=2), Linear(7, 5)])
def test_gradients_by_the_batch_are_those_of_batch_norm(layer):
    torch.manual_seed(0)
    net = torch.nn.Sequential(layer, Linear(2, 2)).double()  # the last one is left alone
    ablations.batch_gradient(net)
    x = torch.randn(8, *((layer.in_features,) if isinstance(layer, Linear) else (layer.in_channels, 6, 6))).double()
    target = torch.randn_like(layer(x))
    (by_us,) = torch.autograd.grad((layer(x) * target).sum(), layer.weight)
    plain = type(layer).forward(layer, x)
    channel = plain.ndim - 1 if isinstance(layer, Linear) else 1
    others = [axis for axis in range(plain.ndim) if axis != channel]
    std = plain.std(others, keepdim=True, correction=0).detach()
    normalized = torch.nn.functional.batch_norm(plain, None, None, training=True, eps=1e-20)
    (expected,) = torch.autograd.grad((normalized * std * target).sum(), layer.weight)
    torch.testing.assert_close(by_us, expected)


def test_noise_leaves_the_mean_of_a_linear_branch():
    torch.manual_seed(0)
    branch = torch.nn.Identity()
    branch.register_forward_hook(ablations.partial(ablations._dropped, 0.3))
    mean = branch(torch.ones(20_000, 2, 1, 1)).mean()
    assert mean.item() == pytest.approx(1.0, abs=4 * (0.3 / 0.7 / 20_000) ** 0.5)


@pytest.mark.parametrize("name", ["normprop+nothing", "batch+zero-bias"])
def test_one_line_for_what_there_is_not(name):
    with pytest.raises(ConfigError, match=r"ablations: no method .*; there are normprop\+ zero-bias, "):
        network(name)


@pytest.mark.parametrize("name", ["nin", "resnet20", "mlp40", "vit"])
def test_networks_take_images_of_32x32(name):
    assert getattr(ablations, name)(norm="normprop")(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    assert ablations.unet(norm="batch")(torch.randn(2, 3, 32, 32)).shape == (2, 2, 32, 32)
