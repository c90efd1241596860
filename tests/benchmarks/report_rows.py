"""Runs of made-up numbers, for the tests of the report."""

from __future__ import annotations

from typing import Any

PARTS = {"target": 40.0, "context": 30.0, "predictor": 20.0, "loss": 1.0, "optimizer": 9.0}


def machine(device: str = "NVIDIA H200", chip: str | None = "h200", **other: Any) -> dict[str, Any]:
    """What ran it."""
    found = {
        "device": device,
        "kind": "cuda" if chip else "cpu",
        "chip": chip,
        "threads": 2,
        "torch": "2.13.0",
        "triton": "3.9.0",
        "python": "3.11.7",
        "cuda": "13.0" if chip else None,
        "driver": "580.65" if chip else None,
        "commit": "0123456789",
        "clocks": None,
        "copy_bandwidth": 4e12,
        "matmul_rate": 7e14,
    }
    return found | other


def run(
    suite: str, rows: list[dict], date: str = "2026-01-02T03:04:05Z", of: dict | None = None, command: str = ""
) -> dict:
    """A run of a suite."""
    command = f"python -m benchmarks {command or suite}"
    return {"suite": suite, "command": command, "date": date, "machine": of or machine(), "rows": rows}


def step(row: str, **other: Any) -> dict[str, Any]:
    """A row of the step suite."""
    settings = {"model": "vit_huge/14", "pixels": 224, "batch": 128, "dtype": "bf16", "steps": 20}
    found = {
        "ms": 100.0,
        "images_per_second": 1280.0,
        "context_tokens_per_second": 140800.0,
        "mfu": 0.5,
        "of_matmul_rate": None,
        "peak_memory_bytes": 3 << 30,
        "parts_ms": PARTS,
        "eager_over_this": 1.0,
    }
    return {"row": row, **settings, **found} | other


def kernel(peer: str, ms: float | None = None, operation: str = "EMA", **other: Any) -> dict[str, Any]:
    """A row of the kernels suite."""
    row = {"operation": operation, "case": "4 M parameters", "peer": peer, "bytes": 4e9, "flops": 1e9, "launches": 1}
    if ms:
        row |= {"ms": ms, "spread_ms": ms / 50, "GB/s": 4e3 / ms, "TFLOP/s": 1 / ms, "roof": 1 / ms}
    return row | other


def kernels() -> list[dict[str, Any]]:
    """Right, wrong and absent peers of two operations."""
    return [
        kernel("torch foreach", 3.0),
        kernel("off", wrong="output 0 is 1.0e-01 from the fp64 answer, 2.0e-03 allowed"),
        kernel("apex", absent="not installed"),
        kernel("fastjepa", 2.0, best_peer_over_ours=1.5),
        kernel("torch index_select", 4.0, "take rows", flops=0),
        kernel("fastjepa", 5.0, "take rows", flops=0, best_peer_over_ours=0.8),
    ]


def point(axis: str, value: int, row: str, **other: Any) -> dict[str, Any]:
    """A row of the scaling suite."""
    return {"axis": axis, "value": value, **step(row, images_per_second=10.0 * value), "parameters": 10**6} | other


def swap(model: str) -> dict[str, Any]:
    """A row of the swap suite."""
    times = {"before_ms": 20.0, "after_ms": 10.0, "speedup": 2.0, "outputs": 1e-7, "gradients": 2e-7, "places": 9}
    return {"codebase": "transformers", "model": model, "version": "5.0"} | times


def every_suite() -> list[dict[str, Any]]:
    """A run of each."""
    ours = [point("batch", size, "fastjepa truncated") for size in (16, 8)]
    pillow = {
        "engine": "Pillow",
        "workers": 2,
        "images_per_second": 800.0,
        "images_per_second_per_core": 400.0,
        "error": 0.0,
    }
    decodes = {"engine": "decode only", "workers": 1, "images_per_second": 900.0, "images_per_second_per_core": 900.0}
    return [
        run("step", [step("eager"), step("fastjepa ragged", ms=50.0, eager_over_this=2.0)]),
        run("kernels", kernels()),
        run("scaling", [point("batch", 8, "eager"), point("batch", 16, "eager"), point("batch", 8, "compiled"), *ours]),
        run("swap", [swap("IJepaModel"), {"codebase": "timm", "model": "VisionTransformer", "absent": "No module"}]),
        run("masks", [{"patches": "16x16", "batch": 128, "form": "ragged", "median_ms": 0.4, "min_ms": 0.3}]),
        run("input", [pillow, decodes, {"engine": "DALI", "workers": 2, "absent": "needs CUDA"}]),
        run("host", [{"operation": "bias + GELU", "ours_us": 30.0, "torch_us": 20.0, "launches": 2}]),
    ]
