"""The mask sampler: distribution, geometry, both forms, seeds, and settings that admit no mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fastjepa import MaskCollator, Ragged, apply_masks

OFFICIAL = {
    "input_size": (224, 224),
    "patch_size": 14,
    "enc_mask_scale": (0.85, 1.0),
    "pred_mask_scale": (0.15, 0.2),
    "aspect_ratio": (0.75, 1.5),
    "nenc": 1,
    "npred": 4,
    "min_keep": 10,
}


def variation(ours, theirs):
    ours, theirs = np.asarray(ours, dtype=float).ravel(), np.asarray(theirs, dtype=float).ravel()
    return np.abs(ours / ours.sum() - theirs / theirs.sum()).sum() / 2


def windowed(histogram):
    return np.convolve(histogram, np.ones(9), "same")


def test_distribution_is_the_official_one(golden):
    expected = golden("masks_in1k_vith14")
    collate = MaskCollator(**OFFICIAL, ragged=True)
    contexts, unions, context, target, top_left = (
        np.zeros(257),
        np.zeros(257),
        np.zeros(256),
        np.zeros(256),
        np.zeros(256),
    )
    shortest = []
    for step in range(300):
        masks_enc, masks_pred = collate.sample(128, [3, step])
        lengths, blocks = masks_enc.lengths.numpy(), masks_pred.values.numpy().reshape(128, -1)
        np.add.at(contexts, lengths, 1)
        context += np.bincount(masks_enc.values.numpy(), minlength=256)
        target += np.bincount(blocks.ravel(), minlength=256)
        top_left += np.bincount(masks_pred.values.numpy()[masks_pred.offsets[:-1].numpy()], minlength=256)
        union = np.zeros((128, 256), dtype=bool)
        union[np.arange(128)[:, None], blocks] = True
        np.add.at(unions, union.sum(1), 1)
        shortest.append(lengths.min())
    assert variation(context, expected["context_occupancy"]) < 0.06
    assert variation(target, expected["target_occupancy"]) < 0.06
    assert variation(top_left, expected["target_top_left"]) < 0.06
    assert variation(windowed(contexts), windowed(expected["context_count_hist"])) < 0.06
    assert variation(windowed(unions), windowed(expected["target_union_hist"])) < 0.06
    assert abs(np.mean(shortest) - expected["truncated_counts"][:, 0].mean()) < 2


def test_both_forms_are_the_same_masks():
    cut, whole = MaskCollator(**OFFICIAL), MaskCollator(**OFFICIAL, ragged=True)
    (masks_enc, masks_pred), (ragged_enc, ragged_pred) = cut.sample(8, [1]), whole.sample(8, [1])
    assert isinstance(ragged_enc, Ragged)
    assert isinstance(ragged_pred, Ragged)
    assert masks_enc[0].dtype == torch.int64
    shortest = int(ragged_enc.lengths.min())
    assert all(len(m) == 8 and m.shape[1] == shortest for m in masks_enc)
    for image, sequence in enumerate(ragged_enc.unbind()):
        assert masks_enc[0][image].tolist() == sequence[:shortest].tolist()
    for place, sequence in enumerate(ragged_pred.unbind()):
        assert masks_pred[place % 4][place // 4].tolist() == sequence.tolist()


@given(
    st.integers(4, 12),
    st.integers(4, 70),
    st.integers(1, 3),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_geometry(height, width, nenc, npred, allow_overlap, seed):
    settings = {"enc_mask_scale": (0.6, 0.9), "pred_mask_scale": (0.2, 0.4), "aspect_ratio": (0.7, 1.4), "min_keep": 1}
    collate = MaskCollator(
        (height * 4, width * 4), 4, nenc=nenc, npred=npred, allow_overlap=allow_overlap, ragged=True, **settings
    )
    contexts, targets = collate.sample(3, [seed])
    assert (contexts.num_sequences, targets.num_sequences) == (3 * nenc, 3 * npred)
    sizes = set()
    for sequence in targets.unbind():
        rows, columns = sequence // width, sequence % width
        block = (int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1)
        assert len(sequence) == block[0] * block[1]
        assert sequence.unique().tolist() == sequence.tolist()
        assert int(rows.max()) < height - 1 or block[0] == height
        sizes.add(block)
    assert len(sizes) == 1
    for place, sequence in enumerate(contexts.unbind()):
        assert len(sequence) > 1
        assert sequence.unique().tolist() == sequence.tolist()
        image = place // nenc
        taken = torch.cat(targets.unbind()[image * npred : (image + 1) * npred])
        free = not set(sequence.tolist()) & set(taken.tolist())
        # With room to spare a context never holds a target patch; where it does, some target was let in for room.
        assert allow_overlap or free or len(taken.unique()) > 0.2 * height * width


def test_crowded_contexts_let_targets_in():
    collate = MaskCollator((64, 64), 8, (0.3, 0.3), (0.7, 0.7), (1.0, 1.0), nenc=2, npred=4, min_keep=12, ragged=True)
    contexts, _ = collate.sample(64, [0])
    assert int(contexts.lengths.min()) > 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_keep": 300}, "min_keep=300"),
        ({"pred_mask_scale": (0.01, 0.02), "min_keep": 10}, "pred_mask_scale"),
        ({"enc_mask_scale": (0.0, 1.0)}, "enc_mask_scale"),
        ({"enc_mask_scale": (0.9, 0.5)}, "enc_mask_scale"),
        ({"enc_mask_scale": (0.9, 1.5)}, "at most 1"),
        ({"aspect_ratio": (0.0, 1.0)}, "aspect_ratio"),
        ({"patch_size": 15}, "does not divide"),
        ({"patch_size": 0}, "does not divide"),
        ({"input_size": (14, 14)}, "no mask is possible"),
        ({"npred": 0}, "npred"),
        ({"nenc": 0}, "nenc"),
        ({"min_keep": -1}, "min_keep"),
        # Large blocks most of the time, but a tenth of them a patch wide: the official sampler hangs now and then.
        ({"aspect_ratio": (0.75, 200.0), "min_keep": 20}, "no mask is possible"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        MaskCollator(**(OFFICIAL | changes))


def test_empty_batch():
    with pytest.raises(ValueError, match="empty batch"):
        MaskCollator(**OFFICIAL)([])


def flat(masks):
    return [m.tolist() for m in masks[0]] + [m.tolist() for m in masks[1]]


def test_seed_and_state():
    first, second, other = (MaskCollator(**OFFICIAL, seed=s) for s in (5, 5, 6))
    drawn = [flat(first([0] * 4)[1:]) for _ in range(3)]
    assert [flat(second([0] * 4)[1:]) for _ in range(3)] == drawn
    assert flat(other([0] * 4)[1:]) != drawn[0]
    assert drawn[0] != drawn[1]
    second.load_state_dict({"seed": 5, "step": 1})
    assert [flat(second([0] * 4)[1:]) for _ in range(2)] == drawn[1:]
    assert second.state_dict() == {"seed": 5, "step": 3}


def test_workers_draw_their_own_and_repeat_by_seed():
    def epoch(seed):
        torch.manual_seed(seed)
        loader = DataLoader(list(range(16)), batch_size=4, num_workers=2, collate_fn=MaskCollator(**OFFICIAL))
        return [(images.tolist(), flat(masks)) for images, *masks in loader]

    once = epoch(0)
    assert once == epoch(0)
    assert once != epoch(1)
    assert len({str(masks) for _, masks in once}) == 4


def test_apply_masks():
    x = torch.randn(2, 5, 3)
    masks = [torch.tensor([[0, 2], [4, 1]]), torch.tensor([[3, 3], [0, 4]], dtype=torch.int32)]
    expected = torch.stack([x[0, [0, 2]], x[1, [4, 1]], x[0, [3, 3]], x[1, [0, 4]]])
    assert torch.equal(apply_masks(x, masks), expected)
    assert torch.equal(apply_masks(x, masks[0]), expected[:2])
    with pytest.raises(ValueError, match=r"\[B, K\]"):
        apply_masks(x, [torch.zeros(3, 2, dtype=torch.int64)])
