"""What a step holds in a GPU's memory at most, by count."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fastjepa.plan.cost import INDEX, WIDE, Step
from fastjepa.plan.layers import Shape
from fastjepa.plan.work import Batch


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        state: what stays between steps: parameters, target, moments, and the copies that our optimizer keeps of the
            first two in the branches' precision. buckets: in which several GPUs send gradients. gradients: of all
            parameters, unless they lie in the buckets, as ours do. earlier: of the parts of the batch that came before
            the last, as its backward pass begins, which lie beside them.
        copies: others' parameters cast to that precision, kept for the backward pass. activations: kept for it too.
        workspace: of the operation that needs most beside them. update: what the optimizer makes beside its state.
    """

    state: float
    buckets: float
    gradients: float
    earlier: float
    copies: float
    activations: float
    workspace: float
    update: float

    @property
    def peak(self) -> float:
        """At most at once: as the backward pass begins, or, with every gradient there, as the optimizer steps."""
        return self.state + self.buckets + max(self._backward, self._update)

    @property
    def at_backward(self) -> bool:
        """Whether that is as the backward pass begins."""
        return self._backward >= self._update

    @property
    def _backward(self) -> float:
        return self.earlier + self.copies + self.activations + self.workspace

    @property
    def _update(self) -> float:
        return self.gradients + self.update


def memory(step: Step, several: bool = False) -> Memory:
    """Of a step, without what the allocator loses and CUDA itself takes; `several`: of several GPUs.

    Parts of a batch are taken to be alike. With `Ragged` masks the largest of four of 32 images has up to 5 % more.
    """
    models, precision, parts = step.models, step.precision, step.settings.accumulate
    count, copied = models.parameters, precision.branch if precision.mixed else 0
    held = models.parameters + models.encoder_parameters
    return Memory(
        state=WIDE * (2 * count + held) + (copied * held if step.ours else 0),
        buckets=WIDE * count if several else 0,
        gradients=0 if several and step.ours else WIDE * count,
        earlier=WIDE * count if parts > 1 else 0,
        copies=0 if step.ours else copied * count,
        activations=activations(step) / parts,
        workspace=workspace(step) / parts,
        update=WIDE * count if step.implementation == "eager" else 0,  # the root of the second moments
    )


def largest(step: Step, batches: Iterable[Batch], graphs: bool = False, several: bool = False) -> Memory:
    """Of the batch whose step holds most. With `graphs` their activations are there beside those of a launched step."""
    found = max((memory(replace(step, batch=batch), several) for batch in batches), key=lambda memory: memory.peak)
    return replace(found, activations=2 * found.activations) if graphs and step.ours else found


def activations(step: Step) -> float:
    """Bytes of the images, and of what the forward pass kept of them for the backward pass."""
    tokens, flops, (stream, branch) = step.batch.tokens, step.models.flops, step.carried
    wide, narrow, predicted = step.encoder, step.predictor, tokens.predicted
    depths, inputs = (flops.encoder.layers, flops.predictor.layers), stream + branch  # a layer's
    if step.settings.recomputes("context"):
        kept = inputs * depths[0] * wide.width * tokens.context
    else:
        kept = depths[0] * layer_kept(step, "context")
    if step.settings.recomputes("predictor"):
        kept += inputs * depths[1] * narrow.width * tokens.pairs
    else:
        kept += (depths[1] - 1) * layer_kept(step, "predictor") + layer_kept(step, "predictor", last=True)
    # Inputs of the last norms, and of the products behind them.
    kept += wide.width * (stream + branch) * tokens.context
    kept += narrow.width * (stream * (predicted if step.ours else tokens.pairs) + branch * predicted)
    kept += WIDE * flops.patch_values * step.patches
    if step.ours:
        kept += branch * flops.patch_values * tokens.context  # visible patches
        kept += wide.width * (stream * step.batch.kept + branch * predicted)  # features; what the loss keeps
        return kept + 2 * INDEX * tokens.pairs
    kept += branch * flops.patch_values * step.patches if step.precision.mixed else 0
    kept += wide.width * (stream * step.patches + 2 * WIDE * predicted)  # embedded patches; prediction and features
    return kept + (INDEX * wide.width * tokens.context if step.implementation == "eager" else 0)


def layer_kept(step: Step, part: str, last: bool = False) -> float:
    """Bytes that the forward pass keeps within a layer of the context encoder or predictor, or within its last."""
    tokens = step.batch.tokens
    if part == "context":
        return step.layer.bytes("kept", step.encoder, tokens.context, tokens.context_squares, step.carried)
    ends = tokens.predicted if last and step.ours else None
    return step.layer.bytes("kept", step.predictor, tokens.pairs, tokens.pair_squares, step.carried, ends)


def workspace(step: Step) -> float:
    """What the backward pass of a stack's last layer makes beyond what it lets go of meanwhile.

    Gradients of the stream, twice, and of the MLP's hidden width, once; with attention's weights written out also two
    tables of them. In ours that layer ends for the predicted tokens alone, and of the hidden width there are three: the
    GELU's output, made again, and the gradients of its output and input. Where layers are computed again, what one of
    them keeps is there too, in place of its inputs; in the predictor that of the layer before the last, which is whole.
    """
    tokens, (stream, branch) = step.batch.tokens, step.carried

    def of(shape: Shape, count: float, squares: float) -> float:
        weights = 2 * WIDE * shape.heads * squares if step.implementation == "eager" else 0
        hidden = (3 if step.ours else 1) * branch * shape.mlp_ratio
        return shape.width * count * (2 * stream + hidden) + weights

    encoder = of(step.encoder, tokens.context, tokens.context_squares)
    predictor = of(step.predictor, tokens.predicted if step.ours else tokens.pairs, tokens.pair_squares)
    if step.settings.recomputes("context"):
        encoder += layer_kept(step, "context")
    if not step.settings.recomputes("predictor"):
        return max(encoder, predictor)
    found = [encoder, predictor + layer_kept(step, "predictor", last=True)]
    if step.models.flops.predictor.layers > 1:
        inputs = step.predictor.width * tokens.pairs * (stream + branch)
        whole = of(step.predictor, tokens.pairs, tokens.pair_squares)
        found.append(whole + layer_kept(step, "predictor") - inputs)
    return max(found)
