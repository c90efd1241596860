"""A chip that is not there, emulated: kernels compiled for it run instruction by instruction on CPU tensors."""

from benchmarks.emulator.driver import emulated
from benchmarks.emulator.memory import Fault

__all__ = ["Fault", "emulated"]
