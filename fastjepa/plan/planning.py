"""A training run on GPUs that may not be here: hours, money, memory, and what each figure rests on."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastjepa.chips import CHIPS, Chip
from fastjepa.config import Config
from fastjepa.plan import assumed
from fastjepa.plan.cost import WIDE, Step
from fastjepa.plan.layers import IMPLEMENTATIONS
from fastjepa.plan.measured import PACKAGED, Measured, images_per_core, read_runs, steps_of, unlikeness
from fastjepa.plan.memory import Memory, largest
from fastjepa.plan.predict import Communication, Part, communication, gpu_fractions, launching, parts
from fastjepa.plan.recipe import SETTINGS, recipe
from fastjepa.plan.settings import PLAIN, Settings
from fastjepa.plan.work import FEWEST, Batches, Models, draw

IMAGENET = 1_281_167  # pictures in ImageNet-1k's training set
FORMAT, VERSION = "fastjepa plan", 1
MASKINGS = ("truncated", "ragged")
MOST_IMAGES = 1 << 14  # a GPU, of the batches that are tried
MANY = 512  # images, of the batches that are drawn for that


@dataclass(frozen=True)
class Order:
    """What is to be planned.

    Attributes:
        config: model, masks, batch size on each GPU and epochs. chip: by name. images: of the data set.
        price_per_gpu_hour, price_per_kwh: None where there is none. network: bytes a second out of a node, None takes
            the assumed one. images_per_core: pictures that a core reads a second, None takes the measured or assumed.
    """

    config: Config
    chip: Chip
    gpus: int = 1
    per_node: int = 8
    images: int = IMAGENET
    implementation: str = "fastjepa"
    price_per_gpu_hour: float | None = None
    price_per_kwh: float | None = None
    currency: str = "USD"
    network: float | None = None
    images_per_core: float | None = None

    def __post_init__(self) -> None:
        for name in ("gpus", "per_node", "images"):
            if getattr(self, name) < 1:
                option = {"per_node": "gpus-per-node"}.get(name, name)
                raise ValueError(f"--{option} must be at least 1, got {getattr(self, name)}")
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"--implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {self.implementation!r}"
            )
        for name in ("price_per_gpu_hour", "price_per_kwh"):
            price = getattr(self, name)
            if price is not None and not 0 <= price < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} must be 0 or more, got {price:g}")
        for name, option in (("network", "network-gb-per-s"), ("images_per_core", "images-per-core")):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < float("inf"):
                raise ValueError(f"--{option} must be above 0, got {rate:g}")
        if not self.config.meta.use_bfloat16:
            raise ValueError("only bf16 is planned, whose rates the planner knows: add meta.use_bfloat16=true")
        if self.images < self.global_batch:
            raise ValueError(
                f"--images {self.images} are fewer than one step takes: {self.gpus} GPUs of "
                f"{self.config.data.batch_size} images; lower --batch-size or --gpus"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Order:
        """By the options of `fastjepa plan`, None where nothing is asked for.

        Raises:
            ValueError: an option that will not do; names it, and says what would.
        """
        rate = options["network_gb_per_s"]
        same = ("gpus", "implementation", "price_per_gpu_hour", "price_per_kwh", "currency", "images_per_core")
        return cls(
            recipe(options["config"], {name: options[name] for name in SETTINGS}, options["overrides"]),
            find_chip(options["gpu"]),
            per_node=options["gpus_per_node"],
            images=IMAGENET if options["images"] is None else options["images"],
            network=None if rate is None else 1e9 * rate,
            **{name: options[name] for name in same},
        )

    @property
    def global_batch(self) -> int:
        """Images of a step on all GPUs."""
        return self.gpus * self.config.data.batch_size

    @property
    def steps(self) -> int:
        """Of the whole run; images that do not fill a step are left out of an epoch."""
        return self.config.optimization.epochs * (self.images // self.global_batch)

    @property
    def settings(self) -> Settings:
        """The configuration's, which are ours alone."""
        return Settings.of(self.config) if self.implementation == "fastjepa" else PLAIN

    @property
    def left_out(self) -> list[str]:
        """Keys of the configuration that change a step of ours, and of which the plan knows nothing."""
        runtime, ours, several = self.config.runtime, self.implementation == "fastjepa", self.gpus > 1
        found = {
            "runtime.fp8_target": runtime.fp8_target,
            "runtime.shard": runtime.shard and several,
            "runtime.cuda_graphs": runtime.cuda_graphs and several,
            "runtime.attention": runtime.attention not in ("auto", "triton"),
        }
        return [name for name, on in found.items() if on and ours]

    @property
    def graphs(self) -> bool:
        """Whether steps come from CUDA graphs, as they can on one GPU."""
        return self.config.runtime.cuda_graphs and self.gpus == 1

    @property
    def nodes(self) -> int:
        """That hold the GPUs."""
        return -(-self.gpus // self.per_node)


def find_chip(name: str) -> Chip:
    """A chip of `fastjepa.chips` by name.

    Raises:
        ValueError: an unknown name; suggests the nearest.
    """
    names = [chip.name for chip in CHIPS]
    if name.lower() not in names:
        alike = [known for known in names if name and known.startswith(name.lower())]
        near = alike or difflib.get_close_matches(name.lower(), names, n=1)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"--gpu: unknown GPU {name!r}; {hint}known are {', '.join(names)}")
    return next(chip for chip in CHIPS if chip.name == name.lower())


