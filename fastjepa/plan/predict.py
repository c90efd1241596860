"""Seconds of a step's parts, from what of the roof they reach, and of the gradients' all-reduce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastjepa.chips import Chip
from fastjepa.plan import assumed
from fastjepa.plan.assumed import Fraction
from fastjepa.plan.cost import PARTS, WIDE, Step
from fastjepa.plan.measured import Measured, fitted, unlikeness


@dataclass(frozen=True)
class Part:
    """One part of a step on one GPU. `efficiency`: floor over seconds, if there is one; floor: at the whole roof."""

    flops: float
    bytes: float
    floor_seconds: float
    efficiency: float | None
    seconds: float
    basis: str


@dataclass(frozen=True)
class Communication:
    """The all-reduce of a step's gradients.

    Attributes:
        gradient_bytes: of all gradients. bytes_per_gpu: that each GPU sends. link: which one is the slowest.
        link_bytes_per_second: of it, that an all-reduce reaches. seconds: of the all-reduce alone.
        hidden_behind: seconds of the encoder's backward pass, in which its gradients come. exposed_seconds: that it
            adds to a step. hides: whether no more of it shows than its last bucket. needed_bytes_per_second: of the
            link, for that.
    """

    gradient_bytes: float
    bytes_per_gpu: float
    link: str
    link_bytes_per_second: float
    seconds: float
    hidden_behind: float
    exposed_seconds: float
    hides: bool
    needed_bytes_per_second: float
    basis: str


def parts(step: Step, peak: float, bandwidth: float, fractions: Mapping[str, Fraction]) -> dict[str, Part]:
    """Each part at its fraction of the roof."""
    found = {}
    for name, cost in step.costs().items():
        floor, fraction = cost.seconds(peak, bandwidth), fractions[name]
        seconds = floor / fraction.value
        found[name] = Part(cost.flops.total, cost.bytes, floor, fraction.value, seconds, fraction.source)
    return found


def fractions_of(
    rows: Sequence[Measured], step: Step, row: str, peak: float, bandwidth: float, carried: str = ""
) -> dict[str, Fraction]:
    """What the parts of `step` reach of a roof by measured rows of its implementation."""
    found = {}
    for part, cost in step.costs().items():
        slope, each = fitted(rows, step, part, row)
        floor = cost.seconds(peak, bandwidth)
        reached = floor / (slope * floor + each * step.passes(part))
        nearest = min(rows, key=lambda r: unlikeness(r, step, part, row))
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        found[part] = Fraction(reached, f"measured: {nearest}{more}{carried}")
    return found


def gpu_fractions(measured: Sequence[Measured], step: Step, row: str, chip: Chip) -> dict[str, Fraction]:
    """What the parts of `step` reach on a GPU: measured on it, else on another one, else assumed; never on a CPU."""
    rows = [m for m in measured if m.kind == "cuda" and m.chip and m.implementation == step.implementation]
    own = [m for m in rows if m.chip == chip.name]
    if rows:
        carried = "" if own else f"; carried over to {chip.name}"
        return fractions_of(own or rows, step, row, chip.flops, chip.bandwidth, carried)
    return dict.fromkeys(PARTS, assumed.fraction(step.implementation, chip.name))


def launching(step: Step, graphs: bool, found: Mapping[str, Part]) -> Part:
    """What a step's launches take a core beyond the time that the GPU has work for; ours can be a graph, and one."""
    computing = sum(part.seconds for part in found.values())
    if graphs and step.ours:
        seconds, basis = 0.0, "counted: a step from a CUDA graph is one launch"
    elif not step.ours or any("measured:" in part.basis for part in found.values()):
        seconds, basis = 0.0, "assumed: within the other parts' efficiencies"
    else:
        seconds = max(0.0, step.launches * assumed.LAUNCH.value - computing)
        each = f"{1e6 * assumed.LAUNCH.value:.0f} us of a core each (the host suite, on an Intel Xeon)"
        basis = f"counted: {step.launches} launches; assumed: {each}, while the GPU runs those before"
    return Part(0.0, 0.0, 0.0, None, seconds, basis)


def communication(
    step: Step,
    chip: Chip,
    gpus: int,
    per_node: int,
    found: Mapping[str, Part],
    number: int = WIDE,
    network: float | None = None,
) -> Communication:
    """Gradients, in rings over all GPUs, each of which crosses the slowest link once each way.

    They go with the last part of a batch. number: bytes of one. network: bytes a second that leave a node, each way;
    None takes the assumed one.
    """
    gradients = number * step.models.parameters
    moved = 2 * (gpus - 1) / gpus * gradients
    behind = assumed.BACKWARD_SHARE.value * found["context"].seconds / step.settings.accumulate
    if gpus == 1:
        return Communication(gradients, 0, "none", 0, 0, behind, 0, True, 0, "counted: one GPU sends nothing")
    link, rate, source = f"{chip.name}'s link within a node", chip.link, chip.source
    outside = assumed.NETWORK[chip.name].value if network is None else network
    if gpus > per_node and outside < rate:
        link, rate = "the network between nodes", outside
        source = "given: --network-gb-per-s" if network is not None else f"assumed: {assumed.NETWORK[chip.name].source}"
    reached = assumed.LINK_SHARE.value * rate
    tower = step.models.flops.encoder
    layer = WIDE * (4 + 2 * tower.mlp_ratio) * tower.width**2 if step.ours else 0  # whose gradients come at once
    last = min(1.0, max(assumed.BUCKET.value, layer) / (WIDE * step.models.parameters))  # cut before they are rounded
    seconds = moved / reached
    exposed = max(last * seconds, seconds - behind)
    return Communication(
        gradient_bytes=gradients,
        bytes_per_gpu=moved,
        link=link,
        link_bytes_per_second=reached,
        seconds=seconds,
        hidden_behind=behind,
        exposed_seconds=exposed,
        hides=exposed <= last * seconds,
        needed_bytes_per_second=moved / behind,
        basis=f"assumed: no step on several GPUs was measured; {assumed.LINK_SHARE.value:.0%} of {link} ({source})",
    )
