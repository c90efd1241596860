"""What each operator and launch of a step costs a GPU, seen on the meta device: launches, bytes, FLOPs, memory made.

- An operator of PyTorch on device tensors is one launch that reads its inputs and writes its outputs once; views and
  empty tensors are none. That is the least: some take several kernels, such as LayerNorm's backward, and ours are
  counted kernel by kernel. Multi-tensor operators take as many as their lists need in PyTorch's launcher.
- A tensor that is read at picked rows (gather, index_select) counts the rows picked; one that is expanded, its storage.
- A launch of ours reads or writes each tensor it is given once, whatever the caches have to hold for that. AdamW + EMA,
  whose launch is given addresses, counts what its kernel file declares.
- Matrix products of linear layers and convolutions are "gemm", those of attention (a fused kernel, or batched products)
  "attention". FLOPs of ours are those of whole tiles, recomputation included. All else is "rest".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fastjepa import pairing, ragged
from fastjepa.nn import block, linear, norm, stack
from fastjepa.ops import checks, library, rows
from fastjepa.optim import AdamWEMA

KINDS = ("gemm", "attention", "rest")

# Autocast's lists for CUDA, as far as the models go; torch has no autocast for the meta device.
NARROW = {"linear", "matmul", "__matmul__", "bmm", "baddbmm", "addmm", "mm", "conv2d", "scaled_dot_product_attention"}
WIDE = {"layer_norm", "softmax", "log_softmax", "smooth_l1_loss", "mse_loss", "l1_loss", "norm"}

# What operators of PyTorch do other than reading all inputs and writing all outputs.
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FILLS = {"zeros", "ones", "full", "arange", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full",
         "zero_", "fill_"}  # fmt: skip
PICKS = {"index_select", "gather", "index", "embedding"}
PUTS = {"index_copy_": 2, "index_put_": 2, "index_add_": 3, "scatter_": 2, "scatter_add_": 3}  # passes over the source
READS_BACK = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal"}
# What one launch of a multi-tensor operator holds, with CUDA 13 (ATen/native/cuda/MultiTensorApply.cuh).
CHUNK, CHUNKS, LISTS = 65536, 2240, (770, 448, 336, 252, 210)

# Tables that a kernel of ours reads or writes at the rows that an index names, no more of them than it has places.
THROUGH = {
    "_gather_kernel": {"x_ptr": "rows_ptr", "pos_ptr": "rows_ptr"},
    "_assemble_kernel": {"context_ptr": "source_ptr", "pos_ptr": "patches_ptr"},
    "_jepa_loss_fwd_kernel": {"features_ptr": "rows_ptr"},
    "_place_kernel": {"order_ptr": "rows_ptr"},
}
OVER = {"_layer_norm_bwd_kernel": "y_ptr"}  # may lie over what is read, and is written nevertheless
PRODUCTS = {"_attention_fwd_kernel": 2, "both": 7, "queries": 3, "keys": 4}  # of attention, in a kernel or a pass of it


@dataclass(frozen=True)
class Event:
    """One operator or launch. kind: of `KINDS`, or "none" where nothing runs and memory may be made all the same.

    what: dtypes read and written, and "weights" where the largest tensor has the shape of a weight.
    """

    name: str
    kind: str
    launches: int = 0
    bytes: int = 0
    flops: float = 0.0
    allocations: int = 0
    allocated: int = 0
    syncs: int = 0
    casts: int = 0
    what: str = ""


class Counter(TorchDispatchMode):
    """Sees every operator on the meta device, after autograd and autocast; with `fake`, on every device.

    Attributes:
        lengths: {(tokens, sequences): int64 [S]} of everything that attends through our kernels.
        weights: shapes of the weights.
        events: by the part of the step that they belong to; `mark` names the part of those since the last mark.
        passes: an event as it is to be added, or None; for graphs whose operators are not all launched.
    """

    def __init__(
        self,
        lengths: dict[tuple[int, int], Tensor] | None = None,
        weights: Sequence[torch.Size] = (),
        fake: bool = False,
    ):
        super().__init__()
        self.lengths, self.weights, self.fake = lengths or {}, set(weights), fake
        self.events: dict[str, list[Event]] = defaultdict(list)
        self.passes: Callable[[Event], Event | None] = lambda event: event
        self._open: list[Event] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """A compiled region is still compiled."""
        return True

    def add(self, event: Event) -> None:
        """Something that no operator tells of."""
        self._open.append(event)

    def mark(self, part: str) -> None:
        """What has come since the last mark belongs to `part`."""
        self.events[part] += self._open
        self._open = []

    def clear(self) -> None:
        """Forget what was seen."""
        self.events.clear()
        self._open = []

    def launch(self, name: str, arguments: dict[str, Any]) -> None:
        """A kernel of ours, by the arguments that its launcher passes.

        Raises:
            ValueError: attention over sequences whose lengths are not known.
        """
        through = THROUGH.get(name, {})
        tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
        over = OVER.get(name, "")
        once = [tensor for key, tensor in tensors.items() if key not in (*through, over)]
        moved = sum(map(touched, _distinct(once))) + (touched(tensors[over]) if over in tensors else 0)
        for key, index in through.items():
            if key in tensors:
                size = touched(tensors[key])
                moved += min(size, size // max(1, len(tensors[key])) * tensors[index].numel())
        what = self._what(list(tensors.values()), [])
        products = PRODUCTS.get(arguments.get("PASS", name))
        if products is None:
            self.add(Event(name, "rest", 1, moved, what=what))
            return
        sequences = len(arguments["offsets_ptr"]) - 1
        found = self.lengths.get((arguments["n_tokens"], sequences))
        if found is None:
            raise ValueError(f"attention over {sequences} unknown sequences of {arguments['n_tokens']} tokens in all")
        rows, stream = (-(-found // arguments[size]) * arguments[size] for size in ("ROWS", "STREAM"))
        width = arguments["N_HEADS"] * (arguments["D0"] + arguments["D1"])
        flops = 2.0 * products * width * float((rows * stream).sum())
        self.add(Event(name, "attention", 1, moved, flops, what=what))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = self._on_device((args, kwargs))
        if func is torch.ops.aten._local_scalar_dense.default and inputs and inputs[0].is_meta:
            self.add(Event("_local_scalar_dense", "rest", 1, inputs[0].itemsize, syncs=1))
            return 0.0  # there is no value, and every step goes on with this one
        result = func(*args, **kwargs)
        outputs = self._on_device(result)
        if func.namespace == "aten" and (inputs or outputs):
            event = self.passes(self._event(func, args, kwargs, inputs, outputs, result))
            if event is not None:
                self.add(event)
        return result

    def _on_device(self, tree: Any) -> list[Tensor]:
        return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and (self.fake or t.device.type == "meta")]

    def _what(self, inputs: list[Tensor], outputs: list[Tensor]) -> str:
        largest = max((*inputs, *outputs), key=lambda t: t.numel(), default=None)
        if largest is None:
            return ""
        kinds = ["+".join(sorted({_SHORT.get(t.dtype, str(t.dtype)) for t in ts})) for ts in (inputs, outputs)]
        return " -> ".join(filter(None, kinds)) + " weights" * (largest.shape in self.weights)

    def _event(
        self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor], result: Any
    ) -> Event:
        """What one operator costs."""
        name, packet = func._schema.name.split("::")[1], func._overloadpacket
        known = {t.untyped_storage()._cdata for t in inputs}
        made = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in outputs) if s._cdata not in known}
        memory: dict[str, Any] = {"allocations": len(made), "allocated": sum(made.values())}
        syncs = name in READS_BACK or (name == "repeat_interleave" and kwargs.get("output_size") is None)
        if name in EMPTY or not (made or func._schema.is_mutable or syncs):
            return Event(name, "none", **memory)
        if name.startswith(("_foreach_", "_fused_", "_amp_foreach_")):
            return Event(name, "rest", *_multi_tensor(name, args, outputs, bool(made)), **memory)
        what = self._what(inputs, outputs)
        if packet in flop_registry or "attention" in name:
            kind = "attention" if name in ("bmm", "baddbmm") or "attention" in name else "gemm"
            moved = sum(map(touched, (*_distinct(inputs), *outputs)))
            return Event(name, kind, 1, moved, _flops(packet, name, args, kwargs, result), what=what, **memory)
        casts = name in ("_to_copy", "copy_") and len({t.dtype for t in (*inputs[-1:], *outputs)}) > 1
        moved = _moved(name, args, _distinct(inputs), outputs)
        return Event(name, "rest", 1, moved, syncs=int(syncs), casts=int(casts), what=what, **memory)


class Held(TorchDispatchMode):
    """How many bytes of tensors there are at most, on the meta device, as operators and launches make and drop them.

    An allocator's gaps and what an operator makes within itself are not seen. `first` are there from the start.

    >>> with Held([]) as held:
    ...     x = torch.zeros(10, device="meta")
    ...     x = x + 1
    ...     x = x[:5] + 1
    >>> held.most
    80
    """

    def __init__(self, first: Sequence[Tensor]):
        super().__init__()
        self._there: dict[int, StorageWeakRef] = {}
        self._bytes: dict[int, int] = {}
        self.most = self._held = 0
        self._note(first)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._note([t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_meta])
        return result

    def _note(self, tensors: Sequence[Tensor]) -> None:
        new = False
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage._cdata not in self._there:
                self._there[storage._cdata] = StorageWeakRef(storage)
                self._bytes[storage._cdata] = storage.nbytes()
                self._held += storage.nbytes()
                new = True
        if new:
            for place in [place for place, reference in self._there.items() if reference.expired()]:
                del self._there[place]
                self._held -= self._bytes.pop(place)
            self.most = max(self.most, self._held)


_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32", torch.bool: "bool"}


def touched(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor shows, each once: an expanded dimension is one element long.

    >>> touched(torch.zeros(3, 1).expand(3, 5)), touched(torch.zeros(4, 4)[:, :2])
    (12, 32)
    """
    shown = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0)
    return prod(shown) * tensor.itemsize


