"""What one lane does alone: PTX arithmetic on arrays that hold a register of every lane.

Registers hold raw bits. Sums, products and roots are rounded to nearest even, as on the chip; `approx` instructions
give the nearest number where a chip may be an ulp or two off. Fused sums are made in a wider type and then rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch

Array = np.ndarray
RAW = {1: np.dtype(bool), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
_WHOLE = {"s": "i", "u": "u", "b": "u"}
_SMALLEST = np.finfo(np.float32).smallest_normal
_E4M3_MOST = 448.0


class Operation(NamedTuple):
    """takes: kinds of the operands, without the result, of as many as there may be. gives: kind of the result."""

    function: Callable[..., Array]
    takes: tuple[str, ...]
    gives: str


def bits_of(kind: str) -> int:
    """Width of a kind such as f32, bf16x2 or pred."""
    if kind == "pred":
        return 1
    if kind == "e4m3x2":
        return 16
    number = kind.lstrip("bfsu").split("x")
    return int(number[0]) * (int(number[1]) if len(number) == 2 else 1)


def read(raw: Array, kind: str) -> Array:
    """Numbers of raw bits: bf16 and f16 as fp32, a pair as a last dimension of two, from the low half up."""
    if kind == "pred":
        return raw
    if kind.endswith("x2"):
        return read(np.ascontiguousarray(raw)[..., None].view(RAW[bits_of(kind) // 2]), kind[:-2])
    if kind == "bf16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float32)
    if kind.startswith("f"):
        return raw.view(f"f{bits_of(kind) // 8}")
    return raw.view(f"{_WHOLE[kind[0]]}{bits_of(kind) // 8}")


def write(numbers: Array, kind: str) -> Array:
    """Raw bits of numbers, rounded to the nearest even."""
    if kind == "pred":
        return numbers.astype(bool)
    if kind.endswith("x2"):
        halves = np.ascontiguousarray(write(numbers, kind[:-2]))
        return halves.view(RAW[bits_of(kind)])[..., 0]
    if kind == "bf16":
        return _to_bf16(_single(numbers))
    if kind == "f16":
        return numbers.astype(np.float16).view(np.uint16)
    if kind == "e4m3":
        clipped = torch.from_numpy(np.ascontiguousarray(_single(numbers))).clamp(-_E4M3_MOST, _E4M3_MOST)
        return clipped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    if kind.startswith("f"):
        return np.ascontiguousarray(numbers.astype(f"f{bits_of(kind) // 8}")).view(RAW[bits_of(kind)])
    return np.ascontiguousarray(numbers.astype(f"{_WHOLE[kind[0]]}{bits_of(kind) // 8}")).view(RAW[bits_of(kind)])


def operation(op: str) -> Operation | None:
    """What an instruction computes of its operands, or None where it is no arithmetic.

    Raises:
        NotImplementedError: arithmetic that no kernel here has had yet.
    """
    name, *words = op.split(".")
    if name not in _FAMILIES:
        return None
    found = _FAMILIES[name](words)
    if found is None:
        raise NotImplementedError(f"the emulator does not know {op}")
    return found


def _is_real(kind: str) -> bool:
    return kind.startswith(("f", "bf"))


def _single(numbers: Array) -> Array:
    return numbers.astype(np.float32, copy=False)


def _to_bf16(x: Array) -> Array:
    raw = np.ascontiguousarray(x).view(np.uint32)
    rounded = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def _flushed(x: Array) -> Array:
    return np.where(np.abs(x) < _SMALLEST, np.copysign(np.float32(0), x), x)


def _float(function: Callable[..., Array], inputs: int) -> Callable[[list[str]], Operation | None]:
    """A function of numbers of one kind, with subnormal ones taken for 0 where the instruction says so."""

    def made(words: list[str]) -> Operation | None:
        if not _MODES.issuperset(words[:-1]):
            return None

        def flushing(*xs: Array) -> Array:
            return _flushed(_single(function(*map(_flushed, xs))))

        kind = words[-1]
        return Operation(flushing if "ftz" in words else function, (kind,) * inputs, kind)

    return made


_MODES = {"rn", "ftz", "approx", "full"}  # how real numbers are rounded, as far as it is nearest even or nearly so


def _fused(a: Array, b: Array, c: Array) -> Array:
    """a b + c: fp64 holds any product of two fp32 numbers, longdouble nearly so of two fp64 ones."""
    wide = np.float64 if a.dtype != np.float64 else np.longdouble
    return (a.astype(wide) * b + c).astype(a.dtype)


def _two(function: Callable[[Array, Array], Array]) -> Callable[[list[str]], Operation | None]:
    """A function of two, of whole numbers or of real ones."""

    def made(words: list[str]) -> Operation | None:
        kinds = [word for word in words if word[-1].isdigit()]
        if len(kinds) == 2 and words[0] == "rn":  # add.rn.f32.bf16: a narrow one, made wide, and a wide one
            return Operation(function, (kinds[1], kinds[0]), kinds[0])
        if _is_real(kinds[-1]):
            return _float(function, 2)(words)
        return Operation(function, (kinds[-1],) * 2, kinds[-1]) if len(words) == 1 else None

    return made


def _extreme(past_nan: Callable, with_nan: Callable) -> Callable[[list[str]], Operation | None]:
    """The least or the most of two or three: of what is a number, unless the instruction says otherwise."""

    def made(words: list[str]) -> Operation | None:
        *modes, kind = words
        if modes not in ([], ["NaN"]):
            return None
        return Operation(lambda *xs: reduce(with_nan if modes else past_nan, xs), (kind,) * 3, kind)

    return made


def _multiply(words: list[str]) -> Operation | None:
    kind = words[-1]
    if _is_real(kind):
        return _float(np.multiply, 2)(words)
    wide = f"{_WHOLE[kind[0]]}8"
    if words[0] == "wide":
        return Operation(lambda a, b: a.astype(wide) * b, (kind, kind), f"{kind[0]}{2 * bits_of(kind)}")
    if words[0] == "hi" and bits_of(kind) == 32:
        return Operation(lambda a, b: a.astype(wide) * b >> 32, (kind, kind), kind)
    return Operation(np.multiply, (kind, kind), kind) if words[0] == "lo" else None


def _multiply_add(words: list[str]) -> Operation | None:
    times = None if _is_real(words[-1]) else _multiply(words)
    if times is None:
        return None
    return Operation(lambda a, b, c: times.function(a, b) + c, (*times.takes, times.gives), times.gives)


def _divide(words: list[str]) -> Operation | None:
    kind = words[-1]
    if _is_real(kind):
        return _float(np.divide, 2)(words)
    return Operation(lambda a, b: (a - np.fmod(a, b)) // b, (kind, kind), kind)


def _logic(function: Callable[..., Array], inputs: int) -> Callable[[list[str]], Operation]:
    return lambda words: Operation(function, (words[-1],) * inputs, words[-1])


def _shift(function: Callable[[Array, Array], Array]) -> Callable[[list[str]], Operation]:
    """By any number of places: beyond the width nothing is left but the sign."""

    def made(words: list[str]) -> Operation:
        kind, width = words[-1], bits_of(words[-1])

        def shifted(x: Array, places: Array) -> Array:
            most = function(x, x.dtype.type(width - 1))
            beyond = most if kind[0] == "s" else np.zeros_like(x)
            return np.where(places >= width, beyond, function(x, np.minimum(places, width - 1).astype(x.dtype)))

        return Operation(shifted, (kind, "u32"), kind)

    return made


_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _compare(words: list[str]) -> Operation | None:
    how, kind = words[0], words[-1]
    real = _is_real(kind)
    function = _COMPARISONS.get(how[:2])
    if function is None or len(words) != 2:
        return None
    if not real:
        return Operation(function, (kind, kind), "pred")
    unordered = how.endswith("u")

    def compared(a: Array, b: Array) -> Array:
        nan = np.isnan(a) | np.isnan(b)
        return function(a, b) | nan if unordered else function(a, b) & ~nan

    return Operation(compared, (kind, kind), "pred")


def _select(words: list[str]) -> Operation:
    kind = f"b{bits_of(words[-1])}"
    return Operation(lambda a, b, p: np.where(p, a, b), (kind, kind, "pred"), kind)


def _convert(words: list[str]) -> Operation | None:
    *modes, gives, takes = words
    if not {"rn", "satfinite"}.issuperset(modes):
        return None
    if gives.endswith("x2"):  # the first operand goes to the upper half
        return Operation(lambda high, low: np.stack(np.broadcast_arrays(low, high), axis=-1), (takes, takes), gives)
    if _is_real(takes) and not _is_real(gives):
        return None
    return Operation(np.positive, (takes,), gives)


def _root(words: list[str]) -> Operation | None:
    return _float(lambda x: 1 / np.sqrt(x.astype(np.float64)), 1)(words)


def _power(words: list[str]) -> Operation | None:
    return _float(lambda x: np.exp2(x.astype(np.float64)), 1)(words)


def _field(words: list[str]) -> Operation | None:
    """Some bits of a word; signed, the highest of them is the sign."""
    kind = words[-1]
    if kind not in ("u32", "s32"):
        return None

    def extracted(x: Array, at: Array, width: Array) -> Array:
        wide = x.astype(np.int64) >> at.astype(np.int64) & ((1 << width.astype(np.int64)) - 1)
        sign = np.int64(1) << (width.astype(np.int64) - 1)
        return wide if kind == "u32" else (wide ^ sign) - sign

    return Operation(extracted, (kind, "u32", "u32"), kind)


def _permute(words: list[str]) -> Operation | None:
    """Four of the eight bytes of two words, or of their signs alone, as the nibbles of a third say."""
    if words != ["b32"]:
        return None

    def permuted(a: Array, b: Array, which: Array) -> Array:
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        found = np.zeros(np.broadcast_shapes(both.shape, which.shape), dtype=np.uint64)
        for i in range(4):
            nibble = which.astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
            byte = both >> np.uint64(8) * (nibble & np.uint64(7)) & np.uint64(255)
            sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
            found |= np.where(nibble >> np.uint64(3), sign, byte) << np.uint64(8 * i)
        return found

    return Operation(permuted, ("b32",) * 3, "b32")


_FAMILIES: dict[str, Callable[[list[str]], Operation | None]] = {
    "add": _two(np.add),
    "sub": _two(np.subtract),
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": _float(_fused, 3),
    "div": _divide,
    "rem": lambda words: Operation(np.fmod, (words[-1],) * 2, words[-1]),
    "min": _extreme(np.fmin, np.minimum),
    "max": _extreme(np.fmax, np.maximum),
    "neg": _float(np.negative, 1),
    "abs": _float(np.abs, 1),
    "sqrt": _float(np.sqrt, 1),
    "rsqrt": _root,
    "ex2": _power,
    "and": _logic(np.bitwise_and, 2),
    "or": _logic(np.bitwise_or, 2),
    "xor": _logic(np.bitwise_xor, 2),
    "not": _logic(np.invert, 1),
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "bfe": _field,
    "prmt": _permute,
    "setp": _compare,
    "selp": _select,
    "cvt": _convert,
}
