import pytest
import torch

from normprop import models, norms
from normprop.errors import ConfigError
from normprop.nn import NormPropLayer, Skip


@pytest.mark.parametrize("norm", norms.names())
@pytest.mark.parametrize(("name", "shape"), [("unet3d", (1, 8, 8, 8)), ("resnet18", (3, 64, 64))])
def test_every_method_trains(name, shape, norm):
    torch.manual_seed(0)
    network = models.create(name, shape, 3, norm=norm, width=0.125)
    logits = network(torch.randn(2, *shape))
    space = shape[1:] if name == "unet3d" else ()
    assert logits.shape == (2, 3, *space)
    torch.nn.functional.cross_entropy(logits, torch.randint(3, (2, *space))).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_resnet18_is_the_papers():
    network = models.resnet18(3, 1000, norm="batch")
    # The count that every implementation of it has.
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_689_512
    x = torch.randn(1, 3, 64, 64)
    assert [(x := layer(x)).shape[-1] for layer in network[:10]] == [32, 16, 16, 16, 8, 8, 4, 4, 2, 2]


@pytest.mark.parametrize("norm", ["normprop", "normprop-paper"])
@pytest.mark.parametrize(("name", "shape"), [("unet3d", (1, 8, 8, 8)), ("resnet18", (3, 64, 64))])
def test_normprop_networks_do_not_mix_samples(name, shape, norm):
    torch.manual_seed(0)
    network = models.create(name, shape, 3, norm=norm, width=0.25)
    batch = torch.randn(3, *shape)
    torch.testing.assert_close(network.eval()(batch[:1]), network.train()(batch)[:1], rtol=1e-4, atol=1e-5)


def test_unet_has_two_convolutions_a_level_and_direction():
    network = models.unet(2, 4, norm="none")
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv3d)]
    channels = [(c.in_channels, c.out_channels) for c in convolutions]
    down, lowest = [(2, 16), (16, 16), (16, 32), (32, 32)], [(32, 64), (64, 64)]
    up = [(96, 32), (32, 32), (48, 16), (16, 16), (16, 4)]
    assert channels == down + lowest + up


@pytest.mark.parametrize("dims", [2, 3])
def test_unet_gives_every_voxel_its_logits(dims):
    network = models.unet(1, 5, width=0.25, dims=dims)
    assert network(torch.randn(2, 1, *[4] * dims)).shape == (2, 5, *[4] * dims)


def test_what_is_below_stands_in_front_of_a_levels_own_detail():
    network = models.unet(1, 2, width=0.25, dims=2)
    inner = [module for module in network.modules() if isinstance(module, Skip)][1]
    detail = torch.randn(1, 8, 4, 4)
    joined = inner(detail)
    assert joined.shape == (1, 16 + 8, 4, 4)
    assert torch.equal(joined[:, 16:], detail)
    below = joined[:, :16]
    assert torch.equal(below, below[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_biases_start_for_the_depth_of_the_way_along_the_skips():
    network = models.unet(3, 2, width=0.25, dims=2)
    layers = [module for module in network.modules() if isinstance(module, NormPropLayer)]
    # Two convolutions before the topmost skip, two after it, and a head without activation.
    plain = models.mlp((3, 4, 4), 2, depth=4, hidden_features=8)
    (bias,) = {round(layer.bias[0].item(), 6) for layer in plain.modules() if isinstance(layer, NormPropLayer)} - {0.0}
    assert {round(layer.bias[0].item(), 6) for layer in layers} == {bias, 0.0}


def test_errors():
    with pytest.raises(ConfigError, match="dims must be 2 or 3, got 1"):
        models.unet(dims=1)
    with pytest.raises(ConfigError, match="takes volumes"):
        models.create("unet3d", (3, 32, 32), 10)
