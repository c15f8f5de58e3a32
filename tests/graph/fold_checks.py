"""How the tests of folding compare networks."""

import copy

import torch

from normprop import fold
from tests.graph.families import FAMILIES, TRAPS

ALL = {**FAMILIES, **TRAPS}
SIMILAR = {"resnet_v1_basic", "resnext", "senet", "mobilenet_v2", "mobilenet_v3", "regnet", "unet_3d", "linear_gan"}


@torch.no_grad()
def stirred(net):
    """Parameters off their initial values, statistics as after a training, in evaluation."""
    for parameter in net.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for module in net.modules():
        if isinstance(getattr(module, "running_var", None), torch.Tensor):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return net.eval()


def agree(plain, net, *inputs, rtol=1e-10):
    """Both in float64, relative to the largest value; nothing of normprop is left in the first."""
    assert not any("normprop" in type(module).__module__ for module in plain.modules())
    assert not plain.training
    first, second = (copy.deepcopy(model).double().eval() for model in (plain, net))
    with torch.no_grad():
        wide = [input.double() for input in inputs]
        own, other = first(*copy.deepcopy(wide)), second(*copy.deepcopy(wide))
    torch.testing.assert_close(own, other, rtol=0, atol=rtol * float(other.abs().max()))


def both_ways(net, x):
    """Folded with and without an example, both right in float64 on another input."""
    net = net.double()
    results = [fold(net, x.double()), fold(net)]
    for plain in results:
        agree(plain, net, torch.randn_like(x))
    return results


def kinds(plain):
    return [type(module).__name__ for module in plain.modules() if not [*module.children()]]
