"""Memory as lanes see it: the host's, where tensors lie, and that of a program, with what must not happen in either."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from benchmarks.emulator.arithmetic import RAW, Array

SECTOR = 32  # bytes: the least that a chip moves from or to global memory
BANKS, BANK = 32, 4  # of shared memory, and their width in bytes
GRAIN = 2  # bytes that are watched as one
_FIRST = 64  # address at which the view of the host's memory begins


class Fault(Exception):
    """What a chip would punish by a wrong result or an error: said with the kernel's line."""


class Global:
    """The host's memory, where whole tensors may be read and written and nothing else.

    anywhere: kernels that are given addresses may come to any tensor there is. moved: where bytes asked for, sectors
    and requests of a warp are counted, by "load" and "store".
    """

    def __init__(self, tensors: Iterable[Tensor], moved: Counter[str] | None = None, anywhere: bool = False):
        self.views = {width: _all_memory(width) for width in (1, 2, 4, 8)}
        self.moved, self.anywhere = moved, anywhere
        self._know(tensors)

    def _know(self, tensors: Iterable[Tensor]) -> None:
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors if _lies_here(t))}
        before = -(1 << 62)  # so that every address that a kernel may come to is behind a start
        self.starts = np.array([before, *sorted(storages)], dtype=np.int64)
        self.ends = np.array([before, *(start + storages[start] for start in sorted(storages))], dtype=np.int64)

    def check(self, addresses: Array, width: int) -> None:
        """
        Raises:
            Fault: an address that is not aligned to its width, or beyond every tensor.
        """
        if (addresses % width).any():
            raise Fault(f"an access of {width} bytes at an address that is not a multiple of {width}")
        outside = self._outside(addresses, width)
        if self.anywhere and outside.any():
            self._know(t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter))
            outside = self._outside(addresses, width)
        if outside.any():
            raise Fault(f"an access of {width} bytes outside every tensor, by {int(outside.sum())} lanes")

    def _outside(self, addresses: Array, width: int) -> Array:
        at = np.searchsorted(self.starts, addresses, side="right") - 1
        return (at < 0) | (addresses > self.ends[at] - width)

    def load(self, addresses: Array, width: int, count: int, lanes: Array) -> list[Array]:
        """`count` words of `width` bytes from each address."""
        self.check(addresses, width * count)
        self.count("load", addresses, width * count, lanes)
        view, at = self.views[width], (addresses - _FIRST) // width
        return [view[at + i] for i in range(count)]

    def store(self, addresses: Array, words: list[Array], width: int, lanes: Array) -> None:
        """Words of `width` bytes, one after another, to each address."""
        self.check(addresses, width * len(words))
        self.count("store", addresses, width * len(words), lanes)
        view, at = self.views[width], (addresses - _FIRST) // width
        for i, word in enumerate(words):
            view[at + i] = word

    def count(self, what: str, addresses: Array, size: int, lanes: Array) -> None:
        """Take in what a warp asks for at once: an access never spans sectors, being aligned."""
        if self.moved is None:
            return
        warps = lanes // 32
        sectors = np.unique(warps * (1 << 43) + addresses // SECTOR)
        self.moved[f"{what} requests"] += len(np.unique(warps))
        self.moved[f"{what} sectors"] += len(sectors)
        self.moved[f"{what} bytes"] += size * len(lanes)


def _lies_here(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout is torch.strided


def _all_memory(width: int) -> Array:
    class Everything:
        __array_interface__ = {  # noqa: RUF012
            "data": (_FIRST, False),
            "shape": ((1 << 47) // width,),
            "typestr": RAW[8 * width].str,
            "version": 3,
        }

    return np.asarray(Everything())


class Shared:
    """Shared memory of several programs, as one array with a program's after another's; fresh memory is all ones.

    Between two barriers, what one warp writes no other may touch, and what it reads no other may write.
    moved: where the passes of 128 bytes are counted that the banks needed, and that they would have needed at best.
    """

    def __init__(self, programs: int, size: int, moved: Counter[str] | None = None):
        self.given, self.size = size, -(-size // 16) * 16
        self.bytes = np.full(programs * self.size + 16, 0xFF, dtype=np.uint8)
        self.views = {width: self.bytes.view(RAW[8 * width]) for width in (1, 2, 4, 8)}
        self.epoch = np.zeros(programs, dtype=np.int64)
        grains = len(self.bytes) // GRAIN
        self.written, self.read = np.full(grains, -1, dtype=np.int64), np.full(grains, -1, dtype=np.int64)
        self.moved = moved

    def places(self, addresses: Array, programs: Array, size: int) -> Array:
        """In the one array.

        Raises:
            Fault: an access beyond what the program has, or one that is not aligned.
        """
        if (addresses % size).any():
            raise Fault(f"an access of {size} bytes of shared memory at an address that is not a multiple of {size}")
        if ((addresses < 0) | (addresses + size > self.given)).any():
            raise Fault(f"an access beyond the {self.given} bytes of shared memory")
        return addresses + programs * self.size

    def load(self, places: Array, width: int, count: int, programs: Array, warps: Array) -> list[Array]:
        """`count` words of `width` bytes from each place, noted as read by a warp."""
        self.note_read(places, width * count, programs, warps)
        view, at = self.views[width], places // width
        return [view[at + i] for i in range(count)]

    def store(self, places: Array, words: list[Array], width: int, programs: Array, warps: Array) -> None:
        """Words of `width` bytes, one after another, to each place."""
        view, at = self.views[width], places // width
        self.note_written(places, width * len(words), programs, warps, [view[at + i] != w for i, w in enumerate(words)])
        for i, word in enumerate(words):
            view[at + i] = word
            if (view[at + i] != word).any():
                raise Fault("two lanes write different things to the same place")

    def note_read(self, places: Array, size: int, programs: Array, warps: Array) -> None:
        """
        Raises:
            Fault: another warp has written it since the last barrier.
        """
        grains, now = _grains(places, size), (self.epoch[programs] * 64)[:, None]
        last = self.written[grains]
        if ((last >= now) & (last != now + warps[:, None])).any():
            raise Fault("a warp reads what another has written since the last barrier")
        before = self.read[grains]
        shared = (before >= now) & (before != now + warps[:, None])
        self.read[grains] = now + np.where(shared, 63, warps[:, None])
        others = self.read[grains] != now + warps[:, None]  # lanes of several warps may have read one grain just now
        self.read[grains[others]] = np.broadcast_to(now + 63, grains.shape)[others]

    def note_written(self, places: Array, size: int, programs: Array, warps: Array, changes: list[Array]) -> None:
        """`changes`, word by word: something else stood there. Several warps may write the same.

        Raises:
            Fault: another warp has read or written it since the last barrier.
        """
        grains, mine = _grains(places, size), (self.epoch[programs] * 64 + warps)[:, None]
        now = (self.epoch[programs] * 64)[:, None]
        changed = np.stack(changes, axis=1).repeat(grains.shape[1] // len(changes), axis=1)
        for last, what in ((self.read, "read"), (self.written, "written")):
            seen = last[grains]
            if ((seen >= now) & (seen != mine) & changed).any():
                raise Fault(f"a warp writes what another has {what} since the last barrier")
        self.written[grains] = mine

    def count(self, what: str, addresses: Array, size: int, lanes: Array) -> None:
        """Take in how often the banks have to be asked: as often as one has different words to give."""
        if self.moved is None:
            return
        together = 128 // max(size, BANK)  # lanes that are served at once
        phase = lanes // 32 * 8 + lanes % 32 // together
        words = (addresses[:, None] + np.arange(0, max(size, BANK), BANK)).astype(np.int64) // BANK
        asked = np.unique(np.repeat(phase, words.shape[1]) * (1 << 20) + words.ravel())
        _, each = np.unique(asked // (1 << 20) * BANKS + asked % BANKS, return_counts=True)
        phases = np.unique(asked // (1 << 20) * BANKS + asked % BANKS) // BANKS
        first = np.flatnonzero(np.r_[True, phases[1:] != phases[:-1]])
        self.moved[f"shared {what} passes"] += int(np.maximum.reduceat(each, first).sum())
        self.moved[f"shared {what} passes at best"] += len(first)


def _grains(places: Array, size: int) -> Array:
    return (places // GRAIN)[:, None] + np.arange(max(1, size // GRAIN))
