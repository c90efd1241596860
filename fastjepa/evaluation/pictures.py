"""Pictures of a run: its curves, and what an encoder sees in images. matplotlib is imported only where it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastjepa.evaluation.features import normalise

# Dark to light, so that they stay apart without colour; each has its own dash and marker besides.
STYLES: dict[str, dict[str, Any]] = {
    "linear": {"label": "linear probe", "color": "#0b3c6f", "marker": "o", "linestyle": "-"},
    "knn": {"label": "nearest neighbours", "color": "#c8501e", "marker": "s", "linestyle": "--"},
    "low_shot": {"label": "low-shot, 5 labels a class", "color": "#5f9e6e", "marker": "^", "linestyle": ":"},
}
INK, PALE = "#222222", "#b8b8b8"
SMOOTH = 25  # steps that the drawn loss is averaged over
STYLE = {
    "font.size": 15,
    "axes.titlesize": 16,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "lines.linewidth": 2.4,
    "lines.markersize": 8,
    "legend.frameon": False,
    "legend.fontsize": 14,
}


def plot_curves(rows: Sequence[Mapping[str, float]], evaluations: Sequence[Mapping[str, Any]], out: Path) -> Path:
    """Draw loss, probe accuracy and rank over the steps, one below the other.

    Arguments:
        rows: with `step` and `loss`, as `TrainResult.rows` has them.
        evaluations: with `step`, `rankme` and, where there are classes, `linear`, `knn` and `low_shot` in percent; the
            first is of the encoder before training.
        out: the PNG file to write, 1080 pixels wide.

    Raises:
        ValueError: nothing to draw, or matplotlib is not installed.
    """
    if not rows or not evaluations:
        raise ValueError("curves need at least one step and one evaluation")
    figure_of, context = _matplotlib()
    probed = evaluations[0].get("linear") is not None
    with context(STYLE):
        figure = figure_of((7.2, 10.0 if probed else 7.0), dpi=150, layout="constrained")
        axes = figure.subplots(3 if probed else 2, 1, sharex=True, height_ratios=[3, 4, 3] if probed else [1, 1])
        _draw_loss(axes[0], rows)
        if probed:
            _draw_probes(axes[1], evaluations)
        _draw_rank(axes[-1], evaluations)
        axes[-1].set_xlabel("training step")
        figure.savefig(out)
    return out


def plot_features(encoder: nn.Module, images: Tensor, out: Path, baseline: nn.Module | None = None) -> Path:
    """Draw the first three principal components of the patch features as a picture, beside each image.

    The components are those of all images' patches together, so that equal colours mean equal features; the first is
    green, the brightest, so that it shows without colour too.

    Shapes: images [k, 3, H, W], uint8 or normalised; H and W may be larger than the encoder was trained on.

    Arguments:
        baseline: another encoder (an untrained one, say), drawn between the image and `encoder`.
        out: the PNG file to write, 1080 pixels wide.

    Raises:
        ValueError: no images, or matplotlib is not installed.
    """
    if not len(images):
        raise ValueError("there are no images to draw the features of")
    figure_of, context = _matplotlib()
    columns = [("picture", shown(images))]
    if baseline is not None:
        columns.append(("before training", feature_colours(baseline, images)))
    columns.append(("after training" if baseline is not None else "features", feature_colours(encoder, images)))
    side = 7.2 / len(columns)
    aspect = images.shape[2] / images.shape[3]
    with context(STYLE):
        figure = figure_of((7.2, side * aspect * len(images) + 0.4), dpi=150, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
        grid = figure.subplots(len(images), len(columns), squeeze=False)
        for row, axes in enumerate(grid):
            for (title, pictures), axis in zip(columns, axes, strict=True):
                axis.imshow(pictures[row], interpolation="nearest", extent=(0, 1, 0, aspect))
                axis.set_axis_off()
                if row == 0:
                    axis.set_title(title, loc="center", fontsize=15)
        figure.savefig(out)
    return out


def plot_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str], out: Path, title: str = "") -> Path:
    """Draw what each class is taken for, as shares of the pictures of the class (a row).

    Shapes: confusion [C][C] counts, rows the true classes. Names and numbers are written where there is room for them.

    Raises:
        ValueError: no classes, or matplotlib is not installed.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    if not counts.size:
        raise ValueError("there are no classes to draw a confusion of")
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    figure_of, context = _matplotlib()
    with context(STYLE | {"axes.grid": False}):
        figure = figure_of((7.2, 7.2), dpi=150, layout="constrained")
        axis = figure.subplots()
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axis.set_xlabel("taken for")
        axis.set_ylabel("is")
        if len(classes) <= 30:
            size = 13 if len(classes) <= 12 else 9
            axis.set_xticks(range(len(classes)), [name[:16] for name in classes], rotation=90, fontsize=size)
            axis.set_yticks(range(len(classes)), [name[:16] for name in classes], fontsize=size)
        if len(classes) <= 12:
            for (row, column), share in np.ndenumerate(shares):
                if round(100 * share):
                    colour = "white" if share > 0.5 else INK
                    axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=12)
        figure.suptitle(title or "Confusion, % of each class", fontsize=15, fontweight="bold")
        figure.savefig(out)
    return out


