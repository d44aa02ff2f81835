"""`skippy plan`: what a model would need and do on a card, from its configuration alone.

No weight is read. Sizes are those that the engine would have; times are a roofline over the
card's datasheet, so bounds that no machine quite reaches.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from skippy.engine.adapter import AdapterConfig, part_sizes
from skippy.engine.build import CUDA_RESERVE_BYTES, cpu_cache_bytes, gpu_dtype, wanted_context
from skippy.engine.config import EngineConfig
from skippy.engine.errors import ConfigError
from skippy.engine.hub import find_model
from skippy.engine.model import CausalLM
from skippy.engine.roofline import (
    CARDS,
    Card,
    Cost,
    ModelSizes,
    Weights,
    beta_eff,
    kv_bytes_per_token,
    loaded_weights,
    tokens_per_step,
)
from skippy.engine.shape import ModelConfig
from skippy.engine.training.display import duration
from skippy.engine.training.estimate import Processor
from skippy.engine.training.here import cost_here
from skippy.engine.training.options import TrainOptions
from skippy.engine.weights import Checkpoint, read_checkpoint

CUDA_CONTEXT_BYTES = 400 * 2**20
"""What a driver keeps for itself on a card in use; no datasheet tells it."""
ACCEPTANCES = (0.6, 0.8)
"""Assumed chances of a drafted token: about those of sampled and of greedy text."""
BATCHES = (1, 4, 16, 64, 256)
CONTEXT = 2048
"""Tokens of each sequence where speed is told."""
CONTEXTS = (2048, 8192, 32768, 131072)
REACHED = 0.7
"""The share of a datasheet's peak that the large products of a training reach, about."""

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """On what to plan, and how to print it.

    Raises:
        ConfigError: there is no such card.
    """

    gpu: str
    json: bool = False

    def __post_init__(self) -> None:
        if self.gpu not in CARDS:
            raise ConfigError(f"gpu is {self.gpu!r}, which is not one of {', '.join(CARDS)}.")


def run_plan(config: EngineConfig, options: PlanOptions) -> int:
    """Print the plan and return 0.

    Raises:
        CheckpointError: there is no such config.json, or its model is not supported.
        ConfigError: the model is not meant for so many positions.
    """
    record = predict(config, options)
    sys.stdout.write(json.dumps(record) + "\n" if options.json else "".join(f"{line}\n" for line in _lines(record)))
    return 0


def model_sizes(config: ModelConfig) -> ModelSizes:
    """What the engine's own module holds for a configuration; nothing is allocated."""
    with torch.device("meta"):
        model = CausalLM(config, 1)
    layers = list(model.model.layers[0].parameters())
    return ModelSizes(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        matrices=tuple((p.shape[0], p.shape[1]) for p in layers if p.dim() == 2),
        vectors=sum(p.numel() for p in model.parameters() if p.dim() == 1),
        kv_width=2 * config.num_key_value_heads * config.head_dim,
        query_width=config.num_attention_heads * config.head_dim,
        head_dim=config.head_dim,
        tied=config.tie_word_embeddings,
    )


# --- what is predicted ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Job:
    """What a plan is made of: a model, a card, and how the one would be loaded onto the other."""

    config: EngineConfig
    options: PlanOptions
    checkpoint: Checkpoint
    card: Card
    sizes: ModelSizes
    itemsize: int
    wanted_len: int
    weights: Weights
    adapter: AdapterConfig

    @property
    def on_cpu(self) -> bool:
        return self.options.gpu == "cpu"

    @property
    def draft_head(self) -> float:
        """The share of the head's rows that drafts read."""
        return (self.adapter.draft_vocab_size or self.sizes.vocab_size) / self.sizes.vocab_size

    @property
    def kept(self) -> int:
        """Layers of a draft pass."""
        return self.sizes.layers - (self.adapter.skip_end - self.adapter.skip_start)

    @property
    def cost(self) -> Cost:
        return Cost.of(self.card, self.sizes, self.weights, self.itemsize, self.config.quantization)

    @property
    def adapter_parameters(self) -> int:
        return sum(part_sizes(self.adapter, self.checkpoint.config).values())

    @property
    def adapter_bytes(self) -> int:
        """In the type of the model; a CPU has as float16, too, its head and the kept layers as changed by LoRA."""
        held = self.adapter_parameters * self.itemsize
        if not self.on_cpu:
            return held
        folded = 2 * self.kept * self.sizes.layer if self.config.quantization == "none" else 0
        return held + folded + 2 * part_sizes(self.adapter, self.checkpoint.config)["head"]


