"""The configuration of a run: one frozen tree, read from the official YAML files and ours."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

Pair = tuple[float, float]
LARGEST = 1 << 16  # bytes of a configuration file
ENGINES = ("auto", "turbo", "pillow", "dali", "torchvision")  # of data.engine


@dataclass(frozen=True)
class DataConfig:
    """Images and how a training crop is made of one. root_path/image_folder is searched for pictures, its `train`
    folder where there is one (the official ImageNet layout); they may lie in tar shards, Arrow or Parquet files."""

    root_path: str
    image_folder: str = ""
    engine: str = "auto"  # what decodes and crops: turbo, pillow, dali or torchvision; auto is turbo where installed
    batch_size: int = 128  # images on each GPU
    crop_size: int = 224  # pixels
    crop_scale: Pair = (0.3, 1.0)  # fraction of the picture's area
    use_horizontal_flip: bool = False
    use_color_distortion: bool = False
    color_jitter_strength: float = 0.0
    use_gaussian_blur: bool = False
    num_workers: int = 10
    pin_mem: bool = True
    max_corrupt: float = (
        0.01  # fraction of unreadable images that is still skipped (a few in a small folder always are)
    )


@dataclass(frozen=True)
class MaskConfig:
    """The blocks of `fastjepa.MaskCollator`; `ragged` keeps every patch of them instead of cutting to the shortest."""

    patch_size: int = 16
    num_enc_masks: int = 1
    num_pred_masks: int = 4
    enc_mask_scale: Pair = (0.85, 1.0)
    pred_mask_scale: Pair = (0.15, 0.2)
    aspect_ratio: Pair = (0.75, 1.5)
    min_keep: int = 10
    allow_overlap: bool = False
    ragged: bool = False


@dataclass(frozen=True)
class MetaConfig:
    """The models. embed_dim, depth and num_heads replace those of model_name where given.

    patch_embed_scale multiplies the patch embedding's initial weights: patches of few pixels start as almost nothing
    beside their positions, and a narrow encoder then learns positions alone.
    """

    model_name: str = "vit_huge"
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    patch_embed_scale: float = 1.0
    pred_depth: int = 12
    pred_emb_dim: int = 384
    use_bfloat16: bool = True
    load_checkpoint: bool = False  # resume from read_checkpoint, or from the folder's latest
    read_checkpoint: str | None = None  # a file, relative to logging.folder
    copy_data: bool = False


@dataclass(frozen=True)
class OptimizationConfig:
    """AdamW and its schedules; ema is the momentum of the target encoder at the start and at the end."""

    epochs: int = 300
    lr: float = 1e-3
    start_lr: float = 2e-4
    final_lr: float = 1e-6
    warmup: float = 40  # epochs
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    ema: Pair = (0.996, 1.0)
    ipe_scale: float = 1.0  # stretches every schedule


@dataclass(frozen=True)
class LoggingConfig:
    """Where the run writes, and what watches it."""

    folder: str
    write_tag: str = "jepa"
    every: int = 10  # steps between readings of the loss from the device
    watch_every: int = 100  # steps between looks at the target features for collapse
    tensorboard: bool = False
    wandb: str | None = None  # project name


@dataclass(frozen=True)
class RuntimeConfig:
    """How the run is run. The numbers depend on `seed` and, under bf16, on `narrow_stream`, `fp8_target` and `shard`;
    on `attention`, `accumulate` and `cuda_graphs` in their last digits; on nothing else here."""

    device: str = "auto"
    seed: int = 0
    save_every: int = 1000  # steps; a checkpoint is also saved at the end of each epoch
    save_minutes: float = 0.0  # and as soon as so many minutes have passed since the last; 0: by steps alone
    resume: bool = False  # go on from the folder's latest checkpoint where there is one, else start
    checkpoint: str = "file"  # written by one process; "sharded": a folder, each process its part, training goes on
    keep: int = 2  # newest checkpoints kept; every 50th epoch is kept besides
    attention: str = "auto"  # backend, as fastjepa.ops.ragged_attention takes it
    accumulate: int = 1  # parts that each batch is taken in, one after the other; it must divide data.batch_size
    activation_checkpointing: bool | Literal["predictor"] = False  # compute blocks again in backward, to save memory
    narrow_stream: bool = False  # under bf16 the residual stream is bf16 too: fewer bytes moved, more rounding
    cuda_graphs: bool = False  # steps launched whole, on one GPU that small models keep waiting; takes more memory
    fp8_target: bool = False  # the target encoder multiplies in 8 bits, on GPUs that can; its features are rounded more
    compress_gradients: bool = False  # sent between processes as bf16
    shard: bool = False  # parameters, gradients and optimizer divided among the processes, to save memory (FSDP)
    stop_after: int | None = None  # stop, resumable, once this many steps are done in all
    max_skipped: int = 10  # steps in a row that may be skipped because loss or gradients are not finite
    profile: bool = False  # a few of the first steps: a trace and tables in the run's folder
    progress: bool = True


@dataclass(frozen=True)
class EvaluationConfig:
    """Probes of the target encoder during training, by `fastjepa eval` in a process of its own; `every: 0` has none."""

    every: int = 0  # epochs; the last is always judged too
    data: str | None = None  # labelled pictures, as `fastjepa eval --data`; the training pictures' folder if not given
    test: str | None = None  # as `fastjepa eval --test`
    probes: str = "linear,knn"
    workers: int = 0  # that read its pictures
    device: str = "auto"  # the one that is trained on


@dataclass(frozen=True)
class Config:
    """A run. Sections `data`, `mask`, `meta`, `optimization`, `logging` are the official ones; `runtime` and
    `evaluation` are ours."""

    data: DataConfig
    logging: LoggingConfig
    mask: MaskConfig = field(default_factory=MaskConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def to_dict(self) -> dict[str, Any]:
        """As nested dicts of plain values, as YAML and checkpoints hold them."""
        return {
            section: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
            for section, values in asdict(self).items()
        }


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, official or ours, and put `section.key=value` overrides on top.

    `path` may also be the name of a shipped configuration, such as `in1k_vith14_ep300`.

    Raises:
        ValueError: a file that is not there or is no YAML, an unknown key (the nearest is suggested), a wrong type, or
            a missing key; names the key or the file.
    """
    path = _find(Path(path))
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{path} has {size} bytes; a configuration has at most {LARGEST}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}{place}: not valid YAML: {problem}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: a configuration has sections {', '.join(SECTIONS)}, this file holds {_kind(tree)}")
    for item in overrides:
        _override(tree, item)
    return parse_config(tree, f"{path} with {' '.join(overrides)}" if overrides else str(path))


