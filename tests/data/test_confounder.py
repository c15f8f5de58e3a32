import pytest
import torch

from normprop.data import Split
from normprop.data.confounder import draw, plant, planted
from normprop.errors import ConfigError


@pytest.mark.parametrize("correlation", [0.0, 0.6, 1.0])
def test_the_confounder_is_uniform_and_correlates_with_the_label_as_asked(correlation):
    labels = torch.arange(100_000) % 10
    z = draw(labels, 10, correlation, torch.Generator().manual_seed(0))
    # Standard errors: 0.29 / sqrt(100000) = 0.001 of the mean, at most 1 / sqrt(100000) = 0.003 of the coefficient.
    assert z.mean().item() == pytest.approx(0.5, abs=0.005)
    assert z.var().item() == pytest.approx(1 / 12, abs=0.002)
    assert torch.histc(z, 20, 0, 1).sub(5_000).abs().max() < 5 * 5_000**0.5
    coefficient = torch.corrcoef(torch.stack([z, labels.float()]))[0, 1].item()
    assert coefficient == pytest.approx(correlation * (1 - 1 / 100) ** 0.5, abs=0.015)


def test_planting_is_seeded_and_leaves_its_arguments_alone():
    split = Split(torch.randint(256, (6, 3, 5, 7), dtype=torch.uint8), torch.arange(6))
    before = split.images.clone()
    first, z = planted(split, 6, 0.5, 0.4, torch.Generator().manual_seed(3))
    again, same = planted(split, 6, 0.5, 0.4, torch.Generator().manual_seed(3))
    other, different = planted(split, 6, 0.5, 0.4, torch.Generator().manual_seed(4))
    assert torch.equal(first.images, again.images)
    assert torch.equal(z, same)
    assert not torch.equal(z, different)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(split.images, before)
    assert torch.equal(first.labels, split.labels)


def test_both_halves_show_the_same_stripes_and_bytes_are_rounded_floats():
    torch.manual_seed(0)
    whole = torch.randint(256, (4, 1, 6, 8), dtype=torch.uint8)
    z = torch.rand(4)
    floats = plant(whole.double() / 255, z, 0.3)
    added = floats - 0.7 * whole.double() / 255
    torch.testing.assert_close(added[:, :, ::2], (0.3 * z.double()).view(4, 1, 1, 1).expand(4, 1, 3, 8))
    assert added[:, :, 1::2].abs().max() < 1e-12
    bytes_ = plant(whole, z, 0.3)
    assert bytes_.dtype == torch.uint8
    assert (bytes_.double() - 255 * floats).abs().max() <= 0.5 + 1e-4
    assert torch.equal(plant(whole, z, 0.0), whole)


def test_errors():
    with pytest.raises(ConfigError, match="correlation"):
        draw(torch.zeros(2, dtype=torch.long), 10, 1.5)
    with pytest.raises(ConfigError, match="strength"):
        plant(torch.zeros(2, 1, 4, 4), torch.zeros(2), -0.1)
    with pytest.raises(ConfigError, match="expected images"):
        plant(torch.zeros(2, 16), torch.zeros(2))