def predict(config: EngineConfig, options: PlanOptions) -> Record:
    """The whole plan: facts of the model and the card, and under "predicted" all that is not.

    Sizes are in bytes and tokens, times in seconds.
    """
    job = _prepare(config, options)
    kv = _predict_kv(job)
    return {
        "plan": config.model,
        "gpu": options.gpu,
        "card": asdict(job.card),
        "quantization": config.quantization,
        "itemsize": job.itemsize,
        "parameters": job.sizes.parameters,
        "max_position_embeddings": job.checkpoint.config.max_position_embeddings,
        "predicted": {
            "weight_bytes": {**asdict(job.weights), "total": job.weights.total},
            "adapter_bytes": job.adapter_bytes,
            "kv": kv,
            "free_rows": job.cost.free_rows,
            "beta_eff": beta_eff(job.weights, job.kept / job.sizes.layers, job.draft_head),
            "speed": _predict_speed(job, kv) if kv["fits"] else [],
            "training": _predict_training(job),
        },
    }


def _prepare(config: EngineConfig, options: PlanOptions) -> _Job:
    checkpoint = read_checkpoint(find_model(config.model, config.revision))
    wanted_len = wanted_context(config, checkpoint)
    on_cpu = options.gpu == "cpu"
    if on_cpu and config.dtype == "float16":
        raise ConfigError("float16 is not supported on CPU; use float32 or bfloat16.")
    card = CARDS[options.gpu]
    auto = torch.float32 if on_cpu else gpu_dtype(checkpoint, card.has_bfloat16)
    dtype: torch.dtype = auto if config.dtype == "auto" else getattr(torch, config.dtype)
    sizes = model_sizes(checkpoint.config)
    stored = checkpoint.dtype.itemsize
    weights = loaded_weights(sizes, dtype.itemsize, stored, config.quantization, wanted_len, on_cpu=on_cpu)
    adapter = TrainOptions().adapter_config(checkpoint.config, sizes.parameters * checkpoint.dtype.itemsize)
    return _Job(config, options, checkpoint, card, sizes, dtype.itemsize, wanted_len, weights, adapter)


