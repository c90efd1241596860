"""AdamW, moving average and copies in one launch: against fp64 and torch over several steps, and what it keeps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastjepa.kernels import adamw_ema, multi_tensor
from fastjepa.kernels.adamw_ema import (
    AdamWEMATensors,
    Hyperparameters,
    MultiTensorAdamWEMA,
    adamw_ema_config,
    adamw_ema_cost,
)
from fastjepa.kernels.adamw_ema_tensors import N_PATHS
from fastjepa.kernels.multi_tensor import MovingTable, addresses
from fastjepa.kernels.reference import ema_update_ref_
from tests.kernels.multi_tensor_checks import Placed, error, round_as_a_chip
from tests.kernels.row_checks import DEVICE, assert_compiles_well, launches

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SIZES = (0, 1, 7, 512, 1300)
GROUPS = [Hyperparameters(1e-2, 0.9, 0.999, 1e-8, 0.04), Hyperparameters(3e-3, 0.8, 0.95, 1e-6, 0.0)]
MOMENTUM = 0.9


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    round_as_a_chip(monkeypatch)


@dataclass
class Run:
    """Parameters in two groups, with moments, targets and copies, stepped by the kernel."""

    placed: list[list[Placed | None]]  # of each parameter: p, m, v, t, copy of p, copy of t
    tables: MultiTensorAdamWEMA
    tensors: AdamWEMATensors

    @classmethod
    def start(
        cls,
        sizes: tuple[int, ...] = SIZES,
        dtype: torch.dtype = FP32,
        target: torch.dtype = FP32,
        copy: torch.dtype = BF16,
        aligned: bool = True,
    ) -> Run:
        """Every third parameter has no target, every fourth no copies."""
        rows = []
        for i, n in enumerate(sizes):
            values, zeros = torch.randn(n), torch.zeros(n)
            unwritten = torch.full((n,), float("nan"))
            rows.append([Placed(values, dtype, aligned), Placed(zeros, dtype, aligned), Placed(zeros, dtype, aligned)])
            rows[-1] += [Placed(values, target, aligned)] if i % 3 != 2 else [None]
            rows[-1] += [Placed(unwritten, copy, aligned)] if i % 4 != 3 else [None]
            rows[-1] += [Placed(unwritten, copy, aligned)] if i % 4 != 3 and i % 3 != 2 else [None]
        lists = [[None if x is None else x.tensor for x in column] for column in zip(*rows, strict=True)]
        params = [row[0].tensor for row in rows]
        tensors = AdamWEMATensors(params, [i % 2 for i in range(len(sizes))], *lists[1:])
        tables = MultiTensorAdamWEMA(tensors, 2, torch.zeros(len(sizes), device=DEVICE))
        tables.set_hyperparameters(GROUPS, MOMENTUM, None)
        return cls(rows, tables, tensors)

    def column(self, i: int) -> list[Tensor]:
        """p, m, v, t, copy of p or copy of t of every parameter that has it."""
        return [placed.tensor for row in self.placed if (placed := row[i]) is not None]

    def gradients(self, dtype: torch.dtype | None = None, aligned: bool = True) -> list[Tensor]:
        """New ones."""
        params = self.tensors.params
        return [Placed(torch.randn(p.numel()), dtype or p.dtype, aligned, written=False).tensor for p in params]

    def assert_surroundings_untouched(self) -> None:
        """No tensor was left."""
        for row in self.placed:
            for placed in row:
                if placed is not None:
                    placed.assert_surroundings_untouched()


class Stock:
    """The same by torch, in the run's precision or in another."""

    def __init__(self, run: Run, dtype: torch.dtype | None = None):
        self.params = [torch.nn.Parameter(p.detach().to(dtype or p.dtype, copy=True)) for p in run.tensors.params]
        self.targets = [None if t is None else t.to(dtype or t.dtype, copy=True) for t in run.tensors.targets]
        groups = []
        for i, (lr, beta1, beta2, eps, decay) in enumerate(GROUPS):
            members = [p for p, group in zip(self.params, run.tensors.groups, strict=True) if group == i]
            groups.append({"params": members, "lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay})
        self.optimizer = torch.optim.AdamW(groups)

    def step(self, grads: Sequence[Tensor | None], max_norm: float | None = None, scale: float = 1.0) -> None:
        """One step, by the functions that people use."""
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = None if grad is None else grad.to(p.dtype, copy=True) / scale
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.params, max_norm)
        self.optimizer.step()
        pairs = [(t, p.detach()) for t, p in zip(self.targets, self.params, strict=True) if t is not None]
        ema_update_ref_([t for t, _ in pairs], [p for _, p in pairs], MOMENTUM)

    def column(self, i: int) -> list[Tensor]:
        """As `Run.column`."""
        states = [self.optimizer.state[p] for p in self.params]
        moments = ([s[name] for s in states if s] for name in ("exp_avg", "exp_avg_sq"))
        return [self.params, *moments, [t for t in self.targets if t is not None]][i]


def assert_near(run: Run, stock: Stock, exact: Stock) -> None:
    """p, m, v, t at most twice as far from fp64 as torch's; copies are p and t rounded."""
    for i, name in enumerate(("p", "m", "v", "t")):
        ours = error(run.column(i), exact.column(i))
        assert ours <= 2 * error(stock.column(i), exact.column(i)), name
    for row in run.placed:
        for wide, narrow in ((row[0], row[4]), (row[3], row[5])):
            if wide is not None and narrow is not None:
                assert torch.equal(narrow.tensor, wide.tensor.to(narrow.tensor.dtype))
    run.assert_surroundings_untouched()


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"aligned": False},
        {"copy": FP16},
        {"target": BF16},
        {"dtype": BF16, "target": BF16},
        {"dtype": FP16, "target": FP32},
    ],
    ids=lambda kind: " ".join(f"{k} {v}" for k, v in kind.items()) or "fp32",
)
def test_several_steps(kind: dict):
    run = Run.start(**kind)
    stock, exact = Stock(run), Stock(run, torch.float64)
    for _ in range(4):
        grads = run.gradients()
        run.tables.update(grads)
        stock.step(grads)
        exact.step(grads)
    assert_near(run, stock, exact)
    assert [run.tables.step_of(i).item() for i in range(len(SIZES))] == [4.0] * len(SIZES)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_low_precision_gradients_of_fp32_parameters(dtype: torch.dtype, aligned: bool):
    run = Run.start()
    stock, exact = Stock(run), Stock(run, torch.float64)
    for _ in range(2):
        grads = run.gradients(dtype, aligned)
        run.tables.update(grads)
        stock.step(grads)
        exact.step(grads)
    assert_near(run, stock, exact)


