"""What the `kernels` suite times: an operation on inputs, its declared cost, its right answer, and its peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastjepa.kernels.launch import Cost

Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Peer:
    """One way to do an operation. `make` builds its own state and gives the call that is timed and that answers.

    `absent` says why it cannot run here, where it cannot; `graph`, whether a CUDA graph may be made of it. What there
    is to know of it stands in `benchmarks.peers`.
    """

    name: str
    make: Callable[[], Run]
    absent: str | None = None
    graph: bool = True


@dataclass(frozen=True)
class Operation:
    """One operation on one set of inputs.

    Attributes:
        name: of the operation. case: the inputs, in a few words.
        cost: what it has to move and compute at least.
        exact: gives the answer in fp64.
        peers: the first is the yardstick of error, plain PyTorch at the inputs' precision; "fastjepa" is ours.
        note: what to know when reading its rows.
    """

    name: str
    case: str
    cost: Cost
    exact: Run
    peers: list[Peer] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Sizes:
    """Of the suite's model: ViT-H/14 with 128 images on a GPU, something that a CPU does in milliseconds elsewhere.

    Contexts are `context` tokens on average with deviation `spread`, targets `target`; four targets an image.
    """

    device: torch.device
    dtype: torch.dtype
    images: int
    patches: int
    width: int
    heads: int
    predictor_width: int
    predictor_heads: int
    layers: int
    context: int = 110
    spread: int = 18
    target: int = 44

    @classmethod
    def of(cls, device: torch.device) -> Sizes:
        """Those for a device."""
        if device.type == "cuda":
            return cls(device, torch.bfloat16, 128, 256, 1280, 16, 384, 16, 32)
        return cls(device, torch.float32, 4, 256, 384, 6, 384, 6, 2)

    def lengths(self, mean: int, spread: int, count: int) -> list[int]:
        """Lengths of `count` sequences, the same at every call."""
        drawn = torch.randn(count, generator=torch.Generator().manual_seed(0)) * spread + mean
        return [int(n) for n in drawn.round().clamp(1, self.patches)]

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers on the device."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)


def both(*costs: Cost) -> Cost:
    """Of forward and backward together."""
    return Cost(sum(c.bytes for c in costs), sum(c.flops for c in costs), sum(c.launches for c in costs))


def offsets_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """int32 [S + 1] of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)


def with_gradients(function: Callable[..., Any], inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> Run:
    """The call of `function` on inputs, and the gradient of each of them."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def run() -> Sequence[Tensor]:
        outputs = function(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

    return run


def exactly(function: Callable[..., Any], inputs: Sequence[Tensor], upstream: Sequence[Tensor] = ()) -> Run:
    """The same in fp64; without `upstream`, forward alone."""
    doubles = [x.double() for x in inputs]
    if upstream:
        return with_gradients(function, doubles, [g.double() for g in upstream])
    return forward(function, doubles)


def forward(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Run:
    """The call of `function` on inputs with no gradient."""

    def run() -> Sequence[Tensor]:
        with torch.no_grad():
            outputs = function(*inputs)
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    return run


def compiled(function: Callable[..., Any], dynamic: bool = True) -> Callable[..., Any]:
    """As torch.compile makes it: for every token count, or for the shapes it is called with."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=dynamic)
