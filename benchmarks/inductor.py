"""Inductor's own account of its graphs: what it would launch, move and allocate, with nothing compiled or run.

Needs no GPU: graphs are scheduled for the CPU, whose fusions are not quite a GPU's. A fused node is one launch that
reads and writes its buffers once, as Inductor counts them; allocations are those of the wrapper that it writes, dead
buffers used again. Its matrix products and attention are operators, and counted as such when the graph is called.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from benchmarks.counter import Counter, Event

_VIEWS = {"permute", "reshape", "view", "expand", "unsqueeze", "squeeze", "select", "slice", "clone", "transpose"}
_ALLOCATION = re.compile(r"empty_strided\w*\(\(([\d, ]*)\), \([\d, ]*\), torch\.(\w+)\)")


@contextmanager
def scheduled(counter: Counter) -> Iterator[list[int]]:
    """Graphs that Inductor is given are scheduled and written, not compiled; each call adds what it would cost.

    Gives the number of nodes of each graph so far. Uses parts of torch that are not public; where they have gone, that
    shows as an ImportError or AttributeError.
    """
    from torch._inductor import config, graph

    lowering: Any = graph.GraphLowering
    graphs: list[int] = []

    def compile_to_module(self: Any) -> SimpleNamespace:
        self._update_scheduler()
        events = [event for node in self.scheduler.nodes if (event := _event(node))]
        graphs.append(len(self.scheduler.nodes))
        code = self.codegen()[0].value
        for sizes, dtype in _ALLOCATION.findall(code):
            size = prod(int(n) for n in sizes.split(",") if n.strip()) * getattr(torch, dtype).itemsize
            events.append(Event("empty_strided", "none", allocations=1, allocated=size))

        def call(arguments: list[Any]) -> Any:
            kept, counter.passes = counter.passes, _product
            try:
                result = self.module(*arguments)
            finally:
                counter.passes = kept
            arguments.clear()
            for event in events:
                counter.add(event)
            return result

        return SimpleNamespace(call=call, runner=None, __file__="")

    kept = lowering.compile_to_module
    lowering.compile_to_module = compile_to_module
    try:
        # simdlen 1: there is no code to run, so nobody has to try which vectors this processor has.
        with config.patch({"force_disable_caches": True, "cpp.simdlen": 1}):
            yield graphs
    finally:
        torch._dynamo.reset()
        lowering.compile_to_module = kept


def _product(event: Event) -> Event | None:
    """An operator of a graph, if it is a product. Those that write into a buffer of the wrapper's make none."""
    if event.kind not in ("gemm", "attention"):
        return None
    return replace(event, allocations=0, allocated=0) if event.name in ("mm", "addmm", "bmm", "baddbmm") else event


def _event(node: Any) -> Event | None:
    """A node of the schedule; products and what is done on the way to them are counted when the graph is called."""
    from torch._inductor import ir
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    if isinstance(node, NopKernelSchedulerNode):
        return None
    if isinstance(node, ExternKernelSchedulerNode):
        packet = getattr(getattr(node.node, "op_overload", None), "_overloadpacket", None)
        if isinstance(node.node, ir.MultiOutput) or packet in flop_registry or "attention" in str(packet):
            return None
    origins = {origin for part in node.get_nodes() if part.node is not None for origin in part.node.origins}
    names = dict.fromkeys(getattr(o.target, "__name__", str(o.target)).split(".")[0] for o in origins)
    name = "+".join(sorted(set(names) - _VIEWS))
    casts = int(name == "convert_element_type")  # and nothing else
    return Event(name, "rest", 1, int(node.get_read_write_buffers_sizes()), casts=casts, what="fused")
