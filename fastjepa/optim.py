"""AdamW and the moving average of the target encoder as one optimizer."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fastjepa.copies import set_current
from fastjepa.kernels.reference import ema_update_ref_
from fastjepa.ops.checks import is_expanded
from fastjepa.sharding import is_sharded, local, summed, whole

if TYPE_CHECKING:
    from fastjepa.kernels.adamw_ema import AdamWEMATensors, Hyperparameters, MultiTensorAdamWEMA

# Options of torch's AdamW that can come with a loaded state and that the kernel does not have.
_TORCH_ONLY = ("amsgrad", "maximize", "differentiable")


class AdamWEMA(torch.optim.AdamW):
    """AdamW, then t = momentum * t + (1 - momentum) * p for every parameter p with a target t, then copies of both.

    On CUDA one kernel launch does all of it for all parameter groups, one more where the gradient norm is wanted;
    elsewhere torch's own functions do. `state_dict` is that of `torch.optim.AdamW`: each loads the other's.

    Targets and copies are moved at every step, also where a parameter has no gradient, takes none, or a gradient scaler
    skips it; a step that `skip_nonfinite` skips moves nothing. Gradients are left as they are: scaling and clipping
    happen on the way.

    Parameters sharded by `fully_shard` go with targets sharded alike. Each process updates its own shards; the gradient
    norm, where it is wanted, is that of all of them.

    Shapes:
        params, lr, betas, eps, weight_decay: as `torch.optim.AdamW`; further keys of a parameter group are kept.
        target_params: for each parameter, in the groups' order, its target (same shape, any floating dtype) or None;
            or a mapping from parameters to targets.
        momentum: of the moving average, in 0..1; also an attribute, for schedules to set before each step.
        max_grad_norm: the norm of all gradients together is clipped to this, as `clip_grad_norm_` does.
        skip_nonfinite: a step whose gradient norm is not finite, or that a gradient scaler skips, changes nothing: no
            parameter, moment, step number, target or copy. Decided on the device. The norm is summed in fp32, so beyond
            1e19 it is not finite.
        low_precision: a mapping from parameters and targets to copies of them (say bf16), rewritten at each step.

    Attributes:
        grad_norm: the norm of the last step's gradients before clipping, a scalar on the device; None where neither
            `max_grad_norm` nor `skip_nonfinite` asks for it.

    A step can be captured in a CUDA graph after an eager one. Replays count steps; `sync_hyperparameters` brings new
    values of lr, weight_decay, momentum and so on to the device before a replay, and `note_replay` is called after it.
    `torch.amp.GradScaler` works as with torch's fused optimizers: scale and found_inf stay on the device.

    Raises:
        ValueError: targets or copies that do not fit their parameters, parameters that are not floating or are given
            twice, or a hyperparameter out of its range.

    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2; Assran et al. 2023 (arXiv 2301.08243).

    >>> p, t = torch.nn.Parameter(torch.ones(2)), torch.zeros(2)
    >>> optimizer = AdamWEMA([p], lr=0.5, weight_decay=0.0, target_params=[t], momentum=0.75)
    >>> p.grad = torch.ones(2)
    >>> optimizer.step(); print(p.data, t)
    tensor([0.5000, 0.5000]) tensor([0.1250, 0.1250])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        target_params: Iterable[Tensor | None] | Mapping[Tensor, Tensor] | None = None,
        momentum: float = 0.996,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        low_precision: Mapping[Tensor, Tensor] | None = None,
    ):
        self._tables: MultiTensorAdamWEMA | None = None
        self._states: list[dict[str, Any]] = []  # those of the tables
        self._state_tensors: list[tuple[dict[str, Any], dict[str, Any]]] = []  # each with what it held then
        self._outdated: list[MultiTensorAdamWEMA] = []  # those that a captured CUDA graph still reads
        self._warned = False
        super().__init__(params, lr, betas, eps, weight_decay)
        self._step_supports_amp_scaling = True
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}")
        self.momentum = momentum
        self.max_grad_norm, self.skip_nonfinite = max_grad_norm, skip_nonfinite
        self.grad_norm: Tensor | None = None
        self._targets = _by_parameter(self._params(), target_params)
        self._copies = dict(low_precision or {})
        self._versions = [tensor._version for tensor in self._copies]
        _check_pairs(self._targets, "target")
        _check_pairs(self._copies, "low-precision copy")
        known = {id(t) for pair in self._targets.items() for t in pair} | {id(p) for p in self._params()}
        if any(id(tensor) not in known for tensor in self._copies):
            raise ValueError("low_precision has a key that is neither a parameter nor a target of this optimizer")

    @property
    def momentum(self) -> float:
        """Of the moving average, in 0..1."""
        return self._momentum

    @momentum.setter
    def momentum(self, momentum: float) -> None:
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must be in 0..1, got {momentum}")
        self._momentum = float(momentum)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`. Parameters added after construction have no target and no copy.

        Raises:
            ValueError: parameters that are not floating or are given twice, or a hyperparameter out of its range.
        """
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        self._forget_tables()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update parameters, targets and copies; returns the closure's loss, if there is a closure.

        Raises:
            ValueError: a sparse gradient.
            RuntimeError: captured in a CUDA graph with no step before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not (self._takes_kernels() and self._step_kernels()):
            self._step_torch()
        self._note_copies()
        return loss

    def sync_hyperparameters(self) -> None:
        """Bring lr, betas, eps, weight_decay, momentum and max_grad_norm to the device, where a CUDA graph reads them.

        `step` does so by itself; call this before replaying a graph that holds a step.
        """
        if self._tables is not None:
            self._tables.set_hyperparameters(self._hyperparameters(), self.momentum, self.max_grad_norm)

    @property
    def tables(self) -> object:
        """What a captured step updates: another one after `load_state_dict`, `add_param_group`, or a step that found
        parameters or moments elsewhere."""
        return self._tables

    def copies_are_current(self) -> bool:
        """Whether nobody has written a parameter since its copy was: a graph that holds a step takes the copies."""
        return [tensor._version for tensor in self._copies] == self._versions

    def note_replay(self) -> None:
        """Let autograd know that a replayed CUDA graph has changed all that its step changes.

        What is kept of a parameter only as long as that stays the same, such as its form in 8 bits, is made anew then.
        """
        if self._tables is not None:
            self._tables.note_written()
        self._note_copies()

    def _note_copies(self) -> None:
        for tensor, copy in self._copies.items():
            set_current(copy, tensor)
        self._versions = [tensor._version for tensor in self._copies]

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.AdamW.state_dict`, with step numbers on the CPU, where a stock AdamW keeps them."""
        packed = super().state_dict()
        if self._tables is None:
            return packed
        held = {i: state for i, state in packed["state"].items() if isinstance(state, dict) and "step" in state}
        if held:
            steps = torch.stack([state["step"] for state in held.values()]).cpu()
            packed["state"] = packed["state"] | {
                i: state | {"step": step.clone()} for (i, state), step in zip(held.items(), steps, strict=True)
            }
        return packed

    def __getstate__(self) -> dict[str, Any]:
        own = ("_momentum", "max_grad_norm", "skip_nonfinite", "grad_norm", "_targets", "_copies", "_versions")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._step_supports_amp_scaling = True
        self._outdated = getattr(self, "_outdated", [])
        self._warned = getattr(self, "_warned", False)
        self._forget_tables()

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _takes_kernels(self) -> bool:
        return self._params()[0].device.type == "cuda"

    def _wants_norm(self) -> bool:
        return self.max_grad_norm is not None or self.skip_nonfinite

    def _forget_tables(self) -> None:
        tables = getattr(self, "_tables", None)
        if tables is not None and tables.captured:
            self._outdated.append(tables)
        self._tables = None

    def _hyperparameters(self) -> list[Hyperparameters]:
        from fastjepa.kernels.adamw_ema import Hyperparameters  # Triton is not on every machine

        groups = []
        for group in self.param_groups:
            lr = group["lr"]
            lr = lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)
            beta1, beta2 = group["betas"]
            groups.append(Hyperparameters(lr, float(beta1), float(beta2), group["eps"], group["weight_decay"]))
        return groups

    def _tensors(self, params: list[Tensor]) -> AdamWEMATensors:
        from fastjepa.kernels.adamw_ema import AdamWEMATensors

        states = [self.state.get(p, {}) for p in params]
        targets = [self._targets.get(p) for p in params]
        return AdamWEMATensors(
            params=_locals(params),
            groups=[i for i, group in enumerate(self.param_groups) for _ in group["params"]],
            exp_avgs=_locals([state.get("exp_avg") for state in states]),
            exp_avg_sqs=_locals([state.get("exp_avg_sq") for state in states]),
            targets=_locals(targets),
            param_copies=_locals([self._copies.get(p) for p in params]),
            target_copies=_locals([None if t is None else self._copies.get(t) for t in targets]),
        )

    def _step_kernels(self) -> bool:
        """Whether the kernels could do the step; if not, nothing has happened."""
        options = {name for name in _TORCH_ONLY for group in self.param_groups if group[name]}
        if options:
            self._say_once(f"{sorted(options)} is set")
            return False
        params = self._params()
        grads = [p.grad for p in params]
        if not self._fits(params, grads):
            self._forget_tables()
            self._init_moments(params)
            self._build(params)
        tables = self._tables
        if tables is None:
            return False
        self.sync_hyperparameters()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        total = next((summed(p) for p in params if is_sharded(p)), None)
        tables.update(_locals(grads), self._wants_norm(), self.skip_nonfinite, scale, found_inf, total)
        self.grad_norm = tables.grad_norm if self._wants_norm() else None
        return True

    def _fits(self, params: list[Tensor], grads: list[Tensor | None]) -> bool:
        """Whether the tables are those of these parameters and of the state they have now. Asked at every step."""
        tables = self._tables
        return (
            tables is not None
            and _same(_locals(params), tables.tensors.params)
            and _same(self.state.values(), self._states)
            and all(s.get(name) is tensor for s, tensors in self._state_tensors for name, tensor in tensors.items())
            and all(g is None or m is not None for g, m in zip(grads, tables.tensors.exp_avgs, strict=True))
            and tables.is_current()
        )

    def _init_moments(self, params: list[Tensor]) -> None:
        for p in params:
            if p.grad is not None and not self.state[p]:
                state = self.state[p]
                state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def _build(self, params: list[Tensor]) -> None:
        """Make the tables, if the kernel can take these tensors, and let the state show the steps they count."""
        from fastjepa.kernels.adamw_ema import MultiTensorAdamWEMA

        tensors = self._tensors(params)
        obstacle = tensors.obstacle()
        if obstacle:
            self._say_once(obstacle)
            return
        states = [self.state.get(p) for p in params]
        zero = torch.zeros((), dtype=torch.float32, device="cpu")
        steps = [torch.as_tensor(state["step"], dtype=torch.float32) if state else zero for state in states]
        if any(step.device != steps[0].device for step in steps):
            steps = [step.to(tensors.params[0].device) for step in steps]
        self._tables = MultiTensorAdamWEMA(tensors, len(self.param_groups), torch.stack(steps))
        self._states, self._state_tensors = list(self.state.values()), []
        for i, state in enumerate(states):
            if state:
                state["step"] = self._tables.step_of(i)
                self._state_tensors.append((state, state.copy()))

    def _say_once(self, obstacle: str) -> None:
        if not self._warned:
            warnings.warn(f"AdamWEMA runs without its kernels, and slower: {obstacle}", stacklevel=5)
        self._warned = True

    def _step_torch(self) -> None:
        params = self._params()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        with_grad = [p for p in params if p.grad is not None]
        grads = [p.grad for p in with_grad if p.grad is not None]
        if any(grad.layout != torch.strided for grad in grads):
            raise ValueError("AdamWEMA does not take sparse gradients")
        if scale is not None:
            grads = [grad / scale for grad in grads]
        skip = found_inf is not None and bool(found_inf)
        if self._wants_norm():
            norm = self.grad_norm = whole(torch.nn.utils.get_total_norm(grads))
            if self.max_grad_norm is not None:
                clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                grads = [grad * clip for grad in grads]
            if self.skip_nonfinite and (skip or not bool(norm.isfinite())):
                return
        if not skip:
            self._adamw(dict(zip(with_grad, grads, strict=True)))
        pairs = [(local(self._targets[p]), local(p)) for p in params if p in self._targets]
        ema_update_ref_([t for t, _ in pairs], [p for _, p in pairs], self.momentum)
        for tensor, copy in self._copies.items():
            copy.copy_(tensor)

    def _adamw(self, grads: dict[Tensor, Tensor]) -> None:
        """torch's AdamW, with gradients other than those that the parameters hold."""
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[] for _ in range(6)]
            has_complex = self._init_group(group, *lists)
            params, _, *rest = lists
            beta1, beta2 = group["betas"]
            adamw(
                _locals(params),
                _locals([grads[p] for p in params]),
                *map(_locals, rest),
                foreach=group["foreach"],
                capturable=group["capturable"] and bool(params) and params[0].device.type != "cpu",
                differentiable=group["differentiable"],
                fused=group["fused"],
                has_complex=has_complex,
                amsgrad=group["amsgrad"],
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
            )


