"""What `skippy tune` saved, and when it may be used.

A plan is one JSON file. Its key says where its times were measured and with what; anywhere
else they would be wrong, so there it is left alone, with a warning. Nothing that a model
emits depends on it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
import torch

from skippy.engine.adapter_files import adapter_folder, fingerprint, fingerprint_of
from skippy.engine.config import EngineConfig
from skippy.engine.controller import Prior
from skippy.engine.drafters.hybrid import HybridDrafter
from skippy.engine.drafters.s3d import S3DDrafter
from skippy.engine.errors import ConfigError
from skippy.engine.weights import Checkpoint

if TYPE_CHECKING:
    from skippy.engine.build import Build

FORMAT_VERSION: Final = 1

_Seconds = Annotated[float, msgspec.Meta(gt=0.0)]
_Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]

logger = logging.getLogger("skippy.engine")


class Key(msgspec.Struct, frozen=True):
    """What times depend on. `device` is the name of the GPU or CPU; `threads` counts on a CPU alone."""

    device: str
    threads: int | None
    dtype: str
    quantization: str
    torch: str
    model: str
    adapter: str | None


class Measured(msgspec.Struct, forbid_unknown_fields=True):
    """Of one drafter, see `Prior`."""

    seconds: dict[int, dict[int, _Seconds]]
    acceptance: list[_Share]

    def prior(self) -> Prior:
        return {"seconds": self.seconds, "acceptance": self.acceptance}


class TunedPlan(msgspec.Struct, forbid_unknown_fields=True):
    """The file. `rows` is the table that `tune` printed, for people."""

    format_version: Literal[1]
    key: Key
    drafters: dict[str, Measured]
    rows: list[dict[str, Any]]


def key_of(config: EngineConfig, checkpoint: Checkpoint, device: str, dtype: str) -> Key:
    """The key of an engine on `device`, with weights of `dtype`, once it is built."""
    on_gpu = device.startswith("cuda")
    folder = adapter_folder(checkpoint.path, config.adapter)
    return Key(
        device=torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        threads=None if on_gpu else torch.get_num_threads(),
        dtype=dtype,
        quantization=config.quantization,
        torch=version("torch"),
        model=fingerprint(checkpoint),
        adapter=None if folder is None else fingerprint_of([folder / "adapter.safetensors"]),
    )


def default_path(checkpoint: Checkpoint) -> Path:
    """Where the plan of a model is kept: one file per folder, in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = hashlib.sha256(str(checkpoint.path.resolve()).encode()).hexdigest()
    return Path(cache) / "skippy" / "plans" / f"{checkpoint.path.name}-{digest[:16]}.json"


def check_writable(path: Path) -> None:
    """Find out now whether a plan can be written there later.

    Raises:
        ConfigError: it cannot.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; a plan is one file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}.") from error


def save_plan(path: Path, plan: TunedPlan) -> None:
    """Write a plan; whoever reads meanwhile finds a whole file."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(msgspec.json.format(msgspec.json.encode(plan)) + b"\n")
    new.replace(path)


def load_priors(config: EngineConfig, built: Build, *, serves: bool) -> Mapping[str, Prior]:
    """By drafter, what its controller may begin with; empty without a plan that fits, or an adapter.

    Args:
        serves: whether a plan that the configuration does not name is looked for in the cache. Only for a
            server: what is tuned for its threads fits no other command.

    Raises:
        ConfigError: the configuration names a plan that cannot be read.
    """
    if built.adapter is None or config.learn is not None:  # acceptance will change
        if config.tuned_plan is not None:
            logger.warning("the tuned plan %s is ignored: there is no adapter", config.tuned_plan)
        return {}
    path = default_path(built.checkpoint)
    if config.tuned_plan is not None:
        path = Path(os.path.expanduser(config.tuned_plan))
    elif not serves or not os.access(path, os.R_OK):
        return {}
    try:
        plan = msgspec.json.decode(path.read_bytes(), type=TunedPlan)
    except (OSError, ValueError, RecursionError) as error:
        problem = f"the tuned plan {path} cannot be read: {error}"
        if config.tuned_plan is not None:
            raise ConfigError(problem) from error
        logger.warning("%s; it is ignored", problem)
        return {}
    keys = built.runner.pool.keys
    key = key_of(config, built.checkpoint, str(keys.device), str(keys.dtype).removeprefix("torch."))
    differing = [name for name in Key.__struct_fields__ if getattr(plan.key, name) != getattr(key, name)]
    if differing:
        logger.warning(
            "the tuned plan %s is ignored: its %s is another one; run skippy tune again", path, " and ".join(differing)
        )
        return {}
    logger.info("drafting begins with the tuned plan %s", path)
    priors = {name: measured.prior() for name, measured in plan.drafters.items()}
    # It passes on what it does not look up, at the same cost.
    return {**priors, HybridDrafter.name: priors[S3DDrafter.name]} if S3DDrafter.name in priors else priors


def _cpu_name() -> str:
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()
