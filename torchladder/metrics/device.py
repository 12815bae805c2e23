"""Peak FLOP/s of a device, and the peak memory of this process on it."""

from __future__ import annotations

import os
import re
import resource
import sys

import torch

PEAK_FLOPS = {
    "A100": 312e12,
    "A10": 125e12,
    "A40": 149.7e12,
    "A6000": 154.8e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40S": 362e12,
    "MI250X": 191.5e12,
    "MI300X": 1307e12,
    "RTX 4090": 165.2e12,
    "T4": 65e12,
    "V100": 125e12,
}
"""Dense bf16 FLOP/s from the data sheets (fp16 for devices without bf16), by a phrase of the device's name."""


def get_peak_flops(device: torch.device) -> float | None:
    """Returns the dense bf16 peak of a device in FLOP/s; None if it is unknown, as for a CPU."""
    return peak_flops_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_by_name(name: str) -> float | None:
    """Returns the dense bf16 peak in FLOP/s of a device by its name, such as "NVIDIA H100 80GB HBM3"."""
    # The longest phrase wins: "H100 PCIe" before "H100".
    phrases = [phrase for phrase in PEAK_FLOPS if re.search(rf"\b{phrase}\b", name)]
    return PEAK_FLOPS[max(phrases, key=len)] if phrases else None


def peak_memory(device: torch.device) -> tuple[float, float]:
    """Returns peak memory in GiB and as a fraction: reserved by CUDA since the last call; on a CPU, of the process."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_reserved(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # ru_maxrss is the peak since the process started, in bytes on macOS and in KiB elsewhere.
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return used / 2**30, used / total
