"""Decoupled gradients against batch norm's, against autograd, and against what they promise."""

import copy

import pytest
import torch
from torch import nn

from normprop import models
from normprop.decoupled import InputMoments
from normprop.errors import ConfigError
from normprop.experiments import ablations
from normprop.nn import Conv1d, Conv2d, ConvTranspose2d, Linear
from normprop.training import Muon, constrain, decouple, parameter_groups

LAYERS = {
    "linear": lambda: Linear(7, 5, activation="relu"),
    "not centred": lambda: Linear(7, 5, activation="relu", center=False),
    "wide, few samples": lambda: Linear(40, 30, activation="relu", center=False),
    "convolution": lambda: Conv2d(3, 5, 3, padding=1, activation="relu"),
    "groups, stride": lambda: Conv2d(4, 6, 3, stride=2, groups=2, activation="relu"),
    "channels last": lambda: Conv2d(3, 5, 3, activation="relu").to(memory_format=torch.channels_last),
    "one dimension": lambda: Conv1d(3, 5, 3, padding="same", activation="relu"),
    "fixed moments": lambda: Conv2d(3, 5, 3, activation="relu", moments="fixed"),
    "another activation": lambda: Conv2d(3, 5, 3, activation="gelu"),
    "end of a branch": lambda: Conv2d(3, 5, 1),
    "reflected": lambda: Conv2d(3, 5, 3, padding=1, padding_mode="reflect", activation="relu"),
}


def _network(layer, constrained=False):
    """The layer in double precision with gains and biases drawn, and one after it, which the ablation leaves alone."""
    net = nn.Sequential(layer, Linear(2, 2)).double()
    nn.init.uniform_(layer.gain, 0.5, 1.5)
    nn.init.uniform_(layer.bias, -0.5, 0.5)
    if constrained:
        constrain(torch.optim.SGD(net.parameters(), lr=0.1), net)
    return net


def _input(layer, samples=8):
    features = getattr(layer, "in_features", None) or layer.in_channels
    space = (6,) * layer._spatial_dims
    return 0.5 + torch.randn(samples, features, *space, dtype=torch.float64)


def _gradients(layer, x, by):
    x = x.clone().requires_grad_()
    output = layer(x)
    return [output.detach(), *torch.autograd.grad((output * by).sum(), [x, layer.weight, layer.gain, layer.bias])]


@pytest.mark.parametrize("constrained", [False, True], ids=["measured", "known"])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_with_the_batch_alone_they_are_those_through_its_statistics(make, constrained):
    torch.manual_seed(0)
    net = _network(make(), constrained)
    layer, x = net[0], _input(net[0])
    by = torch.randn_like(layer(x))
    plain = _gradients(layer, x, by)
    decouple(net)  # what is measured first counts in full
    ours = _gradients(layer, x, by)
    twin = copy.deepcopy(net)
    twin[0]._inputs = None
    ablations.batch_gradient(twin)
    torch.testing.assert_close(ours, _gradients(twin[0], x, by))
    for kept in (0, 1, 3, 4):
        torch.testing.assert_close(ours[kept], plain[kept])
    assert not torch.allclose(ours[2], plain[2], rtol=0.01)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_filters_gradient_stays_at_right_angles_to_it(make):
    torch.manual_seed(0)
    net = _network(make(), constrained=True)
    decouple(net)
    for _ in range(3):
        x = _input(net[0])
        *_, by_weight, _, _ = _gradients(net[0], x, torch.randn_like(net[0](x)))
    inner = (by_weight * net[0].weight).flatten(1).sum(1)
    assert inner.abs().max() < 1e-9 * by_weight.abs().max() * by_weight[0].numel()


def test_averages_reach_back():
    torch.manual_seed(0)
    moments, weight = InputMoments(span=16), torch.eye(3)
    batches = [torch.randn(4, 3) + number for number in range(5)]
    for x in batches:
        moments.measure(x, x, weight, None)
    kept = torch.exp(torch.tensor(-4 / 16))
    shares = kept ** torch.arange(4, -1, -1)
    shares = shares / shares.sum()
    torch.testing.assert_close(
        moments.mean, (shares.view(-1, 1, 1) * torch.stack([x.mean(0, True) for x in batches])).sum(0)
    )
    covariances = torch.stack([torch.cov(x.T, correction=0) for x in batches])
    torch.testing.assert_close(moments.covariance, (shares.view(-1, 1, 1) * covariances).sum(0))


def test_of_many_images_every_so_many_are_measured():
    torch.manual_seed(0)
    layer, x = Conv2d(3, 5, 3), torch.randn(100, 3, 6, 6)
    all_of_them, some = InputMoments(span=50), InputMoments(span=2)
    for moments, images in ((all_of_them, x[::25]), (some, x)):
        moments.measure(images, layer._linear(images, layer.weight, layer.bias), layer.weight, layer._convolution)
    torch.testing.assert_close((some.mean, some.covariance), (all_of_them.mean, all_of_them.covariance))


