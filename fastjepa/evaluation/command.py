"""What `fastjepa eval` does: a checkpoint's encoder, judged on a folder of pictures."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastjepa.chips import find_device
from fastjepa.evaluation.judge import ProbeSettings, judge
from fastjepa.evaluation.labelled import LabelledPictures, labelled_pictures
from fastjepa.pretrained import load_encoder


def evaluate_checkpoint(
    checkpoint: str | os.PathLike[str],
    data: str | os.PathLike[str],
    test: str | os.PathLike[str] | None = None,
    *,
    model: str = "target_encoder",
    num_heads: int | None = None,
    settings: ProbeSettings | None = None,
    batch_size: int = 128,
    workers: int = 0,
    device: str = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The marks of an encoder in a checkpoint, as `judge` gives them, with `checkpoint`, `model` and `data`.

    Arguments:
        checkpoint, model, num_heads: as `fastjepa.load_encoder`.
        data, test: folders, as `labelled_pictures` takes them.
        device: "auto" is CUDA where there is one.

    Raises:
        ValueError: a checkpoint, folder, device or setting that will not do.
    """
    settings = settings or ProbeSettings()
    if batch_size < 1 or workers < 0:
        raise ValueError(f"batch_size must be at least 1 and workers at least 0, got {batch_size} and {workers}")
    encoder = load_encoder(checkpoint, model, num_heads)
    high, wide = encoder.patch_embed.img_size
    if high != wide:
        raise ValueError(f"checkpoint {checkpoint}: its pictures are {high}x{wide}; only square ones are judged")
    make = partial(LabelledPictures, size=high, batch_size=batch_size, workers=workers)
    ours, theirs, classes, line = labelled_pictures(data, test, make, settings.seed)
    say(line)
    encoder = encoder.to(find_device(device))
    result = judge(encoder, ours, theirs, classes, settings, say)
    return {"checkpoint": str(checkpoint), "model": model, "data": str(Path(data)), **result}
