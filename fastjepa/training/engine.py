"""The training loop: what a step does, and what happens around it."""

from __future__ import annotations

import math
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from fastjepa.chips import chip_of, find_device
from fastjepa.config import Config
from fastjepa.data import Augment, Batch, TrainingBatches, choose_engine, find_images
from fastjepa.data.batches import Unreadable
from fastjepa.evaluation.features import MEAN, STD
from fastjepa.masks import MaskCollator
from fastjepa.nn import set_activation_checkpointing, set_attention_backend, set_fp8, set_narrow_stream
from fastjepa.objective import IJEPA
from fastjepa.ops import attention_backend
from fastjepa.schedules import Schedules
from fastjepa.sharding import local
from fastjepa.training.graphs import CudaRecorder, StepGraphs
from fastjepa.training.judging import Judging
from fastjepa.training.log import NoLog, RunLog
from fastjepa.training.models import build_models, build_optimizer, step_flops
from fastjepa.training.profile import profiled
from fastjepa.training.ranks import ALONE, Ranks
from fastjepa.training.resume import Checkpoints, restore, run_state
from fastjepa.training.stop import StopSignals
from fastjepa.training.watch import CollapseWatch, SkippedSteps, SpikeWatch


@dataclass(frozen=True)
class TrainResult:
    """What a run came to: steps done in all, last loss, newest checkpoint, the model, and the rows it logged.

    `stopped`: the signal that ended it before its time, or None.
    """

    steps: int
    loss: float
    checkpoint: Path
    model: IJEPA
    rows: list[dict[str, float]]
    stopped: str | None = None


