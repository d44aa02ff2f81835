"""The model that is pretrained: transformers' own, from a folder's configuration, maybe grown in depth."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from skippy.engine.errors import ConfigError
from skippy.engine.loading import weight_files
from skippy.engine.training import causal_attention

_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def new_model(config: Mapping[str, Any], device: torch.device) -> LlamaForCausalLM:
    """A model of random float32 weights, as transformers draws them; drawn on the CPU, put on `device`.

    Raises:
        ConfigError: it is none of the Llama family.
    """
    if config.get("model_type") != "llama":
        raise ConfigError(f"model_type {config.get('model_type')!r} cannot be pretrained here; it must be 'llama'.")
    llama = LlamaConfig.from_dict({**config, "dtype": "float32", "use_cache": False})
    llama._attn_implementation = causal_attention.register() if device.type == "cpu" else "sdpa"
    model = LlamaForCausalLM(llama)
    nn.Module.to(model, device)  # transformers' own `to` has no types
    return model


def layer_origins(old: int, new: int) -> list[tuple[int, bool]]:
    """For every layer of a grown model, the old layer it comes from, and whether it is added.

    The added ones stand evenly between the old ones, each behind the one it is copied from.

    Raises:
        ConfigError: there are fewer new layers than old, or more than twice as many.
    """
    if not old <= new <= 2 * old:
        raise ConfigError(f"a model of {old} layers can grow to {old} to {2 * old}, not {new}.")
    added = {(2 * i + 1) * old // (2 * (new - old)) for i in range(new - old)}
    return [(layer, copy) for layer in range(old) for copy in ((False, True) if layer in added else (False,))]


def grow(model: LlamaForCausalLM, weights: Mapping[str, Tensor], old: int) -> None:
    """Fill a model with the weights of one with `old` layers, so that it computes the same function.

    An added layer is a copy of the one before it whose output projections are zero: the residual stream
    passes it unchanged, and training decides what it becomes (block expansion, arXiv 2401.02415).

    Raises:
        ConfigError: as `layer_origins`, or the weights do not fit.
    """
    origins = layer_origins(old, model.config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            added = False
            if parts[1] == "layers":
                source, added = origins[int(parts[2])]
                parts[2] = str(source)
            weight = weights.get(".".join(parts))
            if weight is None or weight.shape != parameter.shape:
                raise ConfigError(f"the weights to begin with do not fit {name} of shape {list(parameter.shape)}.")
            if added and parts[-2] in ("o_proj", "down_proj"):
                parameter.zero_()
            else:
                parameter.copy_(weight)


def average(model: LlamaForCausalLM, other: Path) -> None:
    """Move the weights half way to those of the model in another folder.

    The mean of two states of one training is often better than either (arXiv 2203.05482).

    Raises:
        ConfigError: the other is no model of the same shape.
    """
    weights = {name: weight for file in weight_files(other) for name, weight in load_file(file).items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = weights.get(name)
            if weight is None or weight.shape != parameter.shape:
                raise ConfigError(f"the model in {other} has no {name} of shape {list(parameter.shape)}.")
            parameter.lerp_(weight.to(parameter), 0.5)


def export(folder: Path, source: Path, config: Mapping[str, Any], model: LlamaForCausalLM) -> None:
    """Write a checkpoint folder: bfloat16 weights, config.json and the tokenizer of the folder `source`.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach().to("cpu", torch.bfloat16) for name, parameter in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n", encoding="utf-8")
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
