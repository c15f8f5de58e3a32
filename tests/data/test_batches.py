"""Batches and augmentation: each sample once, reproducible, and pixels only moved."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normprop.data import Split, augment, batches
from normprop.errors import ConfigError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(count):
    numbers = torch.arange(count)
    return Split(numbers.float().unsqueeze(1), numbers)


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 50), st.booleans(), st.booleans())
def test_each_sample_comes_once(count, batch_size, shuffle, drop_last):
    got = list(batches(numbered(count), batch_size, shuffle=shuffle, generator=seeded(), drop_last=drop_last))
    sizes = [len(labels) for _, labels in got]
    full, rest = divmod(count, batch_size)
    assert sizes == [batch_size] * full + ([rest] if rest and not drop_last else [])
    labels = [int(label) for _, batch in got for label in batch]
    assert len(set(labels)) == len(labels)
    if not drop_last:
        assert sorted(labels) == list(range(count))
    if not shuffle:
        assert labels == list(range(len(labels)))
    for images, batch in got:
        assert torch.equal(images[:, 0].long(), batch)


def order(generator, shuffle=True):
    return torch.cat([labels for _, labels in batches(numbered(100), 7, shuffle=shuffle, generator=generator)]).tolist()


def test_the_order_comes_from_the_generator():
    generator = seeded()
    state = generator.get_state()
    first, second = order(generator), order(generator)
    assert first != second
    assert first != list(range(100))
    assert [order(generator.set_state(state)), order(generator)] == [first, second]
    assert order(seeded(1)) != first
    torch.manual_seed(3)
    assert order(seeded()) == first


def test_without_a_generator_the_order_is_torchs_own():
    torch.manual_seed(5)
    first = order(None)
    torch.manual_seed(5)
    assert order(None) == first


def test_unshuffled_batches_leave_the_generator_alone():
    generator = seeded()
    state = generator.get_state()
    order(generator, shuffle=False)
    assert torch.equal(generator.get_state(), state)


def test_the_order_is_drawn_at_the_call():
    generator = seeded()
    state = generator.get_state()
    batches(numbered(10), 2, shuffle=True, generator=generator)
    assert not torch.equal(generator.get_state(), state)


def test_bytes_become_floats_from_0_to_1_and_floats_stay():
    values = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    images, labels = next(batches(Split(values, torch.arange(256)), 256, shuffle=False))
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(images.flatten().double(), torch.arange(256).double() / 255, rtol=1e-7, atol=0)
    features = torch.randn(4, 3, generator=seeded())
    images, _ = next(batches(Split(features, torch.arange(4)), 4, shuffle=False))
    assert torch.equal(images, features)


def test_batches_can_be_changed_in_place():
    split = numbered(4)
    for images, labels in batches(split, 4, shuffle=False):
        images.zero_()
        labels.zero_()
    assert split.images.flatten().tolist() == split.labels.tolist() == [0, 1, 2, 3]


def test_batches_go_to_the_device():
    images, labels = next(batches(numbered(4), 2, shuffle=True, generator=seeded(), device="meta"))
    assert (images.device.type, labels.device.type) == ("meta", "meta")


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_that_is_not_positive_is_refused_at_the_call(batch_size):
    with pytest.raises(ConfigError, match=f"batch size {batch_size}; expected a positive number"):
        batches(numbered(4), batch_size, shuffle=False)


def images(count=64, height=6, width=5, dtype=torch.float32):
    """Images whose values are all different and not zero."""
    return (torch.arange(count * 2 * height * width) + 1).view(count, 2, height, width).to(dtype)


def test_flips_are_of_single_images_and_half_of_them():
    before = images(1000)
    after = augment(before, seeded(), flip=True, pad=0)
    flipped = (after == before.flip(-1)).flatten(1).all(1)
    kept = (after == before).flatten(1).all(1)
    assert (flipped ^ kept).all()
    # Binomial(1000, 1/2): standard deviation 15.8.
    assert abs(int(flipped.sum()) - 500) < 80


def test_the_same_flips_again_give_the_image_back():
    before = images()
    after = augment(augment(before, seeded(), pad=0), seeded(), pad=0)
    assert torch.equal(after, before)


def crops(image, pad):
    """All windows of the padded image, cut out one by one."""
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * pad, width + 2 * pad, dtype=image.dtype)
    padded[:, pad : pad + height, pad : pad + width] = image
    return {(y, x): padded[:, y : y + height, x : x + width] for y in range(2 * pad + 1) for x in range(2 * pad + 1)}


@pytest.mark.parametrize("pad", [1, 2, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_windows_of_the_padded_image(pad, flip):
    before = images(300)
    after = augment(before, seeded(), flip=flip, pad=pad)
    assert after.shape == before.shape
    found = []
    for old, new in zip(before, after, strict=True):
        sources = [old, old.flip(-1)] if flip else [old]
        places = [
            place for source in sources for place, window in crops(source, pad).items() if torch.equal(window, new)
        ]
        assert len(places) == 1
        found.append(places[0])
    rows, columns = torch.tensor(found).T
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(2 * pad + 1))
    # Rows and columns are drawn apart: over 300 images the correlation has standard deviation 0.058.
    assert abs(float(torch.corrcoef(torch.stack([rows, columns]).double())[0, 1])) < 0.25


def test_every_place_is_as_likely():
    count, pad = 9000, 1
    impulse = torch.zeros(count, 1, 3, 3)
    impulse[:, 0, 1, 1] = 1
    counts = augment(impulse, seeded(), flip=False, pad=pad).sum((0, 1))
    # Nine places, expected 1000 each, standard deviation 29.8.
    assert (counts - 1000).abs().max() < 150


def test_each_image_is_moved_by_itself():
    same = images(1).expand(200, -1, -1, -1)
    assert len({tuple(image.flatten().tolist()) for image in augment(same, seeded(), flip=True, pad=1)}) > 10


def test_augmentation_comes_from_the_generator_and_leaves_the_input_alone():
    before = images()
    copy = before.clone()
    first = augment(before, seeded(7))
    torch.manual_seed(123)
    assert torch.equal(augment(before, seeded(7)), first)
    assert not torch.equal(augment(before, seeded(8)), first)
    assert torch.equal(before, copy)
    torch.manual_seed(9)
    unseeded = augment(before)
    torch.manual_seed(9)
    assert torch.equal(augment(before), unseeded)


def test_bytes_and_floats_move_alike():
    before = images(8, 4, 4, torch.uint8)
    moved = augment(before, seeded())
    assert moved.dtype == torch.uint8
    assert torch.equal(moved.float(), augment(before.float(), seeded()))


@pytest.mark.parametrize("count", [0, 1])
def test_small_batches(count):
    assert augment(images(count), seeded()).shape == (count, 2, 6, 5)


def test_no_augmentation_changes_nothing():
    before = images()
    assert torch.equal(augment(before, seeded(), flip=False, pad=0), before)


def test_wrong_arguments_give_one_line():
    with pytest.raises(ConfigError, match=r"shape \(3, 4\); expected images"):
        augment(torch.zeros(3, 4))
    with pytest.raises(ConfigError, match="pad -1"):
        augment(images(), pad=-1)
