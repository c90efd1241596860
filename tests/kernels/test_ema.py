"""The moving average of many tensors: against fp64 and torch, in any dtype and place, with the tables it keeps."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastjepa.kernels import ema
from fastjepa.kernels.ema import MultiTensorEMA, ema_cost, ema_update_
from fastjepa.kernels.multi_tensor import chunk_table
from fastjepa.kernels.reference import ema_update_ref_
from tests.kernels.multi_tensor_checks import Placed, error, round_as_a_chip
from tests.kernels.row_checks import DEVICE, assert_compiles_well, launches

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PAIRS = tuple(itertools.product(DTYPES, DTYPES))


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    round_as_a_chip(monkeypatch)


def placed(sizes: list[int], target: torch.dtype, source: torch.dtype, aligned: bool = True) -> tuple[list, list]:
    return (
        [Placed(torch.randn(n), target, aligned) for n in sizes],
        [Placed(torch.randn(n), source, aligned, written=False) for n in sizes],
    )


def check(targets: list[Placed], sources: list[Placed], momentum: float) -> None:
    """One update of everything, each kind of pair by itself at most twice as far from fp64 as torch."""
    before = [t.tensor.clone() for t in targets]
    torchs = [t.clone() for t in before]
    theirs = [s.tensor.clone() for s in sources]
    exact = [momentum * t.double() + (1 - momentum) * s.double() for t, s in zip(before, theirs, strict=True)]
    ema_update_ref_(torchs, theirs, momentum)
    ema_update_([t.tensor for t in targets], [s.tensor for s in sources], momentum)
    for kind in PAIRS:
        places = [
            i for i, t in enumerate(targets) if (t.tensor.dtype, theirs[i].dtype) == kind and t.tensor.numel() > 9
        ]
        if places:
            ours = error([targets[i].tensor for i in places], [exact[i] for i in places])
            assert ours <= 2 * error([torchs[i] for i in places], [exact[i] for i in places]), kind
    for i, target in enumerate(targets):
        target.assert_surroundings_untouched()
        # Of a few numbers torch may happen to round each one right.
        near = torch.finfo(target.tensor.dtype).eps * (before[i].abs() + theirs[i].abs().to(before[i].dtype))
        assert ((target.tensor.double() - exact[i]).abs() <= near.double()).all()
        assert torch.equal(sources[i].tensor, theirs[i])


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "off by one"])
def test_every_pair_of_dtypes_in_one_call(aligned: bool):
    targets, sources = [], []
    for target, source in PAIRS:
        more_targets, more_sources = placed([0, 1, 3, 1024, 2500], target, source, aligned)
        targets += more_targets
        sources += more_sources
    check(targets, sources, 0.996)


def test_target_and_source_differ_in_alignment():
    targets, sources = placed([5000], torch.float32, torch.float32)
    check(targets, [Placed(s.tensor, torch.float32, aligned=False, written=False) for s in sources], 0.996)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.9999, 1.0])
def test_momentum(momentum: float):
    check(*placed([1500], torch.float32, torch.float32), momentum)


def test_tensor_of_several_chunks():
    chunk = ema.ema_config(80).chunk
    check(*placed([2 * chunk + 1029], torch.float32, torch.float32), 0.996)


def test_momentum_of_0_and_1_are_exact():
    targets, sources = placed([1025], torch.float32, torch.float32)
    before = targets[0].tensor.clone()
    ema_update_([targets[0].tensor], [sources[0].tensor], 1.0)
    assert torch.equal(targets[0].tensor, before)
    ema_update_([targets[0].tensor], [sources[0].tensor], 0.0)
    assert torch.equal(targets[0].tensor, sources[0].tensor)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 3000), st.sampled_from(PAIRS), st.booleans()), min_size=1, max_size=6))
def test_any_tensors(kinds: list[tuple[int, tuple[torch.dtype, torch.dtype], bool]]):
    pairs = [placed([size], *dtypes, aligned) for size, dtypes, aligned in kinds]
    check([t for targets, _ in pairs for t in targets], [s for _, sources in pairs for s in sources], 0.99)


def test_hundreds_of_tensors():
    shapes = [(i % 7, i % 5 + 1) for i in range(200)]
    targets, sources = ([torch.randn(s, device=DEVICE) for s in shapes] for _ in range(2))
    exact = [t.double().lerp(s.double(), 0.25) for t, s in zip(targets, sources, strict=True)]
    ema_update_(targets, sources, 0.75)
    assert error(targets, exact) < 1e-7


def test_launches_are_the_declared_one(monkeypatch: pytest.MonkeyPatch):
    targets, sources = (
        [torch.randn(n, device=DEVICE, dtype=d) for n in (5, 0, 2000) for d in DTYPES] for _ in range(2)
    )
    average = MultiTensorEMA(targets, sources)
    average.update(0.75)
    assert launches(monkeypatch, lambda: average.update(0.5)) == ema_cost(targets, sources).launches == 1


def test_momentum_on_the_device_is_read_when_the_kernel_runs():
    targets, sources = placed([1500], torch.float32, torch.float32)
    other = targets[0].tensor.clone()
    momentum = torch.zeros((), dtype=torch.float64, device=DEVICE)
    average = MultiTensorEMA([targets[0].tensor], [sources[0].tensor])
    for value in (0.9, 0.9999):
        momentum.fill_(value)
        average.update(momentum)
        ema_update_([other], [sources[0].tensor], value)
    assert torch.equal(targets[0].tensor, other)


def test_tables_are_built_again_only_when_a_tensor_moves(monkeypatch: pytest.MonkeyPatch):
    uploads = []
    upload = ema.upload
    monkeypatch.setattr(ema, "upload", lambda table, device: uploads.append(table) or upload(table, device))
    target, source = torch.nn.Parameter(torch.zeros(40, device=DEVICE)), torch.ones(40, device=DEVICE)
    average = MultiTensorEMA([target], [source])
    for _ in range(3):
        average.update(0.5)
    assert len(uploads) == 2
    target.data = target.data.clone()
    average.update(0.5)
    target.data = target.data.half()
    average.update(0.5)
    assert len(uploads) == 6
    assert target.tolist() == [1 - 0.5**5] * 40


def test_dense_tensors_in_any_order_are_swept_and_others_take_the_reference(monkeypatch: pytest.MonkeyPatch):
    def make() -> tuple[torch.Tensor, ...]:
        image = torch.randn(2, 3, 4, 5, device=DEVICE).to(memory_format=torch.channels_last)
        return image, torch.randn(6, 8, device=DEVICE)[:, ::2], torch.randn(6, 4, device=DEVICE).t().double()

    targets, sources = make(), make()
    sources = (*sources[:2], torch.randn(4, 6, device=DEVICE))
    exact = [t.double().lerp(s.double(), 0.25) for t, s in zip(targets, sources, strict=True)]
    average = MultiTensorEMA(targets[:1], sources[:1])
    average.update(1.0)
    assert launches(monkeypatch, lambda: average.update(1.0)) == 1
    ema_update_(targets, sources, 0.75)
    for target, expected in zip(targets, exact, strict=True):
        assert error([target], [expected]) < 1e-7


def test_writing_is_seen_by_autograd():
    weight, source = torch.ones(3, device=DEVICE, requires_grad=True), torch.zeros(3, device=DEVICE)
    loss = (weight * weight).sum()
    ema_update_([weight], [source], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_to_do():
    ema_update_([], [], 0.5)
    ema_update_([torch.zeros(0, device=DEVICE)], [torch.zeros(0, device=DEVICE)], 0.5)
    empty, target = torch.zeros(0, device=DEVICE), torch.ones(3, device=DEVICE)
    ema_update_([empty, target], [torch.ones(0, device=DEVICE), torch.zeros(3, device=DEVICE)], 0.5)
    assert empty.shape == (0,)
    assert target.tolist() == [0.5] * 3


@pytest.mark.parametrize(
    "targets, sources, momentum, message",
    [
        ([torch.zeros(2)], [], 0.5, "as many targets as sources are needed, got 1 and 0"),
        ([torch.zeros(2)], [torch.zeros(3)], 0.5, r"pair 0 has shapes \[2\] and \[3\]"),
        ([torch.zeros(2, dtype=torch.int64)], [torch.zeros(2)], 0.5, "pair 0 must be of floating dtypes"),
        ([torch.zeros(2)], [torch.zeros(2, dtype=torch.complex64)], 0.5, "pair 0 must be of floating dtypes"),
        ([torch.zeros(2)], [torch.zeros(2, device="meta")], 0.5, "pair 0 is on cpu and meta"),
        ([torch.zeros(2)], [torch.zeros(2)], 1.5, r"momentum must be in 0\.\.1, got 1.5"),
        ([torch.zeros(2)], [torch.zeros(2)], float("nan"), r"momentum must be in 0\.\.1, got nan"),
        ([torch.zeros(2)], [torch.zeros(2)], torch.zeros(2), "momentum must be one floating element on cpu"),
    ],
)
def test_bad_input_is_named(targets, sources, momentum, message):
    with pytest.raises(ValueError, match=message):
        ema_update_(targets, sources, momentum)


def test_one_target_twice_is_refused():
    target = torch.zeros(2)
    with pytest.raises(ValueError, match="targets 0 and 1 are the same memory"):
        MultiTensorEMA([target, target], [torch.ones(2), torch.ones(2)])


def test_cost():
    shapes = [(1280, 1280), (1280,), (0,)]
    elements = 1280 * 1281
    full, half = ([torch.empty(s, dtype=d, device="meta") for s in shapes] for d in (torch.float32, torch.bfloat16))
    assert ema_cost(full, full).bytes == 12 * elements
    assert ema_cost(full, half).bytes == 10 * elements
    assert ema_cost(half, full).bytes == 8 * elements
    assert ema_cost(full, full).flops == 3 * elements
    assert ema_cost([], []).launches == 0


def test_only_aligned_pairs_take_wide_accesses():
    """The interpreter does not mind where a tensor lies; a chip does."""
    pairs = [
        [Placed(torch.zeros(9), torch.float16, aligned) for aligned in pair]
        for pair in itertools.product((True, False), repeat=2)
    ]
    average = MultiTensorEMA([t.tensor for t, _ in pairs], [s.tensor for _, s in pairs])
    average.update(0.5)
    assert average._tensors[:, 5].tolist() == [1, 0, 0, 0]


def test_chunks_cover_every_element_once():
    assert chunk_table([5, 0, 9], 4).tolist() == [[0, 0], [0, 1], [2, 0], [2, 1], [2, 2]]
    assert chunk_table([5, 0, 4], 4, at_least=1).tolist() == [[0, 0], [0, 1], [1, 0], [2, 0]]
    assert ema.ema_config(80).chunk >= 16384


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_spills_and_with_wide_loads(arch: int):
    for case in assert_compiles_well("ema", arch, "", 2):
        assert case["registers"] <= 40, case  # 1536 threads to a multiprocessor


@pytest.mark.gpu
def test_a_captured_graph_replays_with_the_momentum_of_then():
    target, source = torch.zeros(100_003, device="cuda"), torch.ones(100_003, device="cuda")
    momentum = torch.ones((), dtype=torch.float64, device="cuda")
    average = MultiTensorEMA([target], [source])
    average.update(momentum)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        average.update(momentum)
    for value in (0.5, 0.25):
        momentum.fill_(value)
        graph.replay()
    assert target.unique().tolist() == [0.875]


@pytest.mark.gpu
def test_tables_cannot_be_built_in_a_capture():
    target, source = torch.zeros(8, device="cuda"), torch.ones(8, device="cuda")
    with pytest.raises(RuntimeError, match="before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ema_update_([target], [source], 0.5)


@pytest.mark.gpu
def test_another_set_of_tensors_compiles_nothing():
    for sizes in ([5], [1000, 7], [100_000]):
        for target, source in PAIRS:
            targets, sources = placed(sizes, target, source)
            ema_update_([t.tensor for t in targets], [s.tensor for s in sources], 0.9)
    assert sum(len(cache[0]) for cache in ema._ema_kernel.device_caches.values()) <= 2
