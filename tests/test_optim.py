"""`AdamWEMA` as an optimizer: torch's AdamW on the CPU to the bit, its state dicts, and the kernels behind it."""

from __future__ import annotations

import copy
import io
import math
import os
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from fastjepa.optim import AdamWEMA
from tests.kernels.multi_tensor_checks import round_as_a_chip
from tests.kernels.row_checks import DEVICE, launches, relative_error

SHAPES = ((6, 4), (3, 5), (6,), (3,), (1,), (0,))
TORCH = ("torch", torch.device("cpu"))
KERNELS = ("kernels", DEVICE)
BOTH = pytest.mark.parametrize("path", [TORCH, KERNELS], ids=["torch", "kernels"])


@pytest.fixture(autouse=True)
def path_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test asks for the kernels and there is no GPU, they are interpreted on CPU tensors."""
    round_as_a_chip(monkeypatch)
    if "path" in request.fixturenames and request.getfixturevalue("path") is KERNELS:
        monkeypatch.setattr(AdamWEMA, "_takes_kernels", lambda self: True)


def params_on(device: torch.device) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(s).to(device)) for s in SHAPES]


def official_groups(params: list[nn.Parameter]) -> list[dict]:
    """Weights of the encoder and of the predictor, then what takes no weight decay of each."""
    exempt = {"WD_exclude": True, "weight_decay": 0}
    return [
        {"params": (p for p in params[:1])},
        {"params": params[1:2]},
        {"params": params[2:4], **exempt},
        {"params": params[4:], **exempt},
    ]


def set_grads(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def bits(tensor: Tensor) -> list[int]:
    return tensor.detach().contiguous().flatten().view(torch.uint8).tolist()


def grads_of(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def assert_equal_or_near(ours: Sequence[Tensor], stock: Sequence[Tensor], path: tuple) -> None:
    """To the bit where torch does the work, else to the rounding of fp32 (the kernels' tests hold them to fp64)."""
    for a, b in zip(ours, stock, strict=True):
        assert torch.equal(a, b) if path is TORCH else relative_error(a.detach(), b.detach()) < 1e-6


@BOTH
def test_steps_are_those_of_torchs_adamw(path: tuple):
    ours, stock = params_on(path[1]), params_on(path[1])
    optimizer = AdamWEMA(official_groups(ours), lr=1e-2, weight_decay=0.3)
    theirs = torch.optim.AdamW(official_groups(stock), lr=1e-2, weight_decay=0.3)
    for step in range(4):
        for group, other in zip(optimizer.param_groups, theirs.param_groups, strict=True):
            group["lr"] = other["lr"] = 0.01 * (step + 1)
        for params in (ours, stock):
            set_grads(params, step)
            params[3].grad = None if step == 1 else params[3].grad
        optimizer.step()
        theirs.step()
        assert_equal_or_near(ours, stock, path)


@BOTH
def test_targets_and_copies_follow(path: tuple):
    params = params_on(path[1])
    params[0].requires_grad_(False)
    targets = [p.detach().clone().to(torch.bfloat16 if i == 1 else torch.float32) for i, p in enumerate(params)]
    expected = [t.clone() for t in targets]
    low = {t: torch.empty_like(t, dtype=torch.bfloat16) for t in (params[0], params[2], targets[2])}
    optimizer = AdamWEMA(params, target_params=[*targets[:5], None], momentum=0.9, low_precision=low)
    for step, momentum in enumerate((0.9, 0.5)):
        set_grads(params[1:], step)
        params[4].grad = None
        optimizer.momentum = momentum
        optimizer.step()
        for t, p in zip(expected[:5], params, strict=False):
            t.lerp_(p.detach().to(t.dtype), 1 - momentum)
        for t, want in zip(targets, expected, strict=True):
            torch.testing.assert_close(t, want)
        assert all(torch.equal(narrow, wide.detach().bfloat16()) for wide, narrow in low.items())
    assert params[0] not in optimizer.state


@BOTH
def test_targets_by_parameter(path: tuple):
    params = params_on(path[1])
    target = torch.zeros(6, device=path[1])
    optimizer = AdamWEMA(official_groups(params), target_params={params[2]: target}, momentum=0.0)
    set_grads(params, 0)
    optimizer.step()
    assert torch.equal(target, params[2])


@BOTH
def test_clipping_leaves_gradients_as_they_are(path: tuple):
    ours, stock = params_on(path[1]), params_on(path[1])
    optimizer, theirs = AdamWEMA(ours, max_grad_norm=0.5), torch.optim.AdamW(stock)
    assert optimizer.grad_norm is None
    for step in range(2):
        set_grads(ours, step)
        set_grads(stock, step)
        before = [g.clone() for g in grads_of(ours)]
        norm = nn.utils.clip_grad_norm_(stock, 0.5)
        optimizer.step()
        theirs.step()
        torch.testing.assert_close(optimizer.grad_norm, norm)
        assert all(map(torch.equal, grads_of(ours), before))
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b)


