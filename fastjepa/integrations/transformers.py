"""A callback for transformers' Trainer that keeps an EMA of what it trains."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from fastjepa.checkpoint import write_checkpoint
from fastjepa.integrations.follower import Decay, Follower

FILE = "ema.pt"  # beside the model in each checkpoint folder of the Trainer


def _callback_class() -> type | None:
    try:
        return importlib.import_module("transformers").TrainerCallback
    except ImportError:
        return None


_CALLBACK = _callback_class()
_Base: Any = _CALLBACK or object


class EMACallback(_Base):
    """Moves an average on after every optimizer step; `.ema` is the `fastjepa.EMA` while training runs and after it.

    Without `student` and `teacher` a copy follows the whole model; evaluations during training are of the copy, each
    checkpoint folder holds it as `ema.pt`, and a resumed run goes on with it. With them the teacher, a submodule,
    follows the student, another one, where it lies, and nothing else changes.

        Trainer(model, args, callbacks=[EMACallback(0.9999, use_warmup=True)])
        Trainer(model, args, callbacks=[EMACallback(0.996, student="encoder", teacher="target_encoder")])

    Arguments:
        decay: in 0..1, or a function from the number of optimizer steps to it.
        student, teacher: names of submodules, both or neither.
        options: keywords of `fastjepa.EMA`.

    Raises:
        ValueError: transformers is not installed, or one of student and teacher is missing.
    """

    def __init__(self, decay: Decay = 0.9999, student: str | None = None, teacher: str | None = None, **options: Any):
        if _CALLBACK is None:
            raise ValueError("this callback needs transformers: pip install transformers")
        super().__init__()
        self._follower = Follower(decay, student, teacher, **options)

    @property
    def ema(self) -> Any:
        """The `fastjepa.EMA`; None before training."""
        return self._follower.ema

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """Make the average, of the checkpoint that training resumes from where there is one.

        Raises:
            ValueError: training resumes from a checkpoint that holds no average.
        """
        if state.global_step:
            self._follower.load_state_dict(self._saved(args, state.global_step))
        self._follower.start(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """Follow; and where an evaluation is next, let it be of the average."""
        self._follower.follow(model, state.global_step)
        if control.should_evaluate:
            self._follower.show(model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """Where an evaluation is next, let it be of the average."""
        if control.should_evaluate:
            self._follower.show(model)

    def on_evaluate(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Train on with the weights that are trained."""
        self._follower.hide()

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Write the average beside the model."""
        if self._follower.is_copy and args.should_save:
            write_checkpoint(self._follower.state_dict(), _folder(args, state.global_step) / FILE)

    def _saved(self, args: Any, step: int) -> dict[str, Any]:
        if not self._follower.is_copy:
            return {"steps": step, "ema": None}
        resumed = args.resume_from_checkpoint
        folders = [Path(resumed)] if isinstance(resumed, str) else []
        for folder in (*folders, _folder(args, step)):
            if (folder / FILE).is_file():
                return torch.load(folder / FILE, map_location="cpu", weights_only=True)
        raise ValueError(
            f"training resumes at step {step}, but its average, {_folder(args, step) / FILE}, is not there"
        )


def _folder(args: Any, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}"