def plan(order: Order, masking: str = "both", measured: Path | None = None) -> dict[str, Any]:
    """The plan as plain values, as `fastjepa plan --json` gives it.

    The figures of one masking lie at the top: of the one that is asked for, or with "both" of the configuration's own.
    `maskings` holds all that was planned.

    measured: a results file to take efficiencies from, instead of the shipped one.

    Raises:
        ValueError: a masking that the implementation has not, masks that are not possible, or a results file that
            cannot be read.
    """
    if masking not in (*MASKINGS, "both"):
        raise ValueError(f"--masking must be one of {', '.join(MASKINGS)} and both, got {masking!r}")
    if order.implementation != "fastjepa" and masking == "ragged":
        raise ValueError(f"--masking ragged needs --implementation fastjepa, got {order.implementation}")
    path = PACKAGED if measured is None else measured
    runs = read_runs(path)
    rows, per_core = steps_of(runs, path.name), images_per_core(runs)
    models = Models.build(order.config)
    wanted = [masking] if masking != "both" else list(MASKINGS if order.implementation == "fastjepa" else MASKINGS[:1])
    found = {name: _plan(order, models, name == "ragged", rows, per_core) for name in wanted}
    own = "ragged" if order.config.mask.ragged else "truncated"
    top = own if own in found else wanted[0]
    config = order.config
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": f"{config.meta.model_name}/{config.mask.patch_size}",
        "pixels": config.data.crop_size,
        "predictor": {"width": config.meta.pred_emb_dim, "depth": config.meta.pred_depth},
        "implementation": order.implementation,
        "settings": order.settings._asdict(),
        "left_out": order.left_out,
        "gpu": order.chip.name,
        "gpus": order.gpus,
        "nodes": order.nodes,
        "batch_size": config.data.batch_size,
        "epochs": config.optimization.epochs,
        "images": order.images,
        "steps": order.steps,
        "parameters": {"encoder": models.encoder_parameters, "predictor": models.predictor_parameters},
        "published": _published(order, models),
        "masking": top,
        **found[top],
        "maskings": found,
    }


def grounds(basis: str) -> list[str]:
    """What a figure stands on, the weakest first, by the words of its basis."""
    return [kind for kind in ("assumed", "published", "measured", "counted", "given") if f"{kind}:" in basis]


