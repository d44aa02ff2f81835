"""Adapters on disk: a folder with adapter.json and adapter.safetensors.

An adapter belongs to one base. For another base of the same shape it drafts badly, and
nothing worse can happen, because every token is verified: that is a warning. Shapes that
do not fit are an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from skippy.engine.adapter import AdapterConfig, S3DAdapter
from skippy.engine.errors import AdapterError
from skippy.engine.hub import find_trained
from skippy.engine.loading import weight_files
from skippy.engine.shape import ModelConfig
from skippy.engine.weights import Checkpoint

FORMAT_VERSION = 1
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BESIDE_MODEL = "s3d"
"""The folder, in a model's folder, where its adapter is looked for."""
BASE_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)

logger = logging.getLogger("skippy.engine")


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of a model's weights, see `fingerprint_of`."""
    return fingerprint_of(weight_files(checkpoint.path))


def fingerprint_of(paths: Iterable[Path]) -> str:
    """A hash of the name, shape and first row of every tensor, in whatever files they are.

    All of a large model would take minutes to read.
    """
    parts: dict[str, bytes] = {}
    for file in paths:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                part = tensors.get_slice(name)
                row = part[:1].contiguous().view(torch.uint8).numpy().tobytes()
                parts[name] = f"{name}{part.get_shape()}".encode() + row
    return hashlib.sha256(b"".join(parts[name] for name in sorted(parts))).hexdigest()


def save_adapter(folder: Path, adapter: S3DAdapter, checkpoint: Checkpoint, training: Mapping[str, Any]) -> None:
    """Write an adapter; whoever reads meanwhile finds whole files.

    Args:
        training: how it was trained, for people to read.

    Raises:
        AdapterError: some value is not finite in float16; nothing is written.
    """
    tensors = {
        name: tensor.detach().to(torch.float16 if tensor.is_floating_point() else torch.int32).contiguous()
        for name, tensor in adapter.state_dict().items()
    }
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise AdapterError(f"The adapter is not saved: {name!r} holds values that are not finite in float16.")
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "format_version": FORMAT_VERSION,
        "base": {name: getattr(checkpoint.config, name) for name in BASE_SIZES},
        "base_fingerprint": fingerprint(checkpoint),
        **asdict(adapter.config),
        "training": dict(training),
    }
    (folder / "adapter.json.new").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / "adapter.safetensors.new")
    # safetensors gives its files to their owner alone; a server may well run as another user.
    shutil.copymode(folder / "adapter.json.new", folder / "adapter.safetensors.new")
    for name in ("adapter.safetensors", "adapter.json"):
        (folder / f"{name}.new").replace(folder / name)


def adapter_folder(model: Path, given: str | None) -> Path | None:
    """The folder given, or downloaded from the hub, or the one in the folder of the model, or None.

    Raises:
        CheckpointError: what is given cannot be downloaded.
    """
    if given is not None:
        return find_trained(given)
    beside = model / BESIDE_MODEL
    return beside if (beside / "adapter.json").exists() else None


def load_adapter(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> S3DAdapter:
    """Read an adapter for a model.

    Raises:
        AdapterError: it is missing, damaged, of an unknown format or of another shape.
    """
    described = _read_description(folder)
    file = folder / "adapter.safetensors"
    _check_base(folder, described, checkpoint.config)
    try:
        names = [field.name for field in fields(AdapterConfig) if field.name in described or field.default is MISSING]
        config = AdapterConfig(**{name: described[name] for name in names})
        config.check(checkpoint.config)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise AdapterError(f"{folder / 'adapter.json'} is not a usable description: {reason}.") from error
    if config.draft_vocab_size >= checkpoint.vocab_size:
        raise AdapterError(
            f"{folder / 'adapter.json'}: draft_vocab_size is {config.draft_vocab_size}, and the model has "
            f"{checkpoint.vocab_size} tokens."
        )
    with torch.device("meta"):
        adapter = S3DAdapter(config, checkpoint.config)
    wanted = adapter.state_dict()
    try:
        tensors = load_file(file, device=str(device))
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} cannot be read: {error}. Is it complete?") from error
    for name in wanted.keys() | tensors.keys():
        if name not in tensors or name not in wanted or tensors[name].shape != wanted[name].shape:
            raise AdapterError(f"{file}: the tensor {name!r} is missing, left over or of another shape.")
        known = FLOAT_DTYPES if wanted[name].is_floating_point() else (torch.int32, torch.int64)
        if tensors[name].dtype not in known:
            raise AdapterError(f"{file}: the tensor {name!r} is of the type {tensors[name].dtype}.")
        if not tensors[name].isfinite().all():
            raise AdapterError(f"{file}: the tensor {name!r} holds values that are not finite.")
    ids = tensors["draft_ids"].tolist() if "draft_ids" in tensors else []
    if len(set(ids)) < len(ids) or not all(0 <= token < checkpoint.vocab_size for token in ids):
        raise AdapterError(f"{file}: 'draft_ids' names a token twice, or one that the model does not have.")
    adapter.load_state_dict(
        {name: tensor.to(dtype if tensor.is_floating_point() else torch.int64) for name, tensor in tensors.items()},
        assign=True,
    )
    if described.get("base_fingerprint") != fingerprint(checkpoint):
        logger.warning(
            "the adapter in %s was trained for another model of the same shape than %s: output stays exact, but "
            "few drafts will be accepted",
            folder,
            checkpoint.path,
        )
    return adapter.requires_grad_(False).eval()


def _read_description(folder: Path) -> dict[str, Any]:
    file = folder / "adapter.json"
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"{folder} holds no adapter: {file} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(described, dict):
        raise AdapterError(f"{file} does not hold a JSON object.")
    if described.get("format_version") != FORMAT_VERSION:
        raise AdapterError(
            f"{file} has format_version {described.get('format_version')!r}; this version of Skippy reads "
            f"{FORMAT_VERSION}."
        )
    return described


def _check_base(folder: Path, described: Mapping[str, Any], base: ModelConfig) -> None:
    trained_for = described.get("base")
    trained_for = trained_for if isinstance(trained_for, dict) else {}
    for name in BASE_SIZES:
        if trained_for.get(name) != getattr(base, name):
            raise AdapterError(
                f"The adapter in {folder} is for a model whose {name} is {trained_for.get(name)}; this one's is "
                f"{getattr(base, name)}."
            )
