"""Objects pasted on photographs: what is under the mask is the object, what is not is the photograph."""

import pytest
import torch

from normprop import data
from normprop.data import Dataset, Split, cifar, idx, pasted
from normprop.errors import DataError
from normprop.training.config import TrainConfig
from normprop.training.loop import fit


def random_bytes(*shape, seed=0, low=0):
    return torch.randint(low, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_pixels_are_the_objects_where_the_mask_is_and_the_photographs_elsewhere():
    photographs = random_bytes(50, 3, 12, 12)
    objects = random_bytes(50, 1, 7, 5, seed=1)
    images, masks = pasted.paste(photographs, objects, torch.Generator().manual_seed(2))
    assert images.dtype == torch.uint8
    assert masks.dtype == torch.int64
    places = set()
    for image, mask, photograph, (thing,) in zip(images, masks, photographs, objects, strict=True):
        shape = (thing >= 32).long()
        found = [
            (top, left)
            for top in range(6)
            for left in range(8)
            if torch.equal(mask[top : top + 7, left : left + 5], shape) and mask.sum() == shape.sum()
        ]
        assert len(found) == 1
        (top, left) = found[0]
        places.add(found[0])
        outside = mask == 0
        assert torch.equal(image[:, outside], photograph[:, outside])
        painted = image[:, top : top + 7, left : left + 5][:, shape == 1].float()
        grey = thing[shape == 1].float()
        gains = painted[:, grey.argmax()] / grey.max()
        assert bool(((gains > 0.24) & (gains <= 1)).all())
        assert bool(((painted - gains.unsqueeze(1) * grey).abs() < 2).all())
    assert len(places) > 20


@pytest.fixture
def directory(monkeypatch, tmp_path):
    def dataset(shape, name):
        parts = [Split(random_bytes(n, *shape, seed=n), torch.arange(n) % 2) for n in (30, 12)]
        return Dataset(name, ("a", "b"), *parts)

    monkeypatch.setattr(cifar, "load", lambda layout, folder: dataset((3, 32, 32), "cifar10"))
    monkeypatch.setattr(idx, "load", lambda layout, folder: dataset((1, 28, 28), "fashion-mnist"))
    return tmp_path


def test_the_same_files_give_the_same_images_and_every_pixel_has_a_label(directory):
    one, other = data.load("pasted", directory), data.load("pasted", directory)
    assert torch.equal(one.train.images, other.train.images)
    assert torch.equal(one.test.labels, other.test.labels)
    assert (len(one.train), len(one.test), one.num_classes) == (30, 12, 2)
    assert one.train.labels.shape == (30, 32, 32)
    assert one.split(train=10, validation=5, test=3).validation.labels.shape == (5, 32, 32)


@pytest.mark.parametrize("norm", ["normprop", "batch"])
def test_a_u_net_learns_to_find_them(directory, norm):
    dataset = data.load("pasted", directory).split(train=24, validation=6)
    config = TrainConfig(epochs=8, batch_size=2, lr=0.1, augment=("flip", "crop"), accelerator="cpu")
    result = fit(lambda: normprop_unet(norm), dataset, config)
    first, last = result.curve[0], result.curve[-1]
    assert result.status == "complete"
    assert 0 <= last.test_error < min(first.test_error, 0.3)  # a third of the pixels are the object's


def normprop_unet(norm):
    from normprop import models

    return models.create("unet", (3, 32, 32), 2, norm=norm, width=0.25)


def test_masks_move_with_their_images(directory, monkeypatch):
    """An image that shows its own labels still does after flips and crops."""
    from normprop.training import run

    seen = []
    original = run.Run._logits

    def noted(self, network, images):
        seen.append(images)
        return original(self, network, images)

    def loss(logits, labels, label_smoothing):
        assert torch.equal((seen[-1][:, 0] > 0.5).long(), labels)
        seen.append("compared")
        return logits.square().mean()

    monkeypatch.setattr(run.Run, "_logits", noted)
    monkeypatch.setattr(run.F, "cross_entropy", loss)
    labels = torch.randint(2, (8, 6, 6), generator=torch.Generator().manual_seed(0))
    part = Split(labels.unsqueeze(1).float(), labels)
    config = TrainConfig(epochs=2, batch_size=2, augment=("flip", "crop"), data_norm="none", accelerator="cpu")
    fit(lambda: torch.nn.Conv2d(1, 2, 1), Dataset("own labels", ("a", "b"), part, part, part), config)
    assert seen.count("compared") == 8


def test_one_line_for_labels_that_do_not_fit():
    with pytest.raises(DataError, match=r"labels have shape \(2, 3, 3\), images \(2, 1, 4, 4\); expected a label"):
        Split(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 3, dtype=torch.int64))
    with pytest.raises(DataError, match=r"expected torch.int64 \(N,\) or \(N, H, W\)"):
        Split(torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.int64))