@BOTH
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_that_is_not_finite_changes_nothing(path: tuple, bad: float):
    params = params_on(path[1])
    targets = [torch.full_like(p, -0.0) for p in params]
    copies = {t: t.bfloat16() for t in (*params, *targets)}
    optimizer = AdamWEMA(params, target_params=targets, momentum=0.5, skip_nonfinite=True, low_precision=copies)
    set_grads(params, 0)
    grads_of(params)[0][0, 0] = bad
    everything = [*params, *targets, *copies.values()]
    before = [bits(t) for t in everything]
    optimizer.step()
    assert optimizer.grad_norm is not None
    assert not optimizer.grad_norm.isfinite()
    assert [bits(t) for t in everything] == before
    set_grads(params, 0)
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"].item() == 1.0
    assert all(torch.equal(t, 0.5 * p) for t, p in zip(targets, params, strict=True))


@BOTH
@pytest.mark.parametrize("overflow", [False, True])
def test_under_a_gradient_scaler(path: tuple, overflow: bool):
    ours, stock = params_on(path[1]), params_on(path[1])
    optimizer, theirs = AdamWEMA(ours), torch.optim.AdamW(stock)
    scaler = torch.amp.GradScaler(path[1].type, init_scale=1024.0)
    scaler.scale(torch.zeros((), device=path[1]))  # its scale is made at first use
    set_grads(ours, 0)
    set_grads(stock, 0)
    for grad in grads_of(ours):
        grad *= 1024
    if overflow:
        grads_of(ours)[0][0, 0] = math.inf
    else:
        theirs.step()
    scaler.step(optimizer)
    scaler.update()
    assert_equal_or_near(ours, stock, path)
    assert scaler.get_scale() == (512.0 if overflow else 1024.0)


@BOTH
def test_state_goes_to_torchs_adamw_and_back(path: tuple):
    """ours -> stock -> ours, each going on for two steps, ends where stock alone does."""
    moving, stock = params_on(path[1]), params_on(path[1])
    theirs = torch.optim.AdamW(official_groups(stock), lr=1e-2)
    for step in range(6):
        set_grads(stock, step)
        theirs.step()
    state = None
    for start, make in ((0, AdamWEMA), (2, torch.optim.AdamW), (4, AdamWEMA)):
        optimizer = make(official_groups(moving), lr=1e-2)
        if state is not None:
            optimizer.load_state_dict(state)
        for step in (start, start + 1):
            set_grads(moving, step)
            optimizer.step()
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    assert_equal_or_near(moving, stock, path)
    expected = theirs.state_dict()
    assert state["param_groups"] == expected["param_groups"]
    assert state["param_groups"][2]["WD_exclude"] is True
    assert list(state["state"]) == list(expected["state"])
    for ours, other in zip(state["state"].values(), expected["state"].values(), strict=True):
        assert list(ours) == list(other) == ["step", "exp_avg", "exp_avg_sq"]
        assert ours["step"].device == other["step"].device == torch.device("cpu")
        assert_equal_or_near(list(ours.values()), list(other.values()), path)


