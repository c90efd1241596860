"""Every probe on one encoder: marks on held-out pictures, as a table, a CSV or plain values."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastjepa.evaluation.attentive import AttentiveHeads
from fastjepa.evaluation.labelled import LabelledPictures, TokenBatches
from fastjepa.evaluation.logistic import LinearHeads, Standardiser
from fastjepa.evaluation.probes import draw_few, knn_predict, linear_predict, percent
from fastjepa.evaluation.rank import rankme
from fastjepa.nn.vision_transformer import VisionTransformer

PROBES = ("linear", "knn", "low-shot", "attentive")


@dataclass(frozen=True)
class ProbeSettings:
    """What is tried. The grids are tried all at once; what does best on `held_out` of the training pictures counts."""

    probes: tuple[str, ...] = PROBES
    layers: int = 4  # the linear probe takes the last one's features, and those of so many last ones side by side
    lr: tuple[float, ...] = (0.003, 0.02, 0.1, 0.5, 2.0)
    weight_decay: tuple[float, ...] = (0.0, 5e-4, 5e-3)
    epochs: int = 28
    neighbours: int = 10
    shots: tuple[float, ...] = (0.01, 5)  # labels a class, or below 1 their share
    draws: int = 5
    c: float = 0.1  # inverse penalty of the low-shot probe
    attentive_lr: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    attentive_weight_decay: tuple[float, ...] = (0.01, 0.1)
    attentive_epochs: int = 20
    memory: int = 2 << 30  # bytes of tokens kept for the attentive probe
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.probes or any(name not in PROBES for name in self.probes):
            raise ValueError(f"probes are some of {', '.join(PROBES)}, got {', '.join(self.probes) or 'none'}")
        for name in ("layers", "epochs", "neighbours", "draws", "attentive_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if any(not (0 < shots < 1 or (shots >= 1 and shots == int(shots))) for shots in self.shots):
            raise ValueError(f"shots are whole numbers of labels a class, or shares below 1, got {list(self.shots)}")


def judge(
    encoder: VisionTransformer,
    train: LabelledPictures,
    test: LabelledPictures,
    classes: list[str],
    settings: ProbeSettings | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """All marks of an encoder; a function of the pictures and the seed alone.

    Returns:
        `rows`, each with `probe`, `features`, `setting`, `accuracy` in percent and `spread`, its deviation between
        draws of labels; `rankme` of the test pictures' features; `confusion` [classes][classes] of the best row, rows
        the true classes; `classes`, `train` and `test` counts, `unreadable`, `seconds`.

    Raises:
        ValueError: pictures that cannot be read, too many of them.
    """
    settings = settings or ProbeSettings()
    began = time.perf_counter()
    layers = min(settings.layers, len(encoder.blocks)) if "linear" in settings.probes else 1
    say(f"features of {len(train)} and {len(test)} pictures")
    ours, labels = train.features(encoder, layers)
    unreadable = list(train.unreadable)
    theirs, truth = test.features(encoder, layers)
    unreadable += test.unreadable
    device = next(encoder.parameters()).device
    judged = _Judged(ours, labels, theirs, truth, len(classes), ours.shape[1] // layers, settings, device)
    rows: list[tuple[dict[str, Any], Tensor]] = []
    for probe in settings.probes:
        say(f"{probe} probe")
        ways = {"linear": judged.linear, "knn": judged.knn, "low-shot": judged.low_shot}
        rows += judged.attentive(encoder, train, test) if probe == "attentive" else ways[probe]()
    best = max(rows, key=lambda row: row[0]["accuracy"])
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    confusion.index_put_((truth, best[1]), torch.ones((), dtype=torch.int64), accumulate=True)
    return {
        "rows": [row for row, _ in rows],
        "rankme": float(rankme(theirs[:, -judged.width :])),
        "confusion": confusion.tolist(),
        "confusion_of": best[0]["probe"],
        "classes": classes,
        "train": len(labels),
        "test": len(truth),
        "unreadable": unreadable,
        "seconds": round(time.perf_counter() - began, 1),
    }


@dataclass
class _Judged:
    """Features and labels to fit on and to judge by; each method gives rows and what they predict for the test set."""

    train: Tensor
    labels: Tensor
    test: Tensor
    truth: Tensor
    classes: int
    width: int  # of one layer's features
    settings: ProbeSettings
    device: torch.device  # where the probes are fitted

    def linear(self) -> list[tuple[dict[str, Any], Tensor]]:
        """SGD over the grid, on the last layer's features and on all layers'."""
        rows = []
        counts = sorted({1, self.train.shape[1] // self.width})
        for layers in counts:
            train, test = (x[:, -layers * self.width :] for x in (self.train, self.test))
            standard = Standardiser.of(train)
            lr, decay, found = self._sweep(standard(train), standard(test))
            name = "last layer" if layers == 1 else f"last {layers} layers"
            rows.append(self._row("linear", name, f"lr {lr:g}, weight decay {decay:g}", [found]))
        return rows

    def knn(self) -> list[tuple[dict[str, Any], Tensor]]:
        """A vote of neighbours."""
        train, test = self._last()
        labels = self.labels.to(self.device)
        found = knn_predict(train, labels, test, self.classes, self.settings.neighbours).cpu()
        return [self._row("knn", "last layer", f"{self.settings.neighbours} neighbours", [found])]

    def low_shot(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Logistic regression on few labels, several draws of them."""
        train, test = (x.double() for x in self._last())
        labels, rows = self.labels.to(self.device), []
        for shots in self.settings.shots:
            drawn = [draw_few(self.labels, shots, (self.settings.seed, n)) for n in range(self.settings.draws)]
            found = [linear_predict(train[d], labels[d], test, self.classes, self.settings.c).cpu() for d in drawn]
            few = f"{100 * shots:g} % of the labels" if shots < 1 else f"{int(shots)} labels a class"
            rows.append(self._row("low-shot", "last layer", f"{few}, {len(drawn)} draws", found))
        return rows

    def attentive(
        self, encoder: VisionTransformer, train: LabelledPictures, test: LabelledPictures
    ) -> list[tuple[dict[str, Any], Tensor]]:
        """Attention over the patches, over its own grid."""
        s = self.settings
        fitted, held = self._hold_out(len(train))
        lr, decay = _grid(s.attentive_lr, s.attentive_weight_decay)
        heads = AttentiveHeads(self.width, self.classes, encoder.num_heads, lr, decay, self.device, s.seed)
        batches = TokenBatches(encoder, train, fitted, s.memory, s.seed)
        heads.fit(batches, s.attentive_epochs, batches.steps)
        right = torch.zeros(len(lr))
        for tokens, labels in TokenBatches(encoder, train, held, 0)(None):
            right += (heads.predict(tokens) == labels).sum(dim=1).cpu()
        best = int(right.argmax())
        everything = TokenBatches(encoder, test, torch.arange(len(test)), 0)(None)
        found = torch.cat([heads.predict(tokens)[best].cpu() for tokens, _ in everything])
        return [self._row("attentive", "patches", f"lr {lr[best]:g}, weight decay {decay[best]:g}", [found])]

    def _sweep(self, train: Tensor, test: Tensor) -> tuple[float, float, Tensor]:
        """The setting that does best on held-out training pictures, fitted anew on all of them."""
        s = self.settings
        fitted, held = self._hold_out(len(train))
        lr, decay = _grid(s.lr, s.weight_decay)
        heads = LinearHeads(train.shape[1], self.classes, lr, decay, self.device)
        heads.fit(train[fitted], self.labels[fitted], s.epochs, seed=s.seed)
        right = (heads.predict(train[held]) == self.labels[held]).double().mean(dim=1)
        best = int(right.argmax())
        head = LinearHeads(train.shape[1], self.classes, lr[best : best + 1], decay[best : best + 1], self.device)
        return lr[best], decay[best], head.fit(train, self.labels, s.epochs, seed=s.seed).predict(test)[0]

    def _last(self) -> tuple[Tensor, Tensor]:
        """The last layer's features, of the training and of the test pictures, where probes are fitted."""
        return self.train[:, -self.width :].to(self.device), self.test[:, -self.width :].to(self.device)

    def _hold_out(self, count: int) -> tuple[Tensor, Tensor]:
        """Places to fit on and to choose a setting by; all of them for both where there are few."""
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.settings.seed))
        held = round(count * self.settings.held_out)
        return (order[held:], order[:held]) if held >= self.classes else (order, order)

    def _row(self, probe: str, features: str, setting: str, found: list[Tensor]) -> tuple[dict[str, Any], Tensor]:
        marks = [percent(prediction == self.truth) for prediction in found]
        row = {"probe": probe, "features": features, "setting": setting, "accuracy": float(np.mean(marks))}
        return row | {"spread": float(np.std(marks)) if len(marks) > 1 else None}, found[0]


def render(result: dict[str, Any]) -> str:
    """The marks as a table to read."""
    lines = [f"{'probe':<12}{'features':<16}{'accuracy':>10}   setting"]
    for row in result["rows"]:
        spread = "" if row["spread"] is None else f", deviation {row['spread']:.1f}"
        lines.append(f"{row['probe']:<12}{row['features']:<16}{row['accuracy']:>8.1f} %   {row['setting']}{spread}")
    judged = f"{result['test']} pictures of {len(result['classes'])} classes"
    lines.append(f"effective rank (RankMe) {result['rankme']:.1f}; {judged}")
    if result["unreadable"]:
        lines.append(f"left out {len(result['unreadable'])} that cannot be read, the first: {result['unreadable'][0]}")
    return "\n".join(lines)


def write_csv(result: dict[str, Any], path: Path) -> None:
    """The rows as CSV."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(result["rows"][0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(result["rows"])


def _grid(lr: tuple[float, ...], weight_decay: tuple[float, ...]) -> tuple[list[float], list[float]]:
    pairs = [(rate, decay) for rate in lr for decay in weight_decay]
    return [rate for rate, _ in pairs], [decay for _, decay in pairs]