@torch.no_grad()
def feature_colours(encoder: nn.Module, images: Tensor) -> np.ndarray:
    """The first three principal components of the patch features as colours.

    Shapes: images [k, 3, H, W], uint8 or normalised -> float32 [k, rows, columns, 3] in 0..1.
    """
    device = next(encoder.parameters()).device
    training = encoder.training
    encoder.eval()
    try:
        floating = normalise(images) if images.dtype == torch.uint8 else images
        features = torch.cat([encoder(image[None].to(device)).float().cpu() for image in floating])  # [k, N, D]
    finally:
        encoder.train(training)
    count, patches, width = features.shape
    rows = round(math.sqrt(patches * images.shape[2] / images.shape[3]))
    flat = features.view(-1, width)
    flat = flat - flat.mean(dim=0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)  # [D, D], strongest first
    scores = flat @ directions[:3].T
    if scores.shape[1] < 3:
        scores = torch.nn.functional.pad(scores, (0, 3 - scores.shape[1]))
    scores = scores * torch.sign(torch.median(scores, dim=0).values + 1e-12)  # the sign of a component means nothing
    low, high = torch.quantile(scores[:: max(1, len(scores) // 100_000)], torch.tensor([0.02, 0.98]), dim=0)
    colours = ((scores - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return colours[:, [1, 0, 2]].view(count, rows, patches // rows, 3).numpy()


def _draw_loss(axis: Any, rows: Sequence[Mapping[str, float]]) -> None:
    steps, losses = (np.array([row[key] for row in rows], dtype=np.float64) for key in ("step", "loss"))
    axis.plot(steps + 1, losses, color=PALE, linewidth=1)
    window = min(SMOOTH, len(losses))
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    axis.plot(steps[window - 1 :] + 1, smooth, color=INK)
    axis.set_title("Loss")
    axis.set_ylim(bottom=0)


def _draw_probes(axis: Any, evaluations: Sequence[Mapping[str, Any]]) -> None:
    steps = [e["step"] for e in evaluations]
    for name, style in STYLES.items():
        values = [e[name] for e in evaluations]
        axis.plot(steps, values, **style)
        axis.axhline(values[0], color=style["color"], linewidth=1, linestyle=style["linestyle"], alpha=0.6)
    axis.set_title("Accuracy on held-out pictures, %")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.36 * (high - low))  # room for the legend
    axis.legend(loc="upper left", handlelength=3)


def _draw_rank(axis: Any, evaluations: Sequence[Mapping[str, Any]]) -> None:
    steps, ranks = [e["step"] for e in evaluations], [e["rankme"] for e in evaluations]
    axis.plot(steps, ranks, color=INK, marker="o")
    axis.set_title("Effective rank of the features (RankMe)")
    axis.set_ylim(0, 1.15 * max(ranks))


def shown(images: Tensor) -> np.ndarray:
    """Images as matplotlib shows them, [k, H, W, 3]; floating ones are stretched to 0..1."""
    if images.dtype == torch.uint8:
        return images.permute(0, 2, 3, 1).numpy()
    low, high = images.amin(), images.amax()
    return ((images - low) / (high - low).clamp(min=1e-6)).permute(0, 2, 3, 1).float().numpy()


def _matplotlib() -> tuple[Any, Any]:
    """A maker of figures that draws to files alone, whatever backend is set, and the context of a style."""
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install 'fastjepa[demo]'") from error

    def figure_of(size: tuple[float, float], **settings: Any) -> Any:
        figure = Figure(figsize=size, **settings)
        FigureCanvasAgg(figure)
        return figure

    return figure_of, mpl.rc_context
