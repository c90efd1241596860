"""What every kernel file shares: the chip, the shipped configurations, and the declared cost of an operation."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class CompileCase:
    """One shipped configuration of one kernel, complete enough to compile it for a chip that is not there.

    signature: argument name -> "*bf16", "i32", "fp32", ... or "constexpr", in the kernel's order.
    constexprs: value of each constexpr argument.
    aligned: arguments stated to be divisible by 16, as Triton finds them to be at launch.
    """

    name: str
    config: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Cost:
    """What one call of an operation has to move and compute at least, and the kernels it launches."""

    bytes: int
    flops: int
    launches: int


def cdiv(count: int, size: int) -> int:
    """Pieces of `size` that `count` takes, as `triton.cdiv`, which takes ten times as long."""
    return -(-count // size)


def arch_of(device: torch.device) -> int:
    """80 for sm_80, 90 for sm_90, ...; 80 on a machine without CUDA, where kernels are interpreted."""
    return _capability(device) if device.type == "cuda" else 80


@cache  # asked at every launch
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def is_interpreted() -> bool:
    """Whether Triton runs its kernels in Python on CPU tensors (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


TRITON_DTYPE = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}
