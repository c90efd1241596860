"""The peers of the `kernels` suite: what each of them is, and what it needs to be there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.operations import Peer, Run, forward, with_gradients


@dataclass(frozen=True)
class Entry:
    """What is known of a peer before it runs.

    Attributes:
        what: it is.
        modules: what it imports, PyTorch's and ours apart.
        get: how those are had.
        cuda: it needs a GPU, of `capability` at least, and of `gradient` for the backward of attention.
        graph: a CUDA graph may be made of it: not where its authors say no.
    """

    what: str
    modules: tuple[str, ...] = ()
    get: str = ""
    cuda: bool = False
    capability: tuple[int, int] = (0, 0)
    gradient: tuple[int, int] = (0, 0)
    graph: bool = True


_APEX = "build NVIDIA/apex; the apex on PyPI is another package"
_FLASH = (8, 0)

PEERS = {
    "torch": Entry("plain PyTorch at the inputs' precision: what errors are measured by"),
    "eager, as published": Entry(
        "as the official code does it: indices repeated over the width, attention weights written out, fp32 where "
        "autocast has it, a loop over parameters"
    ),
    "torch.compile": Entry("plain or eager PyTorch as Inductor compiles it, for every token count at once"),
    # Attention
    "torch SDPA": Entry("scaled_dot_product_attention over padded sequences, the backend that torch takes"),
    "torch SDPA flash, padded": Entry("the flash backend forced; on a GPU it takes no mask, so equal lengths alone"),
    "torch SDPA flash, nested": Entry("the flash backend forced, on nested tensors", cuda=True, capability=_FLASH),
    "torch SDPA cuDNN, padded": Entry("the cuDNN backend forced", cuda=True, capability=_FLASH),
    "torch SDPA cuDNN, nested": Entry("the cuDNN backend forced, on nested tensors", cuda=True, capability=_FLASH),
    "torch SDPA efficient, padded": Entry("the memory-efficient backend forced", cuda=True),
    "torch SDPA efficient, nested": Entry("the memory-efficient backend forced, on nested tensors", cuda=True),
    "torch SDPA math, padded": Entry("the math backend forced"),
    "torch nested tensors": Entry("scaled_dot_product_attention on nested (jagged) tensors, the backend torch takes"),
    "torch varlen": Entry(
        "torch.nn.attention.varlen, flash attention on packed sequences",
        modules=("torch.nn.attention.varlen",), get="torch >= 2.10", cuda=True, capability=_FLASH,
    ),
    "torch FlexAttention": Entry("compiled, its block mask made at every call, since lengths change", cuda=True),
    "torch FlexAttention, mask kept": Entry("compiled, its block mask made once, as for many layers", cuda=True),
    "flash-attn 2": Entry(
        "flash_attn_varlen_qkvpacked_func",
        modules=("flash_attn.flash_attn_interface",), get="pip install flash-attn",
        cuda=True, capability=_FLASH,
    ),
    "flash-attn 3": Entry(
        "flash_attn_varlen_func of flash-attention's hopper/, made for sm 90",
        modules=("flash_attn_interface",), get="build hopper/ of Dao-AILab/flash-attention", cuda=True,
        capability=_FLASH,
    ),
    "flash-attn 4": Entry(
        "flash_attn_varlen_func in the CuTe language; no backward below sm 90",
        modules=("flash_attn.cute",), get="pip install flash-attn-4", cuda=True, capability=_FLASH,
        gradient=(9, 0),
    ),
    "xformers": Entry(
        "memory_efficient_attention under a BlockDiagonalMask made once, as for many layers",
        modules=("xformers.ops",), get="pip install xformers", cuda=True,
    ),
    # EMA and AdamW
    "torch foreach_lerp": Entry("torch._foreach_lerp_ over both lists"),
    "torch foreach mul, add": Entry("torch._foreach_mul_, then torch._foreach_add_"),
    "torch AveragedModel": Entry("torch.optim.swa_utils.AveragedModel with get_ema_multi_avg_fn"),
    "timm ModelEmaV3": Entry("its foreach path", modules=("timm.utils.model_ema",), get="pip install timm"),
    "apex multi_tensor_axpby": Entry(
        "amp_C.multi_tensor_axpby through multi_tensor_apply",
        modules=("apex.multi_tensor_apply", "amp_C"), get=_APEX, cuda=True,
    ),
    "torch fused AdamW, foreach_lerp": Entry("torch.optim.AdamW(fused=True), then torch._foreach_lerp_"),
    "apex FusedAdam, foreach_lerp": Entry(
        "apex.optimizers.FusedAdam, then torch._foreach_lerp_",
        modules=("apex.optimizers.fused_adam", "amp_C"), get=_APEX, cuda=True, graph=False,
    ),
    "apex FusedAdamSWA": Entry(
        "apex.contrib.openfold_triton: AdamW and the average in one kernel; writes each parameter once more",
        modules=("apex.contrib.openfold_triton.fused_adam_swa",), get=_APEX, cuda=True, graph=False,
    ),
    # Rows
    "Liger LayerNorm": Entry(
        "its LayerNorm after torch's addition of the residual",
        modules=("liger_kernel.ops.layer_norm",), get="pip install liger-kernel", cuda=True,
    ),
    # Ours
    "fastjepa": Entry("this library: Triton kernels on a GPU, PyTorch elsewhere"),
    "fastjepa, tables kept": Entry("as IJEPA.update_target does it, the tables of pointers made once", cuda=True),
}  # fmt: skip


def peer(name: str, make: Callable[[], Run], device: torch.device, gradient: bool = False) -> Peer:
    """A peer of the registry on a device, absent where it cannot run there; `gradient`: its backward is wanted."""
    return Peer(name, make, absence(PEERS[name], device, gradient), PEERS[name].graph)


def peers(
    makers: Mapping[str, Callable[[], Callable[..., Any]]], inputs: Sequence[Tensor], upstream: Sequence[Tensor] = ()
) -> list[Peer]:
    """Those that are functions of the same inputs, with gradients where something comes from upstream.

    makers: name in the registry -> what imports or compiles it when it is its turn, and gives the function.
    """

    def run(make: Callable[[], Callable[..., Any]]) -> Run:
        return with_gradients(make(), inputs, upstream) if upstream else forward(make(), inputs)

    device = inputs[0].device
    return [peer(name, lambda m=make: run(m), device, bool(upstream)) for name, make in makers.items()]


def absence(entry: Entry, device: torch.device, gradient: bool = False) -> str | None:
    """Why it cannot run on a device, in one line; None where it can. Imports nothing."""
    if entry.cuda and device.type != "cuda":
        return "needs CUDA"
    gone = next((name for module in entry.modules if (name := missing(module))), None)
    if gone:
        return f"not installed: no module {gone}; {entry.get}"
    needed = max(entry.capability, entry.gradient) if gradient else entry.capability
    if entry.cuda and (found := torch.cuda.get_device_capability(device)) < needed:
        backward = " for its backward" if needed > entry.capability else ""
        return f"needs compute capability {_dotted(needed)}{backward}, this GPU has {_dotted(found)}"
    return None


def missing(module: str) -> str | None:
    """The first part of a module's dotted name that is not installed, None where all are. Nothing is imported.

    Another package of the same name is found out by what it lacks.

    >>> missing("torch.nn.attention"), missing("torch.nn.no_such.thing")
    (None, 'torch.nn.no_such')
    """
    name, *inner = module.split(".")
    spec = find_spec(name)
    for part in inner:
        if spec is None:
            return name
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations or ()))
    return name if spec is None else None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