@BOTH
def test_loading_while_running(path: tuple):
    """A state loaded into an optimizer that has stepped replaces its moments and its step numbers."""
    params, reference = params_on(path[1]), params_on(path[1])
    optimizer, other = AdamWEMA(params), AdamWEMA(reference)
    set_grads(params, 0)
    set_grads(reference, 0)
    optimizer.step()
    other.step()
    saved, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    optimizer.step()
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
    for one in (optimizer, other):
        one.step()
    assert all(map(torch.equal, params, reference))
    assert optimizer.state_dict()["state"][0]["step"].item() == 2.0


@BOTH
@pytest.mark.parametrize("replace", [False, True], ids=["in place", "replaced"])
def test_step_numbers_set_by_hand_count(path: tuple, replace: bool):
    ours, stock = params_on(path[1]), params_on(path[1])
    optimizer, theirs = AdamWEMA(ours), torch.optim.AdamW(stock)
    for step in range(2):
        for one, params in ((optimizer, ours), (theirs, stock)):
            set_grads(params, step)
            one.step()
            for p in params:
                one.state[p]["step"] = torch.tensor(100.0) if replace else one.state[p]["step"].fill_(100)
    assert_equal_or_near(ours, stock, path)


@BOTH
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: torch.load(_saved(x), weights_only=False)])
def test_copies_of_the_optimizer_go_on_by_themselves(path: tuple, clone: Callable):
    params = params_on(path[1])
    targets = [torch.zeros_like(p) for p in params]
    optimizer = AdamWEMA(params, target_params=targets, momentum=0.5, max_grad_norm=1.0)
    set_grads(params, 0)
    optimizer.step()
    other = clone(optimizer)
    theirs = other.param_groups[0]["params"]
    set_grads(params, 1)
    set_grads(theirs, 1)
    optimizer.step()
    other.step()
    assert all(map(torch.equal, params, theirs))
    assert all(torch.equal(targets[i], other._targets[p]) for i, p in enumerate(theirs))
    assert targets[0] is not other._targets[theirs[0]]


def _saved(value: object) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return io.BytesIO(buffer.getvalue())


@BOTH
def test_groups_added_later(path: tuple):
    ours, stock = params_on(path[1]), params_on(path[1])
    optimizer, theirs = AdamWEMA(ours[:2]), torch.optim.AdamW(stock[:2])
    for step in range(2):
        for one, params in ((optimizer, ours), (theirs, stock)):
            set_grads(params, step)
            one.step()
            if step == 0:
                one.add_param_group({"params": params[2:], "lr": 0.1})
    assert_equal_or_near(ours, stock, path)


