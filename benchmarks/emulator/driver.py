"""Kernels launched on a chip that is emulated: Triton compiles them for it, and a processor runs what came of it."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton import knobs
from triton.runtime import driver

from benchmarks.codegen import LIMITS
from benchmarks.counter import replaced
from benchmarks.emulator import machine, ptx
from benchmarks.emulator.memory import Global
from benchmarks.launches import Chip, launched_on
from fastjepa.ops import library
from fastjepa.optim import AdamWEMA

Moved = dict[str, Counter[str]]  # kernel -> what Global and Shared count


@contextmanager
def emulated(sm: int, moved: Moved | None = None) -> Iterator[list[str]]:
    """Operations take their kernels within, on CPU tensors, compiled for a chip and run instruction by instruction.

    Gives the names of what has been launched. What each kernel moves is added to `moved`, in words of `Global` and
    `Shared`; counting takes longer than the rest.

    Raises:
        Fault: within, from the launch of a kernel that does what a chip would punish.
    """
    chip = _Emulated(sm, moved)
    changes: list[tuple[Any, str, Any]] = [
        (knobs.runtime, "kernel_load_start_hook", chip.find),
        (library, "takes_kernels", lambda x: x.device.type == "cpu"),
        (AdamWEMA, "_takes_kernels", lambda self: True),
    ]
    with launched_on(chip), replaced(changes):
        yield chip.launched


class _Emulated(Chip):
    """A driver that runs what it is asked to launch, before it returns."""

    def __init__(self, sm: int, moved: Moved | None):
        super().__init__(sm, ("emulated", sm))
        self.moved, self.launched = moved, list[str]()
        self.launcher_cls = _Launcher
        self.utils = self  # Triton asks it for what it asks a driver's utilities
        self.code: machine.Code | None = None

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": LIMITS[self.sm].shared_of_one}

    def find(self, module: Any, function: Any, name: str, metadata_group: dict[str, str], hash: str) -> None:
        """Triton's hook before a kernel is loaded: the PTX lies beside what is."""
        self.code = machine.Code(ptx.parse(Path(metadata_group[f"{name}.ptx"]).read_text(encoding="utf-8")))

    def load_binary(self, name: str, kernel: bytes, shared: int, device: Any) -> tuple[Any, ...]:
        return object(), self.code, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass


class _Launcher:
    """How a compiled kernel is launched."""

    def __init__(self, src: Any, metadata: Any):
        self.kinds, self.shared = list(src.signature.values()), metadata.shared
        self.anywhere = "tensors_ptr" in src.signature  # a table of addresses

    def __call__(self, x: int, y: int, z: int, stream: int, code: machine.Code, *rest: Any) -> None:
        chip: Any = driver.active  # a kernel is compiled once for all that is emulated of its kind
        _, metadata, enter, leave, *arguments = rest
        if enter is not None:
            enter(metadata)
        given = [(kind, value) for kind, value in zip(self.kinds, arguments, strict=True) if kind != "constexpr"]
        values = [_bits(kind, value) for kind, value in given]
        values += [0] * (len(code.program.params) - len(values))  # scratch memory, which no kernel here has
        chip.launched.append(code.program.name)
        moved = None if chip.moved is None else chip.moved.setdefault(code.program.name, Counter())
        with _disable_current_modes():  # what it computes with is nobody's operation
            tensors = (value for _, value in given if isinstance(value, Tensor))
            machine.launch(code, (x, y, z), values, self.shared, Global(tensors, moved, self.anywhere))
        if leave is not None:
            leave(metadata)


def _bits(kind: str, value: Any) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if kind in ("fp32", "fp64"):
        return int.from_bytes(struct.pack("<f" if kind == "fp32" else "<d", value), "little")
    return int(value) & ((1 << int(kind[1:])) - 1) if kind[0] in "iu" else int(value)
