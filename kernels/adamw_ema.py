"""AdamW (arXiv 1711.05101), the moving average of the target and low-precision copies of both, in one launch for all.

With g the gradient, unscaled and clipped, k the step of this parameter, and every quantity an fp32 register:

    p = p * (1 - lr * weight_decay)
    m = beta1 * m + (1 - beta1) * g,    v = beta2 * v + (1 - beta2) * g * g
    p = p - lr / (1 - beta1^k) * m / (sqrt(v) / sqrt(1 - beta2^k) + eps)
    t = momentum * t + (1 - momentum) * p

then the copies of p and t. Where clipping or the norm is wanted, the launch of `grad_norm` before it leaves partial
sums, which every program of the update adds in one order: no atomics, nothing read back.

Step numbers live on the device, one for each chunk: its own program alone reads and advances it, so that a skipped step
is not counted and a captured CUDA graph counts its replays.

Row of the tensor table (int64): elements, group, addresses of p, m, v, t, copy of p, copy of t, then their dtype codes,
m and v being of p's. Row of the gradient table (int64): address, dtype code, aligned, path. A path is one of `PATHS`,
whose blocks go 16 bytes at a time, or the number of them: scalar accesses, any dtypes. Row of the hyperparameters
(fp64), one a group: lr, weight decay, beta1, beta2, eps, log beta1, log beta2; the last row: momentum, largest norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adamw_ema_tensors import N_PATHS, PATHS, TENSOR_ROW, AdamWEMATensors, Hyperparameters, laid_as
from .grad_norm import GRADIENT_ROW, MAX_PARTIALS, grad_norm_config, grad_norm_launch
from .launch import CompileCase, Cost, arch_of
from .multi_tensor import (
    LaunchConfig,
    MovingTable,
    addresses,
    chunk_table,
    everywhere,
    host_table,
    is_capturing,
    lerp,
    load_any,
    round_to,
    store_any,
    typed_pointer,
    upload,
)

_HYPER_ROW: tl.constexpr = tl.constexpr(8)


def adamw_ema_config(arch: int) -> LaunchConfig:
    """One 16-byte access to each of five operands a thread and block. Unmeasured: chosen from compiled resources."""
    return LaunchConfig(block=512, chunk=grad_norm_config(arch).chunk, num_warps=4)


@triton.jit
def _adamw(p, g, m, v, scalars):
    grad_scale, decay, weight1, beta2, weight2, step_size, inverse_root, eps = scalars
    g *= grad_scale
    m = lerp(m, g, weight1)
    v = beta2 * v + weight2 * g * g
    p = p * decay - step_size * tl.div_rn(m, tl.sqrt_rn(v) * inverse_root + eps)
    return p, m, v


@triton.jit
def _update_blocks(
    tensor_ptr,
    gradient_ptr,
    start,
    blocks,
    is_active,
    moves,
    scalars,
    weight,
    P_CODE: tl.constexpr,
    G_CODE: tl.constexpr,
    T_CODE: tl.constexpr,
    COPY_CODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    target = tl.load(tensor_ptr + 5)
    param_copy = tl.load(tensor_ptr + 6)
    target_copy = tl.load(tensor_ptr + 7)
    p_ptr = typed_pointer(tl.load(tensor_ptr + 2), P_CODE) + start
    g_ptr = typed_pointer(tl.load(gradient_ptr), G_CODE) + start
    m_ptr = typed_pointer(tl.load(tensor_ptr + 3), P_CODE) + start
    v_ptr = typed_pointer(tl.load(tensor_ptr + 4), P_CODE) + start
    t_ptr = typed_pointer(target, T_CODE) + start
    param_copy_ptr = typed_pointer(param_copy, COPY_CODE) + start
    target_copy_ptr = typed_pointer(target_copy, COPY_CODE) + start
    active = everywhere(is_active, BLOCK)
    has_target = everywhere((target != 0) & moves, BLOCK)
    copies_param = everywhere(param_copy != 0, BLOCK)
    copies_target = everywhere((target_copy != 0) & moves, BLOCK)
    for block in range(blocks):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        p = tl.load(p_ptr + offsets)
        g = tl.load(g_ptr + offsets, mask=active, other=0.0)
        m = tl.load(m_ptr + offsets, mask=active, other=0.0)
        v = tl.load(v_ptr + offsets, mask=active, other=0.0)
        t = tl.load(t_ptr + offsets, mask=has_target, other=0.0)
        new_p, new_m, new_v = _adamw(p.to(tl.float32), g.to(tl.float32), m.to(tl.float32), v.to(tl.float32), scalars)
        new_p = tl.where(active, new_p.to(p.dtype), p)
        new_t = lerp(t.to(tl.float32), new_p.to(tl.float32), weight).to(t.dtype)
        tl.store(p_ptr + offsets, new_p, mask=active)
        tl.store(m_ptr + offsets, new_m.to(m.dtype), mask=active)
        tl.store(v_ptr + offsets, new_v.to(v.dtype), mask=active)
        tl.store(t_ptr + offsets, new_t, mask=has_target)
        tl.store(param_copy_ptr + offsets, new_p.to(param_copy_ptr.dtype.element_ty), mask=copies_param)
        tl.store(target_copy_ptr + offsets, new_t.to(target_copy_ptr.dtype.element_ty), mask=copies_target)


@triton.jit(do_not_specialize=["n_groups"])
def _adamw_ema_kernel(
    tensors_ptr,  # int64 [n, 12]
    gradients_ptr,  # int64 [n, 4]
    chunks_ptr,  # int32 [C, 2]
    steps_ptr,  # fp32 [C]
    hyper_ptr,  # fp64 [G + 1, 8]
    partials_ptr,  # fp32 [P], or None: no norm, no clipping
    norm_ptr,  # fp32 [1]
    grad_scale_ptr,  # one element, or None
    found_inf_ptr,  # one element, or None
    n_groups,
    N_PARTIALS: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + 2 * chunk).to(tl.int64)
    start = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * CHUNK
    tensor_ptr = tensors_ptr + tensor * TENSOR_ROW
    gradient_ptr = gradients_ptr + tensor * GRADIENT_ROW
    count = tl.minimum(tl.load(tensor_ptr) - start, CHUNK).to(tl.int32)
    group_ptr = hyper_ptr + tl.load(tensor_ptr + 1) * _HYPER_ROW
    grad = tl.load(gradient_ptr)
    path = tl.load(gradient_ptr + 3)
    is_active = grad != 0
    moves = tl.full((), 1, tl.int1)  # whether targets follow

    grad_scale = 1.0
    if grad_scale_ptr is not None:
        grad_scale = (1.0 / tl.load(grad_scale_ptr).to(tl.float64)).to(tl.float32)
    if found_inf_ptr is not None:
        is_finite = tl.load(found_inf_ptr) == 0
        is_active = is_active & is_finite
        if SKIP_NONFINITE:
            moves = is_finite
    if partials_ptr is not None:
        norm = tl.sqrt_rn(tl.sum(tl.load(partials_ptr + tl.arange(0, N_PARTIALS)))) * grad_scale
        if chunk == 0:
            tl.store(norm_ptr, norm)
        if SKIP_NONFINITE:
            moves = moves & (norm < float("inf"))
            is_active = is_active & moves
        clip = tl.load(hyper_ptr + n_groups * _HYPER_ROW + 1).to(tl.float32) / (norm + 1e-6)
        grad_scale *= tl.where(clip > 1.0, 1.0, clip)  # a norm that is NaN stays one

    # In fp64, or 1 - beta2 loses half its digits.
    lr = tl.load(group_ptr)
    beta1 = tl.load(group_ptr + 2)
    beta2 = tl.load(group_ptr + 3)
    step = tl.load(steps_ptr + chunk) + 1.0
    tl.debug_barrier()  # the other threads of this program have read it too
    tl.store(steps_ptr + chunk, step, mask=is_active)
    correction1 = 1.0 - tl.exp(step.to(tl.float64) * tl.load(group_ptr + 5))
    correction2 = 1.0 - tl.exp(step.to(tl.float64) * tl.load(group_ptr + 6))
    scalars = (
        grad_scale,
        (1.0 - lr * tl.load(group_ptr + 1)).to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        (lr / correction1).to(tl.float32),
        (1.0 / tl.sqrt(correction2)).to(tl.float32),
        tl.load(group_ptr + 4).to(tl.float32),
    )
    weight = (1.0 - tl.load(hyper_ptr + n_groups * _HYPER_ROW)).to(tl.float32)

    blocks = tl.where(path < N_PATHS, count // BLOCK, 0)
    for i in tl.static_range(N_PATHS):
        if path == i:
            _update_blocks(
                tensor_ptr,
                gradient_ptr,
                start,
                blocks,
                is_active,
                moves,
                scalars,
                weight,
                PATHS[4 * i],
                PATHS[4 * i + 1],
                PATHS[4 * i + 2],
                PATHS[4 * i + 3],
                BLOCK,
            )

    param = tl.load(tensor_ptr + 2)
    exp_avg = tl.load(tensor_ptr + 3)
    exp_avg_sq = tl.load(tensor_ptr + 4)
    target = tl.load(tensor_ptr + 5)
    param_copy = tl.load(tensor_ptr + 6)
    target_copy = tl.load(tensor_ptr + 7)
    p_code = tl.load(tensor_ptr + 8)
    t_code = tl.load(tensor_ptr + 9)
    g_code = tl.load(gradient_ptr + 1)
    for first in range(blocks * BLOCK, count, LANES):
        lanes = first + tl.arange(0, LANES)
        offsets = start + lanes
        inside = lanes < count
        active = inside & everywhere(is_active, LANES)
        has_target = inside & everywhere((target != 0) & moves, LANES)
        copies_target = inside & everywhere((target_copy != 0) & moves, LANES)
        p = load_any(param, offsets, inside, p_code)
        g = load_any(grad, offsets, active, g_code)
        m = load_any(exp_avg, offsets, active, p_code)
        v = load_any(exp_avg_sq, offsets, active, p_code)
        t = load_any(target, offsets, has_target, t_code)
        new_p, new_m, new_v = _adamw(p, g, m, v, scalars)
        new_p = round_to(tl.where(active, new_p, p), p_code)
        new_t = round_to(lerp(t, new_p, weight), t_code)
        store_any(param, offsets, new_p, active, p_code)
        store_any(exp_avg, offsets, new_m, active, p_code)
        store_any(exp_avg_sq, offsets, new_v, active, p_code)
        store_any(target, offsets, new_t, has_target, t_code)
        store_any(param_copy, offsets, new_p, inside & everywhere(param_copy != 0, LANES), tl.load(tensor_ptr + 10))
        store_any(target_copy, offsets, new_t, copies_target, tl.load(tensor_ptr + 11))


class MultiTensorAdamWEMA:
    """The tables of one optimizer, and its update in one launch, or two where the gradient norm is wanted.

    Tables hold as long as `is_current`; make another of these then. Kept alive, an outdated one still serves the CUDA
    graphs that were captured with it.

    Shapes:
        tensors: see `AdamWEMATensors`; parameters without exp_avg are not stepped, their targets and copies are.
        steps: fp32 [n] on the tensors' device or the CPU, the steps each parameter has made.

    Raises:
        ValueError: tensors that the kernel cannot take.
    """

    def __init__(self, tensors: AdamWEMATensors, num_groups: int, steps: Tensor):
        obstacle = tensors.obstacle()
        if obstacle:
            raise ValueError(obstacle)
        device = self._device = tensors.params[0].device
        self._config, self._norm_config = adamw_ema_config(arch_of(device)), grad_norm_config(arch_of(device))
        self.tensors, self._paths = tensors, tensors.paths()
        self._there = [t for row in tensors.rows() for t in row if t is not None]
        self._found = addresses(self._there)
        self._table = upload(host_table(tensors.table()), device)
        chunks = chunk_table([p.numel() for p in tensors.params], self._config.chunk, at_least=1)
        self._first_chunks = (chunks[:, 1] == 0).nonzero()[:, 0]
        self._chunks = upload(chunks, device)
        steps = steps if steps.device == device else upload(steps, device)
        self._steps = steps.index_select(0, self._chunks[:, 0])  # [C]
        self._step_views = [self._steps[i] for i in self._first_chunks.tolist()]
        self._steps_version = self._steps._version
        self._gradients = MovingTable(len(tensors.params), GRADIENT_ROW.value, device)
        self._partials = torch.zeros(MAX_PARTIALS, dtype=torch.float32, device=device)
        self._hyper = torch.zeros(num_groups + 1, _HYPER_ROW.value, dtype=torch.float64, device=device)
        self._hyper_rows: list[list[float]] = []
        self._written = [t for row in tensors.rows() for t in (row[0], *row[3:]) if t is not None]
        self.grad_norm = torch.zeros((), dtype=torch.float32, device=device)
        self.captured = False

    def is_current(self) -> bool:
        """Whether the tensors lie where they lay when the tables were built."""
        return addresses(self._there) == self._found

    def step_of(self, i: int) -> Tensor:
        """fp32 scalar on the device: the steps parameter i has made. Writing it in place sets them."""
        return self._step_views[i]

    def set_hyperparameters(self, groups: Sequence[Hyperparameters], momentum: float, max_norm: float | None) -> None:
        """Write what changed to the device, in stream order and without waiting.

        While a CUDA graph is captured only learning rates that are on the device are copied, there and at each replay.
        """
        rows = [group.row() for group in groups]
        rows.append([momentum, math.inf if max_norm is None else max_norm, *[0.0] * 6])
        if rows != self._hyper_rows and not is_capturing(self._device):
            self._hyper.copy_(upload(torch.tensor(rows, dtype=torch.float64, device="cpu"), self._device))
            self._hyper_rows = rows
        for i, group in enumerate(groups):
            if isinstance(group.lr, Tensor):
                self._hyper[i, 0].copy_(group.lr)

    def update(
        self,
        grads: Sequence[Tensor | None],
        norm: bool = False,
        skip_nonfinite: bool = False,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        total: Callable[[Tensor], object] | None = None,
    ) -> None:
        """One step of every parameter that has a gradient, then the moving average and the copies of every one.

        Shapes:
            grads: one for each parameter, or None. One that lies unlike its parameter is copied first.
            norm: clip to the largest norm, and leave the norm of the unscaled gradients in `grad_norm`.
            skip_nonfinite: change nothing where that norm is not finite or `found_inf` is not 0, targets and copies
                included.
            grad_scale: one element, by which the gradients are divided.
            found_inf: one element; where it is not 0, nothing is stepped, and without `skip_nonfinite` targets and
                copies follow as ever.
            total: sums a tensor over processes, in place, for the norm of gradients that lie in parts on them.

        Raises:
            ValueError: a sparse gradient, one of another dtype than fp32, fp16, bf16, or one without optimizer state.
        """
        if self._steps._version != self._steps_version:  # written from outside: the first chunk's value is the one set
            first = upload(self._first_chunks, self._device)
            self._steps.copy_(self._steps.index_select(0, first).index_select(0, self._chunks[:, 0]))
            self._steps_version = self._steps._version
        grads = laid_as(self.tensors.params, grads)
        self.captured |= is_capturing(self._device)
        gradients = self._gradients.follow(addresses(grads), lambda: self.tensors.gradient_table(grads, self._paths))
        if norm:
            if total is not None:
                self._partials.zero_()  # places that this process leaves as they are may hold what others had there
            grad_norm_launch(self._table, gradients, self._chunks, self._partials, self._norm_config)
            if total is not None:
                total(self._partials)
        _adamw_ema_kernel[(len(self._chunks),)](
            tensors_ptr=self._table,
            gradients_ptr=gradients,
            chunks_ptr=self._chunks,
            steps_ptr=self._steps,
            hyper_ptr=self._hyper,
            partials_ptr=self._partials if norm else None,
            norm_ptr=self.grad_norm,
            grad_scale_ptr=grad_scale,
            found_inf_ptr=found_inf,
            n_groups=len(self._hyper) - 1,
            N_PARTIALS=MAX_PARTIALS,
            SKIP_NONFINITE=skip_nonfinite,
            CHUNK=self._config.chunk,
            BLOCK=self._config.block,
            LANES=self._config.lanes,
            num_warps=self._config.num_warps,
            num_stages=1,
            enable_fp_fusion=False,
        )
        self.note_written()

    def note_written(self) -> None:
        """Let autograd know that an update, also one that a CUDA graph replays, has written its tensors."""
        torch.autograd.graph.increment_version(self._written)


def adamw_ema_cost(tensors: AdamWEMATensors, grads: Sequence[Tensor | None], norm: bool = False) -> Cost:
    """36 bytes an element at fp32 with a target, 2 more for each bf16 copy, and 4 more where the norm is taken."""
    moved = flops = 0
    for (p, m, v, t, *copies), grad in zip(tensors.rows(), grads, strict=True):
        width = 0 if t is None else 2 * t.element_size()
        width += sum(copy.element_size() for copy in copies if copy is not None)
        flops += (0 if t is None else 3) * p.numel()
        if grad is not None and m is not None and v is not None:
            width += (1 + norm) * grad.element_size() + 2 * (p.element_size() + m.element_size() + v.element_size())
            flops += (16 + 2 * norm) * p.numel()
        elif width:
            width += p.element_size()
        moved += width * p.numel()
    return Cost(bytes=moved, flops=flops, launches=1 + norm)


def compile_cases(arch: int) -> list[CompileCase]:
    """The update alone, after the norm, and after the norm under a gradient scaler."""
    config = adamw_ema_config(arch)
    constexprs = {"N_PARTIALS": MAX_PARTIALS, "CHUNK": config.chunk, "BLOCK": config.block, "LANES": config.lanes}
    cases = []
    for name, given in (
        ("alone", ()),
        ("clip", ("partials_ptr",)),
        ("clip scaler", ("partials_ptr", "grad_scale_ptr", "found_inf_ptr")),
    ):
        optional = dict.fromkeys(("partials_ptr", "grad_scale_ptr", "found_inf_ptr"), "constexpr")
        optional |= dict.fromkeys(given, "*fp32")
        signature = {
            "tensors_ptr": "*i64",
            "gradients_ptr": "*i64",
            "chunks_ptr": "*i32",
            "steps_ptr": "*fp32",
            "hyper_ptr": "*fp64",
            "partials_ptr": optional["partials_ptr"],
            "norm_ptr": "*fp32",
            "grad_scale_ptr": optional["grad_scale_ptr"],
            "found_inf_ptr": optional["found_inf_ptr"],
            "n_groups": "i32",
            "N_PARTIALS": "constexpr",
            "SKIP_NONFINITE": "constexpr",
            "CHUNK": "constexpr",
            "BLOCK": "constexpr",
            "LANES": "constexpr",
        }
        cases.append(
            CompileCase(
                name="adamw_ema",
                config=f"{config} {name}",
                kernel=_adamw_ema_kernel,
                signature=signature,
                constexprs=constexprs | {"SKIP_NONFINITE": bool(given)} | {k: None for k in optional if k not in given},
                num_warps=config.num_warps,
                num_stages=1,
                aligned=tuple(k for k, v in signature.items() if v.startswith("*")),
            )
        )
    return cases
