"""The mixed order: a permutation in which every stretch has the classes in proportion."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from normprop.data.order import mixed


@given(st.lists(st.integers(0, 5), max_size=80))
def test_is_a_permutation_with_classes_spread_evenly(labels):
    labels = np.array(labels, np.int64)
    order = mixed(labels)
    assert sorted(order) == list(range(len(labels)))
    total = len(labels)
    for number in set(labels.tolist()):
        count = (labels == number).sum()
        seen = np.cumsum(labels[order] == number)
        # By rank the i-th of n stands at (i + 1/2) / n; the other classes round by at most half a sample each.
        expected = np.arange(1, total + 1) * count / total
        assert np.abs(seen - expected).max() <= 0.5 + count / total * len(set(labels.tolist())) / 2 + 1


def test_does_not_keep_the_order_within_a_class():
    order = mixed(np.zeros(100, np.int64))
    assert not np.array_equal(order, np.arange(100))


def test_is_always_the_same():
    # RandomState(0).permutation(6) is [5, 2, 1, 3, 0, 4], and numpy promises never to change it.
    assert mixed(np.zeros(6, np.int64)).tolist() == [5, 2, 1, 3, 0, 4]
    assert mixed(np.array([0, 0, 0, 1, 1, 1])).tolist() == [2, 5, 1, 3, 0, 4]


def test_the_only_sample_of_a_class_stands_in_the_middle():
    assert mixed(np.array([0] * 8 + [1])).tolist().index(8) == 4
