"""Ways to take one and the same I-JEPA training step: as published, strongest plain PyTorch, ours.

All share weights, optimizer settings, images and masks, and a way's `encoder`, `predictor` and `target_encoder` are
modules that are called once a step, so that whoever times a step can put marks at their borders.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.naive import Encoder, Predictor, take
from fastjepa import IJEPA, Ragged
from fastjepa.data import Batch
from fastjepa.pairing import TargetRows
from fastjepa.training.graphs import CudaRecorder, Part, Recorder, Result, StepGraphs
from fastjepa.training.models import build_optimizer, parameter_groups

Masks = list[Tensor] | Ragged


class Way:
    """One way. `models` are the modules that hold the trained parameters, under the official names.

    Attributes:
        name: of its row. ragged: whether it takes `Ragged` masks, with nothing cut.
    """

    name: str
    ragged = False

    def __init__(self, models: tuple[nn.Module, nn.Module], target_encoder: nn.Module, bf16: bool):
        self.models, self.bf16 = models, bf16
        self.encoder, self.predictor = models
        self.target_encoder = target_encoder
        self.device = next(models[0].parameters()).device

    def inputs(self, masks_enc: Masks, masks_pred: Masks, images: int) -> tuple[Any, ...]:
        """What goes with `images` images into the step: masks on the device, as the data loader would bring them."""
        return tuple(_on(masks, self.device) for masks in (masks_enc, masks_pred))

    def take(self, images: Tensor, inputs: tuple[Any, ...], mark: Callable[[str], None]) -> Tensor:
        """Forward and backward; the loss. `mark` is told as the "loss" is there, and as the backward pass ends."""
        loss = self.loss(images, *inputs)
        mark("loss")
        self.backward(loss)
        mark("context")
        return loss

    def loss(self, images: Tensor, *inputs: Any) -> Tensor:
        """The objective of a batch, in bf16 autocast where asked for."""
        with self.autocast():
            return self.objective(images, *inputs)

    def autocast(self) -> AbstractContextManager[Any]:
        """In which the objective is taken."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def objective(self, images: Tensor, *inputs: Any) -> Tensor:
        """As `loss`, in whatever precision is in force."""
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss."""
        loss.backward()

    def update(self, momentum: float) -> None:
        """AdamW and the EMA; gradients are gone afterwards."""
        raise NotImplementedError

    def gradients(self) -> list[Tensor]:
        """Those that are held now, in the official order, on the CPU; of a scaled loss too."""
        held = [p.grad for model in self.models for p in model.parameters() if p.grad is not None]
        return [g.detach().cpu() for g in held]

    def tensors(self) -> list[Tensor]:
        """All that stays between two steps: parameters, targets, optimizer state and copies."""
        optimizer: torch.optim.Optimizer = self.optimizer  # type: ignore[attr-defined]
        states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return [*(p for m in (*self.models, self.target_encoder) for p in m.parameters()), *states]


def _on(masks: Masks, device: torch.device) -> Masks:
    return masks.to(device) if isinstance(masks, Ragged) else [m.to(device) for m in masks]


class Eager(Way):
    """As the published code takes it.

    Attention weights written out, autocast, GradScaler, AdamW as torch builds it by default, a gradient norm read back
    for each weight, one multiply-add per parameter for the EMA, the loss read back.
    """

    name = "eager"

    def __init__(self, models: tuple[nn.Module, nn.Module], bf16: bool = False):
        super().__init__(models, copy.deepcopy(models[0]).requires_grad_(False), bf16)
        self.optimizer = torch.optim.AdamW(parameter_groups(*models))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=bf16 and self.device.type == "cuda")
        self.last: Tensor | None = None

    def objective(self, images: Tensor, masks_enc: list[Tensor], masks_pred: list[Tensor]) -> Tensor:
        """Targets normalised whole, then gathered; smooth L1 on the predictor's output."""
        with torch.no_grad():
            features = self.target_encoder(images)
            features = self._take(F.layer_norm(features, features.shape[-1:]), masks_pred)
            if len(masks_enc) > 1:
                features = features.view(len(masks_pred), 1, len(images), *features.shape[1:])
                features = features.repeat(1, len(masks_enc), 1, 1, 1).flatten(0, 2)
        prediction = self.predictor(self.encoder(images, masks_enc), masks_enc, masks_pred)
        return F.smooth_l1_loss(prediction, features)

    def _take(self, features: Tensor, masks: list[Tensor]) -> Tensor:
        return take(features, masks)

    def backward(self, loss: Tensor) -> None:
        """Of the scaled loss."""
        self.last = loss
        self.scaler.scale(loss).backward()

    def gradients(self) -> list[Tensor]:
        """As `Way.gradients`, the scale taken out."""
        return [g / self.scaler.get_scale() for g in super().gradients()]

    def update(self, momentum: float) -> None:
        """AdamW, gradient norms for the log, EMA."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for name, parameter in self.models[0].named_parameters():
            if parameter.grad is not None and not (name.endswith(".bias") or parameter.dim() == 1):
                torch.norm(parameter.grad).item()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for ours, target in zip(self.encoder.parameters(), self.target_encoder.parameters(), strict=True):
                target.mul_(momentum).add_((1.0 - momentum) * ours)
        if self.last is not None:
            self.last.item()


class Compiled(Eager):
    """The strongest plain PyTorch: torch.compile, SDPA, fused AdamW, foreach EMA, no scaler, nothing read back."""

    name = "compiled"

    def __init__(self, models: tuple[nn.Module, nn.Module], bf16: bool = False):
        super().__init__(models, bf16)
        torch._dynamo.reset()
        self.encoder, self.predictor = (_Border(torch.compile(model)) for model in models)
        self._targets: list[Tensor] = list(self.target_encoder.parameters())
        self.target_encoder = _Border(torch.compile(self.target_encoder))
        self.optimizer = torch.optim.AdamW(parameter_groups(*models), fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)

    def _take(self, features: Tensor, masks: list[Tensor]) -> Tensor:
        return take(features, masks, plain=False)

    def update(self, momentum: float) -> None:
        """Fused AdamW, then one foreach pass for the EMA."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            ours: list[Tensor] = list(self.models[0].parameters())
            torch._foreach_lerp_(self._targets, ours, 1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]


