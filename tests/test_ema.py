"""The EMA of a model: torch's and timm's numbers, one launch, shards where they lie, and the model left alone."""

from __future__ import annotations

import copy
import importlib.util
import io
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.spawn import start_processes
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from fastjepa import EMA, vit_tiny
from fastjepa.ops import library
from tests.kernels.multi_tensor_checks import round_as_a_chip
from tests.kernels.row_checks import launches


class Net(nn.Module):
    """With a tied weight, floating and whole buffers, and one that is not saved."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.tied = self.second.weight
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


def wander(model: nn.Module, step: int) -> None:
    """Other weights and buffers, as a training step would leave them."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator))  # variances are positive
            else:
                tensor.add_(1)


def assert_same(ours: nn.Module, theirs: nn.Module, **tolerance: float) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


@pytest.mark.parametrize("averaged_buffers", [True, False])
def test_it_is_torchs_averaged_model(averaged_buffers):
    model = Net()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=averaged_buffers)
    ours = EMA(model, decay=0.9, exclude_buffers=not averaged_buffers)
    for step in range(5):
        wander(model, step)
        for average in (theirs, ours):
            average.update_parameters(model)
        if averaged_buffers:  # torch averages this count too; ours copies it, as timm's does
            theirs.module.norm.num_batches_tracked.copy_(model.norm.num_batches_tracked)
        assert_same(ours, theirs)
    assert ours.n_averaged == theirs.n_averaged == 5
    loader = [torch.randn(6, 5) for _ in range(2)]
    for average in (ours, theirs):
        update_bn(loader, average)
    assert_same(ours, theirs)
    images = torch.randn(3, 5)
    assert not ours.module.training
    torch.testing.assert_close(ours(images), theirs.eval()(images))


