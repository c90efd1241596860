"""What the multi-tensor kernels share: many tensors in one launch, through two tables on the device.

The tensor table has one int64 row a tensor: addresses (0: none), number of elements, dtype codes. The chunk table has
one int32 row a program: which tensor, and the how-manieth piece of CHUNK elements of it. Both are built on the host and
copied once; a launch passes two pointers whatever the number, shapes and dtypes of the tensors.

A tensor is swept as it lies in memory, so tensors that meet in a row must have equal, dense strides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
VECTOR_BYTES = 16

FP32: tl.constexpr = tl.constexpr(0)
FP16: tl.constexpr = tl.constexpr(1)
BF16: tl.constexpr = tl.constexpr(2)


@dataclass(frozen=True)
class LaunchConfig:
    """A program sweeps up to `chunk` elements, `block` at a time; `programs` caps the programs (0: one a chunk)."""

    block: int
    chunk: int
    num_warps: int
    programs: int = 0

    @property
    def lanes(self) -> int:
        """Threads of a program: what does not fill a block of 16-byte accesses goes one element a thread at a time."""
        return 32 * self.num_warps

    def __str__(self) -> str:
        return f"{self.block}/{self.chunk} w{self.num_warps}" + (f" p{self.programs}" if self.programs else "")


@triton.jit
def typed_pointer(address, CODE: tl.constexpr):
    """The int64 address, known to be divisible by 16, as a pointer to the dtype of CODE."""
    if CODE == FP32:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif CODE == FP16:
        pointer = address.to(tl.pointer_type(tl.float16))
    else:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    return tl.multiple_of(pointer, 16)


@triton.jit
def everywhere(flag, BLOCK: tl.constexpr):
    """A mask [BLOCK] that is the same throughout: it switches an access on or off, and leaves it 16 bytes wide."""
    # By way of integers: the interpreter spreads a bool as numbers that it takes for no mask.
    return tl.zeros([BLOCK], dtype=tl.int32) + flag.to(tl.int32) != 0


@triton.jit
def load_any(address, offsets, mask, code):
    """fp32 [BLOCK] from a tensor whose dtype is known at run time only."""
    if code == FP32:
        x = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=0.0)
    elif code == FP16:
        x = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        x = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def store_any(address, offsets, x, mask, code):
    """fp32 [BLOCK] into a tensor whose dtype is known at run time only."""
    if code == FP32:
        tl.store(address.to(tl.pointer_type(tl.float32)) + offsets, x, mask=mask)
    elif code == FP16:
        tl.store(address.to(tl.pointer_type(tl.float16)) + offsets, x.to(tl.float16), mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.bfloat16)) + offsets, x.to(tl.bfloat16), mask=mask)


@triton.jit
def round_to(x, code):
    """fp32 [BLOCK] as `store_any` would leave it."""
    if code == FP16:
        x = x.to(tl.float16).to(tl.float32)
    elif code == BF16:
        x = x.to(tl.bfloat16).to(tl.float32)
    return x


@triton.jit
def lerp(start, end, weight):
    """start + weight * (end - start), from whichever side is nearer, so that weights 0 and 1 are exact."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (1.0 - weight) * (end - start))


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape are dense and hold their elements in the same order."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    strides = zip(a.stride(), b.stride(), a.shape, strict=True)
    return is_dense(a) and all(i == j or size == 1 for i, j, size in strides)


def is_aligned(*tensors: Tensor | None) -> bool:
    """Whether every tensor that is there starts at a multiple of 16 bytes."""
    return all(t is None or t.data_ptr() % VECTOR_BYTES == 0 for t in tensors)


def addresses(tensors: Sequence[Tensor | None]) -> list[int | torch.dtype | None]:
    """Where the tensors lie, then as what: tables hold while this stays the same. Asked at every step, hence flat."""
    places = [0 if t is None else t.data_ptr() for t in tensors]
    return [*places, *[None if t is None else t.dtype for t in tensors]]


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def host_table(rows: Sequence[Sequence[int]] | Sequence[int]) -> Tensor:
    """int64 on the CPU, whatever torch's default device is."""
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def upload(table: Tensor, device: torch.device) -> Tensor:
    """A host table on `device`, without waiting for the device.

    Raises:
        RuntimeError: a CUDA graph is being captured; the graph would copy from host memory that is gone by then.
    """
    if is_capturing(device):
        raise RuntimeError("pointer tables cannot be built while a CUDA graph is captured: run one step before")
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def chunk_table(numels: Sequence[int], chunk: int, at_least: int = 0) -> Tensor:
    """int32 [C, 2] on the host: (tensor, piece) of every chunk, tensors in order, `at_least` chunks for each tensor."""
    counts = host_table([max(at_least, cdiv(n, chunk)) for n in numels])
    tensor = torch.arange(len(numels), device="cpu").repeat_interleave(counts)
    piece = torch.arange(len(tensor), device="cpu") - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.stack([tensor, piece], dim=1).to(torch.int32).contiguous()


class MovingTable:
    """An int64 table [rows, columns] of tensors that move from time to time, such as gradients.

    A CUDA graph gets a table of its own, which it fills again from page-locked memory at every replay; both stay as
    long as this object does.
    """

    def __init__(self, rows: int, columns: int, device: torch.device):
        self._device = device
        self._found: list[int | torch.dtype | None] | None = None
        self._table = torch.empty(0, dtype=torch.int64, device=device)
        self._shape = rows, columns
        self._spare: tuple[Tensor, Tensor] | None = None
        self._captured: list[tuple[Tensor, Tensor]] = []

    def follow(self, found: list[int | torch.dtype | None], rows: Callable[[], list[list[int]]]) -> Tensor:
        """The table on the device, made anew from `rows()` if the `addresses` found are not those it was made from.

        Raises:
            RuntimeError: a CUDA graph is being captured and there was no step before it.
        """
        if is_capturing(self._device):
            if self._spare is None:
                raise RuntimeError("run one step before capturing this optimizer in a CUDA graph, and one between two")
            host, table = self._spare
            self._captured.append(self._spare)
            self._spare = None
            host.copy_(host_table(rows()))
            return table.copy_(host, non_blocking=True)
        if self._spare is None:
            pinned = self._device.type == "cuda"
            host = torch.empty(self._shape, dtype=torch.int64, device="cpu", pin_memory=pinned)
            self._spare = host, torch.empty(self._shape, dtype=torch.int64, device=self._device)
        if found != self._found:
            self._table = upload(host_table(rows()), self._device)
            self._found = found
        return self._table