def test_late_steps_of_a_tensor_of_several_chunks():
    """The bias corrections of step 1 and of step 5001, over the border between two chunks."""
    run = Run.start((adamw_ema_config(80).chunk + 600,))
    stock, exact = Stock(run), Stock(run, torch.float64)
    for steps in (0, 5000):
        run.tables.step_of(0).fill_(steps)
        for one in (stock, exact):
            if steps:
                one.optimizer.state[one.params[0]]["step"].fill_(steps)
        grads = run.gradients()
        run.tables.update(grads)
        stock.step(grads)
        exact.step(grads)
        assert_near(run, stock, exact)
        assert run.tables.step_of(0).item() == steps + 1
        # Of the step numbers each chunk has its own.
        assert run.tables._steps.tolist() == [steps + 1] * 2


def test_first_step_from_zero_is_as_near_as_torchs():
    """Where p is 0, nothing hides the rounding of the update itself."""
    run = Run.start((2000,))
    run.tensors.params[0].zero_()
    stock, exact = Stock(run), Stock(run, torch.float64)
    grads = run.gradients()
    run.tables.update(grads)
    stock.step(grads)
    exact.step(grads)
    assert_near(run, stock, exact)


@pytest.mark.parametrize("max_norm", [1.0, 1e6], ids=["clipped", "not clipped"])
def test_clipping_and_the_norm(max_norm: float):
    run = Run.start()
    run.tables.set_hyperparameters(GROUPS, MOMENTUM, max_norm)
    stock, exact = Stock(run), Stock(run, torch.float64)
    for _ in range(3):
        grads = run.gradients()
        run.tables.update(grads, norm=True)
        stock.step(grads, max_norm)
        exact.step(grads, max_norm)
        assert torch.isclose(run.tables.grad_norm.double(), torch.cat([g.double() for g in grads]).norm(), rtol=1e-6)
    assert_near(run, stock, exact)


