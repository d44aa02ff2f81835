"""From a Hugging Face folder to a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from skippy.engine.config import BUILTIN_MODEL
from skippy.engine.errors import CheckpointError
from skippy.engine.model import CausalLM, ModelConfig

ARCHITECTURES = ("LlamaForCausalLM",)
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
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


def resolve(model: str) -> Path:
    """The folder of a model name.

    Raises:
        CheckpointError: there is no such folder.
    """
    path = Path(str(files("skippy.engine") / "builtin")) if model == BUILTIN_MODEL else Path(os.path.expanduser(model))
    if not path.is_dir():
        raise CheckpointError(
            f"There is no model folder {str(path)!r} (and {BUILTIN_MODEL!r} names the built-in model)."
        )
    return path


def open_checkpoint(model: str) -> Checkpoint:
    """Read the configuration of a model folder.

    Raises:
        CheckpointError: the folder, or something in it, is missing, damaged or unsupported.
    """
    path = resolve(model)
    raw = _read_json(path / "config.json", required=True)
    architectures = raw.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else "?"
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path} holds a {architecture}, which is not supported; supported: {', '.join(ARCHITECTURES)}."
        )
    generation = _read_json(path / "generation_config.json", required=False)
    tokens = _tokenizer_size(path)
    try:
        config = parse_config(raw)
        vocab_size = min(config.vocab_size, tokens or config.vocab_size)
        eos = _ids(raw.get("eos_token_id"), generation.get("eos_token_id"))
        bos = _ids(raw.get("bos_token_id"))
        return Checkpoint(
            path=path,
            config=config,
            dtype=_dtype(raw),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=tuple(token for token in eos if 0 <= token < vocab_size),
            vocab_size=vocab_size,
        )
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / 'config.json'} is not a usable configuration: {error!r}.") from error


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """config.json of transformers 4 or 5 to a ModelConfig.

    Raises:
        KeyError: a size is missing.
        ValueError: a setting is not supported.
    """
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {raw['hidden_act']!r} is not supported")
    rope = dict(raw.get("rope_parameters") or {})
    if not rope:
        rope = dict(raw.get("rope_scaling") or {})
        rope["rope_theta"] = raw.get("rope_theta", 10000.0)
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_type {rope['rope_type']!r} is not supported")
    for name in SIZES:
        if int(raw[name]) < 1:
            raise ValueError(f"{name} is {raw[name]}")
    config = ModelConfig(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_hidden_layers=int(raw["num_hidden_layers"]),
        num_attention_heads=int(raw["num_attention_heads"]),
        num_key_value_heads=int(raw.get("num_key_value_heads") or raw["num_attention_heads"]),
        head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // int(raw["num_attention_heads"])),
        max_position_embeddings=int(raw["max_position_embeddings"]),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        rope_parameters=rope,
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
    )
    if config.num_key_value_heads < 1 or config.head_dim < 2 or config.head_dim % 2:
        raise ValueError(f"num_key_value_heads is {config.num_key_value_heads}, head_dim is {config.head_dim}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError("num_attention_heads is not a multiple of num_key_value_heads")
    return config


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, max_len: int) -> CausalLM:
    """The model of a checkpoint, in `dtype` on `device`, not yet packed.

    Raises:
        CheckpointError: a tensor is missing, left over, of the wrong shape or cannot be read.
    """
    with torch.device("meta"):
        model = CausalLM(checkpoint.config, max_len)
    wanted = dict(model.state_dict())
    if checkpoint.config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    loaded, file_of = _read_tensors(checkpoint, wanted, dtype, device)
    for name, tensor in wanted.items():
        if name not in loaded:
            raise CheckpointError(f"{checkpoint.path} lacks the tensor {name!r}.")
        if loaded[name].shape != tensor.shape:
            raise CheckpointError(
                f"{file_of[name]} holds {name!r} in shape {list(loaded[name].shape)}, and config.json implies "
                f"{list(tensor.shape)}."
            )
    if checkpoint.config.tie_word_embeddings:
        loaded["lm_head.weight"] = loaded["model.embed_tokens.weight"]
    spread_heads(loaded, checkpoint.config)
    model.load_state_dict(loaded, assign=True)
    try:
        model.prepare_rope(dtype, device)
    except (ArithmeticError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path / 'config.json'}: unusable rotary settings: {error!r}.") from error
    if checkpoint.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False).eval()


def _read_tensors(
    checkpoint: Checkpoint, wanted: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, Path]]:
    """The wanted tensors of every weight file, and the file that each came from."""
    loaded: dict[str, torch.Tensor] = {}
    file_of: dict[str, Path] = {}
    for file in weight_files(checkpoint.path):
        try:
            with safe_open(file, framework="pt", device=str(device)) as shard:
                for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if name in wanted:
                        tensor = shard.get_tensor(name)
                        if not tensor.is_floating_point():
                            raise CheckpointError(
                                f"{file} holds {name!r} as {tensor.dtype}: quantised, in an unknown way."
                            )
                        loaded[name] = tensor.to(dtype)
                        file_of[name] = file
                    elif not _ignorable(name, checkpoint):
                        raise CheckpointError(f"{file} holds {name!r}, which no Llama model has: is it another family?")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}. Is the download complete?") from error
    return loaded, file_of


def spread_heads(tensors: dict[str, torch.Tensor], config: ModelConfig) -> None:
    """Reorder query heads from h // group == KV head to h % num_kv_heads == KV head.

    So the query heads of one KV head can be read as rows of one product without a copy.
    The function that the layer computes stays the same.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    order = torch.arange(heads).view(kv_heads, heads // kv_heads).t().flatten()
    for name, tensor in tensors.items():
        if ".self_attn.q_proj." in name:
            tensors[name] = tensor.view(heads, -1, *tensor.shape[1:])[order.to(tensor.device)].flatten(0, 1)
        elif name.endswith(".self_attn.o_proj.weight"):
            tensors[name] = tensor.view(len(tensor), heads, -1)[:, order.to(tensor.device)].flatten(1)


def _ignorable(name: str, checkpoint: Checkpoint) -> bool:
    tied_copy = name == "lm_head.weight" and checkpoint.config.tie_word_embeddings
    return tied_copy or name.endswith("rotary_emb.inv_freq")


def weight_files(path: Path) -> list[Path]:
    index_file = path / "model.safetensors.index.json"
    index = _read_json(index_file, required=False)
    names = ["model.safetensors"]
    if index:
        try:
            names = sorted({str(name) for name in index["weight_map"].values()})
        except (KeyError, AttributeError) as error:
            raise CheckpointError(f"{index_file} is not a usable index: {error!r}.") from error
    for name in names:
        if not (path / name).is_file():
            pickles = (
                "; pickled .bin weights are not read, because they can run code" if list(path.glob("*.bin")) else ""
            )
            raise CheckpointError(f"{path} has no {name}{pickles}.")
    return [path / name for name in names]


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