def _plan(
    order: Order, models: Models, ragged: bool, rows: Sequence[Measured], per_core: tuple[float, str] | None
) -> dict[str, Any]:
    """The figures of one masking, and their basis."""
    config, chip = order.config, order.chip
    batch_size = config.data.batch_size
    batches = draw(config, batch_size, ragged)
    step = Step(models, batches.mean, order.implementation, settings=order.settings)
    row = step.row(ragged)
    found = parts(step, chip.flops, chip.bandwidth, gpu_fractions(rows, step, row, chip))
    number = step.precision.branch if config.runtime.compress_gradients and step.ours else WIDE
    exchange = communication(step, chip, order.gpus, order.per_node, found, number, order.network)
    found["launching"] = launching(step, order.graphs, found)
    seconds = sum(part.seconds for part in found.values()) + exchange.exposed_seconds
    hours = order.steps * seconds / 3600
    flops = sum(flops.total for flops in models.flops.parts(batches.mean.tokens).values()) / batch_size
    rate = batch_size / seconds
    memory = largest(step, batches.drawn, order.graphs, order.gpus > 1)
    watts, watts_basis = _watts(order, step, row, rows)
    timing = _timing(found, exchange)
    figures = {
        "hours": hours,
        "gpu_hours": order.gpus * hours,
        "floor_hours": order.steps * sum(part.floor_seconds for part in found.values()) / 3600,
        "seconds_per_step": seconds,
        "images_per_second": order.gpus * rate,
        "images_per_second_per_gpu": rate,
        "mfu": flops * rate / chip.flops,
        "flops_per_image": flops,
        "context_tokens": batches.context,
        "target_tokens": batches.target,
        "peak_memory_bytes": round(memory.peak),
        "memory": {name: round(value) for name, value in asdict(memory).items()},
        "fits": memory.peak <= assumed.USABLE.value * chip.memory,
        "largest_batch": largest_batch(order, models, ragged),
        "energy_kwh": order.gpus * hours * watts / 1000,
        "watts_per_gpu": watts,
        "communication": {key: value for key, value in asdict(exchange).items() if key != "basis"},
        "parts": {name: asdict(part) for name, part in found.items()},
    }
    figures["parts"]["communication"] = _as_part(exchange)
    figures["cost"] = _cost(order, figures["gpu_hours"], figures["energy_kwh"])
    figures["input"], input_basis = _input(order, rate, per_core)
    drawn = f"{batches.count} batches of {batch_size} images drawn from the mask sampler"
    figures["basis"] = {
        **dict.fromkeys(("hours", "gpu_hours", "seconds_per_step", "images_per_second"), timing),
        **dict.fromkeys(("images_per_second_per_gpu", "mfu"), timing),
        "floor_hours": f"counted: every part at the whole of the roof of {chip.name} ({chip.source}), nothing sent",
        "flops_per_image": f"counted: FLOPs that the masks need, {drawn}",
        "context_tokens": f"counted: {drawn}",
        "target_tokens": f"counted: {drawn}",
        "peak_memory_bytes": _memory_basis(order, memory, batches),
        "largest_batch": f"assumed: {assumed.USABLE.value:.0%} {assumed.USABLE.source}; counted: the rest",
        "energy_kwh": f"{watts_basis}; {grounds(timing)[0]}: hours, see there",
        **dict.fromkeys(("communication", "parts.communication"), exchange.basis),
        "cost": f"given: the prices; {grounds(timing)[0]}: hours and energy, see there",
        "input": f"{input_basis}; {grounds(timing)[0]}: images a second, see there",
        **{f"parts.{name}": part.basis for name, part in found.items()},
    }
    return figures


def largest_batch(order: Order, models: Models, ragged: bool) -> int:
    """The most images that fit on a GPU and fill equal parts, to about one in fifty; 0 where none do.

    Beyond `MANY` images a batch is taken to be that many times one of `MANY`, which what is cut to the shortest is not
    more than.
    """
    room = assumed.USABLE.value * order.chip.memory

    def fits(count: int) -> bool:
        some = min(count, MANY)
        batches = [batch.times(count / some) for batch in draw(order.config, some, ragged, FEWEST).drawn]
        step = Step(models, batches[0], order.implementation, settings=order.settings)
        return largest(step, batches, order.graphs, order.gpus > 1).peak <= room

    low, high = 0, 1
    while high <= MOST_IMAGES and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low - low % order.settings.accumulate