def multi_tensor_launches(numels: Sequence[int], lists: int) -> int:
    """Launches of a multi-tensor operator over `lists` lists of tensors of these sizes.

    >>> multi_tensor_launches([100] * 300, 4), multi_tensor_launches([2240 * 65536 + 1], 1)
    (2, 2)
    """
    launches = chunks = tensors = 0
    for numel in filter(None, numels):
        tensors += 1
        last = -(-numel // CHUNK)
        for chunk in range(1, last + 1):
            chunks += 1
            if chunks == CHUNKS or (chunk == last and tensors == LISTS[min(lists, len(LISTS)) - 1]):
                launches, chunks, tensors = launches + 1, 0, int(chunk < last)
    return launches + (chunks > 0)


def _multi_tensor(name: str, args: Any, outputs: list[Tensor], makes: bool) -> tuple[int, int]:
    """(launches, bytes) of an operator over lists. Fused AdamW, with no scale, leaves its gradients as they are."""
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    written = outputs if makes else lists[0]
    if name.startswith("_fused_"):
        lists = lists[:4]  # parameters, gradients, two moments; behind them the steps, one element each
        written = [*lists[0], *lists[2], *lists[3]]
    launches = multi_tensor_launches([t.numel() for t in lists[0]], len(lists) + makes)
    return launches, sum(touched(t) for some in (*lists, written) for t in some)


def _flops(packet: Any, name: str, args: Any, kwargs: Any, result: Any) -> float:
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=result)
    backward = "backward" in name
    return (sdpa_backward_flop_count if backward else sdpa_flop_count)(*(t.shape for t in args[: 3 + backward]))


