"""The I-JEPA objective on features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastjepa.kernels.reference import jepa_loss_ref
from fastjepa.ops import library
from fastjepa.ops.checks import check_offsets, check_range, check_tensors
from fastjepa.pairing import Pairing, TargetRows, select_sequences
from fastjepa.ragged import Ragged, image_rows, masks_to_ragged


def jepa_loss(
    prediction: Tensor | Ragged,
    target_features: Tensor,
    masks_pred: list[Tensor] | Ragged,
    targets: TargetRows | None = None,
    *,
    check: bool = False,
) -> Tensor:
    """Smooth-L1 (beta 1) between predictions and the layer-normalised target features of the masked patches.

    Shapes:
        prediction: with `Ragged` masks a `Ragged` [T', D], sequences in order image, target, context; with lists the
            tensor [npred * nenc * B, K', D] in order target, context, image.
        target_features: [B, N, D], output of the target encoder; takes no gradient. With `targets`, those rows of it
            alone: [U, D].
        masks_pred: `Ragged` of patch indices with npred sequences an image, or npred tensors [B, K'].

    Returns:
        The mean over every element, a scalar.

    Raises:
        ValueError: masks that name no patch, a prediction that does not fit them, targets of other masks or features,
            tensors on several devices, or as `gather_tokens` an index or offsets.

    Source: section 3 of Assran et al. 2023 (arXiv 2301.08243); the layer norm (eps 1e-5, no affine) and smooth-L1 are
    those of the published training code.
    """
    if target_features.dim() != (3 if targets is None else 2):
        wanted = "[B, N, D]" if targets is None else "[U, D], the rows of `targets`,"
        raise ValueError(f"target_features must be {wanted} got {list(target_features.shape)}")
    width = target_features.shape[-1]
    batch = len(target_features) if targets is None else None
    masks = masks_pred if isinstance(masks_pred, Ragged) else masks_to_ragged(masks_pred, batch)
    values = prediction.values if isinstance(prediction, Ragged) else prediction
    if values.dim() < 2 or not width:
        raise ValueError(f"prediction must be tokens of width {width} above 0, got {list(values.shape)}")
    flat = values.reshape(math.prod(values.shape[:-1]), values.shape[-1])
    integers = {"masks_pred": masks.values} if targets is None else {"targets.place": targets.place}
    check_tensors({"prediction": values, "target_features": target_features}, integers)
    tokens = masks.values.shape[0]
    if not tokens:
        raise ValueError("masks_pred names no patch, so there is nothing to take a mean of")
    if flat.shape[1] != width or not flat.shape[0] or flat.shape[0] % tokens:
        raise ValueError(f"prediction {list(values.shape)} does not fit {tokens} target tokens of width {width}")
    if check:
        check_offsets(masks.offsets, tokens, tokens, check)
    if targets is None:
        patches = target_features.shape[1]
        check_range("masks_pred", masks.values, 0, patches - 1, check)
        rows = image_rows(masks, len(target_features), patches)
    else:
        rows = targets.place
        if len(rows) != tokens or len(targets.kept) != len(target_features):
            raise ValueError(
                f"targets keep {len(targets.kept)} rows for {len(rows)} tokens, but there are {len(target_features)} "
                f"rows of target_features and {tokens} target tokens"
            )
        check_range("targets.place", rows, 0, len(target_features) - 1, check)
    contexts = flat.shape[0] // tokens
    if contexts > 1:  # every target is predicted once from each context
        if isinstance(masks_pred, Ragged):
            target_of = torch.arange(masks.num_sequences * contexts, device=rows.device) // contexts
        else:
            npred = 1 if isinstance(masks_pred, Tensor) else len(masks_pred)
            target_of = Pairing.mask_major(contexts, npred, masks.num_sequences // npred, rows.device).target_of
        rows = rows.index_select(0, select_sequences(masks, target_of, flat.shape[0]).values)
    features = target_features.detach().reshape(-1, width)
    if library.takes_kernels(flat):
        from fastjepa.kernels.jepa_loss import jepa_loss as kernel

        return library.call(kernel, flat, features, rows, 1e-5)
    return jepa_loss_ref(flat, features, rows)