def _timing(found: dict[str, Part], exchange: Communication) -> str:
    """The bases of the parts, each once, and of what is sent."""
    by_basis: dict[str, list[str]] = {}
    for name, part in found.items():
        by_basis.setdefault(part.basis, []).append(name)
    said = [basis if len(by_basis) == 1 else f"{', '.join(names)}: {basis}" for basis, names in by_basis.items()]
    return "; ".join([*said, f"communication: {exchange.basis}"])


def _as_part(exchange: Communication) -> dict[str, Any]:
    """Like the others: its floor is what it has to show if all but its last bucket hides."""
    return {
        "flops": 0.0,
        "bytes": exchange.bytes_per_gpu,
        "floor_seconds": 0.0,
        "efficiency": None,
        "seconds": exchange.exposed_seconds,
        "basis": exchange.basis,
    }


def _watts(order: Order, step: Step, row: str, rows: Sequence[Measured]) -> tuple[float, str]:
    same = [m for m in rows if m.watts and m.chip == order.chip.name and m.implementation == order.implementation]
    if not same:
        source = f"assumed: the limit of the board all the time ({order.chip.source}); hosts and cooling are not in it"
        return float(order.chip.watts), source
    near = min(same, key=lambda m: unlikeness(m, step, "context", row))
    assert near.watts is not None
    return near.watts, f"measured: what the GPU took in {near}; hosts and cooling are not in it"


def _memory_basis(order: Order, memory: Memory, batches: Batches) -> str:
    when = "as the backward pass begins" if memory.at_backward else "as the optimizer steps"
    how = {
        "fastjepa": "what the kernels keep",
        "compiled": "what torch.compile is taken to keep (assumed, its graphs were not looked into)",
        "eager": "what autograd keeps",
    }[order.implementation]
    return f"counted: state, gradients and {how}, of the largest of {batches.count} batches, {when}"


def _cost(order: Order, gpu_hours: float, kwh: float) -> dict[str, Any] | None:
    if order.price_per_gpu_hour is None and order.price_per_kwh is None:
        return None
    gpus = None if order.price_per_gpu_hour is None else gpu_hours * order.price_per_gpu_hour
    energy = None if order.price_per_kwh is None else kwh * order.price_per_kwh
    return {"currency": order.currency, "gpus": gpus, "energy": energy, "total": (gpus or 0.0) + (energy or 0.0)}


def _input(order: Order, rate: float, per_core: tuple[float, str] | None) -> tuple[dict[str, float], str]:
    """What each node has to read."""
    if order.images_per_core is not None:
        core, source = order.images_per_core, "given: --images-per-core"
    else:
        core, source = per_core or (
            assumed.IMAGES_PER_CORE.value,
            f"assumed: {assumed.IMAGES_PER_CORE.value:.0f} {assumed.IMAGES_PER_CORE.source}",
        )
    node = rate * min(order.gpus, order.per_node)
    size = assumed.FILE_BYTES
    figures = {
        "images_per_second_per_node": node,
        "megabytes_per_second_per_node": node * size.value / 1e6,
        "images_per_second_per_core": core,
        "cores_per_node": node / core,
    }
    return figures, f"assumed: {size.value:.0f} {size.source}; {source}"


def _published(order: Order, models: Models) -> dict[str, Any] | None:
    """The published hours in the plan's units, where the run is the published one but for its GPUs."""
    official, config = recipe(), order.config
    same = all(getattr(config, name) == getattr(official, name) for name in ("meta", "data", "optimization"))
    if not same or replace(config.mask, ragged=False) != official.mask or order.images != IMAGENET or order.gpus != 16:
        return None
    hours, a100 = assumed.PUBLISHED_HOURS, find_chip("a100-80g")
    rate = order.steps * order.global_batch / order.gpus / (3600 * hours.value)
    tokens = draw(config, config.data.batch_size, ragged=False).mean.tokens
    flops = sum(f.total for f in models.flops.parts(tokens).values()) / config.data.batch_size
    return {
        "hours": hours.value,
        "gpu_hours": hours.value * order.gpus,
        "images_per_second_per_gpu": rate,
        "mfu": flops * rate / a100.flops,
        "gpu": a100.name,
        "basis": f"published: {hours.value:.0f} {hours.source}",
    }
