"""The peak of this process' memory, or of its memory on a GPU."""

from __future__ import annotations

import re
import resource
from contextlib import suppress
from pathlib import Path

import torch

_RESET_PEAK = "5"
"""What proc(5) wants in clear_refs to start the peak anew."""


def reset_peak(device: str) -> None:
    """Start the peak anew from what is in use now; without /proc it stays that of the whole process."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)


def peak_bytes(device: str) -> int:
    """The most since the last reset: what tensors took on a GPU, else the resident memory of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