def _locals(tensors: Sequence[Any]) -> list[Any]:
    return [t if t is None else local(t) for t in tensors]


def _same(some: Collection[object], others: Collection[object]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= float(group[name]) < float("inf"):
            raise ValueError(f"{name} must be finite and not negative, got {group[name]}")
    if not all(0.0 <= float(beta) < 1.0 for beta in group["betas"]):
        raise ValueError(f"betas must be in 0..1, 1 excluded, got {group['betas']}")
    for p in group["params"]:
        if not p.is_floating_point():
            raise ValueError(f"parameters must be of a floating dtype, got {p.dtype} {list(p.shape)}")
        if is_expanded(p):
            raise ValueError(
                f"a parameter {list(p.shape)} is expanded: its elements share memory, strides {p.stride()}"
            )
    if len({id(p) for p in group["params"]}) < len(group["params"]):
        raise ValueError("a parameter is given twice in one group")


def _by_parameter(
    params: list[Tensor], targets: Iterable[Tensor | None] | Mapping[Tensor, Tensor] | None
) -> dict[Tensor, Tensor]:
    if targets is None:
        return {}
    if isinstance(targets, Mapping):
        strangers = {id(p) for p in targets} - {id(p) for p in params}
        if strangers:
            raise ValueError(f"target_params has {len(strangers)} keys that are not parameters of this optimizer")
        return {p: targets[p] for p in params if p in targets}
    listed = list(targets)
    if len(listed) != len(params):
        raise ValueError(
            f"target_params needs one entry for each of {len(params)} parameters, in the groups' order and None where "
            f"there is no target, got {len(listed)}"
        )
    return {p: t for p, t in zip(params, listed, strict=True) if t is not None}


def _check_pairs(pairs: dict[Tensor, Tensor], what: str) -> None:
    for tensor, other in pairs.items():
        if not isinstance(other, Tensor) or not other.is_floating_point():
            found = getattr(other, "dtype", type(other).__name__)
            raise ValueError(f"a {what} must be a tensor of a floating dtype, got {found}")
        if other.shape != tensor.shape:
            raise ValueError(f"a {what} of shape {list(other.shape)} for a tensor of shape {list(tensor.shape)}")
        if is_sharded(other) != is_sharded(tensor) or local(other).shape != local(tensor).shape:
            raise ValueError(f"a {what} that is not sharded as its tensor of shape {list(tensor.shape)}")
        if other.device != tensor.device:
            raise ValueError(f"a {what} on {other.device} for a tensor on {tensor.device}")
        if is_expanded(other):
            raise ValueError(f"a {what} {list(other.shape)} is expanded: its elements share memory")
    if len({id(t) for t in pairs.values()}) < len(pairs):
        raise ValueError(f"a {what} is given for two tensors")
