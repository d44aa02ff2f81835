"""How much memory there is, and the peak of what this process took of it, or of that of a GPU."""

from __future__ import annotations

import ctypes
import os
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
    peak = _number(r"^VmHWM:\s*(\d+) kB$", "/proc/self/status", 1024)
    return peak if peak is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_bytes() -> int:
    """What this process can still take without swapping, of the machine or of its container; 0 if nothing tells."""
    found = [_number(r"^MemAvailable:\s*(\d+) kB$", "/proc/meminfo", 1024)]
    limit = _number(r"^(\d+)$", "/sys/fs/cgroup/memory.max")
    taken = _number(r"^anon (\d+)$", "/sys/fs/cgroup/memory.stat")  # memory.current counts what can be dropped, too
    if limit is not None and taken is not None:
        found.append(limit - taken)
    return max(0, min((number for number in found if number is not None), default=0))


def total_bytes() -> int:
    """What there is, in use or not, of the machine or of its container."""
    limit = _number(r"^(\d+)$", "/sys/fs/cgroup/memory.max")
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return physical if limit is None else min(limit, physical)


def return_freed() -> None:
    """Give memory that this process freed back to the system.

    The C library keeps the holes that are left between what stays; a load would leave as many as the model is large.
    """
    with suppress(AttributeError):  # other C libraries than glibc do without
        ctypes.CDLL(None).malloc_trim(0)


def _number(pattern: str, file: str, unit: int = 1) -> int | None:
    with suppress(OSError):
        found = re.search(pattern, Path(file).read_text(), re.MULTILINE)
        return int(found[1]) * unit if found else None
    return None
