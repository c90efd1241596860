"""What the GPUs can do by NVIDIA's data sheets: one table, for the share of peak, floors and projections."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Chip(NamedTuple):
    """A GPU by its data sheet.

    Attributes:
        name: as people write it. devices: torch's name of the device contains one of these.
        flops: dense bf16 tensor-core FLOP/s with fp32 accumulation.
        memory: bytes, a data sheet's GB taken as GiB, of which the driver leaves about 99 %.
        bandwidth: of that memory, bytes a second.
        link: bytes a second to other GPUs of the node, each way: NVLink, else PCIe.
        watts: the board's limit.
        source: where the figures are from.
    """

    name: str
    devices: tuple[str, ...]
    flops: float
    memory: int
    bandwidth: float
    link: float
    watts: int
    source: str


# SXM parts where there are two. The PCIe A100 has the same peak and 95 % of the bandwidth; the PCIe H100 has neither,
# and is not here.
CHIPS = (
    Chip("a100-80g", ("A100-SXM4-80GB", "A100 80GB PCIe"), 312e12, 80 << 30, 2039e9, 300e9, 400, "A100 data sheet"),
    Chip("a100-40g", ("A100-SXM4-40GB", "A100-PCIE-40GB"), 312e12, 40 << 30, 1555e9, 300e9, 400, "A100 data sheet"),
    Chip("h100", ("H100 80GB HBM3",), 989.4e12, 80 << 30, 3350e9, 450e9, 700, "H100 data sheet"),
    Chip("h200", ("H200",), 989.4e12, 141 << 30, 4800e9, 450e9, 700, "H200 data sheet"),
    Chip("b200", ("B200",), 2250e12, 180 << 30, 7700e9, 900e9, 1000, "HGX B200 data sheet, an eighth"),
    Chip("l40s", ("L40S",), 362.05e12, 48 << 30, 864e9, 32e9, 350, "L40S data sheet"),
    Chip("4090", ("RTX 4090",), 165.2e12, 24 << 30, 1008e9, 32e9, 450, "Ada architecture paper"),
)


def chip(name: str) -> Chip:
    """The chip of that name, in any case.

    Raises:
        ValueError: a name that is not in the table.

    >>> chip("A100-80G").flops / 1e12
    312.0
    """
    found = next((c for c in CHIPS if c.name == name.lower()), None)
    if found is None:
        raise ValueError(f"the GPU must be one of {', '.join(c.name for c in CHIPS)}, got {name!r}")
    return found


def chip_of(device: torch.device) -> Chip | None:
    """The chip of a device by the name that torch gives it; None where it is not in the table, or no GPU."""
    return None if device.type != "cuda" else named(torch.cuda.get_device_name(device))


def named(device_name: str) -> Chip | None:
    """The chip of a device name such as "NVIDIA A100-SXM4-80GB"; None where it is not in the table.

    >>> named("NVIDIA H200").name, named("NVIDIA H100 PCIe")
    ('h200', None)
    """
    return next((c for c in CHIPS if any(part in device_name for part in c.devices)), None)


def find_device(name: str, option: str = "device") -> torch.device:
    """The device of that name; "auto" is CUDA where there is one. `option` names in an error what asked for it.

    Raises:
        ValueError: a device that this machine or torch does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{option} {name!r} cannot be used here ({reason}); auto picks one") from error
    return device