class _Border(nn.Module):
    """A compiled module within a plain one, whose hooks stay outside of what is compiled."""

    def __init__(self, inner: Callable[..., Any]):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Any) -> Any:
        """Call it."""
        return self.inner(*inputs)


class Fast(Way):
    """fastjepa's models and optimizer, as `fastjepa train` runs them.

    Attributes:
        parts: that a batch is taken in, one after the other, as `runtime.accumulate` has it.
    """

    name = "fastjepa truncated"
    parts = 1

    def __init__(self, model: IJEPA, bf16: bool = False):
        super().__init__((model.encoder, model.predictor), model.target_encoder, bf16)
        self.model, self.optimizer = model, build_optimizer(model, bf16)

    def inputs(self, masks_enc: Masks, masks_pred: Masks, images: int) -> tuple[Any, ...]:
        """The masks, and which rows of the target encoder's output they name, worked out on the CPU.

        Of several parts a tuple of (images, share of the loss, these) for each.
        """
        patches = self.model.encoder.patch_embed.num_patches
        targets, none = TargetRows.build(masks_pred, images, patches), torch.empty(images)
        parts = Batch(none, masks_enc, masks_pred, targets, none, patches).parts(self.parts)
        moved = [(part.to(self.device), share) for part, share in parts]
        found = [(len(part.images), share, (part.masks_enc, part.masks_pred, part.targets)) for part, share in moved]
        return tuple(found) if self.parts > 1 else found[0][2]

    def take(self, images: Tensor, inputs: tuple[Any, ...], mark: Callable[[str], None]) -> Tensor:
        """Part by part; the loss of the batch."""
        if self.parts == 1:
            return super().take(images, inputs, mark)
        losses, start = [], 0
        for count, share, some in inputs:
            loss = self.loss(images[start : start + count], *some) * share
            mark("loss")
            self.backward(loss)
            mark("context")
            losses.append(loss.detach())
            start += count
        return torch.stack(losses).sum()

    def objective(self, images: Tensor, *inputs: Any) -> Tensor:
        """`IJEPA.loss`."""
        return self.model.loss(images, *inputs)

    def tensors(self) -> list[Tensor]:
        """With the copies of weights that the optimizer keeps."""
        return [*super().tensors(), *self.optimizer._copies.values()]

    def update(self, momentum: float) -> None:
        """AdamW and EMA in one pass."""
        self.optimizer.momentum = momentum
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class FastRagged(Fast):
    """The same, with nothing cut."""

    name = "fastjepa ragged"
    ragged = True


class FastGraphs(Fast):
    """The same, each step from a CUDA graph, as `runtime.cuda_graphs` has it; `recorder` makes them.

    What other ways are asked for piece by piece is there too, launched, and gives the same numbers.
    """

    name = "fastjepa truncated, graphs"

    def __init__(self, model: IJEPA, bf16: bool = False, recorder: Recorder | None = None):
        super().__init__(model, bf16)
        self.graphs = StepGraphs(self._take, self.optimizer, recorder or CudaRecorder(self.device))

    def step(self, images: Tensor, inputs: tuple[Any, ...], momentum: float) -> Tensor:
        """The loss of a whole step, which the next one writes over."""
        self.optimizer.momentum = momentum
        masks_enc, masks_pred, targets = inputs
        patches = self.model.encoder.patch_embed.num_patches
        batch = Batch(images, masks_enc, masks_pred, targets, torch.empty(0), patches)
        loss, _ = self.graphs.step([(batch, 1.0)], False, self.device)
        self.graphs.capture()
        return loss

    def _take(self, parts: Sequence[Part], watched: bool) -> Result:
        batch = parts[0][0]
        loss = self.loss(batch.images, batch.masks_enc, batch.masks_pred, batch.targets)
        self.backward(loss)
        self.update(self.optimizer.momentum)
        return loss.detach(), None


