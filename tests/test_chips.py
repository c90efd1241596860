"""The table of GPUs: found by their names, and nothing taken for another chip."""

from __future__ import annotations

import pytest
import torch

from fastjepa.chips import CHIPS, chip, chip_of, named


@pytest.mark.parametrize(
    "device_name, name",
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100 80GB PCIe", "a100-80g"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "4090"),
    ],
)
def test_devices_are_known_by_name(device_name: str, name: str):
    found = named(device_name)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize("device_name", ["NVIDIA H100 PCIe", "NVIDIA L40", "NVIDIA GeForce RTX 4080", "Tesla V100"])
def test_no_chip_is_taken_for_another(device_name: str):
    assert named(device_name) is None


def test_every_row_is_whole():
    assert len({c.name for c in CHIPS}) == len(CHIPS)
    for c in CHIPS:
        assert chip(c.name.upper()) is c
        assert 1e14 < c.flops < 1e16
        assert 20 << 30 < c.memory < 1 << 40
        assert c.link < c.bandwidth < 1e13
        assert 100 < c.watts < 2000
    assert chip_of(torch.device("cpu")) is None


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="a100-80g.*got 'a100'"):
        chip("a100")
