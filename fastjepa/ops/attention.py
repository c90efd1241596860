"""Attention within each sequence of a packed batch."""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from fastjepa.kernels.reference import ragged_attention_ref
from fastjepa.ops import library
from fastjepa.ops.checks import check_offsets

ATTENTION_BACKENDS = ("auto", "triton", "flash-attn", "xformers", "sdpa", "reference")
_MODULES = {"triton": "triton", "flash-attn": "flash_attn.flash_attn_interface", "xformers": "xformers"}


def ragged_attention(
    qkv: Tensor,
    offsets: Tensor,
    max_length: int,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
    check: bool = False,
) -> Tensor:
    """softmax(q k^T * scale) v, each packed sequence on its own.

    Shapes:
        qkv: [T, 3, H, d] floating; query, key and value of each token.
        offsets: int32 [S + 1]; sequence s is tokens `offsets[s]:offsets[s + 1]`. Empty sequences are fine.
        max_length: tokens of the longest sequence (or a bound on it), a host int.
        scale: d ** -0.5 unless given.
        dropout: probability of dropping an attention weight (training only; the caller says when). With "auto",
            dropout, fp64, and head widths that 8 does not divide or above 128 take the reference everywhere.
        backend: "auto": our kernel for CUDA tensors, "reference" for others. "triton": our kernel. "flash-attn",
            "xformers": those packages, where installed. "sdpa": what PyTorch has, `torch.nn.attention.varlen` for
            16-bit CUDA tensors and scaled_dot_product_attention elsewhere. "reference": scaled_dot_product_attention
            over sequences padded to the longest. One that is asked for by name runs or raises; only "auto" chooses.
        check: look into offsets on CUDA too, which waits for the device.

    Returns:
        [T, H, d] in qkv's dtype.

    Raises:
        ValueError: shapes or dtypes other than these, offsets that do not fit (looked into on the CPU, or with
            `check`), or a backend asked for by name that is not there or does not take such tensors.

    Source: equation 1 of Vaswani et al. 2017 (arXiv 1706.03762).

    >>> qkv = torch.randn(5, 3, 2, 8)
    >>> ragged_attention(qkv, torch.tensor([0, 2, 5], dtype=torch.int32), 3).shape
    torch.Size([5, 2, 8])
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3 or not qkv.is_floating_point() or not qkv.shape[3]:
        raise ValueError(f"qkv must be a floating [T, 3, H, d], got {qkv.dtype} {list(qkv.shape)}")
    max_length = check_packed(offsets, max_length, qkv.shape[0], qkv.device, check)
    factor = qkv.shape[3] ** -0.5 if scale is None else scale
    if not math.isfinite(factor):
        raise ValueError(f"scale must be finite, got {scale}")
    if backend == "auto":
        backend = "triton" if library.takes_kernels(qkv) and not _refuses(qkv, factor, dropout) else "reference"
    elif backend == "triton" and (reason := _refuses(qkv, factor, dropout)):
        raise ValueError(f"the triton backend takes {reason}, got {_described(qkv, factor, dropout)}")
    if backend == "triton":
        from fastjepa.kernels.attention import ragged_attention as kernel

        return library.call(kernel, qkv, offsets, max_length, factor)
    if backend == "reference":
        return ragged_attention_ref(qkv, offsets, max_length, factor, dropout)
    check_backend(backend)
    return _PEERS[backend](qkv, offsets, max_length, factor, dropout)


def check_packed(offsets: Tensor, max_length: int, tokens: int, device: torch.device, check: bool = False) -> int:
    """The bound on a sequence's length by which to launch: `max_length`, or fewer where there are fewer tokens.

    Raises:
        ValueError: offsets or a max_length that do not fit so many tokens, as `ragged_attention`.
    """
    if offsets.dim() != 1 or offsets.dtype != torch.int32 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must be int32 [S + 1], got {offsets.dtype} {list(offsets.shape)}")
    if offsets.device != device:
        raise ValueError(f"the tokens are on {device} and offsets on {offsets.device}")
    if not isinstance(max_length, int | torch.SymInt):
        raise ValueError(f"max_length must be a whole number, got {max_length!r}")
    if tokens > (offsets.shape[0] - 1) * max_length:
        raise ValueError(
            f"{offsets.shape[0] - 1} sequences of at most max_length={max_length} tokens cannot hold {tokens}"
        )
    check_offsets(offsets, tokens, max_length, check)
    # Nothing is padded to a bound that is far too high.
    return max_length if torch.compiler.is_compiling() else min(max_length, tokens)


def check_backend(backend: str) -> None:
    """Whether a backend of `ragged_attention` is there.

    Raises:
        ValueError: an unknown one, or one whose package is not installed.
    """
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"the backend of attention must be one of {', '.join(ATTENTION_BACKENDS)}, got {backend!r}")
    module = _MODULES.get(backend)
    if module and not _is_installed(module):
        raise ValueError(f"the {backend} backend needs that package: pip install {backend}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def attention_backend(device: torch.device, backend: str = "auto") -> str:
    """The backend that `ragged_attention` takes for tensors on `device`.

    >>> attention_backend(torch.device("cpu"))
    'reference'
    """
    if backend != "auto":
        return backend
    return "triton" if device.type == "cuda" else "reference"


def _refuses(qkv: Tensor, scale: float, dropout: float) -> str | None:
    """What the kernel takes and this is not; None where it does."""
    if not library.takes_kernels(qkv):
        return "CUDA tensors"
    return kernel_refuses(qkv.dtype, qkv.shape[3], scale, dropout)


def kernel_refuses(dtype: torch.dtype, head_dim: int, scale: float, dropout: float = 0.0) -> str | None:
    """What of these the kernel does not take; None where it takes them all."""
    if dtype == torch.float64:
        return "fp32, fp16 or bf16"
    if head_dim % 8 or not 8 <= head_dim <= 128:
        return "head widths in 8..128 that 8 divides"
    return None if 0.0 < scale < math.inf and not dropout else "a positive scale and no dropout"


def _described(qkv: Tensor, scale: float, dropout: float) -> str:
    return f"{qkv.dtype} {list(qkv.shape)} on {qkv.device}, scale {scale}, dropout {dropout}"


def _flash(qkv: Tensor, offsets: Tensor, max_length: int, scale: float, dropout: float) -> Tensor:
    if not qkv.is_cuda or qkv.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"the flash-attn backend takes fp16 or bf16 on CUDA, got {_described(qkv, scale, dropout)}")
    from flash_attn import flash_attn_varlen_qkvpacked_func  # type: ignore[import-not-found]

    return flash_attn_varlen_qkvpacked_func(qkv, offsets, max_length, dropout, softmax_scale=scale)


def _xformers(qkv: Tensor, offsets: Tensor, max_length: int, scale: float, dropout: float) -> Tensor:
    """Its mask is made of lengths on the host, so every call waits for the device."""
    if not qkv.is_cuda:
        raise ValueError(f"the xformers backend takes CUDA tensors, got {_described(qkv, scale, dropout)}")
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask  # type: ignore[import-not-found]

    mask = BlockDiagonalMask.from_seqlens([n for n in offsets.diff().tolist() if n])
    q, k, v = qkv.unsqueeze(0).unbind(2)
    return memory_efficient_attention(q, k, v, attn_bias=mask, p=dropout, scale=scale).squeeze(0)


def _sdpa(qkv: Tensor, offsets: Tensor, max_length: int, scale: float, dropout: float) -> Tensor:
    """PyTorch's own. Its varlen attention has no dropout, and in older versions no scale but d ** -0.5."""
    if not qkv.is_cuda or qkv.dtype not in (torch.float16, torch.bfloat16) or dropout:
        return ragged_attention_ref(qkv, offsets, max_length, scale, dropout)
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unbind(1)
    if scale != qkv.shape[3] ** -0.5:
        q = q * (scale * qkv.shape[3] ** 0.5)
    out = varlen_attn(q, k, v, offsets, offsets, max_length, max_length)
    assert isinstance(out, Tensor)  # nothing else was asked for
    return out


_PEERS = {"flash-attn": _flash, "xformers": _xformers, "sdpa": _sdpa}
