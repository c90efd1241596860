"""`Ragged`: packing, checks, and its ways in and out."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastjepa import Ragged
from fastjepa.ragged import image_rows, masks_to_ragged, sequence_ids

LENGTHS = st.lists(st.integers(0, 7), min_size=1, max_size=9)


def packed(lengths, per_image=1):
    return Ragged.from_list([torch.arange(n) + 10 * i for i, n in enumerate(lengths)], per_image)


@given(LENGTHS)
def test_from_list_and_back(lengths):
    ragged = packed(lengths)
    assert ragged.lengths.tolist() == lengths
    assert ragged.max_length == max(lengths)
    assert [t.tolist() for t in ragged.unbind()] == [list(range(10 * i, 10 * i + n)) for i, n in enumerate(lengths)]
    assert sequence_ids(ragged).tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]


@given(LENGTHS)
def test_nested_round_trip(lengths):
    ragged = packed(lengths)
    again = Ragged.from_nested(ragged.to_nested())
    assert torch.equal(again.values, ragged.values)
    assert torch.equal(again.offsets, ragged.offsets)


@pytest.mark.parametrize(
    ("values", "offsets", "per_image", "message"),
    [
        (5, [0, 3], 1, "end at the 5 tokens"),
        (5, [1, 5], 1, "start at 0"),
        (5, [0, 4, 3, 5], 1, "never fall"),
        (5, [0, 2, 5, 5], 2, "does not divide"),
        (5, [0, 5], 0, "does not divide"),
        (0, [], 1, "int32"),
    ],
)
def test_inconsistent(values, offsets, per_image, message):
    with pytest.raises(ValueError, match=message):
        Ragged(torch.zeros(values), torch.tensor(offsets, dtype=torch.int32), per_image)


def test_wrong_types():
    with pytest.raises(ValueError, match="int32"):
        Ragged(torch.zeros(3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="max_length=2, but"):
        Ragged(torch.zeros(3), torch.tensor([0, 3], dtype=torch.int32), max_length=2)
    with pytest.raises(ValueError, match="trailing shape"):
        Ragged.from_list([torch.zeros(2, 3), torch.zeros(2, 4)])
    with pytest.raises(ValueError, match="at least one"):
        Ragged.from_list([])
    with pytest.raises(ValueError, match="jagged"):
        Ragged.from_nested(torch.zeros(2))
    with pytest.raises(ValueError, match="tokens"):
        packed([2, 3]).with_values(torch.zeros(4))
    with pytest.raises(ValueError, match="token dimension"):
        Ragged(torch.tensor(1.0), torch.tensor([0, 1], dtype=torch.int32))


def test_moves_keep_everything():
    ragged = packed([3, 0, 2, 1], per_image=2)
    for moved in (ragged.to("cpu"), pickle.loads(pickle.dumps(ragged)), ragged.to("meta")):
        assert (moved.per_image, moved.max_length, moved.num_sequences) == (2, 3, 4)
    assert ragged.to("meta").device.type == "meta"


def test_rows_of_both_orders():
    image_major = Ragged.from_list([torch.tensor([1]), torch.tensor([2, 0]), torch.tensor([3]), torch.tensor([])], 2)
    image_major = image_major.with_values(image_major.values.int())
    assert image_rows(image_major, 2, 4).tolist() == [1, 2, 0, 7]
    mask_major = masks_to_ragged([torch.tensor([[1], [2]]), torch.tensor([[0], [3]])])
    assert image_rows(mask_major, 2, 4).tolist() == [1, 6, 0, 7]


def test_rows_refuse():
    ragged = packed([2, 1])
    with pytest.raises(ValueError, match="do not fit 3 images"):
        image_rows(ragged, 3, 50)
    with pytest.raises(ValueError, match=r"patches 0\.\.10, but there are patches 0\.\.9"):
        image_rows(ragged, 2, 10)
    with pytest.raises(ValueError, match="one shape"):
        masks_to_ragged([torch.zeros(2, 3)])
