"""A profiler's trace, read: which part of the step each operator, kernel and block of memory belongs to."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

WAIT = "wait for the device"  # the profiler's own, at the end of its window
# The ranges of a step, in their order; each begins where the one before ends.
PARTS = ("data", "to device", "target", "context", "predictor", "loss", "backward", "optimizer", "rest", WAIT)
LEARNT = ("context", "predictor", "loss")  # what backward goes through, from last to first
ENGINE = "autograd::engine::evaluate_function: "  # one node of the backward pass
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
SYNCS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy",
         "cudaFree", "cuCtxSynchronize", "cuStreamSynchronize", "cuEventSynchronize")  # fmt: skip
# Operators that make memory for the one that calls them.
MAKERS = re.compile(r"aten::(new_)?(empty|zeros|ones|full)(_like|_strided)?|aten::resize_")
MIB = 2**20


@dataclass
class Span:
    """A stretch of time in microseconds; `part` is its name, `thread` where the range is shown."""

    part: str
    start: float
    end: float
    thread: tuple[Any, Any] = (0, 0)


@dataclass
class Total:
    """What the calls of one name add up to: microseconds or bytes, in all and by (caller and) shapes."""

    amount: float = 0.0
    calls: int = 0
    by_detail: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, amount: float, detail: str) -> None:
        """One more call."""
        self.amount, self.calls = self.amount + amount, self.calls + 1
        self.by_detail[detail] += amount

    @property
    def detail(self) -> str:
        """The shapes (and the caller) that most of it goes to."""
        return max(self.by_detail, key=lambda key: self.by_detail[key], default="")


class StepTrace:
    """The whole steps of a trace, as `torch.profiler` exports it (Chrome's format).

    Arguments:
        trace: the parsed JSON. standing: bytes that stay between steps, which on the CPU no event tells of.
        cuda: whether the steps were taken on a GPU.

    Attributes:
        steps: spans of the steps. spans: of the parts, in time, backward split where it could be.
        on_device: whether times are the device's: there is a GPU and the trace tells of it.

    Raises:
        ValueError: no whole step is in the trace.
    """

    def __init__(self, trace: dict[str, Any], standing: int = 0, cuda: bool = False):
        self.trace, self.standing, self.cuda = trace, standing, cuda
        self._events: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for event in trace.get("traceEvents", ()):
            self._events[event.get("cat", "")].append(event)
        for events in self._events.values():
            events.sort(key=lambda event: (event.get("ts", 0.0), -event.get("dur", 0.0)))
        ranges = self._events["user_annotation"]
        self.steps = [_span(event) for event in ranges if event["name"].startswith("ProfilerStep#")]
        if not self.steps:
            raise ValueError("the trace holds no whole step")
        self.spans = [_span(event) for event in ranges if event["name"] in PARTS and self._inside(event["ts"])]
        self.backward = self._split_backward()
        if self.backward:
            self.spans = sorted(
                [span for span in self.spans if span.part != "backward"] + _filled(self.spans, self.backward),
                key=lambda span: span.start,
            )
        self._starts = [span.start for span in self.spans]
        self._nest()
        activities = [event for kind in ON_DEVICE for event in self._events[kind]]
        launched = [(self._launches.get(_correlation(e), (e["ts"], "")), e) for e in activities]
        # (event, when it was launched, by which operator)
        self._activities = [(e, time, caller) for (time, caller), e in launched if self._inside(time)]
        self.on_device = cuda and bool(self._activities)

    @property
    def wall(self) -> float:
        """Microseconds of a step, on average."""
        return sum(span.end - span.start for span in self.steps) / len(self.steps)

    def part_of(self, time: float) -> str:
        """The part of the step that the CPU was in."""
        place = bisect_right(self._starts, time) - 1
        return self.spans[place].part if place >= 0 and time <= self.spans[place].end else "rest"

    def times(self) -> list[dict[str, Any]]:
        """A row for each part: `part`, `ms` a step, `share` of the step; on a GPU `CPU ms` too, and a row of idleness.

        `ms` is the device's time where there is a GPU: of what the part launched, whenever that ran.
        """
        on_cpu: dict[str, float] = defaultdict(float)
        for span in self.spans:
            on_cpu[span.part] += span.end - span.start
        if not self.on_device:
            return [self._time_row(part, time) for part, time in on_cpu.items()]
        on_gpu: dict[str, float] = defaultdict(float)
        for event, launched, _ in self._activities:
            on_gpu[self.part_of(launched)] += event["dur"]
        rows = [self._time_row(part, on_gpu[part]) | {"CPU ms": self._ms(time)} for part, time in on_cpu.items()]
        idle = self.wall * len(self.steps) - _covered(event for event, _, _ in self._activities)
        return [*rows, self._time_row("GPU idle", max(0.0, idle))]

    def kernels(self, count: int = 10) -> list[dict[str, Any]]:
        """The largest kernels of the GPU, or operators of the CPU by their own time: `ms` and `calls` a step."""
        if not self.on_device:
            return [self._kernel_row("operator", name, total) for name, total in _largest(self._own_time, count)]
        totals: dict[str, Total] = defaultdict(Total)
        for event, _, caller in self._activities:
            totals[event["name"]].add(event["dur"], caller)
        return [self._kernel_row("kernel", name, total) for name, total in _largest(totals, count)]

    def unexplained(self) -> float:
        """Share of the CPU's step that no operator accounts for: Python, the loader, waiting."""
        main = self.steps[0].thread
        inside = _covered(e for e in self._events["cpu_op"] if _thread(e) == main and self._inside(e["ts"]))
        return 1 - inside / (self.wall * len(self.steps))

    def syncs(self) -> list[dict[str, Any]]:
        """Where the CPU waits for the GPU: `call`, `part`, `calls` and `ms` a step."""
        totals: dict[tuple[str, str], Total] = defaultdict(Total)
        for kind in LAUNCHES:
            for event in self._events[kind]:
                part = self.part_of(event["ts"])
                if event["name"] in SYNCS and self._inside(event["ts"]) and part != WAIT:
                    totals[event["name"], part].add(event["dur"], "")
        return [
            {"call": call, "part": part, "calls": total.calls / len(self.steps), "ms": self._ms(total.amount)}
            for (call, part), total in totals.items()
        ]

    def memory(self) -> list[dict[str, Any]]:
        """A row for each part: `part`, `peak MiB` of all that is held meanwhile, `made MiB` (allocated) a step."""
        times, levels, sizes = self._levels()
        rows: dict[str, dict[str, Any]] = {}
        for span in self.spans:
            first, last = bisect_left(times, span.start), bisect_left(times, span.end)
            row = rows.setdefault(span.part, {"part": span.part, "peak MiB": 0.0, "made MiB": 0.0})
            held = levels[max(0, first - 1) : last] or [self.standing]
            row["peak MiB"] = max(row["peak MiB"], max(held) / MIB)
            row["made MiB"] += sum(size for size in sizes[first:last] if size > 0) / MIB / len(self.steps)
        return list(rows.values())

    def makers(self, count: int = 10) -> list[dict[str, Any]]:
        """The operators that allocate most: `operator`, `MiB` and `calls` a step (those that allocated), `shapes`."""
        return [
            {
                "operator": name,
                "MiB": total.amount / MIB / len(self.steps),
                "calls": total.calls / len(self.steps),
                "shapes": total.detail,
            }
            for name, total in _largest(self._made, count)
        ]

    def peak(self) -> int:
        """Bytes held at most within the steps."""
        return max((int(level) for level in self._levels()[1]), default=self.standing)

    def additions(self) -> list[dict[str, Any]]:
        """Events to be shown with the trace: the parts of the backward pass, on the GPU too, and memory as a curve."""
        events = [_range(span.part, "user_annotation", *span.thread, span.start, span.end) for span in self.backward]
        runs: dict[tuple[int, Any, Any], list[dict[str, Any]]] = defaultdict(list)
        for event, launched, _ in self._activities:
            place = bisect_right(self._starts, launched) - 1
            if place >= 0 and self.spans[place].part.startswith("backward: "):
                runs[(place, *_thread(event))].append(event)
        for (place, process, stream), run in runs.items():
            start, end = min(e["ts"] for e in run), max(e["ts"] + e["dur"] for e in run)
            events.append(_range(self.spans[place].part, "gpu_user_annotation", process, stream, start, end))
        process = self.steps[0].thread[0]
        for time, level, _ in zip(*self._levels(), strict=True):
            held = {"held": round(level / MIB, 3)}
            events.append({"ph": "C", "name": "memory (MiB)", "pid": process, "tid": 0, "ts": time, "args": held})
        return events

    def _inside(self, time: float) -> bool:
        return any(span.start <= time <= span.end for span in self.steps)

    def _ms(self, time: float) -> float:
        return time / 1000 / len(self.steps)

    def _time_row(self, part: str, time: float) -> dict[str, Any]:
        return {"part": part, "ms": self._ms(time), "share": time / len(self.steps) / self.wall}

    def _kernel_row(self, kind: str, name: str, total: Total) -> dict[str, Any]:
        row = {kind: name, "ms": self._ms(total.amount), "share": total.amount / len(self.steps) / self.wall}
        calls = {"calls": total.calls / len(self.steps)}
        return row | calls | {"launched by, largest shapes" if kind == "kernel" else "largest shapes": total.detail}

    def _split_backward(self) -> list[Span]:
        """Spans of backward's parts, told by autograd's sequence numbers: a node has that of its forward operator.

        Empty where the trace does not tell.
        """
        first: dict[int, int] = {}  # place of a forward span -> its lowest number
        starts = [span.start for span in self.spans]
        for event in self._events["cpu_op"]:
            number = event.get("args", {}).get("Sequence number")
            place = bisect_right(starts, event["ts"]) - 1
            if number is not None and place >= 0 and self.spans[place].part in LEARNT:
                first[place] = min(number, first.get(place, number))
        order = sorted((number, self.spans[place].part) for place, number in first.items())
        numbers = [number for number, _ in order]
        found: list[Span] = []
        for event in self._events["cpu_op"]:
            place = bisect_right(starts, event["ts"]) - 1
            if not event["name"].startswith(ENGINE) or place < 0 or self.spans[place].part != "backward":
                continue
            end, number = event["ts"] + event["dur"], event["args"].get("Sequence number")
            whose = bisect_right(numbers, number) - 1 if number is not None else -1
            part = f"backward: {order[whose][1]}" if whose >= 0 else ""
            within = bool(found) and found[-1].start >= self.spans[place].start
            if within and part in ("", found[-1].part):  # nodes without a number write a gradient of what came before
                found[-1].end = max(end, found[-1].end)
            elif part:
                found.append(Span(part, event["ts"], end, _thread(event)))
        return found

    def _nest(self) -> None:
        """Each operator's own time, and which operator each block of memory and each kernel was asked for by."""
        self._own_time: dict[str, Total] = defaultdict(Total)
        self._made: dict[str, Total] = defaultdict(Total)
        self._launches: dict[Any, tuple[float, str]] = {}  # correlation -> (when, by which operator)
        stacks: dict[Any, list[list[Any]]] = defaultdict(list)  # of [event, end, own time]
        asked = [event for event in self._memory_events() if event["args"]["Bytes"] > 0]
        asked += [event for kind in LAUNCHES for event in self._events[kind] if _correlation(event) is not None]
        for event in sorted(self._events["cpu_op"] + asked, key=lambda e: (e["ts"], -e.get("dur", 0.0))):
            stack = stacks[_thread(event)]
            while stack and stack[-1][1] <= event["ts"]:
                self._finish(stack.pop())
            if event["name"] == "[memory]":
                callers = [frame[0] for frame in stack]
                named = [caller for caller in callers if not MAKERS.fullmatch(caller["name"])]
                owner = (named or callers or [{"name": "no operator"}])[-1]
                self._made[owner["name"]].add(event["args"]["Bytes"], _shapes(owner))
            elif event["cat"] in LAUNCHES:
                caller = f"{stack[-1][0]['name']} {_shapes(stack[-1][0])}".strip() if stack else ""
                self._launches[_correlation(event)] = (event["ts"], caller)
            elif self._inside(event["ts"]):
                if stack:
                    stack[-1][2] -= event["dur"]
                stack.append([event, event["ts"] + event["dur"], event["dur"]])
        for stack in stacks.values():
            for frame in stack:
                self._finish(frame)

    def _finish(self, frame: list[Any]) -> None:
        event, _, own = frame
        self._own_time[event["name"]].add(own, _shapes(event))

    def _memory_events(self) -> list[dict[str, Any]]:
        kind = 1 if self.cuda else 0  # torch's numbers of device types
        return [
            event
            for event in self._events["cpu_instant_event"]
            if event["name"] == "[memory]" and event["args"]["Device Type"] == kind and self._inside(event["ts"])
        ]

    def _levels(self) -> tuple[list[float], list[float], list[int]]:
        """(times, bytes held after each, bytes each added) of every allocation and release within the steps.

        On a GPU the allocator says what it has given out; on the CPU only the events themselves can be added up.
        """
        events = self._memory_events()
        sizes = [int(event["args"]["Bytes"]) for event in events]
        if self.cuda:
            levels = [event["args"]["Total Allocated"] for event in events]
        else:
            levels, held = [], self.standing
            for size in sizes:
                held += size
                levels.append(held)
        return [event["ts"] for event in events], levels, sizes


def _span(event: dict[str, Any]) -> Span:
    return Span(event["name"], event["ts"], event["ts"] + event["dur"], _thread(event))


def _thread(event: dict[str, Any]) -> tuple[Any, Any]:
    return event["pid"], event["tid"]


def _correlation(event: dict[str, Any]) -> Any:
    """The number that a launch and what it launched share."""
    return event.get("args", {}).get("correlation")


def _range(name: str, kind: str, process: Any, thread: Any, start: float, end: float) -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "name": name, "pid": process, "tid": thread, "ts": start, "dur": end - start}


def _filled(spans: list[Span], parts: list[Span]) -> list[Span]:
    """The parts of each backward, made to cover it whole."""
    filled = []
    for whole in spans:
        inner = [part for part in parts if whole.start <= part.start <= whole.end] if whole.part == "backward" else []
        ends = [*(part.start for part in inner[1:]), whole.end]
        starts = [whole.start, *ends[:-1]]
        filled += [Span(p.part, start, end, p.thread) for p, start, end in zip(inner, starts, ends, strict=False)]
        if whole.part == "backward" and not inner:
            filled.append(whole)
    return filled


def _covered(events: Iterable[dict[str, Any]]) -> float:
    """Microseconds in which at least one of the events was going on."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def _largest(totals: dict[str, Total], count: int) -> list[tuple[str, Total]]:
    return sorted(totals.items(), key=lambda pair: -pair[1].amount)[:count]


def _shapes(event: dict[str, Any]) -> str:
    """[128, 384] of each tensor that went in, as 128x384."""
    shapes = event.get("args", {}).get("Input Dims", ())
    return ", ".join("x".join(map(str, shape)) for shape in shapes if shape and not isinstance(shape[0], list))
