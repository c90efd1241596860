"""The order of an epoch: everything once, another each epoch, few blocks open at a time."""

from __future__ import annotations

import pickle

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.data.order import WINDOW, EpochOrder


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(0, 5))
def test_blocks_are_seen_once_and_few_at_a_time(blocks, epoch):
    order = EpochOrder(sum(blocks), 3, blocks)(epoch)
    assert sorted(order) == list(range(sum(blocks)))
    block = np.repeat(np.arange(len(blocks)), blocks)[order]
    left, open_now = np.array(blocks), set()
    for b in block:
        open_now.add(int(b))
        left[b] -= 1
        open_now = {b for b in open_now if left[b]}
        assert len(open_now) <= WINDOW


def test_epochs_differ_and_repeat():
    order = EpochOrder(100, 7)
    first, second = order(0).copy(), order(1).copy()
    assert sorted(first) == list(range(100))
    assert not np.array_equal(first, second)
    assert np.array_equal(pickle.loads(pickle.dumps(order))(0), first)
    assert not np.array_equal(EpochOrder(100, 8)(0), first)


def test_an_epoch_is_drawn_once():
    order = EpochOrder(10, 0)
    assert order(4) is order(4)