def _predict_kv(job: _Job) -> Record:
    """The cache as `build` would size it, and without its limit to max_num_seqs."""
    config, per_token = job.config, kv_bytes_per_token(job.sizes, job.itemsize)
    usable = job.card.memory_bytes
    if not job.on_cpu:
        usable = int(config.gpu_memory_utilization * usable) - CUDA_CONTEXT_BYTES - CUDA_RESERVE_BYTES
    free = usable - job.weights.total - job.adapter_bytes
    budget = free
    if config.kv_cache_memory_bytes is not None:
        budget = config.kv_cache_memory_bytes
    elif job.on_cpu:
        longest = (-(-job.wanted_len // config.block_size) + 1) * config.block_size * per_token
        budget = cpu_cache_bytes(longest, free)
    least = 2 * config.block_size * per_token  # one block takes what padding rows write
    fits = least <= budget <= free
    fitting = budget // (per_token * config.block_size) - 1 if fits else 0
    needed = config.max_num_seqs * -(-job.wanted_len // config.block_size)
    tokens = fitting * config.block_size
    lengths = sorted({length for length in CONTEXTS if length < min(job.wanted_len, tokens)} | {job.wanted_len})
    return {
        "bytes_per_token": per_token,
        "fits": fits,
        "usable_bytes": usable,
        "least_bytes": least,
        "budget_bytes": max(0, budget),
        "num_blocks": min(fitting, needed),
        "tokens": tokens,
        "max_model_len": min(job.wanted_len, tokens),
        "wanted_len": job.wanted_len,
        "sequences_by_length": {length: fitting // -(-length // config.block_size) for length in lengths},
    }


def _predict_speed(job: _Job, kv: Mapping[str, Any]) -> list[Record]:
    """Tokens per second by batch size, plain and drafted as widely as pays at each of ACCEPTANCES."""
    cost, context = job.cost, min(CONTEXT, kv["max_model_len"])
    kept, head, widest = job.kept / job.sizes.layers, job.draft_head, job.adapter.num_speculative_tokens
    fitting = kv["tokens"] // (-(-context // job.config.block_size) * job.config.block_size)
    rows = []
    for batch in BATCHES:
        if batch > max(1, min(fitting, job.config.max_num_seqs)):
            break
        drafted = []
        for acceptance in ACCEPTANCES:
            rates = {
                width: batch * tokens_per_step(acceptance, width) / cost.step_seconds(batch, width, context, kept, head)
                for width in range(widest + 1)
            }
            best = max(rates, key=lambda width: rates[width])
            drafted.append({"acceptance": acceptance, "width": best, "tokens_per_second": rates[best]})
        plain = batch / cost.pass_seconds(batch, batch, context)
        rows.append({"batch": batch, "context": context, "tokens_per_second": plain, "drafted": drafted})
    return rows


def _predict_training(job: _Job) -> Record:
    """Of `skippy train` with its defaults, in bfloat16 as it is there, checkpointing where it must."""
    base, options, memory = job.checkpoint.config, TrainOptions(), job.card.memory_bytes
    processor = Processor(REACHED * job.card.half, job.card.bandwidth)
    available = memory if job.on_cpu else memory - CUDA_CONTEXT_BYTES
    cost = cost_here(base, job.adapter, options, torch.bfloat16, job.config.quantization, memory)
    return {
        "writing_seconds": cost.text.seconds(processor),
        "training_seconds": options.steps * cost.step_seconds(processor),
        "bytes": round(cost.peak_bytes),
        "fits": cost.peak_bytes <= available,
        "gradient_checkpointing": cost.gradient_checkpointing,
        "adapter_parameters": job.adapter_parameters,
    }


# --- how it is told ---------------------------------------------------------------------------------------------


def _lines(record: Record) -> list[str]:
    """The record for people; every line that holds a prediction says so."""
    card, predicted = record["card"], record["predicted"]
    weights, kv, training = predicted["weight_bytes"], predicted["kv"], predicted["training"]
    told = [
        f"{record['plan']}: {record['parameters']:,} parameters, {record['itemsize']} bytes each, quantization "
        f"{record['quantization']}",
        f"{card['name']}: {_gb(card['memory_bytes'])}, {card['bandwidth'] / 1e9:.0f} GB/s, half precision "
        f"{card['half'] / 1e12:g} TFLOPS, int8 {card['int8'] / 1e12:g} TOPS ({card['source']})",
    ]
    parts = ", ".join(f"{name} {_gb(weights[name])}" for name in ("embedding", "head", "layers"))
    lines = [
        f"weights {_gb(weights['total'])} ({parts}); adapter {_gb(predicted['adapter_bytes'])}",
        f"KV cache {kv['bytes_per_token']:,} bytes per token: {kv['tokens']:,} tokens in {_gb(kv['budget_bytes'])}; "
        f"{kv['num_blocks']} blocks can be of use",
        f"context {kv['max_model_len']:,} of {kv['wanted_len']:,}"
        if kv["fits"]
        else f"does not fit: {_gb(kv['usable_bytes'])} can be used, and a cache needs {_gb(kv['least_bytes'])} of them "
        "at least; --quantization int8 or nf4 makes the weights smaller",
        *(f"batch at {length:,} tokens each: {count}" for length, count in kv["sequences_by_length"].items() if count),
        f"rows that cost nothing: {predicted['free_rows']}; a draft pass reads {predicted['beta_eff']:.2f} of "
        "what a plain one reads",
    ]
    for row in predicted["speed"]:
        drafted = ", ".join(
            f"{one['tokens_per_second']:.0f} drafting {one['width']} at acceptance {one['acceptance']}"
            for one in row["drafted"]
        )
        lines.append(
            f"tokens/s at most, batch {row['batch']} of {row['context']:,} tokens: "
            f"{row['tokens_per_second']:.0f} plain, {drafted}"
        )
    fits = "fits" if training["fits"] else "does not fit"
    fits += " with gradient checkpointing" if training["gradient_checkpointing"] else ""
    lines += [
        f"training: {duration(training['writing_seconds'])} to write the texts, "
        f"{duration(training['training_seconds'])} to train {training['adapter_parameters']:,} parameters",
        f"training memory {_gb(training['bytes'])}: {fits}",
    ]
    return told + [f"predicted  {line}" for line in lines]


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
