"""What the device can do at most, and how much memory a run takes on it."""

from __future__ import annotations

import os
import re
import resource
import sys

import torch

PEAKS = {
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
"""Dense bf16 peak in FLOP/s by data sheet (fp16 where a device has no bf16), by a phrase of the device's name."""


def peak_flops(device: torch.device) -> float | None:
    """Returns the dense bf16 peak of a device in FLOP/s; None where it is not known, as for a CPU."""
    return _peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _peak(name: str) -> float | None:
    # The longest phrase wins: "H100 PCIe" before "H100".
    known = [phrase for phrase in PEAKS if re.search(rf"\b{phrase}\b", name)]
    return PEAKS[max(known, key=len)] if known else None


def memory(device: torch.device) -> tuple[float, float]:
    """Returns the most memory in use since the last call, in GiB and as a share: CUDA's reserve, or this process's."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_reserved(device)
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # The system counts the peak since the process began, in bytes on a Mac and in KiB elsewhere.
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return used / 2**30, used / whole
