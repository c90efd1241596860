"""Tensors of which each process holds a part, as `torch.distributed.fsdp.fully_shard` makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

# torch.distributed's tensors are told by what they can do: importing them would slow everyone who has none.


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a `DTensor`."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part that lies here, over the same memory; of an ordinary tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """All of it, gathered from every process, each of which must call this; an ordinary tensor is returned as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[operator]


def summed(sharded: Tensor) -> Callable[[Tensor], Any]:
    """What sums an ordinary tensor, in place, over the processes that `sharded` lies on."""
    import torch.distributed as dist

    group = sharded.device_mesh.get_group()  # type: ignore[attr-defined]
    return lambda tensor: dist.all_reduce(tensor, group=group)


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor divided as `other` is: the part that belongs here, on its device. Nothing is sent."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    other_: Any = other
    tensor = tensor.to(other_.device)
    return distribute_tensor(tensor, other_.device_mesh, other_.placements, src_data_rank=None)


def is_hooked_by_others(module: nn.Module) -> bool:
    """Whether somebody hooks its forward. The hooks of `fully_shard`, which gather and free weights, do not count."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not getattr(hook, "__module__", "").startswith("torch.distributed.fsdp.") for hook in hooks)
