"""Batches by step number: the same from any worker and after any interruption."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from itertools import pairwise

import pytest
import torch

from fastjepa import MaskCollator, Ragged
from fastjepa.data import Augment, ImageFolder, Pictures, TrainingBatches
from fastjepa.data.batches import HELD, PREFETCH, Unreadable
from fastjepa.data.engines import PillowEngine
from fastjepa.data.pack import pack
from fastjepa.data.shards import TarShards
from tests.helpers import make_pictures

MASKS = {"enc_mask_scale": (0.85, 1.0), "pred_mask_scale": (0.15, 0.2), "aspect_ratio": (0.75, 1.5), "npred": 4}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"), count=23)


def make(folder, ragged=False, seed=0, batch_size=4, rank=0, world=1, flip=False, **augment):
    masks = MaskCollator((32, 32), 4, **MASKS, ragged=ragged)
    source = folder if isinstance(folder, Pictures) else ImageFolder(folder)
    crops = Augment(32, horizontal_flip=flip, **augment)
    return TrainingBatches(source, crops, masks, batch_size, seed, rank, world)


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


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize("workers, pin", [(1, False), (2, False), (1, True)])
def test_images_that_something_holds_are_not_written_again(pictures, workers, pin):
    batches = make(pictures)
    held = [batch.images[1:2].permute(0, 2, 3, 1) for batch in batches.loader(0, 16, workers, pin)]
    for step, part in enumerate(held):
        assert torch.equal(part, batches[step].images[1:2].permute(0, 2, 3, 1))


def test_memory_of_images_that_nothing_holds_is_used_again(pictures):
    places = [batch.images.data_ptr() for batch in make(pictures).loader(0, 20, 1, False)]
    assert len(set(places)) <= PREFETCH + HELD


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


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_and_workers_see_each_picture_once_after_an_interruption(pictures, world):
    """Two epochs on `world` processes of two workers each, stopped in the middle of each and taken up again."""
    per_epoch = 23 // (4 * world)
    stops = [0, max(1, per_epoch // 2), per_epoch, per_epoch + 1, 2 * per_epoch]
    seen: dict[int, list[int]] = {0: [], 1: []}
    for rank in range(world):
        for start, end in pairwise(stops):
            batches = make(pictures, rank=rank, world=world)
            assert batches.steps_per_epoch == per_epoch
            for step, batch in enumerate(batches.loader(start, end, 2, False), start):
                seen[step // per_epoch] += batch.samples.tolist()
    for samples in seen.values():
        assert len(samples) == len(set(samples)) == 4 * world * per_epoch
    assert seen[0] != seen[1]


def test_ranks_draw_their_own_crops_and_masks(pictures):
    ours, theirs = (make(pictures, rank=rank, world=2)[0] for rank in (0, 1))
    assert not torch.equal(ours.masks_enc[0], theirs.masks_enc[0])
    assert not set(ours.samples.tolist()) & set(theirs.samples.tolist())


@pytest.mark.parametrize("rank, world", [(2, 2), (-1, 1), (0, 0)])
def test_ranks_that_will_not_do(pictures, rank, world):
    with pytest.raises(ValueError, match=f"rank={rank} and world={world}"):
        make(pictures, rank=rank, world=world)


def test_fewer_pictures_than_a_step_of_all_ranks(pictures):
    with pytest.raises(ValueError, match="batch_size=4 for each of 6 processes is more than the 23 pictures"):
        make(pictures, world=6)


def test_shards_give_the_batches_that_the_folder_gives(pictures, tmp_path):
    folder = ImageFolder(pictures)
    pack(folder, tmp_path, 7, quiet=True)
    for step in (0, 4, 7):
        ours, theirs = make(pictures)[step], make(TarShards(tmp_path))[step]
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.samples, theirs.samples)


def test_the_first_picture_left_to_pillow_is_named_once(pictures):
    class Picky(PillowEngine):
        name = "picky"

        def crop(self, data, box, size):
            return super().crop(data, box, size)._replace(aside="not to my taste")

    batches = make(pictures, engine=Picky())
    counter = Unreadable(batches.folder, 0.01)
    said = [line for step in range(3) for line in counter.add(batches[step])]
    name = batches.folder.name(int(batches[0].samples[0]))
    assert said == [f"read by Pillow, as will be others like it: {name} (not to my taste)"]


class Late(PillowEngine):
    """As one that decodes on a GPU."""

    name = "late"
    late = True


@pytest.mark.parametrize("workers", [0, 2])
def test_engines_that_decode_late_give_the_same(pictures, workers):
    early = list(make(pictures, flip=True).loader(0, 6, workers, False))
    late = list(make(pictures, flip=True, engine=Late()).loader(0, 6, workers, False))
    for ours, theirs in zip(late, early, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.samples, theirs.samples)
        assert same(ours.masks_enc, theirs.masks_enc)


def test_what_late_engines_cannot_do(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"data\.engine=late decodes on the device, without colour distortion or blur"):
        make(pictures, engine=Late(), gaussian_blur=True)
    make_pictures(tmp_path, count=4, classes=1)
    bad = tmp_path / "class0" / "002.png"
    bad.write_bytes(bad.read_bytes()[:60])  # its header is whole
    with pytest.raises(ValueError, match=r"002\.png .*; data\.engine=late replaces no such picture"):
        make(tmp_path, engine=Late())[0]


def kill_a_worker(*_: object) -> None:
    """SIGKILL to one of the workers of this process."""
    workers = [child for child in multiprocessing.active_children() if child.pid]
    os.kill(int(workers[0].pid or 0), signal.SIGKILL)


def test_a_lost_worker_is_replaced_once(pictures):
    batches, said = make(pictures), []
    wanted = [batch.samples.tolist() for batch in batches.loader(0, 12, 0, False)]
    found = []
    for step, batch in enumerate(batches.loader(0, 12, 2, False, said.append)):
        found.append(batch.samples.tolist())
        if step == 3:
            kill_a_worker()
    assert found == wanted
    assert len(said) == 1
    assert "a data worker was lost at step" in said[0]


def test_a_worker_that_is_lost_twice_ends_the_run(pictures):
    batches, said = make(pictures), []
    with pytest.raises(OSError, match="data workers were lost twice, now at step .*num_workers=0"):  # noqa: PT012
        for batch in batches.loader(0, 40, 2, False, said.append):
            kill_a_worker(batch)
    assert len(said) == 1


def test_a_worker_that_hangs_is_lost(pictures, monkeypatch):
    monkeypatch.setattr(TrainingBatches, "_make", lambda self, *_: time.sleep(1000))
    said = []
    with pytest.raises(OSError, match="lost twice"):
        next(make(pictures).loader(0, 4, 1, False, said.append, patience=1.0))
    assert "timed out" in said[0]
