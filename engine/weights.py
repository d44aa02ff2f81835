"""From a Hugging Face folder, or a name on the hub, to a model."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skippy.engine.errors import CheckpointError
from skippy.engine.families import FAMILIES, architecture, parameter_names, parameters, parse_config, text_config
from skippy.engine.hub import download, find_model, local_folder
from skippy.engine.loading import Report, stream, weight_files, weight_names
from skippy.engine.model import CausalLM
from skippy.engine.shape import ModelConfig

UNUSABLE = (ArithmeticError, KeyError, TypeError, ValueError)
"""What reading a configuration of no use raises."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder whose configuration was read and found to be supported."""

    path: Path
    config: ModelConfig
    dtype: torch.dtype
    """What the checkpoint is stored in."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    """Tokens that can be chosen: without the rows that pad the embedding."""


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Find a model and read its configuration; of a model on the hub, download what is not there.

    Args:
        model: a folder, or the name of a model on the hub.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: the model, or something in its folder, is missing, damaged or unsupported.
    """
    path = find_model(model, revision)
    checkpoint = read_checkpoint(path)
    # Only now, because weights of a kind that is not supported would be downloaded in vain.
    if local_folder(model) is None:
        download(model, path.name, weight_names(path))
    return checkpoint


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the configuration of a model folder; the weights need not be there.

    Raises:
        CheckpointError: the folder, or something in it, is missing, damaged or unsupported.
    """
    raw = _read_json(path / "config.json", required=True)
    if architecture(raw) not in FAMILIES:
        own_code = " and needs code of its own (auto_map), which Skippy never runs" if "auto_map" in raw else ""
        raise CheckpointError(
            f"{path} holds a {architecture(raw)}, which is not supported{own_code}; supported: {', '.join(FAMILIES)}."
        )
    quantised = raw.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise CheckpointError(
            f"{path} holds weights quantised by {method or 'an unnamed method'}, which cannot be read; supported: the "
            "same model unquantised, with --quantization int8 or nf4."
        )
    generation = _read_json(path / "generation_config.json", required=False)
    tokens = _tokenizer_size(path)
    try:
        config = parse_config(raw)
        vocab_size = min(config.vocab_size, tokens or config.vocab_size)
        text = text_config(raw)
        eos = _ids(raw.get("eos_token_id"), text.get("eos_token_id"), generation.get("eos_token_id"))
        bos = _ids(text.get("bos_token_id"))
        return Checkpoint(
            path=path,
            config=config,
            dtype=_dtype(raw),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=tuple(token for token in eos if 0 <= token < vocab_size),
            vocab_size=vocab_size,
        )
    except UNUSABLE as error:
        raise CheckpointError(f"{path / 'config.json'} is not a usable configuration: {error!r}.") from error


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    max_len: int,
    *,
    finish_layer: Callable[[CausalLM, int], object] | None = None,
    report: Report | None = None,
) -> CausalLM:
    """The model of a checkpoint, in `dtype` on `device`, not yet packed.

    Args:
        finish_layer: called with the model and the number of a layer that is complete. Packing it then, one at a
            time, needs less memory than packing them all in the end.
        report: is told how much is read.

    Raises:
        CheckpointError: a tensor is missing, left over, of the wrong shape or cannot be read.
    """
    with torch.device("meta"):
        model = CausalLM(checkpoint.config, max_len)
    try:
        model.prepare_rope(dtype, device)
    except (ArithmeticError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path / 'config.json'}: unusable rotary settings: {error!r}.") from error
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if checkpoint.config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    missing = dict.fromkeys(wanted)
    missing_of_layer = Counter(map(_layer_of, wanted))
    for file, stored, tensor in _read_tensors(checkpoint, wanted, dtype, device, report):
        for name, value in parameters(stored, tensor, checkpoint.config):
            if name not in missing:
                raise CheckpointError(f"{file} holds {stored!r}, and {name!r} was there already under another name.")
            if value.shape != wanted[name]:
                raise CheckpointError(
                    f"{file} holds {stored!r} in shape {list(tensor.shape)}, and config.json implies "
                    f"{list(wanted[name])} of {name!r}."
                )
            module, _, kind = name.rpartition(".")
            setattr(model.get_submodule(module), kind, nn.Parameter(value, requires_grad=False))
            del missing[name]
        del tensor, value
        layer = _layer_of(name)
        missing_of_layer[layer] -= len(parameter_names(stored))
        if finish_layer is not None and layer is not None and not missing_of_layer[layer]:
            finish_layer(model, layer)
    for name in missing:
        raise CheckpointError(f"{checkpoint.path} lacks the tensor {name!r}.")
    if checkpoint.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False).eval()


def _layer_of(name: str) -> int | None:
    """The layer that a parameter belongs to, if it belongs to one."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _read_tensors(
    checkpoint: Checkpoint,
    wanted: Container[str],
    dtype: torch.dtype,
    device: torch.device,
    report: Report | None,
) -> Iterator[tuple[Path, str, Tensor]]:
    """The file, name and value of every wanted tensor."""

    def is_wanted(file: Path, stored: str) -> bool:
        names = parameter_names(stored)
        of_model = bool(names) and all(name in wanted for name in names)
        if names and not of_model and not _ignorable(names[0], checkpoint):
            raise CheckpointError(
                f"{file} holds {stored!r}, which no model of this configuration has: is it of another kind?"
            )
        return of_model

    return stream(weight_files(checkpoint.path), is_wanted, dtype, device, report)


def _ignorable(name: str, checkpoint: Checkpoint) -> bool:
    tied_copy = name == "lm_head.weight" and checkpoint.config.tie_word_embeddings
    return tied_copy or name.endswith("rotary_emb.inv_freq")


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path} is missing: this is not a Hugging Face model folder.")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    return value


def _dtype(raw: dict[str, Any]) -> torch.dtype:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not supported")
    return DTYPES[name]


def _ids(*values: int | list[int] | None) -> tuple[int, ...]:
    """Every id named by any of the files, once, in order."""
    ids: dict[int, None] = {}
    for value in values:
        for token in value if isinstance(value, list) else [value]:
            if token is not None:
                ids[int(token)] = None
    return tuple(ids)


def _tokenizer_size(path: Path) -> int | None:
    """One more than the largest token id, or None without a tokenizer."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    raw = _read_json(file, required=True)
    try:
        vocab = raw["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        ids += [token["id"] for token in raw.get("added_tokens") or []]
        return max(ids) + 1
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is not a usable tokenizer: {error!r}.") from error
