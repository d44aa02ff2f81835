"""What the machine says of its memory."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import pytest

from skippy.engine.memory import available_bytes, peak_bytes, reset_peak, return_freed

FILES = {
    "/proc/meminfo": "MemTotal: 32000000 kB\nMemAvailable:   8000 kB\n",
    "/sys/fs/cgroup/memory.max": "max\n",
    "/sys/fs/cgroup/memory.stat": "anon 1000000\nfile 900000000\n",
}


def available_with(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> int:
    """With some of the files replaced, or missing; their names are those of FILES, with _ for every dot."""
    files = {name: changes.get(Path(name).name.replace(".", "_"), text) for name, text in FILES.items()}

    def read_text(path: Path) -> str:
        text = files[str(path)]
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read_text)
    return available_bytes()


def test_available_is_what_the_machine_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_with(monkeypatch) == 8000 * 1024
    assert available_with(monkeypatch, memory_max=None, memory_stat=None) == 8000 * 1024


def test_or_its_container_without_what_is_only_cached_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_with(monkeypatch, memory_max="3000000\n") == 2_000_000
    assert available_with(monkeypatch, memory_max="999999\n") == 0
    assert available_with(monkeypatch, memory_max="999999999999\n") == 8000 * 1024


def test_nothing_is_known_to_be_available_where_nothing_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_with(monkeypatch, meminfo=None) == 0


def test_here() -> None:
    assert 0 < available_bytes() < psutil.virtual_memory().total
    assert peak_bytes("cpu") >= psutil.Process().memory_info().rss // 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can")
def test_freed_memory_goes_back_to_the_system() -> None:
    kept = [bytearray(5000) for _ in range(20_000)]
    holes = kept[::2]
    del kept[::2]
    full = psutil.Process().memory_info().rss
    del holes
    kept = kept[:10]
    return_freed()
    assert psutil.Process().memory_info().rss < full - 50_000_000


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here")
def test_the_peak_of_memory_can_start_anew() -> None:
    reset_peak("cpu")
    before = peak_bytes("cpu")
    block = bytearray(b"x") * (64 * 2**20)
    with_block = peak_bytes("cpu")
    assert with_block > before + 48 * 2**20
    del block
    reset_peak("cpu")
    assert peak_bytes("cpu") < with_block - 32 * 2**20
