"""EMA of a whole model, and AdamW with it, and their peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.operations import Operation, Peer, Run, Sizes, missing
from fastjepa import VisionTransformer
from fastjepa.kernels.ema import ema_cost
from fastjepa.kernels.launch import Cost
from fastjepa.nn import Block
from fastjepa.ops import ema_update_
from fastjepa.optim import AdamWEMA

MOMENTUM, LR, DECAY = 0.996, 1e-3, 0.05


def operations(sizes: Sizes) -> list[Operation]:
    """Over every trained parameter of the encoder, in fp32."""
    with torch.device("meta"):
        patch = 14 if sizes.width == 1280 else 16
        model = VisionTransformer([224], patch, embed_dim=sizes.width, depth=sizes.layers, num_heads=sizes.heads)
    assert any(isinstance(block, Block) for block in model.blocks)
    torch.manual_seed(0)
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    params, targets, grads = ([sizes.randn(*shape, dtype=torch.float32) for shape in shapes] for _ in range(3))
    return [_ema(targets, params), _adamw(params, targets, grads)]


def _ema(targets: list[Tensor], sources: list[Tensor]) -> Operation:
    def exact() -> list[Tensor]:
        return [MOMENTUM * t.double() + (1 - MOMENTUM) * s.double() for t, s in zip(targets, sources, strict=True)]

    def loop(ours: list[Tensor]) -> None:
        for t, s in zip(ours, sources, strict=True):
            t.mul_(MOMENTUM).add_((1.0 - MOMENTUM) * s)

    def mul_add(ours: list[Tensor]) -> None:
        torch._foreach_mul_(ours, MOMENTUM)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(ours, sources, alpha=1.0 - MOMENTUM)  # pyright: ignore[reportPrivateImportUsage]

    updates = {
        "torch foreach_lerp": lambda ours: _lerp(ours, sources),
        "eager, as published": loop,
        "torch foreach mul, add": mul_add,
        "fastjepa": lambda ours: ema_update_(ours, sources, MOMENTUM),
    }
    peers = [Peer(name, lambda f=update: _in_place(f, targets)) for name, update in updates.items()]
    peers.insert(3, Peer("timm ModelEmaV3", lambda: _timm(targets, sources), missing("timm")))
    if all(t.is_cuda for t in targets):
        peers.insert(4, Peer("fastjepa, tables kept", lambda: _kept(targets, sources)))
    return Operation("EMA", _case(targets), ema_cost(targets, sources), exact, peers)


def _lerp(targets: list[Tensor], sources: list[Tensor]) -> None:
    torch._foreach_lerp_(targets, sources, 1.0 - MOMENTUM)  # pyright: ignore[reportPrivateImportUsage]


def _in_place(update: Callable[[list[Tensor]], Any], targets: list[Tensor]) -> Run:
    """`update` over copies of the targets; the first answer is the one that counts."""
    ours = [t.clone() for t in targets]

    def run() -> list[Tensor]:
        update(ours)
        return ours

    return run


def _kept(targets: list[Tensor], sources: list[Tensor]) -> Run:
    """As IJEPA.update_target does it: the tables of pointers made once."""
    from fastjepa.kernels.ema import MultiTensorEMA

    ours = [t.clone() for t in targets]
    tables = MultiTensorEMA(ours, sources)

    def run() -> list[Tensor]:
        tables.update(MOMENTUM)
        return ours

    return run


def _timm(targets: list[Tensor], sources: list[Tensor]) -> Run:
    from timm.utils import ModelEmaV3  # type: ignore[import-not-found]

    model, ema = (torch.nn.ParameterList([torch.nn.Parameter(x.clone()) for x in some]) for some in (sources, targets))
    averaged = ModelEmaV3(model, decay=MOMENTUM)
    averaged.module.load_state_dict(ema.state_dict())

    def run() -> list[Tensor]:
        averaged.update(model)
        return list(averaged.module.parameters())

    return run


def _adamw(params: list[Tensor], targets: list[Tensor], grads: list[Tensor]) -> Operation:
    """AdamW and then the EMA of its parameters, from fresh moments."""

    def exact() -> list[Tensor]:
        found = []
        for p, g in zip(params, grads, strict=True):
            p, g = p.double(), g.double()
            found.append(p * (1 - LR * DECAY) - LR * g / (g.abs() + 1e-8))  # the first step, its bias corrected
        return [*found, *(MOMENTUM * t.double() + (1 - MOMENTUM) * p for t, p in zip(targets, found, strict=True))]

    def torchs(average: Callable[[list[Tensor], list[Tensor]], Any], fused: bool | None = None) -> Run:
        ours, averaged = _leaves(params, grads), [t.clone() for t in targets]
        optimizer = torch.optim.AdamW(ours, lr=LR, weight_decay=DECAY, fused=fused)

        def run() -> list[Tensor]:
            optimizer.step()
            with torch.no_grad():
                average(averaged, ours)
            return [*ours, *averaged]

        return run

    def loop(averaged: list[Tensor], ours: list[Tensor]) -> None:
        for t, p in zip(averaged, ours, strict=True):
            t.mul_(MOMENTUM).add_((1.0 - MOMENTUM) * p)

    def ours() -> Run:
        mine, averaged = _leaves(params, grads), [t.clone() for t in targets]
        optimizer = AdamWEMA(mine, lr=LR, weight_decay=DECAY, target_params=averaged, momentum=MOMENTUM)
        if not mine[0].is_cuda:
            optimizer.param_groups[0]["fused"] = True  # as training has it

        def run() -> list[Tensor]:
            optimizer.step()
            return [*mine, *averaged]

        return run

    def apex() -> Run:
        from apex.optimizers import FusedAdam  # type: ignore[import-not-found]

        mine, averaged = _leaves(params, grads), [t.clone() for t in targets]
        optimizer = FusedAdam(mine, lr=LR, weight_decay=DECAY, adam_w_mode=True)

        def run() -> list[Tensor]:
            optimizer.step()
            with torch.no_grad():
                _lerp(averaged, mine)
            return [*mine, *averaged]

        return run

    no_apex = missing("amp_C") and "not installed (NVIDIA's apex)"
    peers = [
        Peer("torch fused AdamW, foreach_lerp", lambda: torchs(_lerp, fused=True)),
        Peer("torch foreach AdamW, loop, as published", lambda: torchs(loop)),
        Peer("apex FusedAdam, foreach_lerp", apex, no_apex),
        Peer("fastjepa", ours),
    ]
    elements = sum(p.numel() for p in params)
    return Operation("AdamW + EMA", _case(params), Cost(36 * elements, 19 * elements, 1), exact, peers)


def _leaves(params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    ours = [torch.nn.Parameter(p.clone()) for p in params]
    for p, g in zip(ours, grads, strict=True):
        p.grad = g.clone()
    return list(ours)


def _case(tensors: list[Tensor]) -> str:
    return f"{sum(t.numel() for t in tensors) / 1e6:.0f} M parameters in {len(tensors)} tensors, fp32"
