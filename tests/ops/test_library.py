"""The operators in graphs, and whole models on interpreted (or, with a GPU, compiled) kernels."""

from __future__ import annotations

import copy

import pytest
import torch

import fastjepa.ops.library
from fastjepa import ops
from fastjepa.kernels.launch import is_interpreted
from fastjepa.nn.norm import LayerNorm
from tests.helpers import GOLDEN_MODELS, distance, golden_lists, golden_model, golden_ragged, part

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
pytestmark = pytest.mark.skipif(not (CUDA or is_interpreted()), reason="kernels need a GPU or Triton's interpreter")


@pytest.fixture
def kernels(monkeypatch):
    """Operations take the kernels wherever their tensors lie."""
    monkeypatch.setattr(fastjepa.ops.library, "takes_kernels", lambda x: True)


def samples():
    """Name -> arguments, small and with gradients where there are any."""
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(shape, device=DEVICE, requires_grad=True)

    def index(*values):
        return torch.tensor(values, device=DEVICE)

    offsets = torch.tensor([0, 3, 3, 5], dtype=torch.int32, device=DEVICE)
    return {
        "gather_rows": (leaf(6, 16), index(4, 1, 5), leaf(3, 16), True),
        "scatter_rows": (leaf(3, 16), index(4, 1, 4), 6, False),
        "assemble_predictor": (leaf(3, 16), leaf(16), leaf(4, 16), index(0, 1, -1, 0, 2, -1), index(0, 1, 2, 3, 1, 0)),
        "mask_token_bwd": (torch.randn(3, 16, device=DEVICE), index(-1, 0, -1), torch.float32),
        "ragged_attention": (leaf(5, 3, 2, 16), offsets, 3, 0.25),
        "jepa_loss": (leaf(4, 16), torch.randn(6, 16, device=DEVICE), index(1, 0, 5, 1), 1e-5),
        "bias_gelu": (leaf(4, 16), leaf(16)),
        "layer_norm": (leaf(4, 16), leaf(4, 16), leaf(16), leaf(16), 1e-6),
    }


@pytest.mark.parametrize("name", list(samples()))
def test_opcheck(name):
    results = torch.library.opcheck(
        getattr(torch.ops.fastjepa, name).default,
        samples()[name],
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_golden_models_on_kernels(golden, kernels, name):
    arrays = golden(name)
    model, images = golden_model(arrays).to(DEVICE), torch.tensor(arrays["images"], device=DEVICE)
    masks_enc, masks_pred = (m.to(DEVICE) for m in golden_ragged(arrays))
    assert distance(model.encoder(images, masks_enc).values.cpu(), arrays["ragged/context"]) < 1e-5
    loss = model.loss(images, masks_enc, masks_pred)
    assert distance(loss.cpu(), arrays["ragged/loss"]) < 1e-5
    loss.backward()
    expected = part(arrays, "ragged_grad")
    for module in ("encoder", "predictor"):
        for key, parameter in getattr(model, module).named_parameters():
            if parameter.requires_grad:
                assert distance(parameter.grad.cpu(), expected[f"{module}/{key}"]) < 2e-4, key
    before = copy.deepcopy(model.target_encoder)
    model.update_target(0.9)
    for old, new, source in zip(
        before.parameters(), model.target_encoder.parameters(), model.encoder.parameters(), strict=True
    ):
        assert distance(new.cpu(), (0.9 * old + 0.1 * source).cpu()) < 1e-6


def test_golden_lists_on_kernels(golden, kernels):
    arrays = golden("ijepa_two_contexts")
    model, images = golden_model(arrays).to(DEVICE), torch.tensor(arrays["images"], device=DEVICE)
    masks_enc, masks_pred = ([m.to(DEVICE) for m in masks] for masks in golden_lists(arrays))
    assert distance(model.predict(images, masks_enc, masks_pred).cpu(), arrays["out/prediction"]) < 1e-5
    assert distance(model.loss(images, masks_enc, masks_pred).cpu(), arrays["out/loss"]) < 1e-5


@pytest.mark.parametrize(
    "on_kernels, backend",
    [(True, "aot_eager"), (False, "aot_eager"), pytest.param(True, "inductor", marks=pytest.mark.gpu)],
)
def test_whole_model_is_one_graph(golden, monkeypatch, on_kernels, backend):
    monkeypatch.setattr(fastjepa.ops.library, "takes_kernels", lambda x: on_kernels)
    arrays = golden("ijepa_two_contexts")
    model, images = golden_model(arrays).to(DEVICE), torch.tensor(arrays["images"], device=DEVICE)
    masks_enc, masks_pred = (m.to(DEVICE) for m in golden_ragged(arrays))
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, fullgraph=True, backend=backend)
    loss = compiled(images, masks_enc, masks_pred)
    assert distance(loss.cpu(), arrays["ragged/loss"]) < 1e-5
    loss.backward()
    expected = part(arrays, "ragged_grad")
    for module in ("encoder", "predictor"):
        for key, parameter in getattr(model, module).named_parameters():
            if parameter.requires_grad:
                assert distance(parameter.grad.cpu(), expected[f"{module}/{key}"]) < 2e-4, key


