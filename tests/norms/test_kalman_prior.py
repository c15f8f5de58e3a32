import pytest
import torch
from torch import nn

from normprop import moments
from normprop.norms.kalman_prior import Gaussian, closed, sampled
from tests.norms.kalman_networks import chain, conv, gaussian, priors_of


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