@BOTH
def test_closure_hooks_and_scheduler(path: tuple):
    params = params_on(path[1])
    optimizer = AdamWEMA(params, lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    calls = []
    optimizer.register_step_post_hook(lambda *args: calls.append("hook"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.cat([p.flatten() for p in params]).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > optimizer.step(closure).item()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert calls == ["hook", "hook"]


@BOTH
def test_learning_rate_as_a_tensor(path: tuple):
    ours, stock = params_on(path[1]), params_on(path[1])
    optimizer, theirs = AdamWEMA(ours, lr=torch.tensor(0.01)), torch.optim.AdamW(stock, lr=torch.tensor(0.01))
    for step in range(2):
        for one, params in ((optimizer, ours), (theirs, stock)):
            set_grads(params, step)
            one.param_groups[0]["lr"].mul_(2)
            one.step()
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", [KERNELS], ids=["kernels"])
@pytest.mark.parametrize("norm", [False, True])
def test_a_step_is_one_launch_or_two(path: tuple, norm: bool, monkeypatch: pytest.MonkeyPatch):
    params = params_on(DEVICE)
    optimizer = AdamWEMA(
        official_groups(params),
        target_params=[torch.zeros_like(p) for p in params],
        low_precision={p: p.detach().bfloat16() for p in params},
        max_grad_norm=1.0 if norm else None,
    )
    set_grads(params, 0)
    optimizer.step()
    tables = optimizer._tables
    # Without the wrapper by which torch marks a step for its profiler, which counts as operations.
    step = AdamWEMA.step.__wrapped__
    assert launches(monkeypatch, lambda: step(optimizer)) == (2 if norm else 1)
    for p, grad in zip(params, grads_of(params), strict=True):
        p.grad = grad.clone()
    optimizer.step()
    assert optimizer._tables is tables
    params[0].data = params[0].data.clone()
    optimizer.step()
    assert optimizer._tables is not tables
    assert optimizer.state_dict()["state"][0]["step"].item() == 4.0


@pytest.mark.parametrize("path", [KERNELS], ids=["kernels"])
@pytest.mark.parametrize("what", ["fp64", "amsgrad", "gaps"])
def test_what_the_kernels_cannot_take_goes_to_torch_and_is_said_once(path: tuple, what: str):
    def make() -> list[nn.Parameter]:
        torch.manual_seed(0)
        value = torch.randn(4, 6, device=DEVICE)
        return [nn.Parameter(value.double() if what == "fp64" else value[:, ::2] if what == "gaps" else value)]

    ours, stock = make(), make()
    optimizer, theirs = AdamWEMA(ours), torch.optim.AdamW(stock)
    if what == "amsgrad":
        optimizer.param_groups[0]["amsgrad"] = theirs.param_groups[0]["amsgrad"] = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            for one, params in ((optimizer, ours), (theirs, stock)):
                set_grads(params, step)
                one.step()
    said = [str(w.message) for w in caught if "AdamWEMA" in str(w.message)]
    assert len(said) == 1, said
    assert {"fp64": "float64", "amsgrad": "amsgrad", "gaps": "gaps"}[what] in said[0]
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b)


P, Q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize(
    "params, options, message",
    [
        ([P], {"lr": -1.0}, "-1.0"),
        ([P], {"betas": (1.0, 0.9)}, "1.0"),
        ([{"params": [P], "lr": -2.0}], {}, "lr must be finite and not negative, got -2.0"),
        ([{"params": [P], "weight_decay": math.nan}], {}, "weight_decay must be finite and not negative, got nan"),
        ([{"params": [P], "betas": (0.9, 1.5)}], {}, r"betas must be in 0\.\.1, 1 excluded, got \(0.9, 1.5\)"),
        ([], {}, "empty parameter list"),
        ([torch.zeros(2, dtype=torch.complex64)], {}, "parameters must be of a floating dtype, got torch.complex64"),
        ([P], {"momentum": 1.5}, r"momentum must be in 0\.\.1, got 1.5"),
        ([P], {"momentum": math.nan}, r"momentum must be in 0\.\.1, got nan"),
        ([P], {"max_grad_norm": 0.0}, "max_grad_norm must be positive or None, got 0.0"),
        ([P, Q], {"target_params": [torch.zeros(2)]}, "one entry for each of 2 parameters, .* got 1"),
        ([P], {"target_params": [torch.zeros(3)]}, r"a target of shape \[3\] for a tensor of shape \[2\]"),
        ([P], {"target_params": [torch.zeros(2).int()]}, "a target must be .* floating dtype, got torch.int32"),
        ([P], {"target_params": [torch.zeros(2, device="meta")]}, "a target on meta for a tensor on cpu"),
        ([P], {"target_params": {Q: torch.zeros(3)}}, "1 keys that are not parameters of this optimizer"),
        ([P], {"low_precision": {Q: torch.zeros(3)}}, "neither a parameter nor a target"),
        ([P], {"low_precision": {P: torch.zeros(3)}}, "a low-precision copy of shape"),
        ([P, Q], {"target_params": [Q.data[:2]] * 2}, "a target of shape"),
        ([P, P], {}, "a parameter is given twice in one group"),
    ],
)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_bad_input_is_named(params, options, message):
    with pytest.raises(ValueError, match=message):
        AdamWEMA(params, **options)


def test_momentum_set_later_is_checked():
    optimizer = AdamWEMA([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=r"momentum must be in 0\.\.1, got -0.1"):
        optimizer.momentum = -0.1
    assert optimizer.momentum == 0.996


@BOTH
def test_sparse_gradients_are_refused(path: tuple):
    p = nn.Parameter(torch.zeros(3, 2, device=path[1]))
    p.grad = torch.ones(3, 2, device=path[1]).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        AdamWEMA([p]).step()


def test_a_group_that_is_refused_is_not_added():
    optimizer = AdamWEMA([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="eps"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "eps": -1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.gpu
def test_a_training_step_in_a_graph():
    """Forward, backward and step captured together, with schedules that move on between replays."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64, device="cuda")
    other = copy.deepcopy(model)
    x = torch.randn(32, 64, device="cuda")
    pairs = []
    for one in (model, other):
        targets = [p.detach().clone() for p in one.parameters()]
        pairs.append((one, targets, AdamWEMA(one.parameters(), target_params=targets, max_grad_norm=1.0)))

    def train(one: nn.Module, optimizer: AdamWEMA) -> None:
        optimizer.zero_grad(set_to_none=True)
        one(x).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for one, _, optimizer in pairs:
            for _ in range(3):
                train(one, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    pairs[0][2].zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        model(x).square().mean().backward()
        pairs[0][2].step()
    for lr, momentum in ((1e-2, 0.9), (1e-3, 0.5)):
        for _, _, optimizer in pairs:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.momentum = momentum
        pairs[0][2].sync_hyperparameters()
        graph.replay()
        train(other, pairs[1][2])
    for a, b in zip([*model.parameters(), *pairs[0][1]], [*other.parameters(), *pairs[1][1]], strict=True):
        torch.testing.assert_close(a, b)
    assert pairs[0][2].state_dict()["state"][0]["step"].item() == 5.0


def test_copies_of_what_others_wrote_are_not_current():
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamWEMA([p], low_precision={p: torch.ones(3, dtype=torch.bfloat16)})
    assert optimizer.copies_are_current()
    with torch.no_grad():
        p.mul_(2)
    assert not optimizer.copies_are_current()
    optimizer.step()
    assert optimizer.copies_are_current()
    with torch.no_grad():
        p.mul_(2)
    optimizer.note_replay()
    assert optimizer.copies_are_current()


@pytest.mark.gpu
def test_a_step_waits_for_nothing():
    params = params_on(torch.device("cuda"))
    optimizer = AdamWEMA(params, target_params=[torch.zeros_like(p) for p in params], max_grad_norm=1.0)
    set_grads(params, 0)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            optimizer.param_groups[0]["lr"] = 1e-3 * step
            for p, grad in zip(params, grads_of(params), strict=True):
                p.grad = grad.clone()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _step_shards(rank: int, folder: str) -> None:
    """One of two processes: steps on shards, by torch's functions and by the kernels, beside steps on the whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        for takes_kernels in (False, True):
            AdamWEMA._takes_kernels = lambda self, on=takes_kernels: on  # this process has the class to itself
            whole = params_on(torch.device("cpu"))[:5]  # one of them has nothing in the second process
            shards = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in whole]
            pairs = [(params, [p.detach().clone() for p in params]) for params in (whole, shards)]
            settings = {"lr": 0.1, "momentum": 0.5, "max_grad_norm": 0.7, "skip_nonfinite": True}
            ours = [AdamWEMA(params, target_params=targets, **settings) for params, targets in pairs]
            for step in range(3):
                set_grads(whole, step)
                if step == 1 and whole[0].grad is not None:
                    whole[0].grad[-1] = math.inf  # in the second process alone, and both skip
                for p, shard in zip(whole, shards, strict=True):
                    shard.grad = None if p.grad is None else distribute_tensor(p.grad, mesh, [Shard(0)])
                for optimizer in ours:
                    optimizer.step()
                torch.testing.assert_close(ours[1].grad_norm, ours[0].grad_norm)
            for (p, shard), (target, part) in zip(
                zip(whole, shards, strict=True), zip(pairs[0][1], pairs[1][1], strict=True), strict=True
            ):
                torch.testing.assert_close(shard.full_tensor(), p, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(part.full_tensor(), target, rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="not sharded as its tensor"):
            AdamWEMA(shards[:1], target_params=[whole[0].detach().clone()])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernels are interpreted on the processor")
def test_shards_are_stepped_where_they_lie(tmp_path):
    start_processes(_step_shards, (os.fspath(tmp_path),), nprocs=2, start_method="fork")
