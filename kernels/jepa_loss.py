"""The I-JEPA objective in one pass: mean smooth-L1 (beta 1) against layer-normalised target features.

    target[t] = (features[rows[t]] - mean) * rstd        (over D, no affine)
    d = prediction - target;   loss = mean(0.5 d^2 where |d| < 1, else |d| - 0.5)
    dprediction = clamp(d, -1, 1) * dloss / (T * D)

Saved for backward: clamp(d, -1, 1) in prediction's dtype. Keeping it moves the bytes that computing it again would, and
lets prediction and features go; unscaled, it cannot underflow. Each program sums its rows in fp32; a second kernel adds
the programs' sums in fp64, in a fixed order.

Legend: T rows (target tokens), R rows of features, D width, P programs. A row's columns are pieces of BLOCK_D, all of
them in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import TRITON_DTYPE, CompileCase, Cost, arch_of, cdiv
from .rows import DTYPES, WIDTHS, LaunchConfig, check_dtype, row_case, row_major, whole_row_config

MAX_WIDTH = 8192
_MEAN_CONFIG = LaunchConfig(1, 1024, num_warps=4)  # one program
_SCALE_CONFIG = LaunchConfig(1, 4096, num_warps=4)  # flat: four 16-byte accesses a lane in 16 bit


def jepa_loss_config(width: int, dtype: torch.dtype, arch: int) -> LaunchConfig:
    """One row to a warp up to D = 1280, or 768 in fp32. Unmeasured: chosen from compiled resources."""
    return whole_row_config(width, dtype, values=40 if dtype.itemsize == 2 else 24, num_warps=4)


@triton.jit(do_not_specialize=["n_rows"])
def _jepa_loss_fwd_kernel(
    prediction_ptr,  # [T, D]
    features_ptr,  # [R, D]
    rows_ptr,  # [T]
    slope_ptr,  # [T, D]: clamp(d, -1, 1)
    part_ptr,  # [P]
    n_rows,
    stride_prediction_row,
    stride_features_row,
    eps,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STORE_SLOPE: tl.constexpr,
):
    PIECES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0).to(tl.int64)
    t = pid * BLOCK_T + tl.arange(0, BLOCK_T)
    t_keep = (t < n_rows)[:, None]
    row = tl.load(rows_ptr + t, mask=t < n_rows, other=0).to(tl.int64)
    h = ()
    p = ()
    total = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for i in tl.static_range(PIECES):
        cols = (i * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        keep = t_keep & (cols < D)
        h += (tl.load(features_ptr + row[:, None] * stride_features_row + cols, mask=keep, other=0.0),)
        p += (tl.load(prediction_ptr + t[:, None] * stride_prediction_row + cols, mask=keep, other=0.0),)
        total += h[i].to(tl.float32)
    mean = tl.sum(total, axis=1) / D  # [BT]
    square = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for i in tl.static_range(PIECES):
        cols = (i * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        centred = tl.where(cols < D, h[i].to(tl.float32) - mean[:, None], 0.0)
        square += centred * centred
    rstd = tl.rsqrt(tl.sum(square, axis=1) / D + eps)
    loss = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for i in tl.static_range(PIECES):
        cols = (i * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        keep = t_keep & (cols < D)
        d = p[i].to(tl.float32) - (h[i].to(tl.float32) - mean[:, None]) * rstd[:, None]
        slope = tl.minimum(tl.maximum(d, -1.0), 1.0)
        loss += tl.where(keep, slope * (d - 0.5 * slope), 0.0)  # both branches of smooth-L1
        if STORE_SLOPE:
            tl.store(slope_ptr + t[:, None] * D + cols, slope, mask=keep)
    tl.store(part_ptr + pid, tl.sum(loss))


@triton.jit(do_not_specialize=["n_parts", "n_rows"])
def _mean_kernel(
    part_ptr,  # [P]
    loss_ptr,  # scalar
    n_parts,
    n_rows,
    width,
    BLOCK_D: tl.constexpr,
):
    acc = tl.zeros([BLOCK_D], dtype=tl.float64)
    for start in range(0, n_parts, BLOCK_D):
        parts = start + tl.arange(0, BLOCK_D)
        acc += tl.load(part_ptr + parts, mask=parts < n_parts, other=0.0).to(tl.float64)
    tl.store(loss_ptr, (tl.sum(acc) / (n_rows.to(tl.float64) * width)).to(tl.float32))


@triton.jit(do_not_specialize=["n_rows"])
def _jepa_loss_bwd_kernel(
    slope_ptr,  # [T, D]
    dloss_ptr,  # scalar
    dprediction_ptr,  # [T, D]
    n_rows,
    width,
    BLOCK_D: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    n_elements = n_rows.to(tl.int64) * width
    scale = tl.load(dloss_ptr).to(tl.float32) / n_elements
    slope = tl.load(slope_ptr + place, mask=place < n_elements, other=0.0).to(tl.float32)
    tl.store(dprediction_ptr + place, slope * scale, mask=place < n_elements)


def jepa_loss_fwd(
    prediction: Tensor, features: Tensor, rows: Tensor, eps: float, store_slope: bool = True
) -> tuple[Tensor, Tensor]:
    """(loss, clamp(d, -1, 1) [T, D]); without `store_slope` the second is empty."""
    n_rows, width = prediction.shape
    slope = torch.empty((n_rows if store_slope else 0, width), dtype=prediction.dtype, device=prediction.device)
    if not n_rows:  # the mean of nothing
        return torch.full((), float("nan"), dtype=torch.float32, device=prediction.device), slope
    narrow = min(prediction.dtype, features.dtype, key=lambda dtype: dtype.itemsize)
    config = jepa_loss_config(width, narrow, arch_of(prediction.device))
    programs = cdiv(n_rows, config.block_t)
    prediction, features = row_major(prediction), row_major(features)
    part = torch.empty(programs, dtype=torch.float32, device=prediction.device)
    loss = torch.empty((), dtype=torch.float32, device=prediction.device)
    _jepa_loss_fwd_kernel[(programs,)](
        prediction_ptr=prediction,
        features_ptr=features,
        rows_ptr=rows,
        slope_ptr=slope,
        part_ptr=part,
        n_rows=n_rows,
        stride_prediction_row=prediction.stride(0),
        stride_features_row=features.stride(0),
        eps=eps,
        D=width,
        BLOCK_T=config.block_t,
        BLOCK_D=config.block_d,
        STORE_SLOPE=store_slope,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
    )
    _mean_kernel[(1,)](
        part_ptr=part,
        loss_ptr=loss,
        n_parts=programs,
        n_rows=n_rows,
        width=width,
        BLOCK_D=_MEAN_CONFIG.block_d,
        num_warps=_MEAN_CONFIG.num_warps,
        num_stages=_MEAN_CONFIG.num_stages,
        enable_fp_fusion=False,
    )
    return loss, slope


def jepa_loss_bwd(slope: Tensor, dloss: Tensor) -> Tensor:
    """dprediction [T, D] from the saved slope [T, D] and the gradient of the loss, a scalar on the same device."""
    dprediction = torch.empty_like(slope)
    n_rows, width = slope.shape
    if n_rows:
        _jepa_loss_bwd_kernel[(cdiv(n_rows * width, _SCALE_CONFIG.block_d),)](
            slope_ptr=slope,
            dloss_ptr=dloss,
            dprediction_ptr=dprediction,
            n_rows=n_rows,
            width=width,
            BLOCK_D=_SCALE_CONFIG.block_d,
            num_warps=_SCALE_CONFIG.num_warps,
            num_stages=_SCALE_CONFIG.num_stages,
            enable_fp_fusion=False,
        )
    return dprediction


class _JepaLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prediction, features, rows, eps):
        loss, slope = jepa_loss_fwd(prediction, features, rows, eps, store_slope=ctx.needs_input_grad[0])
        ctx.save_for_backward(slope)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        (slope,) = ctx.saved_tensors
        return jepa_loss_bwd(slope, dloss), None, None, None


def jepa_loss(prediction: Tensor, features: Tensor, rows: Tensor, eps: float = 1e-5) -> Tensor:
    """Mean smooth-L1 (beta 1) between prediction[t] and layer_norm(features[rows[t]]), no affine.

    Shapes:
        prediction: [T, D]; features: [R, D], D at most 8192, dtypes may differ.
        rows: int32 or int64 [T] in 0..R-1 (not checked).

    Returns:
        fp32 scalar, the same at every repetition; nan where T is 0, as torch's mean. No gradient reaches features.

    Raises:
        ValueError: shapes or dtypes other than these.

    Source: section 3 of Assran et al. 2023 (arXiv 2301.08243).
    """
    if prediction.dim() != 2 or features.shape[1:] != prediction.shape[1:] or rows.shape != prediction.shape[:1]:
        raise ValueError(
            f"expected prediction [T, D], features [R, D] and rows [T], got {list(prediction.shape)}, "
            f"{list(features.shape)} and {list(rows.shape)}"
        )
    if not 0 < prediction.shape[1] <= MAX_WIDTH:
        raise ValueError(f"D must be in 1..{MAX_WIDTH}, got {prediction.shape[1]}")
    check_dtype(prediction=prediction, features=features)
    if rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows must be int32 or int64, got {rows.dtype}")
    return _JepaLoss.apply(prediction, features.detach(), rows.contiguous(), eps)


def jepa_loss_cost(
    tokens: int, width: int, dtype: torch.dtype, index_bytes: int = 4, slope: bool = True, backward: bool = False
) -> Cost:
    """Forward: read prediction and features, write the slope. Backward: read the slope, write it scaled."""
    table = tokens * width * dtype.itemsize
    if backward:
        return Cost(2 * table + 4, tokens * width, 1)
    return Cost((3 if slope else 2) * table + index_bytes * tokens + 4, 14 * tokens * width, 2)


def compile_cases(arch: int) -> list[CompileCase]:
    """Every shipped configuration, with the slope stored as in training."""
    cases = []
    for width in WIDTHS:
        for dtype, target in [(d, d) for d in DTYPES] + [(d, torch.float32) for d in DTYPES if d.itemsize == 2]:
            rows, features = f"*{TRITON_DTYPE[dtype]}", f"*{TRITON_DTYPE[target]}"
            signature = {"prediction_ptr": rows, "features_ptr": features, "rows_ptr": "*i64", "slope_ptr": rows}
            signature |= {"part_ptr": "*fp32", "n_rows": "i32", "stride_prediction_row": "i32"}
            signature |= {"stride_features_row": "i32", "eps": "fp32"}
            config = jepa_loss_config(width, dtype, arch)
            label = f"d{width} {rows[1:]}" + (f" features {features[1:]}" if target != dtype else "")
            cases.append(
                row_case("jepa_loss_fwd", label, _jepa_loss_fwd_kernel, signature, config, D=width, STORE_SLOPE=True)
            )
    signature = {"part_ptr": "*fp32", "loss_ptr": "*fp32", "n_parts": "i32", "n_rows": "i32", "width": "i32"}
    cases.append(row_case("jepa_loss_mean", "fp32", _mean_kernel, signature, _MEAN_CONFIG))
    for dtype in DTYPES:
        rows = f"*{TRITON_DTYPE[dtype]}"
        signature = {"slope_ptr": rows, "dloss_ptr": "*fp32", "dprediction_ptr": rows, "n_rows": "i32", "width": "i32"}
        cases.append(row_case("jepa_loss_bwd", rows[1:], _jepa_loss_bwd_kernel, signature, _SCALE_CONFIG))
    return cases