class Trainer:
    """A run between two steps: models, optimizer, schedules and the number of steps done, in one of its processes."""

    def __init__(self, config: Config, steps_per_epoch: int, ranks: Ranks = ALONE):
        self.config, self.steps_per_epoch, self.ranks = config, steps_per_epoch, ranks
        self.device = ranks.device(pick_device(config.runtime.device))
        seed_everything(config.runtime.seed)
        self.model = build_models(config).to(self.device)
        try:
            set_attention_backend(self.model, config.runtime.attention)
        except ValueError as error:
            raise ValueError(f"runtime.attention: {error}") from None
        set_activation_checkpointing(self.model, config.runtime.activation_checkpointing)
        set_narrow_stream(self.model, config.runtime.narrow_stream)
        if config.runtime.fp8_target:
            try:
                set_fp8(self.model.target_encoder)
            except ValueError as error:
                raise ValueError(f"runtime.fp8_target: {error}") from None
        bf16, compress = config.meta.use_bfloat16, config.runtime.compress_gradients
        if config.runtime.shard and ranks.world > 1:
            self.forward = ranks.shard(self.model, self.device, bf16, compress)
        else:
            self.forward = ranks.wrap(self.model, compress, config.runtime.accumulate)
        self.optimizer = build_optimizer(self.model, bf16)
        self.graphs = self._graphs() if config.runtime.cuda_graphs else None
        self.schedules = Schedules(config.optimization, steps_per_epoch)
        self.step = 0
        self._mean = torch.tensor(MEAN, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(STD, device=self.device).view(3, 1, 1)

    def _graphs(self) -> StepGraphs:
        if self.device.type != "cuda" or self.ranks.world > 1:
            found = f"{self.ranks.world} processes" if self.ranks.world > 1 else str(self.device)
            raise ValueError(f"runtime.cuda_graphs is for one process on a GPU, this is {found}; leave it out")
        return StepGraphs(self._take, self.optimizer, CudaRecorder(self.device))

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] as the floating images that the models take."""
        return (images.float() / 255 - self._mean) / self._std

    def train_step(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """One step on this process's batch, which is on the CPU; (loss, target features), nothing read back.

        The loss is this process's part of the mean over every process's target tokens: they add up to it. Features, of
        whole images, are given on the steps where they are watched. Where the loss of any process or the gradient is
        not finite, nothing is changed but the step's number, which the schedules follow.
        """
        watched = self.step % self.config.logging.watch_every == 0
        lr, weight_decay = self.schedules.lr(self.step), self.schedules.weight_decay(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            if not group.get("WD_exclude"):
                group["weight_decay"] = weight_decay
        self.optimizer.momentum = self.schedules.momentum(self.step)
        parts = batch.parts(self.config.runtime.accumulate)
        taken = self._take(parts, watched) if self.graphs is None else self.graphs.step(parts, watched, self.device)
        self.step += 1
        if self.graphs is not None:
            self.graphs.capture()
        return taken

    def _take(self, parts: Sequence[tuple[Batch, float]], watched: bool) -> tuple[Tensor, Tensor | None]:
        """`train_step` on the parts of a batch and their shares, as far as the device goes."""
        losses, features = [], []
        mine = self.ranks.share(sum(len(part.targets.place) for part, _ in parts), self.device)
        for number, (part, share) in enumerate(parts):
            part = part.to(self.device)
            targets = None if watched else part.targets
            with self.ranks.sends(self.forward, number == len(parts) - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.meta.use_bfloat16):
                    loss, seen = self.forward(self.normalise(part.images), part.masks_enc, part.masks_pred, targets)
                loss = loss * (share * mine)
                # Gradients are averaged over the processes: a loss that is not finite makes those of all of them NaN.
                (loss * self.ranks.world).backward(1 + 0 * loss.detach())
            losses.append(loss.detach())
            if watched:
                features.append(seen)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.stack(losses).sum() if len(losses) > 1 else losses[0]
        return loss, torch.cat(features) if watched else None

    def is_finite(self) -> bool:
        """Whether every weight is; where they lie in parts, those of all processes, each of which asks."""
        bad = torch.zeros((), device=self.device)
        for tensor in self.model.state_dict().values():
            bad += local(tensor).isfinite().all().logical_not()
        return not (self.ranks.total(bad) if self.config.runtime.shard else bad)

    def state(self, loss: float) -> dict:
        """What a checkpoint of this moment holds."""
        return run_state(
            self.config, self.model, self.optimizer, self.step, self.steps_per_epoch, loss, self.ranks.world
        )


@dataclass
class Meter:
    """The rows of the steps since the device was last asked, their losses still on the device."""

    trainer: Trainer
    signals: StopSignals = field(default_factory=StopSignals)
    stopped: str | None = None  # what the processes have agreed to stop for
    watch: CollapseWatch = field(default_factory=CollapseWatch)
    spikes: SpikeWatch = field(default_factory=SpikeWatch)
    rows: list[dict[str, float]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    look: Tensor | None = None
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.flops = step_flops(self.trainer.model)
        chip = chip_of(self.trainer.device)
        self.peak = chip.flops if chip else None
        self.skipped = SkippedSteps(self.trainer.config.runtime.max_skipped)

    def add(self, batch: Batch, loss: Tensor, features: Tensor | None) -> None:
        """Note the step that was just taken on `batch` (the one on the CPU)."""
        step, schedules = self.trainer.step - 1, self.trainer.schedules
        epoch, itr = divmod(step, self.trainer.steps_per_epoch)
        per_context, per_target = _mean_length(batch.masks_enc), _mean_length(batch.masks_pred)
        row = {"epoch": epoch + 1, "itr": itr, "step": step, "mask-A": per_context, "mask-B": per_target}
        row |= {"lr": schedules.lr(step), "weight_decay": schedules.weight_decay(step)}
        row |= {"momentum": schedules.momentum(step), "context tokens": batch.context_tokens}
        row["flops"] = self.flops(len(batch.images), batch.masks_enc, batch.masks_pred) if self.peak else 0.0
        self.rows.append(row)
        self.losses.append(loss.clone())  # torch's loss of the CPU keeps a number for each element it is the mean of
        norm = self.trainer.optimizer.grad_norm
        assert norm is not None
        self.norms.append(norm.clone())  # the next step's is written over it
        if features is not None:
            self.look = self.watch.look(features)

    def must_stop(self) -> bool:
        """Whether a single process was asked to; several have to agree first."""
        return self.signals.asked is not None and self.trainer.ranks.world == 1

    def read(self) -> tuple[list[dict[str, float]], list[str]]:
        """Read the losses back, once for all steps since the last time: (their rows, warnings).

        With them goes whether some process was asked to stop, so that all stop at the same step.
        """
        ranks = self.trainer.ranks
        asked = torch.full((1,), float(self.signals.asked is not None), device=self.trainer.device)
        summed = ranks.total(torch.cat([torch.stack(self.losses), asked]))
        numbers, count = torch.cat([summed, torch.stack(self.norms)]).tolist(), len(self.losses)
        losses, asks, norms = numbers[:count], numbers[count], numbers[count + 1 :]
        if asks:
            self.stopped = self.signals.asked or "a signal to another process"
        batch_size = self.trainer.config.data.batch_size * ranks.world
        now = time.perf_counter()
        seconds, self.began = (now - self.began) / len(losses), now
        rows, warnings = self.rows, []
        for row, loss, norm in zip(rows, losses, norms, strict=True):
            row |= {"loss": loss, "time (ms)": 1000 * seconds, "images/s": batch_size / seconds}
            row |= {"grad norm": norm, "skipped": int(not math.isfinite(norm))}
            warnings.append(self.spikes.judge(int(row["step"]), loss))
            flops = row.pop("flops")
            if self.peak:
                row["mfu"] = flops / seconds / self.peak
        if self.look is not None:
            rank, spread = self.look.tolist()
            rows[-1] |= {"rankme": rank, "feature std": spread}
            warnings.append(self.watch.judge(rank, spread))
        self.rows, self.losses, self.norms, self.look = [], [], [], None
        return rows, [warning for warning in warnings if warning]


def train(config: Config, on_step: Callable[[Trainer], None] | None = None) -> TrainResult:
    """Train as `config` says, from the start or from a checkpoint, to the end or to runtime.stop_after.

    In each of several processes (torchrun, srun) this takes the process's part. `on_step` is called with the trainer
    after each step. SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C save a checkpoint and end the run as if it was asked to stop
    there: a single process after the step, several after the next `logging.every`, when they agree.

    Raises:
        ValueError: a configuration, picture folder or checkpoint that will not do; says what would.
        OSError: the run's folder or its last checkpoint cannot be written.
        FloatingPointError: runtime.max_skipped steps in a row were skipped because their loss or gradient is not
            finite, or a weight is not where a checkpoint was to be written; names the last good checkpoint.
    """
    ranks = Ranks.from_environment()
    with ranks.joined(ranks.device(pick_device(config.runtime.device))), StopSignals() as signals:
        return _train(config, ranks, signals, on_step)


def _train(
    config: Config, ranks: Ranks, signals: StopSignals, on_step: Callable[[Trainer], None] | None
) -> TrainResult:
    batches, unreadable = prepare_data(config, ranks)
    trainer = Trainer(config, batches.steps_per_epoch, ranks)
    checkpoints = Checkpoints(config, ranks, trainer.device)
    source = checkpoints.source()
    if source is not None:
        trainer.step = restore(source, config, trainer.model, trainer.optimizer, batches.steps_per_epoch)
    starts = ranks.of_each(trainer.step, trainer.device)
    if len(set(starts)) > 1:
        steps = ", ".join(map(str, starts))
        raise ValueError(f"logging.folder must be one that all processes see: they would start from steps {steps}")
    total = config.optimization.epochs * batches.steps_per_epoch
    end = min(total, config.runtime.stop_after or total)
    if ranks.leads:
        write_parameters(config)
    log = RunLog(config, trainer.step, total) if ranks.leads else NoLog()
    judging = Judging(config, ranks.leads, trainer.device, trainer.step, batches.steps_per_epoch, signals, log.say)
    meter, rows = Meter(trainer, signals), []
    log.say(opening(config, trainer, batches, source, end))
    saved = trainer.step if source is not None else -1
    if source is not None:
        judging.offer(source, trainer.step)
    every, save_every = config.logging.every, config.runtime.save_every
    workers, pin = config.data.num_workers, config.data.pin_mem and trainer.device.type == "cuda"
    try:
        loader = batches.loader(trainer.step, end, workers, pin, log.say)
        with judging, closing(profiled(loader, trainer, end, log.say)) as stream:
            for batch in stream:
                for line in unreadable.add(batch):
                    log.say(line)
                loss, features = trainer.train_step(batch)
                meter.add(batch, loss, features)
                saves = trainer.step % batches.steps_per_epoch == 0 or trainer.step % save_every == 0
                reports = saves or trainer.step == end or trainer.step % every == 0 or meter.must_stop()
                if reports:
                    rows += report(log, meter, checkpoints, batches)
                    judging.look()
                last = trainer.step == end or meter.stopped is not None
                due = saves or (reports and checkpoints.is_due(trainer.device))
                if last or (due and not meter.skipped.in_a_row):  # the newest one is from before such steps
                    saved = save(log, trainer, checkpoints, rows[-1]["loss"], must=last)
                    if judging.is_turn(trainer.step):
                        finish(log, checkpoints)
                        judging.offer(checkpoints.file(trainer.step), trainer.step)
                if on_step is not None:
                    on_step(trainer)
                if meter.stopped:
                    break
            if meter.stopped is None:
                judging.finish()
    except KeyboardInterrupt:  # a second one, or one raised by `on_step`
        log.say(f"stopped at step {trainer.step}; saving")
        if trainer.step != saved and not checkpoints.takes_all:  # the others may be anywhere
            save(log, trainer, checkpoints, rows[-1]["loss"] if rows else float("nan"), must=True)
    finally:
        trainer.graphs = None  # which hold the trainer, and memory
        finish(log, checkpoints)
        log.close()
    if meter.stopped:
        log.say(f"stopped by {meter.stopped} at step {trainer.step}; runtime.resume=true goes on from there")
    loss = rows[-1]["loss"] if rows else float("nan")
    return TrainResult(trainer.step, loss, checkpoints.latest, trainer.model, rows, meter.stopped)


def prepare_data(config: Config, ranks: Ranks = ALONE) -> tuple[TrainingBatches, Unreadable]:
    """The batches of a run for this process, and the count of its unreadable pictures."""
    mask, data = config.mask, config.data
    try:
        collator = MaskCollator(
            (data.crop_size, data.crop_size),
            mask.patch_size,
            mask.enc_mask_scale,
            mask.pred_mask_scale,
            mask.aspect_ratio,
            mask.num_enc_masks,
            mask.num_pred_masks,
            mask.min_keep,
            mask.allow_overlap,
            mask.ragged,
        )
    except ValueError as error:
        raise ValueError(f"section mask: {error}") from None
    augment = Augment.from_config(data, choose_engine(data.engine, ranks.device(pick_device(config.runtime.device))))
    folder = find_images(data.root_path, data.image_folder)
    batches = TrainingBatches(folder, augment, collator, data.batch_size, config.runtime.seed, ranks.rank, ranks.world)
    return batches, Unreadable(folder, data.max_corrupt)


def report(
    log: RunLog | NoLog, meter: Meter, checkpoints: Checkpoints, batches: TrainingBatches
) -> list[dict[str, float]]:
    """Read the steps since the last report and log them, with the pictures of those that were skipped.

    Raises:
        FloatingPointError: too many in a row were.
    """
    rows, warnings = meter.read()
    log.rows(rows)
    for warning in warnings:
        log.say(f"warning: {warning}")
    for row in rows:
        why = meter.skipped.add(row["loss"], row["grad norm"])
        if why:
            step = int(row["step"])
            log.skipped(step, why, [batches.folder.name(int(i)) for i in batches.pictures(step)])
        if meter.skipped.is_over:
            raise FloatingPointError(
                f"{meter.skipped.in_a_row} steps in a row, the last of them step {row['step']}, were skipped because "
                f"their loss or gradient is not finite (runtime.max_skipped); {_newest(checkpoints)}"
            )
    return rows


def save(log: RunLog | NoLog, trainer: Trainer, checkpoints: Checkpoints, loss: float, must: bool) -> int:
    """Write a checkpoint, for which every process calls this, and return its step; a failure is said, and ends the run
    where it `must` be written.

    Raises:
        FloatingPointError: a weight is not finite; nothing is written.
    """
    if not trainer.is_finite():
        raise FloatingPointError(f"a weight is not finite at step {trainer.step}; {_newest(checkpoints)}")
    if not (trainer.ranks.leads or checkpoints.takes_all):
        return trainer.step
    epochs, rest = divmod(trainer.step, trainer.steps_per_epoch)
    try:
        finish(log, checkpoints)  # its failure is no reason not to try again
        checkpoints.save(trainer.state(loss), trainer.step, epochs if rest == 0 else None)
        if must:
            checkpoints.wait()
    except OSError as error:
        message = failure(error, f" at step {trainer.step}", checkpoints)
        if must:
            raise OSError(message) from error
        log.say(f"warning: {message}")
    return trainer.step


def _newest(checkpoints: Checkpoints) -> str:
    there = checkpoints.latest.exists()
    return f"the last good checkpoint is {checkpoints.latest}" if there else "no checkpoint was saved before"


def finish(log: RunLog | NoLog, checkpoints: Checkpoints) -> None:
    """Wait for the checkpoint that is being written, if one is; a failure is said."""
    try:
        checkpoints.wait()
    except OSError as error:
        log.say(f"warning: {failure(error, '', checkpoints)}")


def failure(error: OSError, where: str, checkpoints: Checkpoints) -> str:
    """What a run says of a checkpoint that could not be written."""
    kept = f"{checkpoints.latest} is as it was" if checkpoints.latest.exists() else "there is none yet"
    return f"no checkpoint{where}: {error.strerror or error} ({checkpoints.folder}); {kept}"


def write_parameters(config: Config) -> None:
    """Make the run's folder and put the configuration in it, as the published code does.

    Raises:
        ValueError: the folder cannot be made or written, or a file of the run's there is a link.
    """
    folder = Path(config.logging.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        links = (entry for entry in folder.iterdir() if entry.is_symlink() and _is_ours(entry.name, config))
        link = next((entry for entry in links if not _names_a_checkpoint(entry, config)), None)
        if link is not None:
            raise ValueError(f"logging.folder: {link} is a symbolic link, and a run writes in its own folder alone")
        (folder / "params-ijepa.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"logging.folder: cannot write to {folder}: {error.strerror}") from error


def _is_ours(name: str, config: Config) -> bool:
    return name in ("params-ijepa.yaml", "tensorboard") or name.lstrip(".").startswith(config.logging.write_tag)


def _names_a_checkpoint(link: Path, config: Config) -> bool:
    """Whether it is one of the links that name a checkpoint that is a folder beside them."""
    return re.fullmatch(rf"{re.escape(config.logging.write_tag)}-step\d{{8}}(-\d+)?", os.readlink(link)) is not None


def opening(config: Config, trainer: Trainer, batches: TrainingBatches, source: Path | None, end: int) -> str:
    """What a run says before its first step."""
    count = sum(p.numel() for p in trainer.model.encoder.parameters())
    masks = "ragged" if config.mask.ragged else "cut to the shortest"
    attention = attention_backend(trainer.device, config.runtime.attention)
    ranks = trainer.ranks
    devices = f"{trainer.device}" if ranks.world == 1 else f"{ranks.world} processes, the first on {trainer.device}"
    start = "from the start" if source is None else f"from {source} at step {trainer.step}"
    return (
        f"{config.meta.model_name} ({count / 1e6:.1f} M parameters) on {devices}, "
        f"{len(batches.folder)} pictures in {batches.folder.root}, read by {batches.augment.engine.name}, "
        f"{batches.steps_per_epoch} steps an epoch, masks {masks}, attention {attention}; {start} to step {end}"
    )


def pick_device(name: str) -> torch.device:
    """The device of `runtime.device`; "auto" is CUDA where there is one.

    Raises:
        ValueError: a device that this machine or torch does not have.
    """
    return find_device(name, "runtime.device:")


def seed_everything(seed: int) -> None:
    """Seed every global generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # the global generator, for whoever uses it
    torch.manual_seed(seed)


def _mean_length(masks) -> float:
    if isinstance(masks, list):
        return float(masks[0].shape[1])
    return len(masks.values) / max(1, masks.num_sequences)
