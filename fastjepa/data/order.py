"""The order in which an epoch sees the pictures: it follows from (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW = 8  # blocks that are open at a time


class EpochOrder:
    """Permutations of `count` pictures, one for each epoch; the last one asked for is kept.

    Pictures that are read in blocks (`Pictures.blocks`) come in an order in which few blocks are open at a time: blocks
    are permuted, and pictures within every `WINDOW` blocks.
    """

    def __init__(self, count: int, seed: int, blocks: Sequence[int] | None = None):
        self.count, self.seed, self.blocks = count, seed, blocks
        self._kept: tuple[int, np.ndarray] | None = None

    def __call__(self, epoch: int) -> np.ndarray:
        """Every number below `count`, once: integers [count]."""
        if self._kept is None or self._kept[0] != epoch:
            rng = np.random.default_rng([self.seed, 0, epoch])
            order = rng.permutation(self.count) if self.blocks is None else _by_blocks(self.blocks, rng)
            self._kept = epoch, order
        return self._kept[1]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": None}


def _by_blocks(blocks: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    starts = np.cumsum([0, *blocks]).tolist()
    shuffled = rng.permutation(len(blocks)).tolist()
    order = []
    for first in range(0, len(blocks), WINDOW):
        window = [np.arange(starts[b], starts[b + 1]) for b in shuffled[first : first + WINDOW]]
        order.append(rng.permutation(np.concatenate(window)))
    return np.concatenate(order)