def test_scaled_gradients():
    run = Run.start()
    run.tables.set_hyperparameters(GROUPS, MOMENTUM, 1.0)
    stock, exact = Stock(run), Stock(run, torch.float64)
    scale, found = torch.full((), 1024.0, device=DEVICE), torch.zeros((), device=DEVICE)
    grads = [1024 * g for g in run.gradients()]
    run.tables.update(grads, norm=True, grad_scale=scale, found_inf=found)
    stock.step(grads, 1.0, 1024.0)
    exact.step(grads, 1.0, 1024.0)
    assert_near(run, stock, exact)
    assert torch.isclose(run.tables.grad_norm * 1024, torch.cat(grads).norm(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), None], ids=["inf", "nan", "found_inf"])
def test_a_step_that_is_not_finite_changes_nothing(bad: float | None, aligned: bool, dtype: torch.dtype):
    run = Run.start(dtype=dtype, aligned=aligned)
    run.tables.update(run.gradients())
    for t in run.column(3):
        t[:1] = -0.0  # a move by nothing would make it 0
    before = [[x.clone().view(torch.int8) for x in run.column(i)] for i in range(6)]
    grads = run.gradients()
    if bad is None:  # somebody else has found it
        run.tables.update(grads, skip_nonfinite=True, found_inf=torch.ones((), device=DEVICE))
    else:
        grads[-1][3] = bad
        run.tables.update(grads, norm=True, skip_nonfinite=True)
        assert not run.tables.grad_norm.isfinite()
    for i in range(6):
        assert all(torch.equal(x.view(torch.int8), y) for x, y in zip(run.column(i), before[i], strict=True))
    assert {run.tables.step_of(i).item() for i in range(len(SIZES))} == {1.0}
    run.assert_surroundings_untouched()


def test_a_step_that_a_scaler_skips_changes_nothing_but_targets_and_copies():
    run = Run.start()
    run.tables.update(run.gradients())
    before = [[x.clone() for x in run.column(i)] for i in range(4)]
    grads = run.gradients()
    grads[-1][3] = float("inf")
    run.tables.update(grads, found_inf=torch.ones((), device=DEVICE))
    for i in range(3):
        assert all(map(torch.equal, run.column(i), before[i]))
    sources = [p for p, t in zip(run.tensors.params, run.tensors.targets, strict=True) if t is not None]
    ema_update_ref_(before[3], sources, MOMENTUM)
    for ours, expected in zip(run.column(3), before[3], strict=True):
        torch.testing.assert_close(ours, expected)
    assert {run.tables.step_of(i).item() for i in range(len(SIZES))} == {1.0}
    run.assert_surroundings_untouched()


def test_a_norm_that_is_nan_reaches_every_parameter_unless_told_to_skip():
    """As with torch's clip_grad_norm_."""
    run = Run.start((8, 8))
    run.tables.set_hyperparameters(GROUPS, MOMENTUM, 1.0)
    grads = run.gradients()
    grads[0][0] = float("nan")
    run.tables.update(grads, norm=True)
    assert run.column(0)[1].isnan().all()


