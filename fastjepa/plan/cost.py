"""FLOPs and bytes of each part of a step as an implementation takes it, by count."""

from __future__ import annotations

from dataclasses import dataclass

from fastjepa.flops import Flops, Tower
from fastjepa.plan.layers import AUTOCAST, LAYERS, Layer, Precision, Shape
from fastjepa.plan.settings import PLAIN, Settings
from fastjepa.plan.work import Batch, Models

PARTS = ("target", "context", "predictor", "loss", "optimizer")
WIDE, INDEX = 4, 8  # bytes of a number in fp32 whatever the precision, and of an index


@dataclass(frozen=True)
class Cost:
    """What a part has to compute and to move."""

    flops: Flops
    bytes: float

    def seconds(self, peak: float, bandwidth: float) -> float:
        """At `peak` FLOP/s and `bandwidth` bytes a second, one after the other: what a part's efficiency is of."""
        return self.flops.total / peak + self.bytes / bandwidth


@dataclass(frozen=True)
class Step:
    """A step of an implementation on a batch.

    Attributes:
        implementation: one of `IMPLEMENTATIONS`. precision: by autocast, or without it. settings: of ours alone.
    """

    models: Models
    batch: Batch
    implementation: str
    precision: Precision = AUTOCAST
    settings: Settings = PLAIN

    @property
    def ours(self) -> bool:
        """Whether only visible patches are embedded, and only tokens that are read reach the end of a last layer."""
        return self.implementation == "fastjepa"

    def row(self, ragged: bool) -> str:
        """What the step suite calls it."""
        if not self.ours:
            return self.implementation
        return ", ".join([f"fastjepa {'ragged' if ragged else 'truncated'}", *self.settings.words])

    @property
    def layer(self) -> Layer:
        """What a layer of it does."""
        return LAYERS[self.implementation]

    @property
    def encoder(self) -> Shape:
        """Of the encoder's layers."""
        tower = self.models.flops.encoder
        return Shape(tower.width, self.models.heads, tower.mlp_ratio)

    @property
    def predictor(self) -> Shape:
        """Of the predictor's layers."""
        tower = self.models.flops.predictor
        return Shape(tower.width, self.models.predictor_heads, tower.mlp_ratio)

    @property
    def patches(self) -> float:
        """Of all images."""
        return self.batch.tokens.images * self.models.flops.num_patches

    @property
    def carried(self) -> Precision:
        """In which the residual stream and the branches are carried from one operation to the next."""
        narrow = self.settings.narrow_stream
        return Precision(self.precision.branch, self.precision.branch) if narrow else self.precision

    @property
    def cast(self) -> int:
        """Bytes that turning a number of the stream's precision into the branches' moves, or the other way."""
        return sum(self.carried) if self.carried.mixed else 0

    @property
    def narrowing(self) -> int:
        """The same of a pixel or a weight, which are wide whatever the stream is."""
        return sum(self.precision) if self.precision.mixed else 0

    def passes(self, part: str) -> int:
        """Through a layer by all parts of a batch, forward one and backward two; a loss and the optimizer are one."""
        flops = self.models.flops
        layers = {"context": flops.encoder.layers, "predictor": flops.predictor.layers}
        layers = {part: (3 + self.settings.recomputes(part)) * count for part, count in layers.items()}
        layers |= {"target": flops.encoder.layers}
        return layers.get(part, 1) * (1 if part == "optimizer" else self.settings.accumulate)

    @property
    def launches(self) -> int:
        """Of a step of ours, PyTorch's operators among them: of each layer, and of what there is once.

        The `count` suite sees as many with lists of masks, and ten fewer for each part with `Ragged` ones.
        """
        flops, settings, parts = self.models.flops, self.settings, self.settings.accumulate
        layers = flops.encoder.layers, flops.predictor.layers
        context, predictor = (settings.recomputes(part) for part in ("context", "predictor"))
        each = 139 + 2 * predictor - settings.narrow_stream
        each += (34 + 6 * context) * layers[0] + (26 + 6 * predictor) * layers[1]
        if parts == 1:
            return each + 2
        gradients = 12 * sum(layers) + 11
        return parts * (each + 2) + (parts - 1) * gradients + 4  # losses: each times its share, and their sum

    def costs(self) -> dict[str, Cost]:
        """Of each of `PARTS`, context and predictor with their backward passes."""
        flops, moved = self.flops(), self.moved()
        return {part: Cost(flops.get(part, Flops()), moved[part]) for part in PARTS}

    def flops(self) -> dict[str, Flops]:
        """FLOPs that are launched: those that the masks need, less or more what this implementation leaves out or adds.

        Pixels take no gradient. Ours ends the last layers for the tokens alone that are read; the others embed every
        patch for the context encoder too. What an attention kernel computes twice is not counted.
        """
        count, tokens = self.models.flops, self.batch.tokens
        parts = count.parts(tokens)
        if self.ours:
            unread = self.patches - self.batch.kept
            parts["target"] += Flops(-count.encoder.tail * unread)
            parts["context"] += count.embed(-tokens.context)
            parts["predictor"] += Flops(-3.0 * count.predictor.tail * (tokens.pairs - tokens.predicted))
            for part, cost in self.again().items():
                parts[part] += cost.flops
        else:
            parts["context"] += count.embed(2.0 * self.patches - 3.0 * tokens.context)
        return parts

    def moved(self) -> dict[str, float]:
        """Bytes that each part moves beside its products with weights."""
        tokens, flops = self.batch.tokens, self.models.flops
        whole = self.patches, self.patches * flops.num_patches
        context, pairs = (tokens.context, tokens.context_squares), (tokens.pairs, tokens.pair_squares)
        kept, predicted = (self.batch.kept, tokens.predicted) if self.ours else (None, None)
        wide, narrow, depth = self.encoder, self.predictor, (flops.encoder.layers, flops.predictor.layers)
        target = self._layers(wide, depth[0], *whole, ("forward",), kept)
        trained = self._layers(wide, depth[0], *context, ("forward", "backward"), None)
        predictor = self._layers(narrow, depth[1], *pairs, ("forward", "backward"), predicted)
        weights = self.models.encoder_parameters, self.models.predictor_parameters
        if self.ours:  # the optimizer keeps copies of all but the patch embeddings'
            weights = flops.patch_values * wide.width, 0
        parts = self.settings.accumulate  # each casts weights, and adds gradients of all parameters to those there are
        cast, added = parts * self.narrowing, 3 * WIDE * (parts - 1)
        moved = {
            "target": target + self._target_ends() + cast * weights[0],
            "context": trained + self._context_ends() + 2 * cast * weights[0] + added * self.models.encoder_parameters,
            "predictor": predictor
            + self._predictor_ends()
            + 2 * cast * weights[1]
            + added * self.models.predictor_parameters,
            "loss": self._loss(),
            "optimizer": self._optimizer(),
        }
        return moved | {part: moved[part] + cost.bytes for part, cost in self.again().items()}

    def again(self) -> dict[str, Cost]:
        """What activation checkpointing has of a part a second time: layers as far as something in them is kept.

        That is all of a layer but its GELU and the product behind.
        """
        tokens, flops = self.batch.tokens, self.models.flops
        context = tokens.context, tokens.context_squares, tokens.context
        pairs = tokens.pairs, tokens.pair_squares, tokens.predicted
        found = {
            "context": self._again(self.encoder, flops.encoder, *context),
            "predictor": self._again(self.predictor, flops.predictor, *pairs),
        }
        return {part: cost for part, cost in found.items() if self.ours and self.settings.recomputes(part)}

    def _again(self, shape: Shape, tower: Tower, tokens: float, squares: float, last: float) -> Cost:
        hidden = shape.mlp_ratio * shape.width * ((tower.layers - 1) * tokens + last)
        matmuls = tower.tail * (tokens - last) + 2 * shape.width * hidden
        moved = self._layers(shape, tower.layers, tokens, squares, ("forward",), last)
        return Cost(tower.forward(tokens, squares) + Flops(-matmuls), moved - 2 * self.carried.branch * hidden)

    def _layers(
        self, shape: Shape, depth: int, tokens: float, squares: float, ways: tuple[str, ...], last: float | None
    ) -> float:
        """Bytes of a stack whose last layer is ended for `last` tokens alone (None: for all)."""
        each = [self.layer.bytes(way, shape, tokens, squares, self.carried) for way in ways]
        end = [self.layer.bytes(way, shape, tokens, squares, self.carried, last) for way in ways]
        return (depth - 1) * sum(each) + sum(end)

    def _pixels(self, patches: float) -> float:
        """Of images as the embedding takes them: cut into patches where it is ours, and cast."""
        values = self.models.flops.patch_values
        cut = 2 * WIDE * self.patches if self.ours else 0
        return values * (cut + self.narrowing * patches)

    def _target_ends(self) -> float:
        """The patch embedding with positions, the picking of tokens for the last layer's end, and the last norm."""
        stream, branch = self.carried
        ends = self.batch.kept if self.ours else self.patches
        embedded = (stream + branch) * self.patches
        if self.ours:  # the first norm has nothing to add, the last has
            embedded -= (stream + branch) * self.patches
            norm, picked = (3 * stream + branch) * ends, 2 * (stream + branch) * ends
        else:
            norm, picked = 2 * stream * ends, 0
        return self._pixels(self.patches) + self.encoder.width * (embedded + norm + picked)

    def _context_ends(self) -> float:
        """The same both ways. Ours gathers pixels and then embeds; the others embed, and then gather.

        With the others also what stands between the target encoder and this one: the features' norm, and their gather.
        """
        tokens, values, (stream, branch) = self.batch.tokens, self.models.flops.patch_values, self.carried
        norm = (5 * stream + 2 * self.cast) * tokens.context
        if self.ours:
            gathered = 2 * WIDE * values * tokens.context
            embedded = (5 * stream + self.cast) * tokens.context
            norm = (6 * stream + 2 * branch + 2 * self.cast) * tokens.context
            return self._pixels(tokens.context) + gathered + self.encoder.width * (embedded + norm)
        embedded = (2 * stream + 3 * branch + self.cast) * self.patches  # zeros for the gather's gradient among it
        features = 2 * WIDE * self.patches + (self._index(2) + 4 * WIDE) * tokens.target
        taken = (self._index(3) + 7 * stream) * tokens.context
        return self._pixels(self.patches) + self.encoder.width * (embedded + taken + norm + features)

    def _index(self, passes: int) -> int:
        """Bytes of an index for each number of the width, which eager code writes out."""
        return INDEX * passes if self.implementation == "eager" else 0

    def _predictor_ends(self) -> float:
        """The input put together, tokens picked for the last layer's end, the last norm, and the output's bias."""
        tokens, (stream, branch) = self.batch.tokens, self.carried
        ends = tokens.predicted if self.ours else tokens.pairs
        embedded = (branch + 2 * self.cast) * tokens.context
        if self.ours:
            assembled = 2 * stream * (tokens.pairs + tokens.context) + (stream - 2 * branch) * tokens.pairs
            picked = (3 * stream + 3 * branch) * tokens.predicted + (stream + branch) * tokens.pairs
            norm = 4 * (stream + branch) * ends
        else:
            positions = (self._index(3) + 7 * stream) * (tokens.context + tokens.target)
            assembled = positions + stream * (3 * tokens.context + 4 * tokens.pairs + 3 * tokens.predicted)
            picked = 4 * branch * tokens.predicted
            norm = (5 * stream + 2 * self.cast) * ends
        out = 2 * branch * tokens.predicted * self.encoder.width
        return self.predictor.width * (embedded + assembled + picked + norm) + out

    def _loss(self) -> float:
        """Smooth L1 and its gradient; ours takes and normalises the features on the way."""
        tokens, (stream, branch) = self.batch.tokens, self.carried
        if self.ours:
            taken = stream * self.encoder.width * self.batch.kept
            return taken + tokens.predicted * (4 * branch * self.encoder.width + INDEX)
        return tokens.predicted * self.encoder.width * (5 * WIDE + 2 * self.cast)

    def _optimizer(self) -> float:
        """AdamW of all that is trained, and the moving average of the target encoder, in fp32."""
        copy = self.precision.branch if self.precision.mixed else 0
        adamw, average = {
            # The norm of the gradients, to know that all are finite: g read. Then one pass: p, m, v read and written, g
            # read, the target read and written, and copies of p and target.
            "fastjepa": (32 + copy, 8 + copy),
            "compiled": (28, 12),  # the average apart: the parameter read once more
            # Pass by pass: decay 8, first moment 12, second 8 + 16, root 8, correction 8, eps 8, update 16; under a
            # scaler the gradients unscaled 8. The average 8 + 8 + 12, and the encoder's gradient norms 4.
            "eager": (92 if self.precision.mixed else 84, 32),
        }[self.implementation]
        return adamw * self.models.parameters + average * self.models.encoder_parameters