class FastRaggedGraphs(FastGraphs):
    """The same, with nothing cut."""

    name = "fastjepa ragged, graphs"
    ragged = True


class Official(Eager):
    """The published models and helpers themselves, from a checkout that the user names."""

    name = "official"

    def __init__(self, models: tuple[nn.Module, nn.Module], helpers: dict[str, Callable[..., Any]], bf16: bool = False):
        super().__init__(models, bf16)
        self.helpers = helpers

    def objective(self, images: Tensor, masks_enc: list[Tensor], masks_pred: list[Tensor]) -> Tensor:
        """With its own gathers."""
        with torch.no_grad():
            features = self.target_encoder(images)
            features = F.layer_norm(features, (features.size(-1),))
            features = self.helpers["apply_masks"](features, masks_pred)
            features = self.helpers["repeat_interleave_batch"](features, len(images), repeat=len(masks_enc))
        prediction = self.predictor(self.encoder(images, masks_enc), masks_enc, masks_pred)
        return F.smooth_l1_loss(prediction, features)


def naive_models(model: IJEPA, plain: bool = True) -> tuple[Encoder, Predictor]:
    """The usual models with the weights of ours, on its device and in its precision.

    Raises:
        ValueError: images that are not square.
    """
    encoder, predictor = model.encoder, model.predictor
    rows, columns = encoder.patch_embed.grid_size
    if rows != columns:
        raise ValueError(f"the baselines take square images, got {rows}x{columns} patches")
    heads, width = encoder.num_heads, predictor.predictor_embed.out_features
    stacks = encoder.blocks, predictor.predictor_blocks
    layers = [(int(b[0].mlp.fc1.out_features), len(b)) for b in stacks]  # pyright: ignore
    device = encoder.pos_embed.device
    with device:
        ours = Encoder(rows, encoder.patch_embed.patch_size, encoder.embed_dim, *layers[0], heads, plain)
        theirs = Predictor(rows, encoder.embed_dim, width, *layers[1], heads, plain)
    ours.load_state_dict(encoder.state_dict())
    theirs.load_state_dict(predictor.state_dict())
    return ours.to(encoder.pos_embed), theirs.to(encoder.pos_embed)


def official(checkout: Path, name: str, model: IJEPA, bf16: bool = False) -> Official:
    """The way of the published code in `checkout`, with the weights of `model`, a `fastjepa.<name>`.

    Raises:
        ValueError: a folder that is not such a checkout.
    """
    encoder, predictor = model.encoder, model.predictor
    with _modules(checkout, ("src.models.vision_transformer", "src.masks.utils", "src.utils.tensors")) as found:
        vit, masks, tensors = found
        theirs = getattr(vit, name)(
            img_size=list(encoder.patch_embed.img_size[:1]), patch_size=encoder.patch_embed.patch_size
        )
        theirs_too = vit.vit_predictor(
            num_patches=encoder.patch_embed.num_patches,
            embed_dim=encoder.embed_dim,
            predictor_embed_dim=predictor.predictor_embed.out_features,
            depth=len(predictor.predictor_blocks),
            num_heads=encoder.num_heads,
        )
    theirs.load_state_dict(encoder.state_dict())
    theirs_too.load_state_dict(predictor.state_dict())
    device = encoder.pos_embed.device
    helpers = {
        "apply_masks": masks.apply_masks,
        "repeat_interleave_batch": tensors.repeat_interleave_batch,
    }
    return Official((theirs.to(device), theirs_too.to(device)), helpers, bf16)


def require_checkout(folder: Path) -> None:
    """Raises:
    ValueError: the folder does not hold the published code.
    """
    if not (folder / "src" / "models" / "vision_transformer.py").is_file():
        raise ValueError(f"--official: {folder} is no checkout of the published code (no src/models there)")


@contextmanager
def _modules(checkout: Path, names: Sequence[str]):
    """Modules of a checkout's `src`, which is taken out of the interpreter's tables again."""
    require_checkout(checkout)
    sys.path.insert(0, str(checkout))
    try:
        found: list[ModuleType] = [import_module(name) for name in names]
        yield found
    finally:
        sys.path.remove(str(checkout))
        for name in [n for n in sys.modules if n == "src" or n.startswith("src.")]:
            del sys.modules[name]
