import copy
import pickle

import pytest
import torch
from torch import nn

from normprop import moments, norms
from normprop.errors import ConfigError
from normprop.models import mlp, nin, resnet
from normprop.norms import kalman
from normprop.norms.kalman_filter import KalmanBatchNorm, KalmanGroupNorm
from normprop.norms.kalman_prior import Gaussian, closed, sampled
from tests.norms.kalman_networks import NAMES, chain, conv, priors_of


def sources(module):
    return [(source.station, len(source.effects)) for source in module.link.sources]


def test_links_pass_poolings_and_start_anew_after_what_they_do_not_know():
    blocks = [conv(2, 2) for _ in range(6)]
    network = nn.Sequential(
        blocks[0],
        nn.Sequential(nn.MaxPool2d(2), nn.Dropout(0.5), blocks[1]),
        nn.AvgPool2d(2),
        nn.Identity(),
        blocks[2],
        nn.ReLU(),
        blocks[3],
        nn.ModuleDict({"inner": nn.Sequential(blocks[4], blocks[5])}),
    )
    kalman.link(network)
    kalman.link(network)  # again, to the same end
    expected = [[], [(0, 2)], [(1, 0)], [], [], [(4, 0)]]
    assert [sources(block) for block in blocks] == expected


def test_what_pools_and_dropout_do_to_the_moments():
    torch.manual_seed(0)
    first, second = conv(2, 3), conv(3, 4, size=1, activation=None)
    before = Gaussian(first.norm.bias.double()[None], first.norm.weight.double().square()[None])
    input, z = torch.randn(4, 2, 8, 8).double(), torch.randn(400_000, 9, 3).double()
    z = before.mean[:, None] + before.var.sqrt()[:, None] * z
    weight = second.linear.weight.detach().double().flatten(1)
    cases = {
        nn.MaxPool2d(3): z.amax(1).relu(),
        nn.MaxPool2d((3, 1)): z[:, :3].amax(1).relu(),
        nn.Dropout(0.25): nn.functional.dropout(z[:, 0].relu(), 0.25),
        nn.AvgPool2d(3): z[:, 0].relu(),
        nn.Identity(): z[:, 0].relu(),
    }
    for module, values in cases.items():
        _, prior = priors_of(chain(first, module, second), input)
        mean, var = values.mean(0), values.var(0)
        # Largest values of Gaussians are not quite Gaussian before their ReLU: 2 % of a deviation.
        torch.testing.assert_close(prior.mean[0], weight @ mean, rtol=0.02, atol=0.02)
        torch.testing.assert_close(prior.var[0], weight.square() @ var, rtol=0.04, atol=0.01)
    network = chain(first, nn.Dropout(0.25), second)
    network[1].eval()
    _, prior = priors_of(network, input)
    torch.testing.assert_close(prior, closed(before, "relu", second.linear.weight, (6, 6)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("projection", [False, True])
def test_moments_of_the_paths_of_a_residual_sum_add(projection):
    torch.manual_seed(0)
    stem = conv(2, 4, padding=1, activation="relu")
    branch = nn.Sequential(conv(4, 4, padding=1, stride=2 if projection else 1), conv(4, 4, padding=1, activation=None))
    shortcut = conv(4, 4, size=1, stride=2, activation=None) if projection else None
    last = conv(4, 3, padding=1)
    network = chain(stem, kalman.KalmanResidual(branch, shortcut, "relu"), last)
    *_, prior = priors_of(network, torch.randn(4, 2, 8, 8).double())

    def pre(block):
        return block.norm.bias.detach(), block.norm.weight.detach().square()

    if projection:
        skip_mean, skip_var = pre(shortcut)
    else:
        skip = moments.of("relu", pre(stem)[0], pre(stem)[1].sqrt())
        skip_mean, skip_var = skip.mean, skip.var
    mean, var = pre(branch[1])
    space = (4, 4) if projection else (8, 8)
    before = Gaussian((skip_mean + mean)[None], (skip_var + var)[None])
    expected = closed(before, "relu", last.linear.weight, space, padding=1)
    torch.testing.assert_close(prior, expected, rtol=1e-3, atol=1e-4)


def test_a_residual_sum_of_the_networks_input_starts_anew():
    branch = conv(2, 2, padding=1, activation=None)
    network = chain(kalman.KalmanResidual(branch), conv(2, 3))
    assert priors_of(network, torch.randn(4, 2, 6, 6).double()) == [None, None]


@pytest.mark.parametrize(("kalman_weight", "reference"), [("batch", "batch"), ("group", "group")])
@pytest.mark.parametrize("model", [nin, resnet, mlp])
def test_networks_at_weight_zero_are_those_of_batch_and_group_norm(kalman_weight, reference, model, monkeypatch):
    method = kalman.batch_method(prior_weight=0.0) if reference == "batch" else kalman.group_method(0.0)
    monkeypatch.setitem(norms.registry._METHODS, "kalman-zero", method)

    def build(name):
        torch.manual_seed(0)
        if model is mlp:
            return mlp((1, 8, 8), 10, norm=name, width=0.1).double()
        return (nin(1, 10, norm=name, width=0.1) if model is nin else resnet(8, 1, norm=name, width=0.25)).double()

    first, second = build("kalman-zero"), build(reference)
    second.load_state_dict(first.state_dict())
    input = torch.randn(4, 1, 8, 8).double()
    for _ in range(2):
        outputs = [network(input) for network in (first, second)]
        torch.testing.assert_close(*outputs)
        for network, output in zip((first, second), outputs, strict=True):
            network.zero_grad()
            output.square().sum().backward()
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(first.eval()(input), second.eval()(input))


def build(name, model):
    torch.manual_seed(0)
    if model == "mlp":
        return mlp((1, 8, 8), 4, norm=name, width=0.1)
    return nin(1, 4, norm=name, width=0.1) if model == "nin" else resnet(8, 1, 4, norm=name, width=0.5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", ["nin", "resnet", "mlp"])
def test_networks_train(name, model):
    network = build(name, model)
    input, labels = torch.randn(8, 1, 8, 8), torch.arange(8) % 4
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(network(input), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_zero_and_constant_batches_give_no_nan_anywhere_in_a_network(name):
    network = build(name, "resnet")
    for value in (0.0, 3.0):
        network.zero_grad()
        network(torch.full((4, 1, 8, 8), value)).square().sum().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
@pytest.mark.parametrize("name", NAMES)
def test_copies_of_a_network_are_linked_among_themselves_alone(name, how):
    network, input = build(name, "resnet"), torch.randn(4, 1, 8, 8)
    network(input).sum().backward()
    twin = how(network)
    torch.testing.assert_close(twin(input), network(input))
    before = twin(input)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    network(input)
    torch.testing.assert_close(twin(input), before)
    ours, theirs = ([m for m in net.modules() if getattr(m, "link", None)] for net in (network, twin))
    assert len({id(module.link.current) for module in theirs}) == 1
    assert ours[0].link.current is not theirs[0].link.current
    assert [module.link.station for module in ours] == [module.link.station for module in theirs]


def test_a_pass_leaves_nothing_behind():
    network, input = build("kalman-batch", "resnet"), torch.randn(4, 1, 8, 8)
    current = network[0].link.current
    network(input)
    assert current.outputs == {}
    network[:2](input)  # a pass that stops in the middle ends with the next one
    assert sorted(current.outputs) == [0, 1, 2, 3]
    copy.deepcopy(network)
    network(input)
    assert current.outputs == {}


def test_a_block_called_out_of_order_says_so():
    network = build("kalman-batch", "nin")
    with pytest.raises(ValueError, match="block before this one was not called"):
        network[1](torch.randn(4, network[1].linear.in_channels, 4, 4))
    network.eval()
    network[1](torch.randn(4, network[1].linear.in_channels, 4, 4))  # running averages need nothing


def test_frozen_blocks_predict_from_their_running_averages():
    torch.manual_seed(0)
    network = chain(conv(2, 3, eps=0.5), conv(3, 4, eps=0.5))
    network[0].eval()
    network[0].norm.running_var.uniform_(0.5, 2.0)
    first = network[0].norm
    _, prior = priors_of(network, torch.randn(4, 2, 8, 8).double())
    var = first.weight.square() * first.running_var / (first.running_var + 0.5)
    expected = closed(Gaussian(first.bias[None], var[None]), "relu", network[1].linear.weight, (6, 6))
    torch.testing.assert_close(prior, expected)


def test_kalman_group_is_the_same_in_evaluation_and_its_samples_do_not_meet():
    network, input = build("kalman-group", "resnet"), torch.randn(4, 1, 8, 8)
    together = network(input)
    torch.testing.assert_close(network.eval()(input), together)
    alone = torch.cat([network(sample[None]) for sample in input])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    assert not list(network.buffers())
    assert network(input[:0]).shape == (0, 4)


def test_linked_blocks_compile_to_one_graph():
    torch.manual_seed(0)
    network, input = nn.Sequential(conv(2, 3), conv(3, 4)), torch.randn(4, 2, 6, 6)
    kalman.link(network)
    twin = copy.deepcopy(network)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        outputs = [part(input) for part in (network, compiled)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().sum().backward()
    for one, other in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(twin.named_buffers()), dict(network.named_buffers()))


@pytest.mark.parametrize("name", NAMES)
def test_priors_stay_in_float32_under_autocast_and_in_half_precision(name):
    network, input = build(name, "resnet"), torch.randn(4, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        priors = priors_of(network, input)
    priors += priors_of(network.bfloat16(), input.bfloat16())
    assert {part.dtype for prior in priors if prior for part in prior} == {torch.float32}


def test_errors():
    with pytest.raises(ConfigError, match="prior must be 'closed' or 'sampled', got 'drawn'"):
        conv(2, 3, prior="drawn")
    with pytest.raises(ConfigError, match="linear layer has no space"):
        kalman.batch_method("sampled").block(0, 3, 4)
    with pytest.raises(ConfigError, match=r"prior_weight must be a number from 0 to 1, got 1\.5"):
        KalmanGroupNorm(4, prior_weight=1.5)
    with pytest.raises(ConfigError, match="micro_batch must be a whole number above zero, got 0"):
        KalmanBatchNorm(4, micro_batch=0)
    with pytest.raises(ConfigError, match="no drop-in layer"):
        norms.create("kalman-batch", 4)
    twice = conv(2, 2)
    with pytest.raises(ConfigError, match="stands in the network twice"):
        kalman.link(nn.Sequential(twice, twice))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        KalmanBatchNorm(4)(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        KalmanBatchNorm(4, micro_batch=1)(torch.zeros(4, 4), Gaussian(torch.zeros(1, 4), torch.ones(1, 4)))
    with pytest.raises(ValueError, match="a batch of 5 does not split into micro-batches of 2"):
        KalmanBatchNorm(4, micro_batch=2)(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="more than 1 value per group"):
        KalmanGroupNorm(1)(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="two or more positions"):
        sampled(Gaussian(torch.zeros(1, 2), torch.ones(1, 2)), "relu", torch.ones(3, 2, 2, 2), (2, 2))
