"""Fixed sine-cosine position embeddings on a grid of patches, and their interpolation to another grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Sine and cosine of each patch's column in the first half of the width, of its row in the second.

    Shapes: width D, a multiple of 4; grid (rows, columns) -> float32 [1, rows * columns, D].

    Raises:
        ValueError: a width that 4 does not divide.

    Source: section 3.5 of Vaswani et al. 2017 (arXiv 1706.03762) on each axis, frequencies 10000^(-4i/D).
    """
    if width % 4:
        raise ValueError(f"sine-cosine position embeddings need a width that 4 divides, got {width}")
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (column, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float().unsqueeze(0)


def interpolate_positions(pos_embed: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Bicubic interpolation of [1, rows * columns, D] to another grid of patches; the same grid comes back as it is."""
    if new_grid == grid:
        return pos_embed
    table = pos_embed.float().view(1, *grid, -1).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=new_grid, mode="bicubic", align_corners=False)
    return table.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
