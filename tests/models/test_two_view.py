import pytest
import torch

from normprop import models
from normprop.errors import ConfigError
from normprop.models.two_view import RegressAndConcatenate, TwoViews
from normprop.norms.regbn import RegBN


@pytest.mark.parametrize("width", [8, 9])
def test_each_branch_sees_its_half_alone(width):
    torch.manual_seed(0)
    views = models.two_view(3, 5, norm="weight", width=0.25)[0]
    images = torch.randn(2, 3, 8, width)
    before = views(images)
    images[..., : width // 2] += 1
    left, right = (views(images) - before).chunk(2, 1)
    assert left.abs().max() > 1e-3
    assert right.abs().max() == 0


def test_with_reg_the_branches_are_batch_norms_and_meet_in_regbn():
    torch.manual_seed(0)
    network = models.create("two-view", (1, 8, 8), 10, norm="reg", width=0.25)
    views = network[0]
    assert isinstance(views, TwoViews)
    assert isinstance(views.fusion, RegressAndConcatenate)
    assert [type(part).__name__ for part in network.modules()].count("BatchNorm2d") == 6
    assert [isinstance(part, RegBN) for part in network.modules()].count(True) == 1
    images = torch.randn(6, 1, 8, 8)
    network.eval()
    left, right = views.left(images[..., :4]), views.right(images[..., 4:])
    torch.testing.assert_close(views(images), torch.cat(views.fusion.regbn(left, right), 1))


def test_errors():
    with pytest.raises(ValueError, match="2 columns"):
        models.two_view(1, 10, norm="none")(torch.zeros(2, 1, 8, 1))
    with pytest.raises(ConfigError, match="setting of the method 'reg'"):
        models.two_view(1, 10, norm="batch", constraint="paper")
    with pytest.raises(ConfigError, match="constraint must be"):
        models.two_view(1, 10, norm="reg", constraint="strict")
