"""What a training leaves on disk, apart from the adapter. Whoever reads finds whole files.

Every file tells the recipe it was made by, so that nothing is taken up by another one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from skippy.engine.errors import ConfigError, TrainingError
from skippy.engine.training.data import Sample

DATA = "data.safetensors"
CHECKPOINT = "checkpoint.safetensors"
PROGRESS = "progress.jsonl"

Recipe = Mapping[str, Any]
_ABOUT = "skippy"
_UNREADABLE = ("model", "data", "exclude")
"""Parts of a recipe that are told by their hash."""


def save_samples(path: Path, samples: Sequence[Sample], about: Mapping[str, Any]) -> None:
    """Write samples of one length; the tokens as int32 [N, T]."""
    tensors = {
        "tokens": torch.tensor([sample.tokens for sample in samples], dtype=torch.int32),
        "start": torch.tensor([sample.start for sample in samples]),
        "temperature": torch.tensor([sample.temperature for sample in samples], dtype=torch.float64),
        "seed": torch.tensor([sample.seed for sample in samples]),
    }
    save_tensors(path, tensors, about)


def load_samples(path: Path) -> tuple[list[Sample], dict[str, Any]]:
    """What `save_samples` wrote, and what it was told about it.

    Raises:
        TrainingError: the file is missing or damaged.
    """
    tensors, about = load_tensors(path)
    try:
        columns = [tensors[name].tolist() for name in ("tokens", "start", "temperature", "seed")]
    except KeyError as error:
        raise TrainingError(f"{path} holds no training text.") from error
    return [Sample(*row) for row in zip(*columns, strict=True)], about


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a file in one move.

    Raises:
        TrainingError: it cannot be written.
    """
    whole = path.with_suffix(".new")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, whole, {_ABOUT: json.dumps(about)})
        whole.replace(path)
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path} cannot be written: {error}.") from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote.

    Raises:
        TrainingError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_ABOUT])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read: {error}. Remove it to begin anew.") from error


def training_state(
    kind: str, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int
) -> dict[str, Tensor]:
    """What is trained and the optimizers' moments of it, by name; the tensors are not copied.

    Args:
        kind: what is trained is called.
    """
    state = {"step": torch.tensor(step)}
    for name, parameter in module.named_parameters():
        state[f"{kind}.{name}"] = parameter.detach()
        for optimizer in optimizers:
            for moment, value in optimizer.state.get(parameter, {}).items():
                state[f"{moment}.{name}"] = value
    return state


@torch.no_grad()
def load_training_state(
    kind: str, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], state: Mapping[str, Tensor]
) -> int:
    """Take over what `training_state` gave, and return its step.

    Raises:
        KeyError, RuntimeError: it is the state of something else.
    """
    owners = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        part, _, name = key.partition(".")
        found.setdefault(name, {})[part] = value
    for name, parameter in module.named_parameters():
        moments = dict(found[name])
        parameter.copy_(moments.pop(kind))
        if moments:  # before the first step there are none
            owners[id(parameter)].state[parameter] = {
                # AdamW wants its step on the CPU.
                moment: value.clone() if moment == "step" else value.to(parameter.device, copy=True)
                for moment, value in moments.items()
            }
    return int(state["step"])


def check_recipe(path: Path, found: object, wanted: Recipe) -> None:
    """Raise ConfigError unless a file was made by the recipe wanted."""
    if not isinstance(found, dict):
        raise ConfigError(f"{path} was not written by a training: use another folder.")
    for name, value in wanted.items():
        if found.get(name) != value:
            values = "" if name in _UNREADABLE else f" ({found.get(name)}, now {value})"
            raise ConfigError(f"{path} was made with another {name}{values}: use another folder.")


def read_progress(folder: Path, last_step: int) -> set[int]:
    """The steps that have a line; lines of later steps, whose training was lost, are removed.

    Raises:
        TrainingError: the file is damaged or cannot be replaced.
    """
    file = folder / PROGRESS
    if not file.exists():
        return set()
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in lines if json.loads(line)["step"] <= last_step]
        rewritten = file.with_suffix(".new")
        rewritten.write_text("".join(kept), encoding="utf-8")
        rewritten.replace(file)
        return {json.loads(line)["step"] for line in kept}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrainingError(f"{file} cannot be gone on with: {error!r}. Remove it to start a new one.") from error


def append_progress(folder: Path, line: Mapping[str, Any]) -> None:
    """Add one line of JSON."""
    with (folder / PROGRESS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
