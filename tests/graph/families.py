"""Small networks of every family that conversion must handle, written for the tests, and traps.

Each entry of ``FAMILIES`` and ``TRAPS`` builds one network, freshly initialised under a fixed seed, in training mode,
and a standard Gaussian input for it. Wiring is that of the published architectures, width and depth are not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tests.graph import families_maps as maps
from tests.graph import families_mobile as mobile
from tests.graph import families_residual as residual
from tests.graph import families_sets as sets
from tests.graph import families_traps as traps


@dataclass(frozen=True)
class Case:
    """A network and the arguments of its call."""

    model: nn.Module
    args: tuple[Tensor, ...]


def _case(build: Callable[[], nn.Module], *shape: int) -> Callable[[], Case]:
    """A constructor of the same case at every call, which leaves the random state alone."""

    def make() -> Case:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Case(build().train(), (torch.randn(shape or (8, 3, 32, 32)),))

    return make


FAMILIES: dict[str, Callable[[], Case]] = {
    "vgg": _case(residual.VGG),
    "resnet_v1_basic": _case(partial(residual.ResNet, residual.Basic)),
    "resnet_v1_bottleneck": _case(partial(residual.ResNet, residual.Bottleneck)),
    "resnet_v2": _case(residual.ResNetV2),
    "resnext": _case(partial(residual.ResNet, residual.Bottleneck, groups=4)),
    "senet": _case(partial(residual.ResNet, residual.Bottleneck, gated=True)),
    "densenet": _case(residual.DenseNet),
    "inception": _case(maps.Inception),
    "mobilenet_v2": _case(mobile.MobileNetV2),
    "mobilenet_v3": _case(mobile.MobileNetV3),
    "efficientnet": _case(mobile.EfficientNet),
    "regnet": _case(mobile.RegNet),
    "shufflenet_v2": _case(mobile.ShuffleNetV2),
    "unet_2d": _case(maps.UNet2d),
    "unet_3d": _case(maps.UNet3d, 8, 1, 16, 16, 16),
    "pointnet": _case(sets.PointNet, 8, 3, 64),
    "dcgan": _case(maps.DCGAN, 8, 32, 1, 1),
    "linear_gan": _case(maps.LinearGAN, 8, 32),
    "yolo": _case(maps.Detector),
    "levit": _case(sets.LeViT),
    "mlp": _case(sets.mlp, 8, 24),
    "conv1d": _case(sets.Conv1dNet, 8, 4, 64),
}

TRAPS: dict[str, Callable[[], Case]] = {
    "norm_subclass": _case(traps.norm_subclass),
    "fused_norm": _case(traps.fused_norm),
    "frozen_norm": _case(traps.frozen_norm),
    "kept_in_eval": _case(traps.kept_in_eval),
    "functional_norm": _case(traps.FunctionalNorm),
    "shared_norm": _case(traps.SharedNorm),
    "shared_conv": _case(traps.SharedConv),
    "conv_read_twice": _case(traps.ConvReadTwice),
    "in_place_readers": _case(traps.InPlaceReaders),
    "no_affine": _case(traps.no_affine),
    "no_running_stats": _case(traps.no_running_stats),
    "cumulative_average": _case(traps.cumulative_average),
    "circular_padding": _case(traps.circular_padding),
    "reflect_padding": _case(traps.reflect_padding),
    "replicate_padding": _case(traps.replicate_padding),
    "norm_before_conv": _case(traps.norm_before_conv),
    "norm_of_input": _case(traps.norm_of_input),
    "norm_of_pool": _case(traps.norm_of_pool),
    "norm_of_norm": _case(traps.norm_of_norm),
}


def normalisers(model: nn.Module) -> list[nn.Module]:
    """The modules that keep running statistics, told by what they have and not by their class."""
    return [module for module in model.modules() if hasattr(module, "running_mean")]


@torch.no_grad()
def look_trained(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Give every normaliser the statistics, gain and bias of a layer that has been trained.

    Args:
        model: the network, changed in place; convolutions and linear layers stay as they are.
        generator: source of the numbers.

    Returns:
        The network.
    """

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    made = {
        "running_mean": lambda like: 0.5 * normal(like),
        "running_var": lambda like: torch.exp(0.5 * normal(like)),
        "weight": lambda like: 0.5 + torch.rand(like.shape, generator=generator, dtype=torch.float64),
        "bias": lambda like: 0.3 * normal(like),
        "num_batches_tracked": lambda like: torch.full(like.shape, 100),
    }
    for module in normalisers(model):
        for name, make in made.items():
            tensor = getattr(module, name, None)
            if tensor is not None:
                tensor.copy_(make(tensor))
    return model
