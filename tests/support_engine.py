"""Tiny checkpoints, drafters of every temper, and a loop that runs an engine dry."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from skippy.engine import Engine, Request, SequenceOutput, StepStats
from skippy.engine.adapter import AdapterConfig, S3DAdapter
from skippy.engine.adapter_files import BESIDE_MODEL, save_adapter
from skippy.engine.families import parse_config
from skippy.engine.model import CausalLM
from skippy.engine.runner import Rows
from skippy.engine.sampling import RowGroup, choose
from skippy.engine.sequence import Sequence
from skippy.engine.shape import full_plan
from skippy.engine.weights import open_checkpoint

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}


def write_checkpoint(folder: Path, **changes: Any) -> Path:
    """A random Llama in `folder`, under TINY_CONFIG with `changes`; a value of None drops the key."""
    config = {k: v for k, v in {**TINY_CONFIG, **changes}.items() if v is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = CausalLM(parse_config(config), 8)
    with torch.no_grad():
        for parameter in model.parameters():
            # Wide enough that logits differ clearly and the text does not settle into a loop at once.
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.dim() == 1 else 0.0))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors")
    return folder


def shard_checkpoint(folder: Path, shards: int, dtype: torch.dtype = torch.float32) -> Path:
    """Cut the weights of a checkpoint into shards of about the same size, with an index."""
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    total, before, index = sum(tensor.nbytes for tensor in tensors.values()), 0, {}
    for name, tensor in tensors.items():
        index[name] = f"model-{before * shards // total + 1:05}-of-{shards:05}.safetensors"
        before += tensor.nbytes
    for file in set(index.values()):
        save_file({name: tensor for name, tensor in tensors.items() if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


TINY_ADAPTER: dict[str, Any] = {
    "skip_start": 1,
    "skip_end": 2,
    "num_speculative_tokens": 6,
    "lora_rank": 2,
    "head_size": 16,
    "bridge_rank": 2,
    "recurrent": True,
}


def random_adapter(base: Path, seed: int = 0, scale: float = 0.02, **changes: Any) -> S3DAdapter:
    """An adapter under TINY_ADAPTER with `changes` for the model in `base`, no parameter of it zero.

    The larger the scale, the less a draft has to do with the model.
    """
    adapter = S3DAdapter(AdapterConfig(**{**TINY_ADAPTER, **changes}), open_checkpoint(str(base)).config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        adapter.masks.mul_(0.2 / scale)  # like the embeddings
    if adapter.draft_ids is not None:
        adapter.draft_ids = torch.randperm(adapter.vocab_size, generator=generator)[: len(adapter.draft_ids)]
    return adapter


def write_adapter(base: Path, folder: Path | None = None, **changes: Any) -> Path:
    """A `random_adapter` on disk, beside its model unless a folder is given."""
    folder = folder or base / BESIDE_MODEL
    save_adapter(folder, random_adapter(base, **changes), open_checkpoint(str(base)), {"steps": 0})
    return folder


def run_dry(
    engine: Engine,
    requests: Iterable[Request],
    at_once: int = 1_000_000,
    on_step: Callable[[StepStats], None] = lambda _: None,
) -> dict[tuple[str, int], list[SequenceOutput]]:
    """Every output of every choice, with at most `at_once` requests in flight; all must end well."""
    waiting = list(requests)[::-1]
    live: set[str] = set()
    outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
    open_choices: dict[str, int] = {}
    while waiting or engine.has_work:
        while waiting and len(live) < at_once:
            request = waiting.pop()
            engine.add(request)
            live.add(request.request_id)
            open_choices[request.request_id] = request.n
        step = engine.step()
        on_step(step.stats)
        for output in step.outputs:
            outputs.setdefault((output.request_id, output.index), []).append(output)
            if output.finish_reason is not None:
                assert output.finish_reason != "error", output.error
                open_choices[output.request_id] -= 1
                if not open_choices[output.request_id]:
                    live.discard(output.request_id)
    engine.check()
    return outputs


def tokens_of(outputs: dict[tuple[str, int], list[SequenceOutput]]) -> dict[tuple[str, int], list[int]]:
    return {choice: [t for output in parts for t in output.token_ids] for choice, parts in outputs.items()}


class EchoDrafter:
    """Drafts the newest token again and again."""

    name = "echo"

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        return [[s.tokens[-1]] * limit for s, limit in zip(sequences, limits, strict=True)]


class OracleDrafter:
    """Knows the answers, and drafts them."""

    name = "oracle"

    def __init__(self, answers: dict[tuple[str, int], list[int]]) -> None:
        self._answers = answers

    def foresee(self, sequence: Sequence, limit: int) -> list[int]:
        answer = self._answers[sequence.request.request_id, sequence.index]
        return answer[sequence.num_output : sequence.num_output + limit]

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        return [self.foresee(s, limit) for s, limit in zip(sequences, limits, strict=True)]


class WrongDrafter(OracleDrafter):
    """Knows the answers, and drafts anything else."""

    name = "wrong"

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        return [[max(0, token - 1) or 3 for token in draft] for draft in super().propose(sequences, limits)]


class OffByOneDrafter(OracleDrafter):
    """Drafts the answers one place late, so that a slip of one in the engine would look right."""

    name = "off-by-one"

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        return [[s.tokens[-1], *self.foresee(s, n)][:n] for s, n in zip(sequences, limits, strict=True)]


class RandomDrafter(OracleDrafter):
    """Drafts of random length, right up to a random place and random from there on."""

    name = "random"

    def __init__(self, answers: dict[tuple[str, int], list[int]], vocab_size: int, seed: int = 0) -> None:
        super().__init__(answers)
        self._random = random.Random(seed)
        self._vocab_size = vocab_size

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        drafts = super().propose(sequences, [self._random.randint(0, limit) for limit in limits])
        for draft in drafts:
            for place in range(self._random.randint(0, len(draft)), len(draft)):
                draft[place] = self._random.randrange(self._vocab_size)
        return drafts


class IdentityDrafter:
    """The whole model drafts one token: the verifier must agree with itself."""

    name = "identity"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        assert all(limits)
        runner = self._engine.runner
        rows = [Rows([s.tokens[-1]], s.computed, s.table, 1) for s in sequences]
        logits = runner.run(rows, full_plan(runner.model.config))
        return choose(logits, [RowGroup(self._engine.states[s], len(s.tokens)) for s in sequences])
