import copy
import math
import pickle

import pytest
import torch
from torch import nn

from normprop import moments, norms
from normprop.errors import ConfigError
from normprop.models import mlp, nin, resnet
from normprop.norms import kalman
from normprop.norms.kalman_filter import KalmanBatchNorm, KalmanGroupNorm, filtered, posterior
from normprop.norms.kalman_prior import Gaussian, closed, sampled

NAMES = ["kalman-batch", "kalman-group"]


def gaussian(*shape):
    """A random mean and variance in float64."""
    return Gaussian(torch.randn(*shape, dtype=torch.float64), torch.rand(*shape, dtype=torch.float64) + 0.5)


def chain(*blocks):
    """Linked blocks in float64."""
    network = nn.Sequential(*blocks).double()
    kalman.link(network)
    return network


def conv(inputs, outputs, size=3, activation="relu", norm=KalmanBatchNorm, prior="closed", bias=False, **options):
    """A block of a 2-d convolution whose gain and bias are not one and zero."""
    names = ("stride", "padding", "groups", "dilation")
    linear = nn.Conv2d(inputs, outputs, size, bias=bias, **{k: options.pop(k) for k in names if k in options})
    block = kalman.KalmanBlock(linear, norm(outputs, **options), activation, prior)
    nn.init.uniform_(block.norm.weight, 0.5, 1.5)
    nn.init.normal_(block.norm.bias, std=0.5)
    return block


def priors_of(network, input):
    """The prior that each block's norm is given in one pass, in the order of the calls."""
    seen = []
    kinds = (KalmanBatchNorm, KalmanGroupNorm)
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
        for module in network.modules()
        if isinstance(module, kinds)
    ]
    network(input)
    for hook in hooks:
        hook.remove()
    return seen


# The filter.


def test_posterior_is_the_law_of_a_two_component_mixture():
    torch.manual_seed(0)
    prior, observed, p = gaussian(2, 3), gaussian(2, 3), 0.3
    mean, var = posterior(prior, observed, p)
    # Two atoms at mean +- deviation have a component's mean and variance, so four weighted atoms are a mixture.
    atoms = torch.stack([part.mean + sign * part.var.sqrt() for part in (prior, observed) for sign in (-1, 1)])
    weights = torch.tensor([p, p, 1 - p, 1 - p], dtype=torch.float64).reshape(4, 1, 1) / 2
    expected = (weights * atoms).sum(0)
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(var, (weights * (atoms - expected).square()).sum(0))


def test_a_prior_out_of_proportion_is_ignored_per_group():
    observed = Gaussian(torch.ones(3, 2), torch.ones(3, 2))
    # Mean ratios 99.5, 100 and not a number.
    prior = Gaussian(torch.zeros(3, 2), torch.tensor([[190.0, 9.0], [190.0, 10.0], [math.nan, 1.0]]))
    mean, var = filtered(prior, observed, 0.5)
    assert mean.tolist() == [[0.5, 0.5], [1.0, 1.0], [1.0, 1.0]]
    assert var.tolist() == [[95.75, 5.25], [1.0, 1.0], [1.0, 1.0]]
    assert filtered(None, observed, 0.5) is observed


def test_channels_that_never_vary_turn_the_prior_off_and_stay_finite():
    observed = Gaussian(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]], requires_grad=True))
    var = filtered(Gaussian(torch.zeros(1, 2), torch.ones(1, 2)), observed, 0.5).var
    var.sum().backward()
    assert var.tolist() == [[0.0, 1.0]]
    assert observed.var.grad.tolist() == [[1.0, 1.0]]