def _moved(name: str, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes read and written by an operator on single tensors that is no product."""
    written = sum(map(touched, outputs))
    if name in FILLS:
        return written
    if name in PICKS:
        return min(touched(args[0]), written) + sum(touched(t) for t in inputs if t is not args[0]) + written
    if name in PUTS:
        return PUTS[name] * touched(inputs[-1]) + sum(map(touched, inputs[1:-1]))
    return sum(map(touched, inputs[1:] if name == "copy_" else inputs)) + written


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors that show the same elements, once."""
    return list({(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()): t for t in tensors}.values())


class CudaAutocast(TorchFunctionMode):
    """bf16 autocast by the rules of CUDA, on any device. No cast is kept: the models use each weight once a step."""

    def __enter__(self):
        """Our own operations, which ask for autocast's dtype themselves, get this one's; layers computed again, too."""
        narrow, again = lambda device, dtype: torch.bfloat16, partial(checkpoint, context_fn=_again)
        askers = rows, norm, linear, stack
        changes: list[tuple[Any, str, Any]] = [(module, "linear_dtype", narrow) for module in askers]
        self._stack = ExitStack()
        self._stack.enter_context(replaced([*changes, *((module, "checkpoint", again) for module in (block, stack))]))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._stack.close()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name not in NARROW and name not in WIDE:
            return func(*args, **kwargs)
        dtype = torch.bfloat16 if name in NARROW else torch.float32

        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return func(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})


def _again() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), CudaAutocast()


@contextmanager
def kernel_path(counter: Counter) -> Iterator[None]:
    """Ours takes its kernels on any device, and launches do nothing but be counted.

    Raises:
        ValueError: no Triton.
    """
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError as error:
        raise ValueError("counting launches needs Triton, which is not installed: pip install triton") from error
    from fastjepa.kernels.adamw_ema import adamw_ema_cost

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        assert not args, "launchers pass by keyword"
        counter.launch(self.fn.__name__, kwargs)

    def step(self: AdamWEMA) -> bool:
        params = self._params()
        self._init_moments(params)
        cost = adamw_ema_cost(self._tensors(params), [p.grad for p in params], self._wants_norm())
        counter.add(Event("_adamw_ema_kernel", "rest", cost.launches, cost.bytes, what="parameters"))
        return True

    changes: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (InterpretedFunction, "run", run),
        (JITFunction, "run", run),
        (AdamWEMA, "_step_kernels", step),
    )
    with as_on_a_gpu(), replaced(changes):
        yield


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Our operations take their kernels on any device, and look at no value, as on a GPU."""
    changes: list[tuple[Any, str, Callable[..., Any]]] = [
        (library, "takes_kernels", lambda x: True),
        (AdamWEMA, "_takes_kernels", lambda self: True),
        (checks, "_looks_into", lambda values, asked: False),
        *((module, "can_look", lambda tensor: False) for module in (ragged, pairing)),
    ]
    with replaced(changes):
        yield


@contextmanager
def replaced(changes: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Attributes, as (owner, name, value), are these within, and then again what they were."""
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield
