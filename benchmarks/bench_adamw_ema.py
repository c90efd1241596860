"""AdamW and the EMA of what it trains, and their peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_ema import MOMENTUM, case, lerp, loop, weights
from benchmarks.operations import Operation, Run, Sizes, compiled
from benchmarks.peers import peer
from fastjepa.kernels.launch import Cost
from fastjepa.optim import AdamWEMA

LR, DECAY = 1e-3, 0.05


def operations(sizes: Sizes) -> list[Operation]:
    """Over every trained parameter of the encoder, in fp32, from fresh moments."""
    params, targets, grads = weights(sizes, 3)
    given = Step(params, targets, grads)
    makers = {
        "torch fused AdamW, foreach_lerp": lambda: given.torchs(lerp, fused=True),
        "eager, as published": lambda: given.torchs(loop),
        "torch.compile": lambda: given.torchs(lerp, compiles=True),
        "apex FusedAdam, foreach_lerp": given.apex,
        "apex FusedAdamSWA": given.apex_swa,
        "fastjepa": given.ours,
    }
    found = [peer(name, make, sizes.device) for name, make in makers.items()]
    elements = sum(p.numel() for p in params)
    return [Operation("AdamW + EMA", case(params), Cost(36 * elements, 19 * elements, 1), given.exact, found)]


class Step:
    """The first step on given tensors, and the ways that optimizers take it, each on copies of its own."""

    def __init__(self, params: list[Tensor], targets: list[Tensor], grads: list[Tensor]):
        self.params, self.targets, self.grads = params, targets, grads

    def exact(self) -> list[Tensor]:
        """In fp64: the bias correction of a first step makes the moments g and g * g."""
        found = []
        for p, g in zip(self.params, self.grads, strict=True):
            p, g = p.double(), g.double()
            found.append(p * (1 - LR * DECAY) - LR * g / (g.abs() + 1e-8))
        averages = (MOMENTUM * t.double() + (1 - MOMENTUM) * p for t, p in zip(self.targets, found, strict=True))
        return [*found, *averages]

    def torchs(self, average: Callable[..., Any], fused: bool | None = None, compiles: bool = False) -> Run:
        """torch.optim.AdamW, then `average`; on a GPU a graph can be made of it where that costs nothing."""
        ours, averaged = self._copies()
        capturable = (fused or compiles) and ours[0].is_cuda
        optimizer = torch.optim.AdamW(ours, lr=LR, weight_decay=DECAY, fused=fused, capturable=capturable)

        def both() -> None:
            optimizer.step()
            average(averaged, ours)

        return _answers(compiled(both, dynamic=False) if compiles else both, ours, averaged)

    def apex(self) -> Run:
        """apex.optimizers.FusedAdam, then the average."""
        from apex.optimizers.fused_adam import FusedAdam  # type: ignore[import-not-found]

        ours, averaged = self._copies()
        optimizer = FusedAdam(ours, lr=LR, weight_decay=DECAY, adam_w_mode=True)

        def both() -> None:
            optimizer.step()
            lerp(averaged, ours)

        return _answers(both, ours, averaged)

    def apex_swa(self) -> Run:
        """Both in one kernel. It writes a copy for computing too, which is the parameter itself here."""
        from apex.contrib.openfold_triton.fused_adam_swa import (  # type: ignore[import-not-found]
            AdamMathType,
            FusedAdamSWA,
        )

        ours, averaged = self._copies()
        math = AdamMathType.ApexAdamW
        optimizer = FusedAdamSWA(ours, ours, averaged, MOMENTUM, lr=LR, weight_decay=DECAY, adam_math_mode=math)
        optimizer.swa_param_groups[0]["n_averaged"] = 1  # at 0 the first update would be a copy
        return _answers(optimizer.step, ours, averaged)

    def ours(self) -> Run:
        """This library's, on the CPU with torch's fused AdamW in it, as training has it."""
        ours, averaged = self._copies()
        optimizer = AdamWEMA(ours, lr=LR, weight_decay=DECAY, target_params=averaged, momentum=MOMENTUM)
        if not ours[0].is_cuda:
            optimizer.param_groups[0]["fused"] = True
        return _answers(optimizer.step, ours, averaged)

    def _copies(self) -> tuple[list[Tensor], list[Tensor]]:
        """(parameters with their gradients, targets)."""
        ours = [torch.nn.Parameter(p.clone()) for p in self.params]
        for p, g in zip(ours, self.grads, strict=True):
            p.grad = g.clone()
        return list(ours), [t.clone() for t in self.targets]


def _answers(step: Callable[[], Any], ours: list[Tensor], averaged: list[Tensor]) -> Run:
    def run() -> list[Tensor]:
        step()
        return [*ours, *averaged]

    return run


def test_adamw_ema(timed):
    """A peer of a case, right and then timed by pytest-benchmark."""
    timed()
