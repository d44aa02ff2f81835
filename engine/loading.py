"""Weights from safetensors files to a device, one tensor of one file at a time.

The files are mapped, not read as a whole: of each, the host holds at most the pages that were
looked at, which it may drop, and lets go of them with the file. A pickle is never opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from skippy.engine.errors import CheckpointError
from skippy.engine.progress import bar_class

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NO_PICKLES = (
    "Reading a pickle can run any code in it, so Skippy reads safetensors only: https://huggingface.co/spaces/safetensors/"
    "convert converts a model, as does save_pretrained of transformers where you trust it."
)

Report = Callable[[int, int], object]
"""Is told the bytes read and the bytes to read."""


def weight_names(folder: Path) -> list[str]:
    """The names of the weight files of a model, from its index if it has one; they need not be there.

    Raises:
        CheckpointError: the index is of no use.
    """
    index = folder / INDEX
    if not index.is_file():
        return [WEIGHTS]
    try:
        names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, OSError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a usable index: {error!r}.") from error
    if not names or any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index} is not a usable index: it must name files beside it.")
    return names


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model.

    Raises:
        CheckpointError: one is missing, or there are only pickles.
    """
    names = weight_names(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return [folder / name for name in names]
    if missing == [WEIGHTS]:
        pickles = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.bin.index.json")))
        instead = f", but pickled weights ({pickles[0]})" if pickles else "; maybe its weights are pickled .bin files"
        raise CheckpointError(f"{folder} has no {WEIGHTS}{instead}. {_NO_PICKLES}")
    raise CheckpointError(
        f"{folder} has no {missing[0]}, which its index names ({len(missing)} of {len(names)} shards are missing): is "
        "the download complete?"
    )


def stream(
    files: Sequence[Path],
    is_wanted: Callable[[Path, str], bool],
    dtype: torch.dtype,
    device: torch.device,
    report: Report | None = None,
) -> Iterator[tuple[Path, str, Tensor]]:
    """Yield the file, name and value of every wanted tensor, in `dtype` on `device`, file by file.

    On a CPU too it is a copy, so that nothing refers to a file that may change.

    Args:
        is_wanted: of a file and a name in it; may raise for a name that should not be there.

    Raises:
        CheckpointError: a file is damaged, has a tensor again, or is quantised.
    """
    seen: set[str] = set()
    sizes = [file.stat().st_size for file in files]
    with bar_class()(total=sum(sizes), unit="B", unit_scale=True, desc="reading weights") as bar:
        done = 0

        def advance(to: int) -> None:
            nonlocal done
            bar.update(to - done)
            done = to
            if report is not None:
                report(done, sum(sizes))

        for i, file in enumerate(files):
            for name, stored in _read(file, is_wanted, seen):
                # Converted on the device, or else the host would hold the result as well.
                yield file, name, stored.to(device).to(dtype, copy=device.type == "cpu")
                advance(done + stored.nbytes)
            advance(sum(sizes[: i + 1]))


def _read(file: Path, is_wanted: Callable[[Path, str], bool], seen: set[str]) -> Iterator[tuple[str, Tensor]]:
    """The names and values of the wanted tensors of a file, in its own type and mapped."""
    try:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
                if name in seen:
                    raise CheckpointError(f"{file} holds {name!r}, which another shard holds, too.")
                seen.add(name)
                if not is_wanted(file, name):
                    continue
                stored = shard.get_tensor(name)
                if not stored.is_floating_point() or stored.element_size() < 2:
                    raise CheckpointError(f"{file} holds {name!r} as {stored.dtype}: quantised, in an unknown way.")
                yield name, stored
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Is the download complete?") from error
