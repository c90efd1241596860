"""Exponential moving average of a whole model in one launch: t = momentum * t + (1 - momentum) * s, in place.

One program a chunk of one tensor; dtypes and alignment differ from tensor to tensor and are read from the table. Full
blocks of 16-byte aligned pairs go through a loop compiled for their two dtypes, the rest through a loop of scalar
accesses that takes any. The arithmetic is fp32, as that of `torch.lerp`.

Row of the tensor table (int64): address of t, address of s, elements, dtype code of t, dtype code of s, aligned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import CompileCase, Cost, arch_of
from .multi_tensor import (
    DTYPE_CODES,
    LaunchConfig,
    addresses,
    chunk_table,
    host_table,
    is_aligned,
    lerp,
    lie_alike,
    load_any,
    store_any,
    typed_pointer,
    upload,
)
from .reference import ema_update_ref_

_ROW: tl.constexpr = tl.constexpr(6)
_N_DTYPES: tl.constexpr = tl.constexpr(len(DTYPE_CODES))


def ema_config(arch: int) -> LaunchConfig:
    """One 16-byte access to each operand a thread and block. Unmeasured: chosen from compiled resources."""
    return LaunchConfig(block=1024, chunk=32768, num_warps=8)


@triton.jit
def _ema_blocks(target_ptr, source_ptr, blocks, weight, BLOCK: tl.constexpr):
    for block in range(blocks):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        target = tl.load(target_ptr + offsets)
        source = tl.load(source_ptr + offsets)
        mean = lerp(target.to(tl.float32), source.to(tl.float32), weight)
        tl.store(target_ptr + offsets, mean.to(target.dtype))


@triton.jit
def _ema_kernel(
    tensors_ptr,  # int64 [n, 6]
    chunks_ptr,  # int32 [C, 2]
    momentum_ptr,  # one element, or None
    weight,  # 1 - momentum where momentum_ptr is None
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    row_ptr = tensors_ptr + tl.load(chunks_ptr + 2 * chunk).to(tl.int64) * _ROW
    start = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * CHUNK
    target = tl.load(row_ptr)
    source = tl.load(row_ptr + 1)
    count = tl.minimum(tl.load(row_ptr + 2) - start, CHUNK).to(tl.int32)
    target_code = tl.load(row_ptr + 3)
    source_code = tl.load(row_ptr + 4)
    blocks = tl.where(tl.load(row_ptr + 5) != 0, count // BLOCK, 0)
    if momentum_ptr is not None:
        # In fp64, or the weight of a momentum such as 0.9999 loses half its digits.
        weight = (1.0 - tl.load(momentum_ptr).to(tl.float64)).to(tl.float32)
    for i in tl.static_range(_N_DTYPES):
        for j in tl.static_range(_N_DTYPES):
            if (target_code == i) & (source_code == j):
                _ema_blocks(typed_pointer(target, i) + start, typed_pointer(source, j) + start, blocks, weight, BLOCK)
    for first in range(blocks * BLOCK, count, LANES):
        offsets = first + tl.arange(0, LANES)
        mask = offsets < count
        t = load_any(target, start + offsets, mask, target_code)
        s = load_any(source, start + offsets, mask, source_code)
        store_any(target, start + offsets, lerp(t, s, weight), mask, target_code)


def _check_pairs(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if len(targets) != len(sources):
        raise ValueError(f"as many targets as sources are needed, got {len(targets)} and {len(sources)}")
    places: dict[int, int] = {}
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.shape != source.shape:
            raise ValueError(f"pair {i} has shapes {list(target.shape)} and {list(source.shape)}")
        if not (target.is_floating_point() and source.is_floating_point()):
            raise ValueError(f"pair {i} must be of floating dtypes, got {target.dtype} and {source.dtype}")
        if target.device != targets[0].device or source.device != targets[0].device:
            raise ValueError(
                f"pair {i} is on {target.device} and {source.device}, the first target on {targets[0].device}"
            )
        if target.numel() and places.setdefault(target.data_ptr(), i) != i:
            raise ValueError(f"targets {places[target.data_ptr()]} and {i} are the same memory")


class MultiTensorEMA:
    """The moving average of one list of tensors after another, with its tables kept from call to call.

    The tables are built at the first update, and again when a tensor has moved. Pairs that lie differently in memory,
    have gaps, or are fp64 are few if any; they take the reference, with launches of their own.

    Shapes: targets, sources: two lists of floating tensors of one device, of equal shapes pair by pair.

    Raises:
        ValueError: lists that do not fit pair by pair, or two targets in the same memory.
    """

    def __init__(self, targets: Iterable[Tensor], sources: Iterable[Tensor]):
        self._targets, self._sources = list(targets), list(sources)
        _check_pairs(self._targets, self._sources)
        self._all = self._targets + self._sources
        self._addresses: list[int | torch.dtype | None] | None = None

    def _build(self) -> None:
        rows, numels = [], []
        self._swept: list[Tensor] = []
        self._others: tuple[list[Tensor], list[Tensor]] = ([], [])
        for target, source in zip(self._targets, self._sources, strict=True):
            codes = DTYPE_CODES.get(target.dtype), DTYPE_CODES.get(source.dtype)
            if None in codes or not lie_alike(target, source):
                self._others[0].append(target)
                self._others[1].append(source)
                continue
            self._swept.append(target)
            numels.append(target.numel())
            rows.append([target.data_ptr(), source.data_ptr(), target.numel(), *codes, is_aligned(target, source)])
        if not rows:
            self._num_chunks = 0
            return
        device = self._targets[0].device
        self._config = ema_config(arch_of(device))
        self._tensors = upload(host_table(rows), device)
        chunks = chunk_table(numels, self._config.chunk)
        self._chunks, self._num_chunks = upload(chunks, device), len(chunks)

    @torch.no_grad()
    def update(self, momentum: float | Tensor) -> None:
        """t = momentum * t + (1 - momentum) * s for every pair, in place, in one launch.

        Shapes:
            momentum: in 0..1; or one floating element on the tensors' device, read when the kernel runs, so that a
                captured CUDA graph replays with whatever it holds by then.

        Raises:
            ValueError: a momentum outside 0..1, or a tensor of more than one element or of another device.
        """
        held = isinstance(momentum, Tensor)
        if not held and not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must be in 0..1, got {momentum}")
        if not self._targets:
            return
        device = self._targets[0].device
        if held and (momentum.numel() != 1 or not momentum.is_floating_point() or momentum.device != device):
            raise ValueError(
                f"momentum must be one floating element on {device}, "
                f"got {momentum.dtype} {list(momentum.shape)} on {momentum.device}"
            )
        found = addresses(self._all)
        if found != self._addresses:
            self._build()
            self._addresses = found
        if self._num_chunks:
            ema_launch(self._tensors, self._chunks, momentum, self._config)
            torch.autograd.graph.increment_version(self._swept)
        if self._others[0]:
            ema_update_ref_(*self._others, momentum)


def ema_launch(tensors: Tensor, chunks: Tensor, momentum: float | Tensor, config: LaunchConfig) -> None:
    """One sweep over the tables. Shapes: tensors int64 [n, 6]; chunks int32 [C, 2], C > 0."""
    held = isinstance(momentum, Tensor)
    _ema_kernel[(len(chunks),)](
        tensors_ptr=tensors,
        chunks_ptr=chunks,
        momentum_ptr=momentum if held else None,
        weight=0.0 if held else 1.0 - momentum,
        CHUNK=config.chunk,
        BLOCK=config.block,
        LANES=config.lanes,
        num_warps=config.num_warps,
        num_stages=1,
        enable_fp_fusion=False,
    )


def ema_update_(targets: Iterable[Tensor], sources: Iterable[Tensor], momentum: float | Tensor) -> None:
    """t = momentum * t + (1 - momentum) * s for every pair, in place, in one launch, with tables for this call alone.

    Shapes: targets, sources: two lists of floating tensors of one device, of equal shapes pair by pair; momentum 0..1.

    Raises:
        ValueError: lists that do not fit pair by pair, or a momentum outside 0..1.
        RuntimeError: called while a CUDA graph is captured; `MultiTensorEMA` keeps its tables and can be captured.
    """
    MultiTensorEMA(targets, sources).update(momentum)


def ema_cost(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> Cost:
    """t read and written, s read: 12 bytes an element at fp32; a subtraction and a multiply-add each; one launch."""
    pairs = list(zip(targets, sources, strict=True))
    moved = sum(t.numel() * (2 * t.element_size() + s.element_size()) for t, s in pairs)
    elements = sum(t.numel() for t, _ in pairs)
    return Cost(bytes=moved, flops=3 * elements, launches=1 if elements else 0)


def compile_cases(arch: int) -> list[CompileCase]:
    """The kernel with the momentum as an argument and with the momentum on the device."""
    config = ema_config(arch)
    cases = []
    for held in (False, True):
        signature = {
            "tensors_ptr": "*i64",
            "chunks_ptr": "*i32",
            "momentum_ptr": "*fp64" if held else "constexpr",
            "weight": "fp32",
            "CHUNK": "constexpr",
            "BLOCK": "constexpr",
            "LANES": "constexpr",
        }
        constexprs = {"CHUNK": config.chunk, "BLOCK": config.block, "LANES": config.lanes}
        if not held:
            constexprs["momentum_ptr"] = None
        cases.append(
            CompileCase(
                name="ema",
                config=f"{config} momentum {'on the device' if held else 'argument'}",
                kernel=_ema_kernel,
                signature=signature,
                constexprs=constexprs,
                num_warps=config.num_warps,
                num_stages=1,
                aligned=("tensors_ptr", "chunks_ptr"),
            )
        )
    return cases
