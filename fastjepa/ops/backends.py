"""Which implementation each operation takes here, asked of one place."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Operation -> the module of fastjepa.kernels that its CUDA path launches; None where it is PyTorch on every device.
# A test compares this with what fastjepa imports, so that it cannot say more or less than what runs.
KERNELS: dict[str, str | None] = {
    "gather_tokens": "gather",
    "scatter_tokens": "gather",
    "assemble_predictor": "gather",
    "ragged_attention": "attention",
    "jepa_loss": "jepa_loss",
    "ema_update_": "ema",
    "AdamWEMA": "adamw_ema",
    "layer_norm": "layer_norm",
    "gelu": "gelu",
    "quantise_rows": "fp8",
}


class Backend(NamedTuple):
    """What an operation runs on: `name` is "triton" or "torch", `reason` says why in a few words."""

    name: str
    reason: str


def backends() -> dict[str, Backend]:
    """The backend that each operation takes for tensors on this machine's best device, by operation.

    >>> backends()["ragged_attention"].name in ("triton", "torch")
    True
    """
    cuda = torch.cuda.is_available()
    return {operation: _backend(kernel, cuda) for operation, kernel in KERNELS.items()}


def _backend(kernel: str | None, cuda: bool) -> Backend:
    if kernel is None:
        return Backend("torch", "no kernel of ours in its path, on any device")
    if not cuda:
        return Backend("torch", "no CUDA GPU that torch can use")
    return Backend("triton", "CUDA tensors launch the kernels of fastjepa.kernels")
