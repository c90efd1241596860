"""The loss: target features normalised, gathered and compared, and its peers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operations import Operation, Sizes, both, compiled, exactly, offsets_of
from benchmarks.peers import peers
from fastjepa import Ragged, ops
from fastjepa.kernels.jepa_loss import jepa_loss_cost
from fastjepa.kernels.reference import jepa_loss_ref


def operations(sizes: Sizes) -> list[Operation]:
    """Four targets an image, with the gradient of the prediction."""
    torch.manual_seed(0)
    lengths = [sizes.target] * (4 * sizes.images)
    tokens = sum(lengths)
    values = torch.cat([torch.randperm(sizes.patches)[:n] for n in lengths]).int()
    masks = Ragged(values, offsets_of(lengths, torch.device("cpu")), per_image=4).to(sizes.device)
    features = sizes.randn(sizes.images, sizes.patches, sizes.width)
    inputs, upstream = [sizes.randn(tokens, sizes.width)], [torch.ones((), device=sizes.device)]
    image = torch.arange(len(lengths), device=sizes.device).repeat_interleave(sizes.target) // 4
    rows = image * sizes.patches + masks.values

    def torchs(prediction: Tensor) -> Tensor:
        return jepa_loss_ref(prediction, features.to(prediction.dtype).flatten(0, 1), rows)

    def official(prediction: Tensor) -> Tensor:
        """Every patch normalised, then those in a target gathered."""
        whole = F.layer_norm(features.float(), (sizes.width,)).flatten(0, 1)
        wanted = whole.gather(0, rows.view(-1, 1).repeat(1, sizes.width))
        return F.smooth_l1_loss(prediction.float(), wanted)

    found = peers(
        {
            "torch": lambda: torchs,
            "eager, as published": lambda: official,
            "torch.compile": lambda: compiled(torchs),
            "fastjepa": lambda: lambda prediction: ops.jepa_loss(masks.with_values(prediction), features, masks),
        },
        inputs,
        upstream,
    )
    cost = both(*(jepa_loss_cost(tokens, sizes.width, sizes.dtype, backward=back) for back in (False, True)))
    case = f"{tokens} tokens of {sizes.width}"
    return [Operation("loss fwd+bwd", case, cost, exactly(torchs, inputs, upstream), found)]


def test_jepa_loss(timed):
    """A peer of a case, right and then timed by pytest-benchmark."""
    timed()
