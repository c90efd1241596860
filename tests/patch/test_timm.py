"""timm and lightly, where they are installed; `test_attention` has their signatures."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

import fastjepa
from fastjepa.patch import FallbackWarning

try:  # torchvision, which it imports, raises a RuntimeError where its binary does not fit torch's
    import timm  # type: ignore[import-not-found]
except (ImportError, RuntimeError) as error:
    pytest.skip(f"timm cannot be imported here: {error}", allow_module_level=True)


def encoder(**options):
    """64 patches, width 48."""
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **options)


@pytest.mark.parametrize("fused", [False, True])
def test_vision_transformer(fused: bool):
    model = encoder()
    for block in model.blocks:
        block.attn.fused_attn = fused
    keys = list(model.state_dict())
    report = fastjepa.patch(model)
    assert not report.skipped
    assert report.verification is not None
    assert report.verification.outputs < 1e-5
    assert list(model.state_dict()) == keys
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        model.train()(torch.randn(2, 3, 32, 32)).sum().backward()


def test_query_norms_and_other_attention_are_refused():
    with pytest.raises(ValueError, match="has q_norm, k_norm besides qkv and proj"):
        fastjepa.patch(encoder(qk_norm=True))
    with pytest.raises(ValueError, match="attention: .*Eva"):
        fastjepa.patch(timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1))


def test_average_of_weights_by_timm_stays_the_same():
    """timm's ModelEmaV3 copies and averages a patched model as any other."""
    model = encoder()
    fastjepa.patch(model, verify=False)
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    first = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update(model)
    now = ema.module.state_dict()
    assert all(torch.allclose(now[k], first[k] + 0.5) for k, _ in model.named_parameters())
    assert type(ema.module.blocks[0].attn).__name__ == "FastAttention"


def test_lightly_trains_the_same():
    lightly = pytest.importorskip("lightly.models.modules", reason="pip install lightly")
    from lightly.models import utils  # type: ignore[import-not-found]

    x = torch.randn(2, 3, 32, 32)
    context, *targets = (torch.stack([torch.randperm(64)[:12].sort().values for _ in range(2)]) for _ in range(3))
    losses = {}
    for patched in (False, True):
        torch.manual_seed(1)
        student = lightly.MaskedVisionTransformerTIMM(vit=encoder(class_token=False, global_pool="avg"))
        predictor = lightly.IJEPAPredictorTIMM(num_patches=64, depth=1, mlp_dim=48, predictor_embed_dim=24, num_heads=3)
        teacher = copy.deepcopy(student).requires_grad_(False)
        reports = [fastjepa.patch(m, verify=False) for m in (student, predictor, teacher) if patched]
        reports += [fastjepa.patch_gathers("lightly")] if patched else []
        optimizer = torch.optim.AdamW([*student.parameters(), *predictor.parameters()], lr=1e-3)
        losses[patched] = []
        for _ in range(20):
            wanted = utils.apply_masks(F.layer_norm(teacher.encode(x), (48,)), targets)
            loss = F.smooth_l1_loss(predictor(student.encode(x, idx_keep=context), context, targets), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if patched:
                fastjepa.ops.ema_update_(teacher.parameters(), student.parameters(), 0.99)
            else:
                utils.update_momentum(student, teacher, 0.99)
            losses[patched].append(loss.item())
        for report in reports:
            report.undo()
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert losses[True][-1] < losses[True][0]
