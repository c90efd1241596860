"""The EMA of a whole encoder, and its peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.operations import Operation, Run, Sizes, compiled
from benchmarks.peers import peer
from fastjepa import VisionTransformer
from fastjepa.kernels.ema import MultiTensorEMA, ema_cost
from fastjepa.ops import ema_update_

MOMENTUM = 0.996


def operations(sizes: Sizes) -> list[Operation]:
    """Over every trained parameter of the encoder, in fp32."""
    targets, sources = weights(sizes, 2)

    def exact() -> list[Tensor]:
        return [MOMENTUM * t.double() + (1 - MOMENTUM) * s.double() for t, s in zip(targets, sources, strict=True)]

    makers = {
        "torch foreach_lerp": lambda: _in_place(lambda ours: lerp(ours, sources), targets),
        "eager, as published": lambda: _in_place(lambda ours: loop(ours, sources), targets),
        "torch foreach mul, add": lambda: _in_place(lambda ours: _mul_add(ours, sources), targets),
        "torch.compile": lambda: _in_place(compiled(lambda ours: lerp(ours, sources), dynamic=False), targets),
        "torch AveragedModel": lambda: _averaged_model(targets, sources),
        "timm ModelEmaV3": lambda: _timm(targets, sources),
        "apex multi_tensor_axpby": lambda: _apex(targets, sources),
        "fastjepa": lambda: _in_place(lambda ours: ema_update_(ours, sources, MOMENTUM), targets),
        "fastjepa, tables kept": lambda: _tables_kept(targets, sources),
    }
    found = [peer(name, make, sizes.device) for name, make in makers.items()]
    return [Operation("EMA", case(targets), ema_cost(targets, sources), exact, found)]


def weights(sizes: Sizes, count: int) -> list[list[Tensor]]:
    """`count` lists of random tensors in the shapes of the encoder's trained parameters, fp32."""
    with torch.device("meta"):
        patch = 14 if sizes.width == 1280 else 16
        model = VisionTransformer([224], patch, embed_dim=sizes.width, depth=sizes.layers, num_heads=sizes.heads)
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    return [[sizes.randn(*shape, dtype=torch.float32) for shape in shapes] for _ in range(count)]


def case(tensors: list[Tensor]) -> str:
    """What they are, in a few words."""
    return f"{sum(t.numel() for t in tensors) / 1e6:.0f} M parameters in {len(tensors)} tensors, fp32"


@torch.no_grad()
def lerp(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Of the whole lists in one call."""
    torch._foreach_lerp_(targets, sources, 1.0 - MOMENTUM)  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def loop(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Parameter by parameter, as the official code does it."""
    for t, s in zip(targets, sources, strict=True):
        t.mul_(MOMENTUM).add_((1.0 - MOMENTUM) * s)


def _mul_add(targets: list[Tensor], sources: list[Tensor]) -> None:
    torch._foreach_mul_(targets, MOMENTUM)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(targets, sources, alpha=1.0 - MOMENTUM)  # pyright: ignore[reportPrivateImportUsage]


def _in_place(update: Callable[[list[Tensor]], Any], targets: list[Tensor]) -> Run:
    """`update` over copies of the targets; the first answer is the one that counts."""
    ours = [t.clone() for t in targets]

    def run() -> list[Tensor]:
        update(ours)
        return ours

    return run


def _tables_kept(targets: list[Tensor], sources: list[Tensor]) -> Run:
    ours = [t.clone() for t in targets]
    tables = MultiTensorEMA(ours, sources)

    def run() -> list[Tensor]:
        tables.update(MOMENTUM)
        return ours

    return run


def _models(*lists: list[Tensor]) -> list[torch.nn.ParameterList]:
    return [torch.nn.ParameterList([torch.nn.Parameter(x.clone()) for x in tensors]) for tensors in lists]


def _averaged_model(targets: list[Tensor], sources: list[Tensor]) -> Run:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model, ema = _models(sources, targets)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(MOMENTUM))
    averaged.module.load_state_dict(ema.state_dict())
    averaged.n_averaged.fill_(1)  # at 0 the first update would be a copy

    def run() -> list[Tensor]:
        averaged.update_parameters(model)
        return list(averaged.module.parameters())

    return run


def _timm(targets: list[Tensor], sources: list[Tensor]) -> Run:
    from timm.utils.model_ema import ModelEmaV3  # type: ignore[import-not-found]

    model, ema = _models(sources, targets)
    averaged = ModelEmaV3(model, decay=MOMENTUM)
    averaged.module.load_state_dict(ema.state_dict())

    def run() -> list[Tensor]:
        averaged.update(model)
        return list(averaged.module.parameters())

    return run


def _apex(targets: list[Tensor], sources: list[Tensor]) -> Run:
    """t = momentum * t + (1 - momentum) * s, both looked at for infinities, as apex does by itself."""
    import amp_C  # type: ignore[import-not-found]
    from apex.multi_tensor_apply import multi_tensor_applier  # type: ignore[import-not-found]

    found_inf = torch.zeros(1, dtype=torch.int32, device=targets[0].device)

    def update(ours: list[Tensor]) -> None:
        lists = [ours, sources, ours]
        multi_tensor_applier(amp_C.multi_tensor_axpby, found_inf, lists, MOMENTUM, 1.0 - MOMENTUM, -1)

    return _in_place(update, targets)


def test_ema(timed):
    """A peer of a case, right and then timed by pytest-benchmark."""
    timed()
