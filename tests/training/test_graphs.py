"""Steps from graphs: the numbers of steps that are launched one by one, whatever changes from one to the next."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastjepa import Ragged, TargetRows
from fastjepa.config import parse_config
from fastjepa.data import Batch
from fastjepa.kernels.launch import is_interpreted
from fastjepa.training import engine, graphs
from tests.helpers import make_pictures, tiny_config
from tests.training.tape import Tape, take_as_on_a_gpu

WATCH_EVERY = 5
NEEDS_KERNELS = pytest.mark.skipif(not is_interpreted(), reason="tapes the launches of Triton's interpreter")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def run_of(pictures, folder, ragged=True, **runtime):
    """(trainer, its batches) of a run on kernels whose features are watched every fifth step."""
    settings = {"device": "cpu", "progress": False, **runtime}
    config = tiny_config(
        pictures,
        folder,
        data={"batch_size": 2, "crop_size": 24},
        mask={"ragged": ragged, "patch_size": 4, "min_keep": 2, "num_pred_masks": 2},
        meta={"embed_dim": 16, "depth": 1, "num_heads": 1, "pred_emb_dim": 16},
        runtime=settings,
        logging={"watch_every": WATCH_EVERY},
    )
    batches, _ = engine.prepare_data(config)
    trainer = engine.Trainer(config, batches.steps_per_epoch)
    take_as_on_a_gpu(trainer)
    return trainer, batches


def state(trainer):
    """All that a step changes. Of the pieces of a parameter each has a step number."""
    optimizer = trainer.optimizer
    held = [*trainer.model.state_dict().values(), *optimizer._copies.values()]
    held += [t for kept in optimizer.state.values() for name, t in kept.items() if name != "step"]
    tables = optimizer._tables
    return held if tables is None else [*held, tables._steps, tables._partials, tables.grad_norm]


def seen(trainer, batch):
    loss, features = trainer.train_step(batch)
    found = [loss.clone(), trainer.optimizer.grad_norm.clone()]
    return found if features is None else [*found, features.clone()]


def owned(batch: Batch) -> Batch:
    """In memory of its own, as on another device."""
    return copy.deepcopy(batch)


@NEEDS_KERNELS
@pytest.mark.parametrize(("ragged", "accumulate"), [(True, 2), (False, 1)])
def test_the_numbers_of_launches_one_by_one(pictures, tmp_path, ragged, accumulate):
    ours, batches = run_of(pictures, tmp_path, ragged, accumulate=accumulate)
    theirs, _ = run_of(pictures, tmp_path, ragged, accumulate=accumulate)
    tape = Tape(lambda: state(ours))
    ours.graphs = graphs.StepGraphs(ours._take, ours.optimizer, tape)
    theirs.graphs = Launched(theirs)
    chosen = batches_for(batches)
    for step, batch in enumerate(chosen):
        pairs = zip(seen(ours, owned(batch)), seen(theirs, owned(batch)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), f"step {step}"
    assert len(ours.graphs.held) == 2
    assert tape.replays == 3  # of steps 2, 3 and 6: 0 and 5 are watched, 1 and 4 the first of their shapes
    assert ours.optimizer.copies_are_current()
    for a, b in zip(state(ours), state(theirs), strict=True):
        assert torch.equal(a, b)
    steps = {kept["step"].item() for kept in ours.optimizer.state_dict()["state"].values()}
    assert steps == {len(chosen)}
    assert tape.names.count("lift_fresh") <= 1, "only the table of gradients may come from the host"


def batches_for(batches):
    """Six batches of the shapes that are the most frequent, another one before the last two of them."""
    found = [batches[step] for step in range(60)]
    keys = [graphs._shapes(batch) for batch in found]
    often = max(keys, key=keys.count)
    alike = [batch for batch, key in zip(found, keys, strict=True) if key == often]
    other = next(batch for batch, key in zip(found, keys, strict=True) if key != often)
    return [*alike[:4], other, *alike[4:6]]


class Launched:
    """In the place of graphs: the padded parts, launched."""

    def __init__(self, trainer):
        self.trainer = trainer

    def step(self, parts, watched, device):
        return self.trainer._take([(part.padded(), share) for part, share in parts], watched)

    def capture(self):
        pass


@NEEDS_KERNELS
def test_a_replay_is_known_to_whoever_keeps_something_of_a_parameter(pictures, tmp_path):
    trainer, batches = run_of(pictures, tmp_path)
    trainer.graphs = graphs.StepGraphs(trainer._take, trainer.optimizer, Tape(lambda: state(trainer)))
    changed = [*trainer.model.encoder.parameters(), *trainer.model.target_encoder.parameters()]
    changed = [p for p in changed if p.requires_grad or p.dim() == 2]
    batch, trainer.step = batches[1], 1
    trainer.train_step(owned(batch))
    before = [p._version for p in changed]
    trainer.train_step(owned(batch))
    assert trainer.graphs.recorder.replays == 1
    assert all(p._version > version for p, version in zip(changed, before, strict=True))


class Nothing:
    """A recorder of graphs that do nothing, for steps that are counted alone; `error` is raised once."""

    within = nullcontext

    def __init__(self):
        self.launched, self.replayed, self.forgotten = [], 0, 0
        self.error = {"take": None, "capture": None}

    def take(self, parts, watched):
        self._fail("take")
        self.launched.append(watched)
        return torch.zeros(()), None

    def capture(self, take):
        self._fail("capture")

        def replay():
            self.replayed += 1

        return replay, (torch.zeros(()), None)

    def forget(self):
        self.forgotten += 1

    def _fail(self, what):
        error, self.error[what] = self.error[what], None
        if error:
            raise error


@pytest.fixture
def counted(pictures, tmp_path):
    """(graphs of steps that are counted, what counts them, two batches of other shapes)."""
    trainer, batches = run_of(pictures, tmp_path)
    nothing = Nothing()
    held = graphs.StepGraphs(nothing.take, trainer.optimizer, nothing)
    *_, one, other, _, _ = batches_for(batches)
    return held, nothing, one, other


def steps(held, *batches, watched=False):
    for batch in batches:
        held.step(owned(batch).parts(1), watched, torch.device("cpu"))
        held.capture()


def test_what_is_launched_and_what_is_not(counted):
    held, nothing, one, other = counted
    steps(held, one, other, one, other, one)
    assert (nothing.launched, nothing.replayed) == ([False, False], 3)
    steps(held, one, watched=True)
    assert (nothing.launched, nothing.replayed) == ([False, False, True], 3)
    assert len({part.images.data_ptr() for inputs, *_ in held.held.values() for part, _ in inputs}) == 1


def test_no_more_graphs_than_the_most(counted, monkeypatch):
    held, nothing, one, other = counted
    monkeypatch.setattr(graphs, "LARGEST", 1)
    steps(held, one, other, other, one)
    assert (len(nothing.launched), nothing.replayed, len(held.held)) == (3, 1, 1)


@pytest.mark.parametrize("where", ["take", "capture"])
def test_where_there_is_no_memory_steps_are_launched(counted, where):
    held, nothing, one, other = counted
    steps(held, one, one)
    parameter = held.optimizer.param_groups[0]["params"][1]
    parameter.grad = torch.ones_like(parameter)  # as far as that step had come
    nothing.error[where] = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.warns(UserWarning, match="launched from here on, without 1 CUDA graphs: CUDA out of memory"):
        steps(held, other)
    assert parameter.grad is None
    assert nothing.forgotten == 1
    steps(held, other, one)
    assert (len(nothing.launched), nothing.replayed) == (4, 1), "each step was taken once"


def test_without_graphs_a_lack_of_memory_is_an_error(counted):
    held, nothing, one, _ = counted
    nothing.error["take"] = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        steps(held, one)


def test_weights_that_others_wrote_are_not_left_out(counted, monkeypatch):
    """A graph takes their copies, so such a step is launched, which looks at whether they are current."""
    held, nothing, one, _ = counted
    steps(held, one, one)
    monkeypatch.setattr(held.optimizer, "copies_are_current", lambda: False)
    steps(held, one)
    assert (len(nothing.launched), nothing.replayed) == (2, 1)


def test_graphs_of_another_state_are_forgotten(counted):
    held, nothing, one, _ = counted
    held.optimizer._tables = Mock()
    steps(held, one, one)
    held.optimizer._tables = Mock()  # as after load_state_dict
    steps(held, one, one)
    assert (len(nothing.launched), nothing.replayed) == (2, 2)


LENGTHS = st.lists(st.integers(0, 36), min_size=2, max_size=2)


@given(st.tuples(LENGTHS, LENGTHS), st.tuples(LENGTHS, LENGTHS), st.booleans())
def test_one_key_is_one_set_of_shapes(ours, theirs, ragged):
    """Batches go to one graph where their padded forms have the same shapes and bounds, and else to others."""
    first, second = batch_of(*ours, ragged), batch_of(*theirs, ragged)
    alike = [[t.shape for t in b.padded().tensors()] + bounds(b.padded()) for b in (first, second)]
    assert (graphs._shapes(first) == graphs._shapes(second)) == (alike[0] == alike[1])


def batch_of(contexts, targets, ragged):
    """Two images of 36 patches; lists are as long as the first length says."""
    if ragged:
        masks = [Ragged.from_list([torch.randperm(36)[:n] for n in lengths]) for lengths in (contexts, targets)]
    else:
        masks = [[torch.stack([torch.randperm(36)[: n[0]] for _ in range(2)])] for n in (contexts, targets)]
    images = torch.zeros(2, 3, 24, 24, dtype=torch.uint8)
    return Batch(images, *masks, TargetRows.build(masks[1], 2, 36), torch.zeros(2), 36)


def bounds(batch):
    return [m.max_length for m in (batch.masks_enc, batch.masks_pred) if isinstance(m, Ragged)]


def test_graphs_are_for_a_gpu(pictures, tmp_path):
    with pytest.raises(ValueError, match="runtime.cuda_graphs is for one process on a GPU, this is cpu"):
        run_of(pictures, tmp_path, cuda_graphs=True)


@pytest.mark.parametrize(
    ("other", "value"),
    [
        ("profile", True),
        ("activation_checkpointing", True),
        ("activation_checkpointing", "predictor"),
        ("attention", "xformers"),
    ],
)
def test_what_cannot_go_with_graphs(pictures, tmp_path, other, value):
    config = tiny_config(pictures, tmp_path).to_dict()
    config["runtime"] |= {"cuda_graphs": True, other: value}
    with pytest.raises(ValueError, match=f"runtime.cuda_graphs cannot go with runtime.{other}"):
        parse_config(config)


@pytest.mark.gpu
@pytest.mark.parametrize("ragged", [True, False])
def test_on_a_gpu(pictures, tmp_path, ragged):
    """The losses of padded steps that are launched, and nothing is waited for in a step from a graph."""
    ours, batches = run_of(pictures, tmp_path, ragged, device="cuda", cuda_graphs=True)
    theirs, _ = run_of(pictures, tmp_path, ragged, device="cuda")
    assert ours.graphs is not None
    for step, batch in enumerate(batches_for(batches)):
        batch = batch.pin_memory()
        known = step % WATCH_EVERY and (graphs._shapes(batch),) in ours.graphs.held
        torch.cuda.set_sync_debug_mode("error" if known else "default")
        try:
            loss = ours.train_step(batch)[0].clone()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        theirs.graphs = Launched(theirs)
        assert torch.equal(loss, theirs.train_step(batch)[0])
    for a, b in zip(ours.model.state_dict().values(), theirs.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
