"""Splits: the promised images, never one in two splits, and an error where that cannot be."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from normprop.data import Dataset, Split
from normprop.errors import ConfigError, DataError


def numbered(count, start=0, num_classes=2):
    """A split whose features are the samples' numbers."""
    numbers = torch.arange(start, start + count)
    return Split(numbers.float().unsqueeze(1), numbers % num_classes)


def dataset(train, test=10, num_classes=2, validation=0):
    classes = tuple(map(str, range(num_classes)))
    own = {"validation": numbered(validation, 20_000, num_classes)} if validation else {}
    return Dataset("numbers", classes, numbered(train, 0, num_classes), numbered(test, 10_000, num_classes), **own)


def numbers(split):
    return [int(number) for number in split.images.flatten()]


sizes = st.one_of(st.none(), st.integers(0, 60))


@settings(deadline=None)
@example(21, 1, 2, 20, None, None)  # a tenth of 20 is more than is left
@given(st.integers(1, 60), st.integers(1, 20), st.integers(2, 7), sizes, sizes, sizes)
def test_splits_never_overlap(total, tests, num_classes, train, validation, test):
    data = dataset(total, tests, num_classes)
    try:
        cut = data.split(train=train, validation=validation, test=test)
    except ConfigError:
        cut = None
    if cut is None:
        asked = (1 if train is None else train) + (max(1, (train or 0) // 10) if validation is None else validation)
        assert asked > total or train == 0 or test == 0 or (test or 0) > tests
        return
    training, held_out = numbers(cut.train), numbers(cut.validation)
    assert not set(training) & set(held_out)
    assert training == list(range(len(training)))
    assert held_out == list(range(len(training), len(training) + len(held_out)))
    assert numbers(cut.test) == numbers(data.test)[: len(cut.test)]
    assert len(training) == (total - len(held_out) if train is None else train)
    assert len(cut.test) == (tests if test is None else test)
    if validation is not None:
        assert len(held_out) == validation
    else:
        assert len(held_out) >= 1
    torch.testing.assert_close(cut.train.labels, torch.tensor(training) % num_classes)


@pytest.mark.parametrize(
    ("total", "num_classes", "train", "validation", "expected"),
    [
        (60_000, 10, None, None, (54_000, 6_000)),
        (50_000, 10, 4_000, None, (4_000, 400)),
        (50_000, 10, 4_000, 2_000, (4_000, 2_000)),
        (50_000, 10, 50, None, (50, 10)),  # one per class
        (55, 10, 50, None, (50, 5)),  # all that is left
        (1_437, 10, None, None, (1_294, 143)),
        (12, 10, None, None, (6, 6)),
        (60, 10, None, 0, (60, 0)),
        (60, 10, 60, 0, (60, 0)),
    ],
)
def test_sizes(total, num_classes, train, validation, expected):
    cut = dataset(total, num_classes=num_classes).split(train=train, validation=validation)
    assert (len(cut.train), len(cut.validation)) == expected
    assert len(cut.test) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": 101}, "numbers: 101 training images asked for, but it has 100; ask for fewer"),
        ({"train": 100}, "numbers: 100 training and 10 validation images asked for, but both come from its 100"),
        ({"train": 60, "validation": 41}, "60 training and 41 validation"),
        ({"validation": 100}, "1 training and 100 validation"),
        ({"test": 11}, "11 test images asked for, but it has 10"),
        ({"train": 0}, "0 training images asked for; expected a positive number"),
        ({"train": -3}, "-3 training"),
        ({"test": 0}, "0 test"),
        ({"validation": -1}, "-1 validation"),
    ],
)
def test_impossible_sizes_give_one_line(arguments, message):
    with pytest.raises(ConfigError) as caught:
        dataset(100).split(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_own_validation_images_are_kept_and_training_is_not_touched():
    data = dataset(50, validation=20)
    assert numbers(data.split(train=50).validation) == list(range(20_000, 20_020))
    cut = data.split(train=30, validation=5, test=3)
    assert numbers(cut.train) == list(range(30))
    assert numbers(cut.validation) == list(range(20_000, 20_005))
    assert len(cut.test) == 3
    for arguments in ({"validation": 21}, {"train": 51}):
        with pytest.raises(ConfigError, match="ask for fewer"):
            data.split(**arguments)


def test_splitting_again_keeps_the_validation_images():
    once = dataset(100).split()
    again = once.split(train=30)
    assert numbers(again.validation) == numbers(once.validation)
    assert numbers(again.train) == list(range(30))


def test_a_loaded_set_has_no_validation_images():
    assert len(dataset(10).validation) == 0


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), "torch.float64"),
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64), r"shape \(2, 3, 4\)"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), "2 images but 3 labels"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32), "labels are torch.int32"),
        (torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64), r"shape \(2, 1\)"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64, device="meta"), "one device"),
    ],
)
def test_a_split_that_does_not_fit_together_is_refused(images, labels, message):
    with pytest.raises(DataError, match=message):
        Split(images, labels)


def test_a_dataset_whose_splits_do_not_fit_together_is_refused():
    good = Split(torch.zeros(2, 3), torch.tensor([0, 1]))
    for bad, message in [
        (Split(torch.zeros(2, 4), torch.tensor([0, 1])), "test images are torch.float32"),
        (Split(torch.zeros(2, 3, dtype=torch.uint8), torch.tensor([0, 1])), "test images are torch.uint8"),
        (Split(torch.zeros(2, 3), torch.tensor([0, 2])), r"test labels range over 0\.\.2; expected 0\.\.1"),
        (Split(torch.zeros(2, 3), torch.tensor([-1, 1])), r"test labels range over -1\.\.1"),
    ]:
        with pytest.raises(DataError, match=message):
            Dataset("bad", ("a", "b"), good, bad)


def test_splits_move_and_are_cut():
    data = Dataset("moved", ("a", "b"), numbered(4), numbered(3)).split(train=3, validation=1)
    copy = data.to("cpu")
    assert (copy.train.images.device.type, copy.validation.labels.device.type) == ("cpu", "cpu")
    assert numbers(data.train[1:]) == [1, 2]
    assert numbers(data.train[torch.tensor([2, 0])]) == [2, 0]
    assert numbered(2).to("meta").images.device.type == "meta"
