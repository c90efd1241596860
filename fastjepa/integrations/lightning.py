"""A Lightning callback that keeps an EMA of what it trains."""

from __future__ import annotations

import importlib
from typing import Any

from fastjepa.integrations.follower import Decay, Follower


def _callback_class() -> type | None:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name).Callback
        except ImportError:
            continue
    return None


_CALLBACK = _callback_class()
_Base: Any = _CALLBACK or object


class EMACallback(_Base):
    """Moves an average on after every optimizer step; `.ema` is the `fastjepa.EMA` while a fit runs and after it.

    Without `student` and `teacher` a copy follows the whole module; validation is of the copy, checkpoints hold it, a
    resumed run goes on with it. With them the teacher, a submodule, follows the student, another one, where it lies;
    its weights are then the module's own, and nothing else changes.

        Trainer(callbacks=[EMACallback(0.9999, use_warmup=True)])
        Trainer(callbacks=[EMACallback(momentum_of_step, student="encoder", teacher="target_encoder")])

    Arguments:
        decay: in 0..1, or a function from the number of optimizer steps to it.
        student, teacher: names of submodules, both or neither.
        options: keywords of `fastjepa.EMA`.

    Raises:
        ValueError: Lightning is not installed, or one of student and teacher is missing.
    """

    def __init__(self, decay: Decay = 0.9999, student: str | None = None, teacher: str | None = None, **options: Any):
        if _CALLBACK is None:
            raise ValueError("this callback needs Lightning: pip install lightning")
        super().__init__()
        self._follower = Follower(decay, student, teacher, **options)

    @property
    def ema(self) -> Any:
        """The `fastjepa.EMA`; None before the first fit."""
        return self._follower.ema

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the average on the device of the module."""
        self._follower.start(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        """Follow, if the batch ended with an optimizer step."""
        self._follower.follow(pl_module, trainer.global_step)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Validate the average."""
        self._follower.show(pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Train on with the weights that are trained."""
        self._follower.hide()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module with the weights that are trained."""
        self._follower.hide()

    def state_dict(self) -> dict[str, Any]:
        """What a Lightning checkpoint holds of this callback."""
        return self._follower.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self._follower.load_state_dict(state_dict)
