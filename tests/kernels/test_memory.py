"""No kernel reads or writes beside its tensors: margins around all of them here, compute-sanitizer where there is one.

The multi-tensor kernels have their margins in tests of their own; the sanitizer takes them in.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastjepa.kernels import attention, gather, gelu, jepa_loss, layer_norm
from fastjepa.kernels.ema import MultiTensorEMA
from tests.kernels.row_checks import DEVICE, ROOT, value_and_gradients

MARGIN = 64  # elements, so that what lies between two margins stays aligned
LENGTHS = [1, 0, 37, 70]
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


class Margins:
    """Makes tensors with room around them, and looks whether anybody wrote there."""

    def __init__(self) -> None:
        self.memory: list[tuple[Tensor, Tensor]] = []
        self._empty = torch.empty

    def around(self, shape: tuple[int, ...], dtype: torch.dtype, outside: float) -> Tensor:
        """An uninitialised tensor between two margins full of `outside`."""
        count = 1
        for n in shape:
            count *= n
        memory = self._empty(count + 2 * MARGIN, dtype=dtype, device=DEVICE).fill_(outside)
        self.memory.append((memory, memory.clone()))
        return memory[MARGIN : MARGIN + count].view(shape)

    def empty(self, *size: object, dtype: torch.dtype | None = None, device: object = None, **options: object):
        """Stands in for torch.empty."""
        shape = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list, torch.Size)) else size
        if torch.device(device or "cpu").type != DEVICE.type:  # type: ignore[arg-type]
            return self._empty(shape, dtype=dtype, device=device, **options)  # type: ignore[arg-type]
        return self.around(tuple(int(n) for n in shape), dtype or torch.float32, 77)  # type: ignore[union-attr]

    def empty_like(self, x: Tensor, dtype: torch.dtype | None = None, **options: object) -> Tensor:
        """Stands in for torch.empty_like, of what lies in rows."""
        return self.around(tuple(x.shape), dtype or x.dtype, 77)

    def given(self, x: Tensor) -> Tensor:
        """x between margins of NaN, or of an index far outside, so that a value read there is seen in the results."""
        outside = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
        return self.around(tuple(x.shape), x.dtype, outside).copy_(x)

    def assert_untouched(self) -> None:
        """Every margin is as it was made."""
        assert self.memory
        for memory, before in self.memory:
            for side in (slice(0, MARGIN), slice(len(memory) - MARGIN, None)):
                assert torch.equal(memory[side].nan_to_num(5.0), before[side].nan_to_num(5.0)), memory.shape


def _attention(given: Callable[[Tensor], Tensor], dtype: torch.dtype, bound: int) -> list[Tensor]:
    offsets = given(torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32))
    qkv, upstream = (given(torch.randn(sum(LENGTHS), *rest).to(dtype)) for rest in ((3, 2, 24), (2, 24)))
    return value_and_gradients(lambda x: attention.ragged_attention(x, offsets, bound), [qkv], [upstream])


def _short_attention(given: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
    return _attention(given, dtype, 70)


def _long_attention(given: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
    return _attention(given, dtype, 4096)


def _gather(given: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
    x, pos, upstream = (given(torch.randn(n, 200).to(dtype)) for n in (36, 12, 7))
    rows = given(torch.tensor([35, 0, 0, 13, 13, 13, 1], dtype=torch.int32))
    return value_and_gradients(lambda x, pos: gather.gather_rows(x, rows, pos, False), [x, pos], [upstream])


def _scatter(given: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
    x, upstream = given(torch.randn(5, 200).to(dtype)), given(torch.randn(9, 200).to(dtype))
    rows = given(torch.tensor([8, 0, 0, 3, 8]))
    return value_and_gradients(lambda x: gather.scatter_rows(x, rows, 9), [x], [upstream])


def _assemble(given: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
    context, token, pos, upstream = (given(torch.randn(*n, 200).to(dtype)) for n in ((3,), (), (11,), (6,)))
    source, patches = given(torch.tensor([0, 1, 2, -1, 0, -1])), given(torch.tensor([10, 0, 3, 3, 5, 10]))
    return value_and_gradients(
        lambda c, t: gather.assemble_predictor(c, t, pos, source, patches), [context, token], [upstream]
    )


def _loss(given: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
    prediction, features = given(torch.randn(5, 200).to(dtype)), given(torch.randn(21, 200).to(dtype))
    rows = given(torch.tensor([20, 0, 7, 7, 3], dtype=torch.int32))
    upstream = torch.ones((), device=DEVICE)
    return value_and_gradients(lambda p: jepa_loss.jepa_loss(p, features, rows), [prediction], [upstream])


def _norm(given: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
    inputs = [given(torch.randn(*n, 200).to(dtype)) for n in ((13,), (13,), (), ())]
    upstream = [given(torch.randn(13, 200).to(dtype)) for _ in "ab"]
    return value_and_gradients(lambda x, r, w, b: layer_norm.add_layer_norm(x, r, w, b, 1e-6), inputs, upstream)


def _mixed_norm(given: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
    """As under autocast: fp32 but for x and y."""
    x, upstream = (given(torch.randn(13, 200).to(dtype)) for _ in "ab")
    inputs = [x, *(given(torch.randn(*n, 200)) for n in ((13,), (), ()))]
    ds = given(torch.randn(13, 200))
    return value_and_gradients(
        lambda x, r, w, b: layer_norm.add_layer_norm(x, r, w, b, 1e-6, dtype), inputs, [upstream, ds]
    )


def _gelu(given: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
    inputs = [given(torch.randn(*n, 200).to(dtype)) for n in ((13,), ())]
    return value_and_gradients(gelu.bias_gelu, inputs, [given(torch.randn(13, 200).to(dtype))])


def _ema(given: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
    targets, sources = ([given(torch.randn(n).to(dtype)) for n in (1, 0, 4097, 300)] for _ in "ab")
    MultiTensorEMA(targets, sources).update(0.9)
    return targets


OPERATIONS = (_short_attention, _long_attention, _gather, _scatter, _assemble, _loss, _norm, _mixed_norm, _gelu, _ema)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__.strip("_"))
def test_margins_stay_whole_and_unseen(operation: Callable, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    margins = Margins()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", margins.empty)
        patch.setattr(torch, "empty_like", margins.empty_like)
        outputs = operation(margins.given, dtype)
    margins.assert_untouched()
    assert all(bool(y.isfinite().all()) for y in outputs)


def test_a_value_written_into_a_margin_is_seen():
    margins = Margins()
    x = margins.given(torch.zeros(3))
    torch.as_strided(x, (4,), (1,)).zero_()
    with pytest.raises(AssertionError):
        margins.assert_untouched()


@pytest.mark.gpu
@pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer here (it comes with the CUDA toolkit)")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_under_the_sanitizer(tool: str):
    """The tests above and those of the multi-tensor kernels once more, every access of theirs watched."""
    watched = ["tests/kernels/test_memory.py", "tests/kernels/test_ema.py", "tests/kernels/test_grad_norm.py"]
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", *watched]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor's end is the end of its memory
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
