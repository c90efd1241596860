"""Batches by step number: the same from any worker and after any interruption."""

from __future__ import annotations

import pytest
import torch

from fastjepa import MaskCollator, Ragged
from fastjepa.data import Augment, ImageFolder, TrainingBatches
from fastjepa.data.batches import Unreadable
from tests.helpers import make_pictures

MASKS = {"enc_mask_scale": (0.85, 1.0), "pred_mask_scale": (0.15, 0.2), "aspect_ratio": (0.75, 1.5), "npred": 4}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"), count=23)


def make(folder, ragged=False, seed=0, batch_size=4):
    masks = MaskCollator((32, 32), 4, **MASKS, ragged=ragged)
    return TrainingBatches(ImageFolder(folder), Augment(32), masks, batch_size, seed)


def same(a, b):
    if isinstance(a, Ragged):
        return torch.equal(a.values, b.values) and torch.equal(a.offsets, b.offsets)
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("ragged", [False, True])
def test_workers_and_resuming_change_nothing(pictures, ragged):
    batches = make(pictures, ragged)
    whole = list(batches.loader(0, 8, 0, False))
    for start, workers in ((0, 2), (3, 1), (5, 0)):
        again = list(make(pictures, ragged).loader(start, 8, workers, False))
        assert len(again) == 8 - start
        for ours, theirs in zip(again, whole[start:], strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.samples, theirs.samples)
            assert same(ours.masks_enc, theirs.masks_enc)
            assert same(ours.masks_pred, theirs.masks_pred)


def test_each_epoch_sees_each_picture_once(pictures):
    batches = make(pictures)
    assert batches.steps_per_epoch == 5
    epochs = [torch.cat([batches[e * 5 + i].samples for i in range(5)]).tolist() for e in range(2)]
    for samples in epochs:
        assert len(set(samples)) == 20
    assert epochs[0] != epochs[1]


def test_seed_changes_everything(pictures):
    ours, theirs = make(pictures, seed=0)[0], make(pictures, seed=1)[0]
    assert not torch.equal(ours.samples, theirs.samples)
    assert not torch.equal(ours.images, theirs.images)


def test_batch_facts(pictures):
    batch = make(pictures, ragged=True)[0]
    assert batch.images.shape == (4, 3, 32, 32)
    assert batch.images.dtype == torch.uint8
    assert batch.context_tokens == int(batch.masks_enc.offsets[-1])
    cut = make(pictures)[0]
    assert cut.context_tokens == 4 * cut.masks_enc[0].shape[1]
    assert cut.to(torch.device("meta")).images.device.type == "meta"


def test_unreadable_pictures_are_replaced_and_named(tmp_path):
    make_pictures(tmp_path, count=20)
    bad = tmp_path / "class0" / "000.png"
    bad.write_bytes(b"broken")
    batches = make(tmp_path)
    seen = [batches[i] for i in range(10)]
    named = {line for batch in seen for line in batch.unreadable}
    assert len(named) == 1
    assert str(bad) in named.pop()
    index = batches.folder.paths.index(bad)
    assert all(index not in batch.samples for batch in seen)
    counter = Unreadable(batches.folder, 0.01)
    said = [line for batch in seen for line in counter.add(batch)]
    assert len(said) == 1


def test_too_many_unreadable_pictures(tmp_path):
    make_pictures(tmp_path, count=20)
    for path in sorted(tmp_path.rglob("*.png"))[:9]:
        path.write_bytes(b"")
    batches = make(tmp_path)
    counter = Unreadable(batches.folder, 0.01)
    assert counter.limit == 5
    seen = [batches[step] for step in range(20)]
    with pytest.raises(ValueError, match=r"[6-9] of the 20 pictures cannot be read, more than data.max_corrupt"):
        [counter.add(batch) for batch in seen]


def test_nothing_readable_ends(tmp_path):
    make_pictures(tmp_path, count=8)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"x")
    batches = make(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        Unreadable(batches.folder, 0.5).add(batches[0])


def test_fewer_pictures_than_a_batch(pictures):
    with pytest.raises(ValueError, match="batch_size=64 is more than the 23 pictures"):
        make(pictures, batch_size=64)


@pytest.mark.parametrize("ragged", [False, True])
def test_parts_are_the_batch(pictures, ragged):
    batch = make(pictures, ragged)[0]
    parts = batch.parts(2)
    assert sum(share for _, share in parts) == pytest.approx(1.0)
    assert torch.equal(torch.cat([part.images for part, _ in parts]), batch.images)
    assert torch.equal(torch.cat([part.samples for part, _ in parts]), batch.samples)
    for name in ("masks_enc", "masks_pred"):
        whole, halves = getattr(batch, name), [getattr(part, name) for part, _ in parts]
        if ragged:
            assert [t.tolist() for t in whole.unbind()] == [t.tolist() for half in halves for t in half.unbind()]
            assert {half.per_image for half in halves} == {whole.per_image}
        else:
            assert all(torch.equal(torch.cat(pair), m) for m, *pair in zip(whole, *halves, strict=True))
    for part, _ in parts:
        assert len(part.targets.place) == sum(m.numel() for m in lists(part.masks_pred))
        assert int(part.targets.kept.max()) < 2 * 64
    assert batch.parts(1) == [(batch, 1.0)]


def lists(masks):
    return [masks.values] if isinstance(masks, Ragged) else masks


@pytest.mark.parametrize("count", [0, 3, 8])
def test_parts_must_be_equal(pictures, count):
    with pytest.raises(ValueError, match=f"a batch of 4 images cannot be taken in {count} equal parts"):
        make(pictures)[0].parts(count)
