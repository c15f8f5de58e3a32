"""Small linked networks for the tests of Kalman Normalization."""

import torch
from torch import nn

from normprop.norms import kalman
from normprop.norms.kalman_filter import KalmanBatchNorm, KalmanGroupNorm
from normprop.norms.kalman_prior import Gaussian

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