def test_parameters_without_gradient_are_only_averaged_and_copied():
    run = Run.start()
    stock, exact = Stock(run), Stock(run, torch.float64)
    for missing in ({1, 3}, {1, 4}):
        grads = [None if i in missing else g for i, g in enumerate(run.gradients())]
        run.tables.update(grads)
        stock.step(grads)
        exact.step(grads)
    for i in (0, 3):
        assert error(run.column(i), exact.column(i)) <= 2 * error(stock.column(i), exact.column(i))
    assert [run.tables.step_of(i).item() for i in range(5)] == [2.0, 0.0, 2.0, 1.0, 1.0]
    run.assert_surroundings_untouched()


def test_parameters_without_moments():
    """A frozen parameter with a target, as the positional embedding is."""
    run = Run.start((600,))
    bare = dataclasses.replace(run.tensors, exp_avgs=[None], exp_avg_sqs=[None])
    before = run.tensors.params[0].clone()
    run.column(3)[0].zero_()
    tables = MultiTensorAdamWEMA(bare, 2, torch.zeros(1, device=DEVICE))
    tables.set_hyperparameters(GROUPS, 0.75, None)
    tables.update([None])
    assert torch.equal(run.tensors.params[0], before)
    assert torch.equal(run.column(3)[0], 0.25 * before)
    assert torch.equal(run.column(4)[0], before.bfloat16())
    with pytest.raises(ValueError, match="parameter 0 has a gradient and no moments"):
        tables.update(run.gradients())


def test_gradients_laid_otherwise_than_their_parameters():
    weight = torch.randn(3, 4, 5, 6, device=DEVICE).to(memory_format=torch.channels_last)
    values = torch.randn(3, 4, 5, 6, device=DEVICE)
    runs = []
    for grad in (values.to(memory_format=torch.channels_last), values):
        p, m, v, t = weight.clone(), *(torch.zeros_like(weight) for _ in range(3))
        tables = MultiTensorAdamWEMA(
            AdamWEMATensors([p], [0], [m], [v], [t], [None], [None]), 1, torch.zeros(1, device=DEVICE)
        )
        tables.set_hyperparameters(GROUPS[:1], 0.5, None)
        tables.update([grad])
        runs.append((p, t))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_beta_of_zero():
    run = Run.start((600,))
    run.tables.set_hyperparameters([Hyperparameters(1e-2, 0.0, 0.0, 1e-8, 0.0)] * 2, MOMENTUM, None)
    grads = run.gradients()
    run.tables.update(grads)
    assert torch.equal(run.column(1)[0], grads[0])
    torch.testing.assert_close(run.column(2)[0], grads[0] ** 2)


def test_the_same_bits_every_time():
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        run = Run.start((1500, 40))
        run.tables.set_hyperparameters(GROUPS, MOMENTUM, 1.0)
        for _ in range(2):
            run.tables.update(run.gradients(), norm=True)
        states.append([x for i in range(6) for x in run.column(i)])
    assert all(map(torch.equal, *states))


def test_hundreds_of_tensors():
    run = Run.start(tuple(i % 9 for i in range(100)))
    stock, exact = Stock(run), Stock(run, torch.float64)
    grads = run.gradients()
    run.tables.update(grads)
    stock.step(grads)
    exact.step(grads)
    assert_near(run, stock, exact)


@pytest.mark.parametrize("norm", [False, True])
def test_launches_are_the_declared_ones(monkeypatch: pytest.MonkeyPatch, norm: bool):
    run = Run.start()
    grads = run.gradients()
    run.tables.update(grads, norm=norm)
    run.tables.set_hyperparameters(GROUPS, MOMENTUM, None)

    def step() -> None:
        run.tables.set_hyperparameters(GROUPS, MOMENTUM, None)
        run.tables.update(grads, norm=norm)

    expected = 2 if norm else 1
    assert launches(monkeypatch, step) == adamw_ema_cost(run.tensors, grads, norm).launches == expected