def parse_config(tree: Mapping[str, Any], source: str = "configuration") -> Config:
    """Nested dicts, as YAML gives them, as a checked `Config`.

    Raises:
        ValueError: as `load_config`; `source` is named in it.
    """
    for section in tree:
        if section not in SECTIONS:
            raise ValueError(f"{source}: unknown section {_shown(section)}{_nearest(str(section), list(SECTIONS))}")
    built = {}
    for section, kind in SECTIONS.items():
        values = tree.get(section)
        if values is None:
            values = {}
        if not isinstance(values, Mapping):
            raise ValueError(f"{source}: section {section} must hold keys and values, not {_kind(values)}")
        built[section] = _section(section, kind, values, source)
    config = Config(**built)
    _check(config, source)
    return config


def shipped_configs() -> dict[str, Path]:
    """Name -> file of the configurations that come with the package."""
    return {p.stem: p for p in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}


SECTIONS: dict[str, Any] = {name: kind for name, kind in typing.get_type_hints(Config).items() if is_dataclass(kind)}


class _Loader(yaml.SafeLoader):
    """That of plain values, without aliases within what an anchor names: a few lines of those stand for more than
    memory holds."""

    def __init__(self, stream: Any):
        super().__init__(stream)
        self._anchors = 0  # that the node being read is within

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if self._anchors and isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="an alias within an anchor", problem_mark=event.start_mark)
        anchored = not isinstance(event, yaml.AliasEvent) and getattr(event, "anchor", None) is not None
        self._anchors += anchored
        node = super().compose_node(parent, index)
        self._anchors -= anchored
        return node


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    shipped = shipped_configs()
    if path.name == str(path) and path.stem in shipped:
        return shipped[path.stem]
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a configuration is a YAML file")
    raise ValueError(f"{path}: no such configuration file; shipped ones are {', '.join(shipped)}")


def _override(tree: dict[str, Any], item: str) -> None:
    name, equals, text = item.partition("=")
    section, dot, key = name.partition(".")
    if not equals or not dot or not key:
        raise ValueError(f"cannot read {item!r}; an override is section.key=value, such as data.batch_size=64")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"cannot read the value of {item!r} as YAML") from error
    if tree.get(section) is None:
        tree[section] = {}
    if not isinstance(tree[section], dict):
        raise ValueError(f"section {section} must hold keys and values, not {_kind(tree[section])}")
    tree[section][key] = value


def _section(section: str, kind: type, values: Mapping[str, Any], source: str) -> Any:
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            elsewhere = [f"{s}.{key}" for s, k in SECTIONS.items() if key in {f.name for f in fields(k)}]
            near = f"; did you mean {elsewhere[0]}?" if elsewhere else _nearest(str(key), list(hints))
            raise ValueError(f"{source}: unknown key {section}.{key if isinstance(key, str) else _shown(key)}{near}")
    missing = [f.name for f in fields(kind) if f.name not in values and not _has_default(f)]
    if missing:
        raise ValueError(f"{source}: {section}.{missing[0]} is missing")
    return kind(**{key: _coerce(value, hints[key], f"{source}: {section}.{key}") for key, value in values.items()})


def _has_default(f: Any) -> bool:
    return f.default is not f.default_factory  # both are MISSING where there is none


