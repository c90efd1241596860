"""What one lane computes: against NumPy's and PyTorch's own numbers, and where a chip's rules differ from theirs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.emulator.arithmetic import bits_of, operation, read, write

NAN, INF = float("nan"), float("inf")
FLOATS = [0.0, -0.0, 1.0, -1.5, 3.4e38, 1e-40, -1e-40, 0.1, 65504.0, 448.0, 1e-8, INF, -INF, NAN]


def compute(op: str, *operands: list) -> list:
    """The result of an instruction for lists of numbers, in and out by its kinds."""
    known = operation(op)
    assert known is not None
    raw = [write(np.array(x, dtype=_dtype(kind)), kind) for x, kind in zip(operands, known.takes, strict=False)]
    with np.errstate(all="ignore"):
        numbers = known.function(*(read(r, kind) for r, kind in zip(raw, known.takes, strict=False)))
    return read(write(np.asarray(numbers), known.gives), known.gives).tolist()


def _dtype(kind: str) -> type:
    if kind == "pred":
        return bool
    real = kind.startswith(("f", "bf"))
    return np.float64 if kind == "f64" else np.float32 if real else np.int64 if kind[0] == "s" else np.uint64


@pytest.mark.parametrize("kind, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_narrow_numbers_are_rounded_as_pytorch_rounds_them(kind: str, dtype: torch.dtype):
    drawn = np.random.randn(5000) * 10.0 ** np.random.randint(-9, 4, 5000)
    numbers = np.concatenate([drawn, FLOATS]).astype(np.float32)
    wanted = torch.from_numpy(numbers).to(dtype)
    with np.errstate(over="ignore"):
        found = write(numbers, kind)
    nan = np.isnan(numbers)
    assert np.array_equal(found[~nan], wanted.view(torch.uint16).numpy()[~nan])
    assert np.isnan(read(found, kind)[nan]).all()
    assert np.array_equal(read(found, kind)[~nan], wanted.float().numpy()[~nan])


def test_eight_bits_end_at_448():
    assert operation("cvt.rn.satfinite.e4m3x2.f32") is not None
    pair = write(np.array([[1e9, -0.3], [NAN, 0.0]], dtype=np.float32), "e4m3x2")
    low, high = (torch.from_numpy((pair >> shift & 255).astype(np.uint8)).view(torch.float8_e4m3fn) for shift in (0, 8))
    assert low[0].item() == 448.0
    assert low[1].isnan()
    assert high.float().tolist() == [-0.3125, 0.0]


def test_pairs_go_from_the_low_half_up():
    known = operation("cvt.rn.bf16x2.f32")
    assert known is not None
    raw = write(known.function(np.float32([1.0]), np.float32([2.0])), known.gives)  # the first goes to the upper half
    assert raw.tolist() == [0x3F80_4000]
    assert read(raw, "bf16x2").tolist() == [[2.0, 1.0]]
    assert compute("fma.rn.bf16x2", [[1.0, 2.0]], [[3.0, 0.1]], [[-3.0, 1.0]]) == [[0.0, 1.203125]]


@pytest.mark.parametrize(
    "op, operands, wanted",
    [
        ("add.s32", ([2**31 - 1], [1]), [-(2**31)]),
        ("sub.s64", ([0], [1]), [-1]),
        ("mul.lo.s32", ([65537], [65537]), [131073]),
        ("mul.hi.u32", ([2**31], [6]), [3]),
        ("mul.wide.s32", ([-3], [2**30]), [-3 * 2**30]),
        ("mul.wide.u32", ([2**32 - 1], [2**32 - 1]), [(2**32 - 1) ** 2]),
        ("mad.lo.s64", ([-3], [5], [1]), [-14]),
        ("mad.wide.s32", ([-1], [4], [2]), [-2]),
        ("div.s32", ([-7, 7, -7], [2, -2, -2]), [-3, -3, 3]),
        ("rem.s64", ([-7, 7], [2, -2]), [-1, 1]),
        ("shl.b32", ([1, 1, 1], [31, 32, 99]), [2**31, 0, 0]),
        ("shr.u32", ([2**31, 2**31], [31, 32]), [1, 0]),
        ("shr.s32", ([-8, -8, 8], [1, 40, 40]), [-4, -1, 0]),
        ("bfe.u32", ([0xABCD], [4], [8]), [0xBC]),
        ("bfe.s32", ([0b1000, 0b0111], [3, 0], [1, 3]), [-1, -1]),
        ("prmt.b32", ([0x33221100], [0x77665544], [0x7610]), [0x77661100]),
        ("prmt.b32", ([0x00000080], [0], [0x8888]), [0xFFFFFFFF]),
        ("min.s64", ([-1], [1]), [-1]),
        ("max.f32", ([NAN], [1.0]), [1.0]),
        ("max.f32", ([2.0], [NAN], [3.0]), [3.0]),
        ("cvt.s64.s32", ([-5],), [-5]),
        ("cvt.u64.u32", ([2**32 - 5],), [2**32 - 5]),
        ("cvt.u32.u64", ([2**33 + 5],), [5]),
        ("cvt.rn.f32.s64", ([2**24 + 1],), [float(2**24)]),
        ("selp.b32", ([1, 1], [2, 2], [True, False]), [1, 2]),
        ("setp.lt.s32", ([-1], [0]), [True]),
        ("setp.lt.u32", ([2**32 - 1], [0]), [False]),
        ("setp.ne.f32", ([NAN, 1.0], [NAN, 2.0]), [False, True]),
        ("setp.geu.f32", ([NAN, 1.0], [1.0, 2.0]), [True, False]),
        ("setp.ne.bf16", ([NAN], [1.0]), [False]),
        ("not.pred", ([True, False],), [False, True]),
        ("ex2.approx.ftz.f32", ([3.0, -1e-40, -200.0, -INF],), [8.0, 1.0, 0.0, 0.0]),
        ("rsqrt.approx.ftz.f32", ([4.0, 0.0],), [0.5, INF]),
        ("add.f32", ([1e-40], [0.0]), [float(np.float32(1e-40))]),
        ("add.rn.f32.bf16", ([1.5], [2.0]), [3.5]),
        ("abs.ftz.f32", ([-1e-40, -2.0],), [0.0, 2.0]),
    ],
)
def test_rules_of_the_chip(op: str, operands: tuple[list, ...], wanted: list):
    assert compute(op, *operands) == wanted


def test_a_fused_sum_is_rounded_once():
    a, square = 1 + 2.0**-12, 1 + 2.0**-11  # its square is 2^-24 more, half a unit
    assert compute("mul.f32", [a], [a]) == [square]
    assert compute("fma.rn.f32", [a], [a], [-square]) == [2.0**-24]
    c, d = 1 + 2.0**-30, 1 - 2.0**-30
    assert compute("fma.rn.f64", [c], [d], [-1.0]) == [-(2.0**-60)]


def test_the_least_of_a_number_and_none_is_none_where_asked_for():
    assert np.isnan(compute("min.NaN.f32", [NAN], [1.0])).all()


def test_what_no_kernel_has_had_is_said():
    integers = ("mul.hi.s64", "add.sat.s32", "setp.lt.and.s32", "bfe.u64", "prmt.b32.f4e", "mad.rn.f32")
    reals = ("cvt.rni.s32.f32", "max.xorsign.f32", "setp.lt.and.f32", "add.sat.f32", "add.rz.f32", "fma.rn.relu.bf16x2")
    for op in integers + reals:
        with pytest.raises(NotImplementedError, match=op):
            operation(op)
    assert operation("mov.b32") is None


def test_widths():
    assert [bits_of(k) for k in ("pred", "b8", "f16", "bf16x2", "f32x2", "e4m3x2", "u64")] == [1, 8, 16, 32, 64, 16, 64]