def test_cost():
    def tensors(target: bool, copies: bool) -> AdamWEMATensors:
        wide, narrow = (torch.empty(100, dtype=d, device="meta") for d in (FP32, BF16))
        copy, other = narrow if copies else None, narrow if copies and target else None
        return AdamWEMATensors([wide], [0], [wide], [wide], [wide if target else None], [copy], [other])

    grad = torch.empty(100, device="meta")
    assert adamw_ema_cost(tensors(False, False), [grad]).bytes == 2800
    assert adamw_ema_cost(tensors(True, False), [grad]).bytes == 3600
    assert adamw_ema_cost(tensors(True, True), [grad]).bytes == 4000
    assert adamw_ema_cost(tensors(True, True), [grad], norm=True).bytes == 4400
    assert adamw_ema_cost(tensors(True, True), [grad.bfloat16()]).bytes == 3800
    assert adamw_ema_cost(tensors(True, False), [None]).bytes == 1200
    assert adamw_ema_cost(tensors(False, False), [None]).bytes == 0


def test_gradient_table_is_made_again_only_when_a_gradient_moves(monkeypatch: pytest.MonkeyPatch):
    run = Run.start((40, 50))
    uploads = []
    upload = multi_tensor.upload
    monkeypatch.setattr(multi_tensor, "upload", lambda table, device: uploads.append(table) or upload(table, device))
    grads = run.gradients()
    for _ in range(3):
        run.tables.update(grads)
    assert len(uploads) == 1
    run.tables.update([grads[0].clone(), None])
    assert len(uploads) == 2
    assert run.tables.is_current()
    run.tensors.params[0].data = run.tensors.params[0].data.clone()
    assert not run.tables.is_current()


def test_only_aligned_tensors_of_known_dtypes_take_a_path_of_wide_accesses():
    """The interpreter does not mind where a tensor lies; a chip does."""
    scalar = N_PATHS.value
    expected = {None: 0, FP32: 0, BF16: 1, FP16: scalar}
    assert Run.start((40, 40)).tensors.paths() == [expected] * 2
    assert Run.start((40,), dtype=BF16, target=BF16).tensors.paths()[0][BF16] == 2
    assert set(Run.start((40,), aligned=False).tensors.paths()[0].values()) == {scalar}
    for change in ({"copy": FP16}, {"target": BF16}, {"dtype": BF16}):
        assert Run.start((40,), **change).tensors.paths()[0][FP32] == scalar
    run = Run.start((40,))
    rows = [run.tensors.gradient_table(run.gradients(aligned=x), run.tensors.paths())[0][2:] for x in (True, False)]
    assert rows == [[True, 0], [False, scalar]]


def test_a_captured_graph_has_a_gradient_table_of_its_own(monkeypatch: pytest.MonkeyPatch):
    capturing = True
    monkeypatch.setattr(multi_tensor, "is_capturing", lambda device: capturing)
    moving, (one, two) = MovingTable(1, 1, DEVICE), torch.zeros(2, 1)
    with pytest.raises(RuntimeError, match="run one step before capturing"):
        moving.follow(addresses([one]), lambda: [[1]])
    capturing = False
    eager = moving.follow(addresses([one]), lambda: [[1]])
    capturing = True
    captured = moving.follow(addresses([one]), lambda: [[2]])
    with pytest.raises(RuntimeError, match="and one between two"):
        moving.follow(addresses([one]), lambda: [[2]])
    capturing = False
    later = moving.follow(addresses([two]), lambda: [[3]])
    assert [eager.item(), captured.item(), later.item()] == [1, 2, 3]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"targets": [torch.zeros(3, dtype=torch.float64)]}, "parameter 0 comes with dtypes .*float64"),
        ({"targets": [torch.zeros(4)]}, "have gaps in memory or different shapes or strides"),
        ({"exp_avgs": [torch.zeros(3, dtype=torch.bfloat16)]}, "parameter 0 is torch.float32 and its moments are not"),
        ({"targets": [torch.zeros(3, device="meta")]}, r"tensors on \['cpu', 'meta'\], not cpu"),
    ],
)
def test_what_the_kernel_cannot_take_is_named(change: dict, message: str):
    tensors = AdamWEMATensors([torch.zeros(3)], [0], [torch.zeros(3)], [torch.zeros(3)], [None], [None], [None])
    with pytest.raises(ValueError, match=message):
        MultiTensorAdamWEMA(dataclasses.replace(tensors, **change), 1, torch.zeros(1))