def model_ema_v3() -> type:
    """timm's class from its file: the package imports torchvision, which the class does not need."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        pytest.skip("timm is not installed")
    file = Path(spec.origin).parent / "utils" / "model_ema.py"
    spec = importlib.util.spec_from_file_location("timm_model_ema", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelEmaV3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update_after_step": 2},
        {"use_warmup": True},
        {"use_warmup": True, "warmup_gamma": 3.0, "warmup_power": 0.75, "min_decay": 0.4, "update_after_step": 1},
        {"exclude_buffers": True},
    ],
)
def test_it_is_timms_model_ema_v3(options):
    theirs_class = model_ema_v3()
    model = Net()
    del model.tied  # timm's goes through the state dict, and so averages a tied weight twice an update
    ours, theirs = EMA(model, decay=0.8, **options), theirs_class(model, decay=0.8, **options)
    for step in range(1, 8):
        wander(model, step)
        for average in (ours, theirs):
            average.update(model, step=step)
        assert ours.get_decay(step) == theirs.get_decay(step)
        assert_same(ours.module, theirs.module)
    for average in (ours, theirs):
        average.update(model)
    assert_same(ours.module, theirs.module)
    for average in (ours, theirs):
        average.set(model)
    assert_same(ours.module, model)


def test_decay_warms_up_as_written():
    ema = EMA(nn.Linear(1, 1), decay=0.7, min_decay=0.2, update_after_step=2, use_warmup=True, warmup_gamma=2.0)
    expected = {step: 1 - (1 + (step - 3) / 2.0) ** (-2 / 3) for step in range(4, 30)}
    assert ema.get_decay() == 0.7
    assert [ema.get_decay(step) for step in range(4)] == [0.0] * 4
    for step, plain in expected.items():
        assert ema.get_decay(step) == pytest.approx(min(max(plain, 0.2), 0.7))
    assert expected[4] < 0.3
    assert expected[29] > 0.7


@given(decays=st.lists(st.floats(0, 1), max_size=6))
def test_any_decays_give_the_weighted_sum(decays):
    model = nn.Linear(3, 2, bias=False).double()
    ema = EMA(model)
    expected = model.weight.detach().clone()
    for step, decay in enumerate(decays):
        wander(model, step)
        ema.decay = decay
        ema.update(model)
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.module.weight.detach(), expected)


def test_kernels_make_one_launch_an_update(monkeypatch):
    round_as_a_chip(monkeypatch)
    model = vit_tiny(img_size=[32], depth=2, embed_dim=24, num_heads=2)
    plain, ours = EMA(model, decay=0.9), EMA(model, decay=0.9)
    for step in range(3):
        wander(model, step)
        plain.update(model)
        with monkeypatch.context() as patch:
            patch.setattr(library, "takes_kernels", lambda x: True)
            made = launches(patch, lambda: ours.update(model))
        assert step == 0 or made == 1  # the first one makes the tables
        assert_same(ours, plain)
    (kept,) = ours._tables.values()
    with torch.no_grad():
        model.norm.weight.data = model.norm.weight.clone()
    with monkeypatch.context() as patch:
        patch.setattr(library, "takes_kernels", lambda x: True)
        ours.update(model)
    plain.update(model)
    assert_same(ours, plain)
    assert next(iter(ours._tables.values())) is not kept


def test_a_teacher_that_is_there_is_moved_where_it_lies():
    student, teacher = Net(), Net()
    before, mode = teacher.first.weight.clone(), teacher.training
    ema = EMA(student, decay=0.75, module=teacher)
    assert ema.module is teacher
    assert teacher.training is mode
    assert torch.equal(teacher.first.weight, before)
    ema.update(student)
    torch.testing.assert_close(teacher.first.weight, 0.75 * before + 0.25 * student.first.weight)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_wrappers_are_seen_through():
    model = Net()
    ema = EMA(model, decay=0.5)
    wrapped = nn.DataParallel(torch.compile(model))
    wander(model, 1)
    ema.update(wrapped)
    plain = EMA(Net(), decay=0.5)
    plain.module.load_state_dict(EMA(wrapped).module.state_dict())
    assert isinstance(EMA(wrapped).module, Net)
    model.second = torch.compile(model.second)
    ema.set(model)
    assert torch.equal(ema.module.second.weight, model.second.weight)


def test_applied_to_gives_the_weights_back_even_when_evaluation_fails():
    model = Net()
    ema = EMA(model, dtype=torch.float64)
    wander(model, 1)
    before, average = copy.deepcopy(model.state_dict()), copy.deepcopy(ema.module.state_dict())

    def evaluation():
        with ema.applied_to(model):
            torch.testing.assert_close(model.first.weight.detach(), average["first.weight"].float())
            raise RuntimeError("evaluation fails")

    with pytest.raises(RuntimeError, match="evaluation fails"):
        evaluation()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for name, value in ema.module.state_dict().items():
        assert torch.equal(value, average[name])


def test_states_load_across():
    model = Net()
    ours, theirs = EMA(model, decay=0.5), AveragedModel(model)
    for step in range(3):
        wander(model, step)
        ours.update_parameters(model)
    theirs.load_state_dict(ours.state_dict())
    assert theirs.n_averaged == 3
    back = EMA(model)
    back.load_state_dict(theirs.state_dict())
    assert_same(back, ours)
    timms = {name: value for name, value in ours.state_dict().items() if name != "n_averaged"}
    plain = EMA(model)
    plain.load_state_dict(timms)
    assert_same(plain.module, ours.module)
    assert plain.n_averaged == 0
    with pytest.raises(RuntimeError, match="Missing"):
        plain.load_state_dict({name: v for name, v in timms.items() if "first" not in name})


def test_copies_and_pickles_go_on_alike(monkeypatch):
    model = Net()
    ema = EMA(model, decay=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(library, "takes_kernels", lambda x: True)
        ema.update(model)
    buffer = io.BytesIO()
    torch.save(ema, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(ema), pickle.loads(pickle.dumps(ema)), torch.load(buffer, weights_only=False)]
    wander(model, 1)
    ema.update(model)
    for other in copies:
        other.update(model)
        assert_same(other, ema)


def test_sixteen_bits_keep_small_steps_in_float32():
    model = Net().bfloat16()
    with pytest.warns(UserWarning, match=r"torch\.bfloat16 rounds small steps away"):
        coarse = EMA(model, decay=0.999)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = EMA(model, decay=0.999, dtype=torch.float32)
    for average in (coarse, fine):
        average.module.first.weight.fill_(1.0)
    with torch.no_grad():
        model.first.weight.fill_(0.0)
    for _ in range(100):
        coarse.update(model)
        fine.update(model)
    torch.testing.assert_close(fine.module.first.weight, torch.full((4, 5), 0.999**100))
    assert (coarse.module.first.weight == 1.0).all()


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_decays_out_of_range(decay):
    with pytest.raises(ValueError, match=r"decay must be in 0\.\.1"):
        EMA(nn.Linear(1, 1), decay=decay)


def test_models_that_do_not_fit_are_named():
    ema = EMA(Net())
    with pytest.raises(ValueError, match="the model has no tied, which the average has"):
        ema.update(nn.Sequential(nn.Linear(5, 4)))
    other = Net()
    other.first = nn.Linear(6, 4)
    with pytest.raises(ValueError, match=r"first\.weight is \[4, 5\] in the average and \[4, 6\] in the model"):
        ema.update(other)
    with pytest.raises(ValueError, match=r"the average has no 0\.bias, which the model has"):
        EMA(nn.Sequential(nn.Linear(5, 4)), module=nn.Sequential(nn.Linear(5, 4, bias=False)))


def test_a_model_without_tensors():
    ema = EMA(nn.GELU())
    ema.update(nn.GELU())
    assert ema.n_averaged == 1


def _follow_shards(rank: int, folder: str) -> None:
    """One of two processes: train a sharded model, with its average sharded too; compare with the whole."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 3))
        ema = EMA(model, decay=0.75)
        plain, follower = copy.deepcopy(model), copy.deepcopy(ema)
        for sharded in (model, ema.module):
            fully_shard(sharded[1])
            fully_shard(sharded)
        with pytest.raises(ValueError, match="cannot be copied"):
            EMA(model)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
        for step in range(3):
            images = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
            for m, average, optimizer in zip((model, plain), (ema, follower), optimizers, strict=True):
                loss = (m(images) - average(images)).square().sum() + m(images).square().sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                average.update(m)
        for ours, theirs in zip(ema.module.parameters(), follower.module.parameters(), strict=True):
            assert type(ours.data).__name__ == "DTensor"
            torch.testing.assert_close(ours.full_tensor(), theirs.detach(), rtol=1e-5, atol=1e-6)
        with ema.applied_to(model):
            torch.testing.assert_close(model[0].weight.full_tensor(), follower.module[0].weight.detach())
        torch.testing.assert_close(model[0].weight.full_tensor(), plain[0].weight.detach())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_shards_are_averaged_where_they_lie(tmp_path):
    # Forked, since importing torch twice more would take longer than the test.
    start_processes(_follow_shards, (os.fspath(tmp_path),), nprocs=2, start_method="fork")


@pytest.mark.gpu
def test_average_on_the_processor_of_a_model_on_the_gpu():
    model = Net().cuda()
    ema = EMA(model, decay=0.5, device="cpu")
    on_gpu = EMA(model, decay=0.5)
    with torch.no_grad():
        model.first.weight.add_(1.0)
    for _ in range(3):
        ema.update(model)
        on_gpu.update(model)
    assert ema.module.first.weight.device.type == "cpu"
    assert_same(ema.module, on_gpu.module.cpu())
