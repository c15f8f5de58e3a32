"""Settings of the layers: recipes, signatures, errors, default devices."""

import inspect
import warnings

import pytest
import torch

from normprop import nn
from normprop.errors import ConfigError
from tests.nn.cases import RECIPES

recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


def test_normalize_weight_reaches_channels_last_weights():
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    with torch.no_grad():
        layer.weight.mul_(5.0)
    layer.normalize_weight_()
    torch.testing.assert_close(layer.weight.detach().flatten(1).norm(dim=1), torch.ones(4))


def test_errors_are_one_clear_line():
    with pytest.raises(ConfigError, match="Linear: moments must be 'fixed' or 'live', got 'dead'"):
        nn.Linear(3, 2, moments="dead")
    with pytest.raises(ConfigError, match="gain must be a number or 'jacobian'"):
        nn.Linear(3, 2, gain="big")
    with pytest.raises(ConfigError, match=r"fan-in 1.*center=False"):
        nn.Conv2d(4, 4, 1, groups=4)
    with pytest.raises(ConfigError, match="nosuch"):
        nn.Linear(3, 2, activation="nosuch")


def test_recipes_and_initial_gain():
    paper = nn.Linear(3, 2, activation="relu", **RECIPES["paper"])
    assert paper.gain.tolist() == pytest.approx([0.8256452711765564] * 2)
    assert nn.Linear(3, 2, activation="relu").gain.tolist() == [1.0, 1.0]
    assert nn.Linear(3, 2, gain="jacobian").gain.tolist() == [1.0, 1.0]
    text = repr(nn.Conv2d(3, 2, 3, activation="relu"))
    assert "activation=relu, center=True, moments=live, gain=1" in text


def test_signature_shows_torchs_arguments_and_ours():
    names = list(inspect.signature(nn.Conv2d).parameters)
    assert names[:3] == ["in_channels", "out_channels", "kernel_size"]
    assert names[-5:] == ["activation", "center", "moments", "gain", "orthogonal"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nn.Conv2d(3, 2, 3, 1, 1, activation="relu")


@pytest.mark.parametrize("activation", ["relu", "tanh", torch.sin, None])
@recipes
def test_meta_device_as_a_context(activation, recipe):
    with torch.device("meta"):
        layer = nn.Conv2d(3, 4, 3, activation=activation, **recipe)
    assert layer.gain.is_meta
    assert layer.initial_gain == nn.Conv2d(3, 4, 3, activation=activation, **recipe).initial_gain


def test_meta_device_as_a_context_with_a_learnable_activation():
    with torch.device("meta"):
        layer = nn.Linear(3, 2, activation=torch.nn.PReLU())
        assert nn.Residual(layer, activation=torch.nn.PReLU(), spatial_dims=0).activation.weight.is_meta
        with pytest.raises(ConfigError, match="meta device"):
            nn.Linear(3, 2, activation=torch.nn.PReLU(), gain="jacobian")
    assert layer(torch.randn(4, 3, device="meta")).shape == (4, 2)