def test_shared_memory_is_named():
    p = torch.zeros(3)
    tensors = AdamWEMATensors([p], [0], [torch.zeros(3)], [torch.zeros(3)], [p], [None], [None])
    with pytest.raises(ValueError, match="parameter 0 or what goes with it shares memory"):
        MultiTensorAdamWEMA(tensors, 1, torch.zeros(1))


@pytest.mark.parametrize(
    "grad, message",
    [
        (torch.zeros(3).double(), r"gradient \[3\] torch.float64 for parameter 0 \[3\]"),
        (torch.zeros(4), r"gradient \[4\] torch.float32 for parameter 0 \[3\]"),
        (torch.zeros(3).to_sparse(), "does not take torch.sparse_coo gradients"),
    ],
)
def test_bad_gradients_are_named(grad: Tensor, message: str):
    run = Run.start((3,))
    with pytest.raises(ValueError, match=message):
        run.tables.update([grad.to(DEVICE)])


def test_chunks_are_large_and_hold_whole_blocks():
    for arch in (80, 86, 89, 90, 100):
        config = adamw_ema_config(arch)
        assert config.chunk >= 16384
        assert config.chunk % config.block == 0


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_spills_and_with_wide_loads(arch: int):
    for case in assert_compiles_well("adamw_ema", arch, "", 3):
        assert case["registers"] <= 80, case  # 768 threads to a multiprocessor


@pytest.mark.gpu
def test_a_captured_graph_counts_steps_and_takes_new_hyperparameters():
    run, other = Run.start((100_003, 40)), Run.start((100_003, 40))
    for i in range(6):
        for a, b in zip(run.column(i), other.column(i), strict=True):
            a.copy_(b)
    grads = run.gradients()
    for one in (run, other):
        one.tables.set_hyperparameters(GROUPS, MOMENTUM, 1.0)
        one.tables.update(grads, norm=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.tables.update(grads, norm=True)
    run.tables.update([g.clone() for g in grads], norm=True)  # the graph does not see this table
    other.tables.update(grads, norm=True)
    for lr in (1e-2, 1e-3):
        groups = [group._replace(lr=lr) for group in GROUPS]
        for one in (run, other):
            one.tables.set_hyperparameters(groups, 0.5, 1.0)
        graph.replay()
        other.tables.update(grads, norm=True)
    for i in range(6):
        assert all(map(torch.equal, run.column(i), other.column(i)))
    assert run.tables.step_of(0).item() == 4.0


@pytest.mark.gpu
def test_another_set_of_tensors_compiles_nothing():
    for sizes in ((5,), (1000, 7), (100_000,)):
        for dtype in (FP32, BF16):
            run = Run.start(sizes, dtype)
            run.tables.update(run.gradients())
    assert sum(len(cache[0]) for cache in adamw_ema._adamw_ema_kernel.device_caches.values()) <= 4


@pytest.mark.gpu
def test_steps_are_right_with_many_programs_at_once():
    """Each program reads and writes its own step number, and no thread sees the next one."""
    run = Run.start((20_000_000,))
    stock = Stock(run)
    for _ in range(3):
        grads = run.gradients()
        run.tables.update(grads)
        stock.step(grads)
    assert math.isclose(error(run.column(0), stock.column(0)), 0.0, abs_tol=1e-6)
    assert run.tables._steps.unique().tolist() == [3.0]
