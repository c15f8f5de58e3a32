"""Folding of every layer, method and family."""

import copy

import pytest
import torch
from torch import fx, nn

from normprop import convert, fold, models, norms
from normprop import nn as np_nn
from normprop.errors import ConversionError
from tests.graph.families import look_trained
from tests.graph.fold_checks import ALL, SIMILAR, agree, both_ways, kinds, stirred

ACTIVATIONS = [None, "relu", "tanh", "leaky_relu", "gelu_tanh", nn.PReLU(), nn.ELU(0.5), torch.cos]


@pytest.mark.parametrize(
    ("activation", "moments"), [*((each, "live") for each in ACTIVATIONS), ("relu", "fixed"), ("tanh", "fixed")]
)
def test_layers_of_every_activation(activation, moments):
    options = {"activation": activation, "moments": moments, "center": moments == "live", "gain": 0.7}
    net = nn.Sequential(
        np_nn.Conv2d(3, 6, 3, padding=1, groups=3, **options),
        np_nn.Conv2d(6, 4, 3, stride=2, padding=1, **options),
        np_nn.Conv2d(4, 4, 2, **options),
        nn.Flatten(),
        np_nn.Linear(36, 3, **options),
    )
    both_ways(stirred(net), torch.randn(2, 3, 8, 8))


LAYERS = {
    "conv1d": (np_nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2, activation="relu"), (4, 9)),
    "conv3d": (np_nn.Conv3d(4, 6, 2, dilation=2, padding=1, groups=2, activation="tanh"), (4, 5, 6, 7)),
    "circular": (np_nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular", activation="relu"), (4, 6, 7)),
    "reflect": (np_nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", activation=None), (4, 6, 7)),
    "same": (np_nn.Conv2d(4, 6, (3, 5), padding="same", activation="relu"), (4, 6, 7)),
    "same_replicate": (np_nn.Conv2d(4, 6, 4, padding="same", padding_mode="replicate", activation="relu"), (4, 6, 7)),
    "transposed1d": (np_nn.ConvTranspose1d(4, 6, 4, stride=3, padding=1, groups=2, activation="relu"), (4, 9)),
    "transposed2d": (np_nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2, activation="relu"), (4, 5, 6)),
    "transposed3d": (np_nn.ConvTranspose3d(4, 2, 2, stride=(1, 2, 2), activation="selu"), (4, 3, 3, 3)),
    "linear_on_tokens": (np_nn.Linear(5, 6, activation="relu"), (4, 5)),
    "no_bias": (np_nn.Conv2d(4, 6, 3, bias=False, activation="relu"), (4, 6, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_every_shape(name):
    layer, shape = LAYERS[name]
    both_ways(stirred(nn.Sequential(copy.deepcopy(layer))), torch.randn(2, *shape))
    both_ways(stirred(copy.deepcopy(layer)), torch.randn(2, *shape))


def test_padding_modes_stay_those_of_the_convolution():
    plain = fold(LAYERS["circular"][0])[0]
    assert (plain.padding_mode, plain.padding) == ("circular", (1, 2))


def test_constant_moments_leave_a_threshold_and_nothing_else():
    net = models.nin(3, 10, norm="normprop-paper", width=0.1)
    for plain in both_ways(stirred(net), torch.randn(2, 3, 16, 16)):
        assert sorted({*kinds(plain)}) == [
            "AdaptiveAvgPool2d", "AvgPool2d", "Conv2d", "Flatten", "MaxPool2d", "Threshold",
        ]  # fmt: skip


def test_live_moments_go_into_the_next_layer_unless_it_pads_with_zeros():
    def form(**options):
        layers = np_nn.Conv2d(3, 4, 3, activation="relu"), np_nn.Conv2d(4, 4, 3, **options)
        return [kinds(plain) for plain in both_ways(stirred(nn.Sequential(*layers)), torch.randn(2, 3, 8, 8))]

    exact = ["Conv2d", "ReLU", "Conv2d"]
    assert form() == form(padding=1, padding_mode="reflect") == [exact, exact]
    kept = ["Conv2d", "Elementwise", "Conv2d"]
    assert form(padding=1) == [kept, kept]


def test_what_follows_another_activation_goes_into_the_next_layer_or_is_one_operation():
    def form(**options):
        layers = np_nn.Conv2d(3, 4, 3, activation="tanh"), np_nn.Conv2d(4, 4, 3, **options)
        return [kinds(plain) for plain in both_ways(stirred(nn.Sequential(*layers)), torch.randn(2, 3, 8, 8))]

    exact = ["Conv2d", "Tanh", "Conv2d"]
    assert form() == [exact, exact]
    kept = ["Conv2d", "Tanh", "Elementwise", "Conv2d"]
    assert form(padding=1) == [kept, kept]


def test_a_residual_block_costs_a_sum_and_a_floor():
    """Scale and shift of the sum go into the branch; the skip path is scaled by the sum."""
    plain = fold(stirred(models.resnet(8, width=0.5)), torch.randn(2, 3, 8, 8))
    block = plain[1]
    assert isinstance(block, fx.GraphModule)
    calls = [node.target for node in block.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    assert calls[0] == "branch"
    assert calls[1] is torch.addcmul
    assert len(calls) == 3
    assert kinds(plain).count("Elementwise") == 7  # one floor for every ReLU


@pytest.mark.parametrize("name", norms.names())
def test_every_method_folds_or_says_why_not(name):
    info = norms.info(name)
    net = models.resnet(8, width=0.25, norm=name)
    x = torch.randn(2, 3, 8, 8)
    theirs = name in ("group", "layer", "weight-standardized")  # torch's group norm stays
    if info.folds or theirs or name == "dynamic-tanh":  # elementwise, though no affine map
        for plain in both_ways(stirred(net), x):
            assert any(isinstance(module, nn.GroupNorm) for module in plain.modules()) == theirs
            assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in plain.modules())
        return
    with pytest.raises(ConversionError, match=r"^fold: \d[\w.]* \(\w+\) has no plain form: ") as error:
        fold(stirred(net), x)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in ALL if name not in SIMILAR])
def test_a_trained_network_of_every_family(name):
    case = ALL[name]()
    net = look_trained(case.model, torch.Generator().manual_seed(1)).double()
    plain = fold(net, case.args)
    left = [module for module in plain.modules() if getattr(module, "running_var", None) is not None]
    assert not left or name == "functional_norm"  # the network's own forward normalises
    with torch.no_grad():
        own, other = (model.eval()(case.args[0].double()) for model in (plain, net))
    for first, second in zip(*(value if isinstance(value, tuple) else (value,) for value in (own, other)), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-10 * float(second.abs().max()))


ABSORBED = ["resnet_v1_bottleneck", "unet_2d", "dcgan", "fused_norm", "conv1d"]


@pytest.mark.parametrize(
    ("name", "moments"), [*((name, "live") for name in ABSORBED), ("vgg", "fixed"), ("resnet_v2", "live")]
)
def test_a_converted_network_of_several_families(name, moments):
    case = ALL[name]()
    net = convert(case.model, case.args, moments=moments).double()
    plain = fold(net, case.args)
    agree(plain, net, case.args[0])
    assert (kinds(plain).count("Elementwise") == 0) == (name != "resnet_v2")
