"""The predictor and its pairing of contexts with targets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa import Ragged, vit_predictor
from fastjepa.pairing import Pairing, PredictorLayout, select_sequences
from tests.helpers import distance


def predictor(depth=2):
    torch.manual_seed(0)
    return vit_predictor(num_patches=16, embed_dim=32, predictor_embed_dim=24, depth=depth, num_heads=2).eval()


@st.composite
def masks(draw):
    batch, nenc, npred = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))

    def some(count, least):
        return [
            torch.tensor(draw(st.lists(st.integers(0, 15), min_size=least, max_size=6, unique=True)), dtype=torch.int32)
            for _ in range(count)
        ]

    return Ragged.from_list(some(batch * nenc, 0), nenc), Ragged.from_list(some(batch * npred, 0), npred)


@settings(max_examples=40)
@given(masks())
def test_layout_by_hand(pair):
    contexts, targets = pair
    nenc, npred = contexts.per_image, targets.per_image
    layout = PredictorLayout.build(contexts, targets, Pairing.image_major(contexts, targets))
    start, patches, source, picked, lengths = contexts.offsets.tolist(), [], [], [], []
    for image in range(contexts.num_sequences // nenc):
        for t in range(npred):
            for k in range(nenc):
                context, target = image * nenc + k, image * npred + t
                ours, theirs = contexts.unbind()[context].tolist(), targets.unbind()[target].tolist()
                source += [start[context] + i for i in range(len(ours))] + [-1] * len(theirs)
                picked += [len(patches) + len(ours) + i for i in range(len(theirs))]
                patches += ours + theirs
                lengths.append(len(ours) + len(theirs))
    assert layout.source.tolist() == source
    assert layout.patches.tolist() == patches
    assert layout.picked.tolist() == picked
    assert layout.offsets.diff().tolist() == lengths
    assert layout.max_length == max(lengths)
    assert layout.targets.per_image == nenc * npred
    assert layout.targets.values.tolist() == [patches[i] for i in picked]


def test_forms_agree():
    model = predictor()
    masks_enc = [torch.stack([torch.randperm(16)[:5] for _ in range(3)]) for _ in range(2)]
    masks_pred = [torch.stack([torch.randperm(16)[:4] for _ in range(3)]) for _ in range(3)]
    context = torch.randn(6, 5, 32)
    lists = model(context, masks_enc, masks_pred)  # [3 targets, 2 contexts, 3 images]
    assert lists.shape == (18, 4, 32)
    packed = Ragged.from_list([context[k * 3 + b] for b in range(3) for k in range(2)], 2)
    enc = Ragged.from_list([masks_enc[k][b] for b in range(3) for k in range(2)], 2)
    pred = Ragged.from_list([masks_pred[t][b] for b in range(3) for t in range(3)], 3)
    ragged = model(packed, enc, pred)
    assert ragged.per_image == 6
    image_major = lists.view(3, 2, 3, 4, 32).permute(2, 0, 1, 3, 4).reshape(-1, 32)
    assert distance(ragged.values, image_major) < 1e-6


@pytest.mark.parametrize("depth", [1, 3])
def test_each_sequence_alone(depth):
    model = predictor(depth)
    contexts = Ragged.from_list([torch.tensor([0, 5]), torch.tensor([1, 2, 3])])
    targets = Ragged.from_list(
        [torch.tensor([4]), torch.tensor([6, 7]), torch.tensor([8, 9, 10]), torch.tensor([11])], 2
    )
    tokens = torch.randn(5, 32)
    together = model(contexts.with_values(tokens), contexts, targets).unbind()
    for place, target in enumerate(targets.unbind()):
        image = place // 2
        context = contexts.unbind()[image].view(1, -1)
        piece = contexts.with_values(tokens).unbind()[image].unsqueeze(0)
        assert distance(together[place], model(piece, [context], [target.view(1, -1)])[0]) < 1e-5


def test_select_sequences():
    ragged = Ragged.from_list([torch.tensor([7, 8]), torch.tensor([], dtype=torch.int64), torch.tensor([9])])
    chosen = select_sequences(ragged, torch.tensor([2, 0, 0, 1]), 5)
    assert chosen.values.tolist() == [2, 0, 1, 0, 1]
    assert chosen.offsets.tolist() == [0, 1, 3, 5, 5]


def test_bad_input():
    model = predictor()
    mask = torch.tensor([[0, 1]])
    ragged = Ragged.from_list([torch.tensor([0, 1])])
    with pytest.raises(ValueError, match="must be all `Ragged`"):
        model(torch.zeros(1, 2, 32), [mask], ragged)
    with pytest.raises(ValueError, match="context has 3 tokens, but masks_enc names 2"):
        model(torch.zeros(1, 3, 32), [mask], [mask])
    with pytest.raises(ValueError, match="masks_enc holds 1 images and masks_pred 2"):
        model(torch.zeros(1, 2, 32), [mask], [mask.repeat(2, 1)])
    with pytest.raises(ValueError, match="masks_enc holds 1 images and masks_pred 2"):
        model(ragged.with_values(torch.zeros(2, 32)), ragged, Ragged.from_list([torch.tensor([0])] * 2))
    with pytest.raises(ValueError, match="patches"):
        model(torch.zeros(1, 2, 32), [torch.tensor([[0, 16]])], [mask])
    with pytest.raises(ValueError, match="give grid_size"):
        vit_predictor(num_patches=15)
    with pytest.raises(ValueError, match="at least one layer"):
        vit_predictor(num_patches=16, depth=0)
    assert vit_predictor(num_patches=15, grid_size=(3, 5), depth=1).predictor_pos_embed.shape == (1, 15, 384)