def test_the_mean_patch_knows_the_padding():
    torch.manual_seed(0)
    layer, x = Conv2d(4, 6, 3, padding=1, stride=2, groups=2), torch.randn(5, 4, 8, 8)
    moments = InputMoments(span=16)
    moments.measure(x, layer._linear(x, layer.weight, layer.bias), layer.weight, layer._convolution)
    patches = nn.functional.unfold(x, 3, padding=1, stride=2).mean((0, 2))
    torch.testing.assert_close(moments.mean.flatten(), patches)


@pytest.mark.parametrize("samples", [1, 2])
def test_one_sample_is_enough(samples):
    torch.manual_seed(0)
    net = _network(Linear(7, 5, activation="relu"))
    decouple(net)
    for _ in range(4):
        *_, by_weight, _, _ = _gradients(net[0], _input(net[0], samples), torch.randn(samples, 5))
        assert by_weight.isfinite().all()
    assert by_weight.abs().max() > 0


@pytest.mark.filterwarnings("ignore:User provided device_type:UserWarning")
def test_under_autocast_as_in_single_precision():
    torch.manual_seed(0)
    found = []
    for enabled in (False, True):
        torch.manual_seed(1)
        net = nn.Sequential(Conv2d(3, 8, 3, activation="relu"), Linear(2, 2))
        decouple(net)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = net[0](torch.randn(8, 3, 8, 8))
        output.float().pow(3).sum().backward()
        found.append(net[0].weight.grad)
    assert torch.nn.functional.cosine_similarity(*(grad.flatten() for grad in found), dim=0) > 0.995


def test_sums_of_half_precision_do_not_overflow():
    torch.manual_seed(0)
    x = 3 * torch.randn(80_000, 2)
    moments = InputMoments(span=16)
    moments.measure(x.half(), x.half(), torch.eye(2), None)
    torch.testing.assert_close(moments.covariance, torch.cov(x.T, correction=0), rtol=0.01, atol=0.05)


def test_an_empty_batch_is_no_matter():
    net = _network(Conv2d(3, 5, 3, activation="relu"))
    handle = decouple(net)
    assert _gradients(net[0], _input(net[0], 0), torch.zeros(0, 5, 4, 4))[2].abs().max() == 0
    assert handle.state_dict() == {}


def test_only_training_measures():
    net = _network(Linear(7, 5, activation="relu"))
    decouple(net)
    inputs, x = net[0]._inputs, _input(net[0])
    with torch.no_grad():
        net[0](x)
    net.eval()[0](x)
    assert inputs.mean is None
    net.train()[0](x)
    assert inputs.mean is not None


def test_transposed_layers_are_left_alone():
    net = nn.Sequential(Conv2d(3, 4, 3), ConvTranspose2d(4, 4, 2, stride=2), nn.Flatten(), Linear(4, 2))
    handle = decouple(net)
    assert list(handle.layers) == ["0", "3"]
    handle.remove()
    assert net[0]._inputs is None


def test_what_was_measured_is_saved():
    torch.manual_seed(0)
    nets = [_network(Conv2d(3, 5, 3, activation="relu")) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    first, second = (decouple(net) for net in nets)
    assert first.state_dict() == {}
    for _ in range(2):
        nets[0][0](_input(nets[0][0]))
    second.load_state_dict(first.state_dict())
    x = _input(nets[0][0])
    by = torch.randn_like(nets[0][0](x).detach())
    first.load_state_dict(second.state_dict())
    with pytest.raises(ConfigError, match=r"^decouple: the state is another network's: no layer 7 here$"):
        first.load_state_dict({"7": {}})
    torch.testing.assert_close(_gradients(nets[0][0], x, by), _gradients(nets[1][0], x, by), rtol=0, atol=0)


def test_a_residual_network_trains_on_single_samples():
    torch.manual_seed(0)
    net = models.resnet(8, 3, 4, width=0.25)
    optimizer = Muon(parameter_groups(net, 0.0, matrices=True), lr=0.005)
    constrain(optimizer, net)
    decouple(net)
    x, losses = torch.randn(16, 3, 16, 16), []
    for step in range(96):
        sample = step % 16
        loss = nn.functional.cross_entropy(net(x[sample : sample + 1]), torch.tensor([sample % 4]))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(losses[-16:]) < 0.7 * sum(losses[:16])


@pytest.mark.parametrize("span", [0.0, -1.0, float("nan"), float("inf")])
def test_one_line_for_a_wrong_span(span):
    with pytest.raises(ConfigError, match=r"^decouple: span must be a finite number of samples above 0, got "):
        decouple(Linear(2, 2), span=span)


def test_one_line_where_it_cannot_be():
    net = _network(Linear(7, 5, activation="relu"))
    decouple(net)
    x = _input(net[0])
    line = r"^Linear: decoupled gradients are for eager training in single or double precision, .* remove them here$"
    with pytest.raises(ConfigError, match=line):
        torch.func.grad(lambda weight: torch.func.functional_call(net[0], {"weight": weight}, (x,)).sum())(
            net[0].weight
        )
    with pytest.raises(ConfigError, match=line):
        net.bfloat16()[0](x.bfloat16())
    net.double()
    with pytest.raises(ConfigError, match=r"^decoupled gradients have no derivatives: remove them before asking for"):
        torch.autograd.grad(net[0](x).sum(), net[0].weight, create_graph=True)
