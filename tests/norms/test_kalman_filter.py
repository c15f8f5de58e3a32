import math

import torch
from torch import nn

from normprop.norms.kalman_filter import KalmanBatchNorm, KalmanGroupNorm, filtered, posterior
from normprop.norms.kalman_prior import Gaussian
from tests.norms.kalman_networks import gaussian


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