def test_batch_norm_filters_evaluates_and_averages_as_its_formulas_say():
    torch.manual_seed(0)
    norm = KalmanBatchNorm(3, prior_weight=0.4, micro_batch=2).double()
    nn.init.uniform_(norm.weight)
    nn.init.normal_(norm.bias)
    input, prior = torch.randn(6, 3, 5, dtype=torch.float64) * 2 + 1, gaussian(3, 3)
    output, used = norm(input, prior)
    means, variances = [], []
    for index, part in enumerate(input.split(2)):
        mean, biased = part.mean((0, 2)), part.var((0, 2), correction=0)
        m = 0.4 * prior.mean[index] + 0.6 * mean
        between = 0.24 * (mean - prior.mean[index]) ** 2
        v = 0.4 * prior.var[index] + 0.6 * biased + between
        by_hand = norm.weight[:, None] * (part - m[:, None]) / (v[:, None] + 1e-5).sqrt() + norm.bias[:, None]
        torch.testing.assert_close(output[2 * index : 2 * index + 2], by_hand)
        torch.testing.assert_close((used.mean[index], used.var[index]), (m, v))
        means.append(m)
        variances.append(0.4 * prior.var[index] + 0.6 * part.var((0, 2), correction=1) + between)
    torch.testing.assert_close(norm.running_mean, 0.1 * torch.stack(means).mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * torch.stack(variances).mean(0))
    assert norm.num_batches_tracked == 1
    norm.eval()
    expected = (input - norm.running_mean[:, None]) / (norm.running_var[:, None] + 1e-5).sqrt()
    evaluated, _ = norm(input, gaussian(3, 3))  # whatever the prior
    torch.testing.assert_close(evaluated, norm.weight[:, None] * expected + norm.bias[:, None])
    assert norm.num_batches_tracked == 1


def test_group_norm_mixes_the_priors_of_the_groups_channels():
    torch.manual_seed(0)
    norm, input, prior = KalmanGroupNorm(4, prior_weight=0.4).double(), torch.randn(3, 4, 5).double(), gaussian(3, 4)
    output, used = norm(input, prior)
    for n in range(3):
        for pair in (slice(0, 2), slice(2, 4)):
            values, means, variances = input[n, pair], prior.mean[n, pair], prior.var[n, pair]
            mean, var = means.mean(), (variances + means**2).mean() - means.mean() ** 2
            m = 0.4 * mean + 0.6 * values.mean()
            v = 0.4 * var + 0.6 * values.var(correction=0) + 0.24 * (values.mean() - mean) ** 2
            torch.testing.assert_close(output[n, pair], (values - m) / (v + 1e-5).sqrt())
            torch.testing.assert_close(used.var[n, pair], v.expand(2))


def test_without_a_prior_or_at_weight_zero_they_are_batch_and_group_norm():
    torch.manual_seed(0)
    input = torch.randn(4, 8, 3, 3)
    for norm, reference, prior in (
        (KalmanBatchNorm(8, 0.0), nn.BatchNorm2d(8), Gaussian(torch.randn(1, 8), torch.rand(1, 8))),
        (KalmanBatchNorm(8, 0.5), nn.BatchNorm2d(8), None),
        (KalmanGroupNorm(8, 0.0), nn.GroupNorm(4, 8), Gaussian(torch.randn(4, 8), torch.rand(4, 8))),
        (KalmanGroupNorm(8, 0.5), nn.GroupNorm(4, 8), None),
    ):
        torch.testing.assert_close(norm(input, prior)[0], reference(input))
        torch.testing.assert_close(dict(norm.named_buffers()), dict(reference.named_buffers()))


def test_micro_batches_are_normalised_on_their_own():
    torch.manual_seed(0)
    norm, reference, input = KalmanBatchNorm(3, micro_batch=2), nn.BatchNorm1d(3), torch.randn(6, 3)
    expected = torch.cat([reference(part) for part in input.split(2)])
    torch.testing.assert_close(norm(input)[0], expected)
    torch.testing.assert_close(KalmanBatchNorm(3, micro_batch=8)(input)[0], nn.BatchNorm1d(3)(input))


def test_at_weight_one_the_batch_only_enters_through_the_prior():
    torch.manual_seed(0)
    prior = Gaussian(torch.randn(1, 3), torch.rand(1, 3) + 0.5)
    first, second = torch.randn(8, 3), torch.randn(8, 3) + 1
    norm = KalmanBatchNorm(3, prior_weight=1.0)
    joint = torch.cat([first[:1], second[1:]])
    torch.testing.assert_close(norm(first, prior)[0][0], norm(joint, prior)[0][0])
    torch.testing.assert_close(norm(first, prior)[0], (first - prior.mean) / (prior.var + 1e-5).sqrt())


# The prior.


