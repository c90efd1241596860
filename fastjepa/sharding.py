"""Models divided among processes (FSDP): who holds what, and tensors of which each process holds a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastjepa.objective import IJEPA

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


def shard(
    model: IJEPA, device: torch.device, dtype: torch.dtype | None = None, reduce: torch.dtype | None = None
) -> None:
    """Divide a live model among all processes by `torch.distributed.fsdp.fully_shard`, block by block.

    Each then keeps its part of every parameter, and gathers those of a block as the block runs. The target encoder is
    divided as the encoder is, so that its moving average needs nothing of others.

    `dtype`: what weights are gathered in, bf16 say; activations are left to autocast. `reduce`: what gradients are sent
    in, fp32 otherwise. Positions, which take no gradient, stay whole on each process, as wide as they are.

    Source: Zhao et al. 2023 (arXiv 2304.11277).
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(dtype, reduce or torch.float32, cast_forward_inputs=False)
    encoder, predictor, target = model.encoder, model.predictor, model.target_encoder
    positions = {encoder.pos_embed, predictor.predictor_pos_embed, target.pos_embed}
    # What is beside the blocks belongs to the whole model: encoder and predictor give `Ragged`, in which FSDP would not
    # find the tensors whose gradients it waits for.
    for module in (*encoder.blocks, *predictor.predictor_blocks, *target.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=positions)


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody hooks its forward. The hooks of `fully_shard`, which gather and free weights, do not count."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not getattr(hook, "__module__", "").startswith("torch.distributed.fsdp.") for hook in hooks)
