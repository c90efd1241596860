"""A moving average of a whole model, beside any training loop."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastjepa import ops
from fastjepa.ops import library
from fastjepa.sharding import local

if TYPE_CHECKING:
    from fastjepa.kernels.ema import MultiTensorEMA


class EMA(nn.Module):
    """`.module` is a copy of a model that follows it: t = decay * t + (1 - decay) * s at each `update(model)`.

    Takes the place of timm's `ModelEmaV3` (same keywords, `update(model, step)`, `set`, `get_decay`, `.module`) and of
    torch's `AveragedModel` with an EMA (`update_parameters(model)`, `.n_averaged`). On CUDA an update is one launch.
    Tensors are matched by name, whatever `torch.compile` or DistributedDataParallel is wrapped around the model.

    A model sharded by `fully_shard` cannot be copied: make the EMA first and shard `.module` as the model, or hand in
    a `module` sharded likewise. Each rank then averages its own shards, with nothing communicated.

    Arguments:
        decay, min_decay: in 0..1; `decay` may be set anew before each update, for a schedule.
        update_after_step, use_warmup, warmup_gamma, warmup_power: of the decay at a step, see `get_decay`.
        device, dtype: where and as what the average is kept, if not as the model. 16-bit weights want
            dtype=torch.float32: in 16 bits the small steps of an average round away.
        exclude_buffers: copy floating buffers (the running statistics of BatchNorm, say) instead of averaging them.
            Others are always copied.
        module: what follows, a teacher that is there already, say; it is moved on from what it holds. None: a copy of
            the model, in evaluation mode.

    Raises:
        ValueError: a decay outside 0..1, a sharded model without `module`, or a module of other names or shapes.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> ema = EMA(model, decay=0.75)
    >>> with torch.no_grad(): _ = ema.module.weight.zero_(), model.weight.fill_(1.0)
    >>> ema.update(model); ema.module.weight.item()
    0.25
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        exclude_buffers: bool = False,
        module: nn.Module | None = None,
    ):
        super().__init__()
        for name, value in (("decay", decay), ("min_decay", min_decay)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in 0..1, got {value}")
        self.decay, self.min_decay, self.update_after_step = decay, min_decay, update_after_step
        self.use_warmup, self.warmup_gamma, self.warmup_power = use_warmup, warmup_gamma, warmup_power
        self.exclude_buffers = exclude_buffers
        self._updates = 0
        self._tables: dict[torch.device, tuple[list[Any], MultiTensorEMA]] = {}
        if module is None:
            if any(_is_sharded(part) for part in model.modules()):
                raise ValueError(
                    "a model sharded by fully_shard cannot be copied: make the EMA before and shard ema.module as the "
                    "model, or pass module=, a copy sharded likewise"
                )
            module = copy.deepcopy(_unwrapped(model)).eval()
        self.module = module.requires_grad_(False)
        self.training = module.training
        if device is not None or dtype is not None:
            self.module.to(device=device, dtype=dtype)
        _warn_of_low_precision(self.module)
        _paired(self.module, model)

    @property
    def n_averaged(self) -> Tensor:
        """How many updates there were; counted on the host, so that none waits for the device."""
        return torch.tensor(self._updates)

    @n_averaged.setter
    def n_averaged(self, count: Tensor | int) -> None:
        self._updates = int(count)

    def get_decay(self, step: int | None = None) -> float:
        """The decay of an update after `step` optimizer steps; without a step `decay` itself.

        It is 0, a copy, up to step `update_after_step` + 1. From then on, n steps later, it is `decay`, or with
        `use_warmup` 1 - (1 + n / warmup_gamma) ** -warmup_power within min_decay..decay, as timm has it.
        """
        if step is None:
            return self.decay
        n = max(0, step - self.update_after_step - 1)
        if n == 0:
            return 0.0
        if not self.use_warmup:
            return self.decay
        return max(min(1 - (1 + n / self.warmup_gamma) ** -self.warmup_power, self.decay), self.min_decay)

    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Follow the model by one step, with the decay of `get_decay(step)`.

        Raises:
            ValueError: a model with other names or shapes than `.module`.
        """
        self._follow(model, self.get_decay(step))
        self._updates += 1

    def update_parameters(self, model: nn.Module) -> None:
        """As `update` at the step that the number of updates says: the first one copies, as `AveragedModel`'s."""
        self.update(model, self._updates + 1)

    def set(self, model: nn.Module) -> None:
        """Make the average equal to the model."""
        self._follow(model, 0.0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The average's own forward."""
        return self.module(*args, **kwargs)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Within the block `model` holds the average, for evaluation; then what it held before, bit for bit."""
        with torch.no_grad():
            pairs = _paired(self.module, model)
            held = [source.clone() for _, source, _ in pairs]
            _copy([source for _, source, _ in pairs], [target for target, _, _ in pairs])
        try:
            yield
        finally:
            with torch.no_grad():
                _copy([source for _, source, _ in _paired(self.module, model)], held)

    @torch.no_grad()
    def _follow(self, model: nn.Module, decay: float) -> None:
        groups: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for target, source, is_buffer in _paired(self.module, model):
            if not target.is_floating_point() or (is_buffer and self.exclude_buffers):
                target.copy_(source)
                continue
            targets, sources = groups.setdefault(target.device, ([], []))
            targets.append(target)
            sources.append(source if source.device == target.device else source.to(target.device))
        for device, (targets, sources) in groups.items():
            self._average(device, targets, sources, decay)

    def _average(self, device: torch.device, targets: list[Tensor], sources: list[Tensor], decay: float) -> None:
        if not library.takes_kernels(targets[0]):
            ops.ema_update_(targets, sources, decay)
            return
        from fastjepa.kernels.ema import MultiTensorEMA

        # Shards are new tensors at each look, over the same memory: tables hold while the memory is the same.
        places = [(t.data_ptr(), t.dtype, t.shape) for t in (*targets, *sources)]
        known = self._tables.get(device)
        if known is None or known[0] != places:
            known = self._tables[device] = places, MultiTensorEMA(targets, sources)
        known[1].update(decay)

    def __getstate__(self) -> dict[str, Any]:
        """Without the tables, which hold this instance's addresses: copies make their own."""
        return super().__getstate__() | {"_tables": {}}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}n_averaged"] = self.n_averaged

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        count = state_dict.pop(f"{prefix}n_averaged", None)  # torch's AveragedModel has one, timm's averages have none
        if count is not None:
            self.n_averaged = count
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _paired(average: nn.Module, model: nn.Module) -> list[tuple[Tensor, Tensor, bool]]:
    """(target, source, whether it is a buffer) of every tensor, of shards the part that lies here.

    Raises:
        ValueError: other names or shapes.
    """
    ours, theirs = _tensors(average), _tensors(model)
    for name in (*ours, *theirs):
        if name not in ours or name not in theirs:
            lacks, has = ("average", "model") if name not in ours else ("model", "average")
            raise ValueError(f"the {lacks} has no {name}, which the {has} has")
        if ours[name][0].shape != theirs[name][0].shape:
            shapes = [list(tensors[name][0].shape) for tensors in (ours, theirs)]
            raise ValueError(f"{name} is {shapes[0]} in the average and {shapes[1]} in the model")
    return [(target, theirs[name][0], is_buffer) for name, (target, is_buffer) in ours.items()]


def _tensors(model: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    """Parameters and buffers by the name that they have without wrappers, and whether each is a buffer.

    Asked at every update, hence in one walk.
    """
    found: dict[str, tuple[Tensor, bool]] = {}
    seen: set[int] = set()
    for place, part in _unwrapped(model).named_modules():
        if _is_sharded(part):
            part.reshard()  # type: ignore[operator]  # the whole ones of a forward may still be in the shards' place
        prefix = "".join(f"{name}." for name in place.split(".") if name and name != "_orig_mod")
        for own, is_buffer in ((part._parameters, False), (part._buffers, True)):
            for name, tensor in own.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[prefix + name] = local(tensor), is_buffer
    return found


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


# By what they can do: importing torch.distributed's tensors would slow the import of everyone who has none.
def _is_sharded(module: nn.Module) -> bool:
    return hasattr(module, "reshard") and hasattr(module, "unshard")


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _warn_of_low_precision(module: nn.Module) -> None:
    low = {p.dtype for p in module.parameters() if p.is_floating_point() and p.element_size() < 4}
    if low:
        warnings.warn(
            f"an average kept in {', '.join(sorted(map(str, low)))} rounds small steps away; dtype=torch.float32 keeps "
            "them",
            stacklevel=3,
        )