def test_white_input_of_a_linear_layer_gives_exactly_w_m_and_w_squared_v():
    torch.manual_seed(0)
    before, weight = gaussian(2, 5), torch.randn(4, 5, dtype=torch.float64)
    mean, var = closed(before, None, weight)
    torch.testing.assert_close(mean, before.mean @ weight.T)
    torch.testing.assert_close(var, before.var @ weight.square().T)
    # Without padding a convolution is the same sum over all taps.
    weight = torch.randn(4, 5, 3, dtype=torch.float64)
    mean, var = closed(before, None, weight, (8,))
    torch.testing.assert_close(mean, before.mean @ weight.sum(-1).T)
    torch.testing.assert_close(var, before.var @ weight.square().sum(-1).T)


@pytest.mark.parametrize(
    ("kernel", "space", "options"),
    [
        ((3,), (7,), {"padding": 1}),
        ((3, 2), (5, 6), {"padding": (2, 1), "stride": (2, 1), "groups": 2}),
        ((3, 3), (6, 5), {"padding": "same", "dilation": 2}),
        ((5, 5), (2, 2), {"padding": 2}),
        ((2, 3, 3), (4, 5, 3), {"padding": 1, "stride": 2}),
    ],
)
def test_closed_form_is_the_law_of_total_variance_of_the_maps(kernel, space, options):
    torch.manual_seed(0)
    function = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(space) - 1]
    before = gaussian(2, 4)
    weight = torch.randn(6, 4 // options.get("groups", 1), *kernel, dtype=torch.float64)
    after = moments.of("tanh", before.mean, before.var.sqrt())
    maps = [part.reshape(2, 4, *[1] * len(space)).expand(2, 4, *space) for part in (after.mean, after.var)]
    means = function(maps[0], weight, **options).flatten(2)
    variances = function(maps[1], weight.square(), **options).flatten(2)
    mean, var = closed(before, "tanh", weight, space, **options)
    # The fixed quadrature of tanh in a graph is good to 1e-5, the adaptive one of the reference to rounding.
    torch.testing.assert_close(mean, means.mean(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(var, variances.mean(2) + means.var(2, correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", nn.PReLU(init=0.3), torch.tanh])
def test_sampled_prior_tends_to_the_closed_form_as_the_map_grows(activation):
    torch.manual_seed(0)
    before, weight = gaussian(2, 3), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    for size in (8, 160):
        options = {"padding": 1, "stride": 2}
        with torch.no_grad():
            exact = closed(before, activation, weight, (size, size), **options)
            draws = [sampled(before, activation, weight, (size, size), **options) for _ in range(20)]
        # Outputs of stride 2 share pixels with few neighbours: about size^2 / 8 independent ones.
        count = size * size / 8
        error = 5 * (exact.var / count).sqrt()
        assert all(((draw.mean - exact.mean).abs() < error).all() for draw in draws)
        # A deviation of 10 sqrt(2 / count) is 5 standard errors of a Gaussian's variance, doubled for heavier tails.
        assert all(((draw.var / exact.var - 1).abs() < 10 * (2 / count) ** 0.5).all() for draw in draws)
        means = torch.stack([draw.mean for draw in draws])
        assert (means.std(0) > 0).all()


def test_the_next_block_expects_what_the_last_one_puts_out():
    torch.manual_seed(0)
    network = chain(conv(2, 3), conv(3, 4, stride=2, padding=1, activation=None))
    first, second = network
    _, prior = priors_of(network, torch.randn(4, 2, 8, 8).double())
    # Gain and bias are what is left of the first block's scale; eps takes 1e-5 of it.
    before = Gaussian(first.norm.bias[None], first.norm.weight.square()[None])
    expected = closed(before, "relu", second.linear.weight, (6, 6), stride=2, padding=1)
    torch.testing.assert_close(prior, expected, rtol=1e-3, atol=1e-4)
    # A Gaussian batch passed through the blocks has these statistics.
    white = first.norm.bias[:, None, None] + first.norm.weight[:, None, None] * torch.randn(4000, 3, 6, 6).double()
    with torch.no_grad():
        output = second.linear(white.relu())
    var, mean = torch.var_mean(output, (0, 2, 3))
    assert ((mean - prior.mean[0]).abs() < 5 * (var / 4000).sqrt()).all()
    assert ((var / prior.var[0] - 1).abs() < 10 * (2 / 4000) ** 0.5).all()


def test_a_channel_that_never_varies_is_expected_to_put_out_its_bias():
    torch.manual_seed(0)
    network = chain(conv(1, 2, size=1), conv(2, 3, size=1, activation=None))
    with torch.no_grad():
        network[0].linear.weight[0] = 0.0
    _, prior = priors_of(network, torch.randn(4, 1, 3, 3).double())
    before = Gaussian(network[0].norm.bias[None], network[0].norm.weight.square()[None] * torch.tensor([0.0, 1.0]))
    expected = closed(before, "relu", network[1].linear.weight, (3, 3))
    torch.testing.assert_close(prior, expected, rtol=1e-3, atol=1e-4)


def test_the_sampled_prior_starts_from_the_filtered_moments_before_gain_and_bias():
    torch.manual_seed(0)
    network = chain(conv(2, 3, prior="sampled"), conv(3, 4, activation=None, prior="sampled", padding=1))
    input = torch.randn(4, 2, 8, 8).double() * 2
    linear = network[0].linear(input)
    mean, var = linear.mean((0, 2, 3)), linear.var((0, 2, 3), correction=0)
    torch.manual_seed(1)
    _, prior = priors_of(network, input)
    torch.manual_seed(1)
    expected = sampled(Gaussian(mean[None], var[None]), "relu", network[1].linear.weight, (6, 6), padding=1)
    torch.testing.assert_close(prior, expected)


def test_micro_batches_have_priors_of_their_own():
    torch.manual_seed(0)
    blocks = [conv(2, 3, prior="sampled", micro_batch=2), conv(3, 4, prior="sampled", micro_batch=2)]
    _, prior = priors_of(chain(*blocks), torch.randn(6, 2, 8, 8).double())
    assert prior.mean.shape == prior.var.shape == (3, 4)
    assert (prior.mean.std(0) > 0).all()


@pytest.mark.parametrize("prior", ["closed", "sampled"])
def test_gradients_flow_through_the_prior_into_earlier_kernels(prior):
    torch.manual_seed(0)
    # An eps of the size of the variance lets much of the filtered variance through to the closed prior.
    settings = {"activation": "tanh", "prior": prior, "prior_weight": 0.9, "eps": 0.5, "micro_batch": 2}
    network = chain(conv(1, 2, 2, **settings), conv(2, 2, 2, padding=1, **settings))
    input = torch.randn(4, 1, 4, 4).double()
    state = {name: value.detach().clone() for name, value in network.state_dict().items() if "running" not in name}
    kernel = state["0.linear.weight"].requires_grad_()

    def output(kernel):
        torch.manual_seed(2)
        return torch.func.functional_call(network, state | {"0.linear.weight": kernel}, (input,))

    assert torch.autograd.gradcheck(output, (kernel,))
    # The prior's share: without it the second norm leaves only the direct path.
    (full,) = torch.autograd.grad(output(kernel).square().sum(), kernel)
    hook = network[1].norm.register_forward_pre_hook(
        lambda _, args: (args[0], Gaussian(args[1].mean.detach(), args[1].var.detach()))
    )
    (direct,) = torch.autograd.grad(output(kernel).square().sum(), kernel)
    hook.remove()
    assert (full - direct).abs().max() > 1e-3 * full.abs().max()


# The chain.


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


# Errors.


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
    for shape in ((1, 4), (0, 4, 3)):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            KalmanBatchNorm(4)(torch.zeros(shape))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        KalmanBatchNorm(4, micro_batch=1)(torch.zeros(4, 4), Gaussian(torch.zeros(1, 4), torch.ones(1, 4)))
    with pytest.raises(ValueError, match="a batch of 5 does not split into micro-batches of 2"):
        KalmanBatchNorm(4, micro_batch=2)(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="more than 1 value per group"):
        KalmanGroupNorm(1)(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="two or more positions"):
        sampled(Gaussian(torch.zeros(1, 2), torch.ones(1, 2)), "relu", torch.ones(3, 2, 2, 2), (2, 2))