def _coerce(value: Any, hint: Any, name: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if value is None and types.NoneType in options:
        return None
    words = [word for o in options if typing.get_origin(o) is Literal for word in typing.get_args(o)]
    if isinstance(value, str) and value in words:
        return value
    kind = next(o for o in options if o is not types.NoneType)
    if kind == Pair:
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
            first, second = (_coerce(v, float, name) for v in value)
            return first, second
        raise ValueError(f"{name} must be two numbers, such as [0.3, 1.0], got {_shown(value)}")
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-6 as a string
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{name} must be a number, got {_shown(value)}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{name} must be a number that a float holds, got {_shown(value)}") from None
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} must be {' or '.join([WORDS[kind], *words])}, got {_shown(value)}")
    if kind is float and value != value:
        raise ValueError(f"{name} must be a number, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """In few letters, whatever it is."""
    if isinstance(value, int) and abs(value) > 10**40:  # longer ones Python does not even write out
        return "a number of more than 40 digits"
    return reprlib.repr(value)


LARGEST_HINTED = 1 << 12  # pixels of a crop for which patch sizes are suggested
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _patches(config: Config) -> str:
    """The two sizes of patches nearest to the one that is set that divide the pictures."""
    patch, pixels = config.mask.patch_size, config.data.crop_size
    if pixels > LARGEST_HINTED:
        return ""
    fits = sorted((p for p in range(4, pixels // 2 + 1) if pixels % p == 0), key=lambda p: abs(p - patch))[:2]
    return f"; {' and '.join(map(str, sorted(fits)))} do" if len(fits) == 2 else ""


def _check(config: Config, source: str) -> None:
    """Ranges that a single value shows to be wrong; masks and images are checked where they are made."""
    data, optimization, runtime = config.data, config.optimization, config.runtime
    low, high = data.crop_scale
    wrong = {
        "data.batch_size must be at least 1": data.batch_size < 1,
        f"data.engine must be one of {', '.join(ENGINES)}, got {data.engine!r}": data.engine not in ENGINES,
        "data.num_workers must be at least 0": data.num_workers < 0,
        "data.crop_size must be at least 1": data.crop_size < 1,
        "data.crop_scale must be two numbers, 0 < smallest <= largest <= 1": not 0 < low <= high <= 1,
        "meta.copy_data is not supported; copy the pictures first and name the copy in data.root_path": (
            config.meta.copy_data
        ),
        f"mask.patch_size={config.mask.patch_size} does not divide data.crop_size={data.crop_size}{_patches(config)}": (
            config.mask.patch_size < 1 or data.crop_size % config.mask.patch_size > 0
        ),
        "meta.pred_depth must be at least 1": config.meta.pred_depth < 1,
        "meta.patch_embed_scale must be above 0": config.meta.patch_embed_scale <= 0,
        "optimization.epochs must be at least 1": optimization.epochs < 1,
        "optimization.warmup must be at least 0": optimization.warmup < 0,
        "optimization.ipe_scale must be above 0": optimization.ipe_scale <= 0,
        "optimization.ema must be two numbers in 0..1": not all(0 <= m <= 1 for m in optimization.ema),
        "logging.every and logging.watch_every must be at least 1": min(
            config.logging.every, config.logging.watch_every
        )
        < 1,
        f"runtime.checkpoint must be file or sharded, got {runtime.checkpoint!r}": (
            runtime.checkpoint not in ("file", "sharded")
        ),
        "runtime.save_minutes must be at least 0": not runtime.save_minutes >= 0,
        "runtime.save_every and runtime.keep must be at least 1": min(runtime.save_every, runtime.keep) < 1,
        f"runtime.accumulate={runtime.accumulate} does not divide data.batch_size={data.batch_size}": (
            runtime.accumulate < 1 or data.batch_size % runtime.accumulate > 0
        ),
        f"logging.write_tag must be a plain file name, got {config.logging.write_tag!r}": (
            not re.fullmatch(r"[^/\\\0:*?\[\]]+", config.logging.write_tag) or config.logging.write_tag[0] == "."
        ),
        "runtime.fp8_target cannot go with runtime.shard: weights in 8 bits are made once a step, of a whole layer": (
            runtime.fp8_target and runtime.shard
        ),
        "runtime.cuda_graphs cannot go with runtime.profile: a graph's launches belong to no part of a step": (
            runtime.cuda_graphs and runtime.profile
        ),
        "runtime.cuda_graphs cannot go with runtime.attention=xformers, which reads lengths back in each step": (
            runtime.cuda_graphs and runtime.attention == "xformers"
        ),
        "runtime.cuda_graphs cannot go with runtime.activation_checkpointing, which reads random state": (
            runtime.cuda_graphs and runtime.activation_checkpointing
        ),
        "runtime.fp8_target needs meta.use_bfloat16": runtime.fp8_target and not config.meta.use_bfloat16,
        "runtime.max_skipped must be at least 1": runtime.max_skipped < 1,
        "runtime.seed must be at least 0": runtime.seed < 0,
        "evaluation.every and evaluation.workers must be at least 0": min(
            config.evaluation.every, config.evaluation.workers
        )
        < 0,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"{source}: {message}")


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}" if len(known) < 20 else ""


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