def test_what_the_kernel_has_not_runs_on_torch(kernels):
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE)
    for qkv in (torch.randn(5, 3, 2, 12, device=DEVICE), torch.randn(5, 3, 2, 16, dtype=torch.float64, device=DEVICE)):
        out = ops.ragged_attention(qkv, offsets, 3)
        q, k, v = qkv[2:].permute(1, 2, 0, 3)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1)
        assert distance(out[2:].cpu(), expected.cpu()) < 1e-5


@pytest.mark.parametrize(
    ("x_dtype", "residual_dtype", "out_dtype"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, None, torch.bfloat16),
        (torch.float32, torch.bfloat16, None),
    ],
    ids=str,
)
def test_opcheck_of_mixed_dtypes(x_dtype, residual_dtype, out_dtype):
    x, residual, weight, bias, eps = samples()["layer_norm"]
    x = x.detach().to(x_dtype).requires_grad_()
    residual = None if residual_dtype is None else residual.detach().to(residual_dtype).requires_grad_()
    results = torch.library.opcheck(
        torch.ops.fastjepa.layer_norm.default,
        (x, residual, weight, bias, eps, out_dtype),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("on_kernels", [True, False])
def test_norm_under_autocast_is_one_graph(monkeypatch, on_kernels, backend):
    """For a linear y is in autocast's dtype, else in that of the sum; the same eager and in a graph.

    fp16, as bf16 is cut and not rounded by the interpreter.
    """
    monkeypatch.setattr(fastjepa.ops.library, "takes_kernels", lambda x: on_kernels)
    norm = LayerNorm(16).to(DEVICE)
    branch, stream = (torch.randn(4, 16, device=DEVICE) for _ in "ab")
    inputs = [branch.half().requires_grad_(), stream.requires_grad_()]

    def run(x, residual):
        with torch.autocast(DEVICE.type, torch.float16):
            first = norm(residual, for_linear=True)
            y, total = norm(x, residual, for_linear=True)
            return first, y, total, norm(x, residual)[0], norm(residual)

    torch._dynamo.reset()
    results = [call(*inputs) for call in (run, torch.compile(run, fullgraph=True, backend=backend))]
    for outputs in results:
        assert [y.dtype for y in outputs] == [torch.float16] * 2 + [torch.float32] * 3
        assert torch.equal(outputs[0], outputs[4].half())
        assert torch.equal(outputs[1], outputs[3].half())
    gradients = [torch.autograd.grad([y.float().square().sum() for y in outputs], inputs) for outputs in results]
    for eager, compiled in zip(*gradients, strict=True):
        assert eager.dtype == compiled.dtype
        assert distance(compiled.float(), eager.float()) < 1e-2
    assert norm(stream, for_linear=True).dtype == torch.float32  # no autocast
