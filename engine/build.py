"""From a configuration to a model on a device with a cache: everything sized once, at start."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from skippy.engine.adapter import S3DAdapter
from skippy.engine.adapter_files import adapter_folder, load_adapter
from skippy.engine.attention import SDPAAttention
from skippy.engine.config import EngineConfig
from skippy.engine.eagle import EagleHead, is_eagle, load_eagle
from skippy.engine.errors import ConfigError
from skippy.engine.kv import KVPool
from skippy.engine.linear import Tiling
from skippy.engine.loading import Report
from skippy.engine.memory import available_bytes, return_freed
from skippy.engine.model import CausalLM
from skippy.engine.quant import pack_as
from skippy.engine.runner import Runner
from skippy.engine.shape import ModelConfig
from skippy.engine.weights import Checkpoint, load_model, open_checkpoint

CPU_KV_BYTES = 256 * 2**20
"""Of a cache in the host's memory, unless one sequence of full length needs more and the memory is there."""
CUDA_RESERVE_BYTES = 512 * 2**20
"""Left for activations and the allocator's rounding on a GPU."""

BFLOAT16_CAPABILITY = (8, 0)
"""Compute capability from which on a GPU multiplies bfloat16 (Ampere; a T4 has 7.5)."""
LESS_MEMORY = "quantization int8 or nf4 makes the weights smaller, and `skippy plan` tells beforehand what fits"

logger = logging.getLogger("skippy.engine")


Reserve = Callable[[Checkpoint, S3DAdapter | None, torch.device], int]


@dataclass(frozen=True, slots=True)
class Build:
    checkpoint: Checkpoint
    runner: Runner
    max_model_len: int
    adapter: S3DAdapter | None
    eagle: EagleHead | None
    eagle_cache: Runner | None
    """The layout and attention of the head's own cache."""


def build(config: EngineConfig, report: Report | None = None, reserve: Reserve | None = None) -> Build:
    """Load the model and lay out the cache.

    Args:
        report: is told how much of the model is read.
        reserve: how many bytes the cache leaves for what is made later.

    Raises:
        CheckpointError: the model cannot be loaded.
        AdapterError: there is an adapter, but it is damaged or of another shape.
        ConfigError: the configuration cannot be met on this machine.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = choose_device(config)
    if device.type == "cuda":
        _prepare_gpu(config)
    checkpoint = open_checkpoint(config.model, config.revision)
    dtype = _dtype(config, checkpoint, device)
    wanted_len = wanted_context(config, checkpoint)
    with _shortage_explained(config):
        adapter, eagle = _trained_parts(config, checkpoint, dtype, device, wanted_len)
        model, tiling = _load(config, checkpoint, adapter, dtype, device, wanted_len, report)
        reserved = reserve(checkpoint, adapter, device) if reserve else 0
        num_blocks = _num_blocks(config, checkpoint, eagle, dtype, device, wanted_len, reserved)
        max_model_len = _fitting_len(config, wanted_len, num_blocks)
        logger.info("context %s of %s", f"{max_model_len:,}", f"{checkpoint.config.max_position_embeddings:,}")
        lay_out = partial(_lay_out, model, num_blocks, config.block_size, max_model_len, dtype, device)
        runner = lay_out(model.config, tiling)
        # A layer of its own in as many blocks; its rows need not be the same to the bit.
        eagle_cache = None if eagle is None else lay_out(eagle.config.layer, Tiling(1, 2**31))
    return Build(checkpoint, runner, max_model_len, adapter, eagle, eagle_cache)


def _prepare_gpu(config: EngineConfig) -> None:
    """Refuse what attention on a GPU cannot take, and choose among its kernels, for the whole process."""
    # Attention reads its mask in vectors of 16 bytes.
    if config.block_size % 8:
        raise ConfigError(f"block_size must be a multiple of 8 on a GPU, got {config.block_size}.")
    # cuDNN plans anew, for milliseconds, at every number of rows and blocks, and keeps every plan.
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def _shortage_explained(config: EngineConfig) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{config.model} does not fit into the memory of the GPU ({str(error).splitlines()[0]}): {LESS_MEMORY}."
        ) from error


def wanted_context(config: EngineConfig, checkpoint: Checkpoint) -> int:
    """The longest context that is wanted, whether or not it fits.

    Raises:
        ConfigError: the model has fewer positions.
    """
    positions = checkpoint.config.max_position_embeddings
    wanted = config.max_model_len or positions
    if wanted > positions:
        raise ConfigError(f"max_model_len {wanted} exceeds the {positions} positions of the model.")
    return wanted


def _trained_parts(
    config: EngineConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, wanted_len: int
) -> tuple[S3DAdapter | None, EagleHead | None]:
    """What was trained to draft for the model, and is to be used."""
    if config.learn is not None:
        return _learnt_adapter(config, checkpoint, dtype, device), None
    wanted = config.adapter is not None or config.drafter != "none"
    folder = adapter_folder(checkpoint.path, config.adapter) if wanted else None
    if folder is None:
        return None, None
    if is_eagle(folder):
        return None, load_eagle(folder, checkpoint, dtype, device, wanted_len)
    return load_adapter(folder, checkpoint, dtype, device), None


def _load(
    config: EngineConfig,
    checkpoint: Checkpoint,
    adapter: S3DAdapter | None,
    dtype: torch.dtype,
    device: torch.device,
    wanted_len: int,
    report: Report | None,
) -> tuple[CausalLM, Tiling]:
    """The model, packed layer by layer as it is read, and the row counts that suit its products."""
    pack_layers = pack_as(config.quantization)

    def finish_layer(model: CausalLM, layer: int) -> None:
        # Folded matrices of their own would take the memory that quantisation saves.
        if adapter is not None and device.type == "cpu" and not adapter.config.fused and pack_layers is None:
            adapter.fold(model, layer)
        model.pack_layer(layer, pack_layers)
        return_freed()

    model = load_model(checkpoint, dtype, device, wanted_len, finish_layer=finish_layer, report=report)
    if adapter is not None and adapter.head is not None and device.type == "cpu":
        adapter.head.pack()
    # An adapter that is yet to be learnt has a head, too.
    has_head = config.learn is not None or (adapter is not None and adapter.head is not None)
    tiling = model.pack(
        checkpoint.vocab_size,
        draft_ids=adapter.draft_ids if adapter else None,
        keep_head_rows=has_head and not checkpoint.config.tie_word_embeddings,
        pack_layers=pack_layers,
    )
    return_freed()
    return model, tiling


def _lay_out(
    model: CausalLM,
    num_blocks: int,
    block_size: int,
    max_len: int,
    dtype: torch.dtype,
    device: torch.device,
    shape: ModelConfig,
    tiling: Tiling,
) -> Runner:
    """A cache for layers of one shape, and what computes passes over it."""
    pool = KVPool(
        shape.num_hidden_layers, num_blocks, block_size, shape.num_key_value_heads, shape.head_dim, dtype, device
    )
    attention = SDPAAttention(
        pool, shape.num_attention_heads, max_len, shape.attention_scale, shape.windows, shape.attention_softcap
    )
    return Runner(model, pool, attention, tiling)


def _learnt_adapter(
    config: EngineConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> S3DAdapter | None:
    """What learning begins with: the adapter in its own folder, else the one that would be used without."""
    assert config.learn is not None
    given = config.adapter
    if (Path(os.path.expanduser(config.learn)) / "adapter.json").exists():
        if given is not None:
            logger.info("learning goes on with the adapter in %s, not with %s", config.learn, given)
        given = config.learn
    folder = adapter_folder(checkpoint.path, given)
    if folder is None:
        return None
    if is_eagle(folder):
        raise ConfigError(f"{given} holds an EAGLE-3 head, which cannot learn here; --learn needs an adapter for s3d.")
    adapter = load_adapter(folder, checkpoint, dtype, device)
    if adapter.config.fused:
        raise ConfigError("A fused adapter cannot learn from what is served: use skippy train --fused.")
    return adapter


def choose_device(config: EngineConfig) -> torch.device:
    """Where the model runs.

    Raises:
        ConfigError: it is asked for on a GPU, and there is none.
    """
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device is cuda, but PyTorch finds no usable GPU (or is a CPU build).")
    return torch.device("cuda")


def _dtype(config: EngineConfig, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        if dtype == torch.float16 and device.type == "cpu":
            raise ConfigError("float16 is not supported on CPU; use float32 or bfloat16.")
        return dtype
    if device.type == "cuda":
        taken = gpu_dtype(checkpoint, torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY)
        if taken != checkpoint.dtype:
            name = str(taken).removeprefix("torch.")
            logger.info("dtype %s: this GPU computes bfloat16, the checkpoint's, only by detours", name)
        return taken
    # float32 sums over packed float16 weights read as few bytes as bfloat16, with fewer conversions.
    return torch.float32


def gpu_dtype(checkpoint: Checkpoint, has_bfloat16: bool) -> torch.dtype:
    """What `auto` takes on a GPU."""
    if has_bfloat16 or checkpoint.dtype != torch.bfloat16:
        return checkpoint.dtype
    # The hidden states of a Gemma exceed the range of float16 (huggingface/transformers issue 36822).
    return torch.float32 if checkpoint.config.norm_offset else torch.float16


def cpu_cache_bytes(longest: int, available: int) -> int:
    """The size of a cache in the host's memory, of which so many bytes are available.

    Args:
        longest: what one sequence of full length needs.
    """
    return max(CPU_KV_BYTES, min(longest, available // 2))


def _block_bytes(config: EngineConfig, shape: ModelConfig, eagle: EagleHead | None, dtype: torch.dtype) -> int:
    """Keys and values of a block, those of an EAGLE-3 head included."""
    values = shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    if eagle is not None:
        values += eagle.config.layer.num_key_value_heads * eagle.config.layer.head_dim
    return 2 * values * config.block_size * dtype.itemsize


def _num_blocks(
    config: EngineConfig,
    checkpoint: Checkpoint,
    eagle: EagleHead | None,
    dtype: torch.dtype,
    device: torch.device,
    max_len: int,
    reserve: int,
) -> int:
    """Blocks within the memory allowed, less a reserve in bytes; no more than max_num_seqs full sequences can use."""
    block_bytes = _block_bytes(config, checkpoint.config, eagle, dtype)
    usable = config.max_num_seqs * -(-max_len // config.block_size)
    if config.kv_cache_memory_bytes is not None:
        budget = config.kv_cache_memory_bytes
    elif device.type == "cpu":
        longest = (-(-max_len // config.block_size) + 1) * block_bytes
        budget = cpu_cache_bytes(longest, max(0, available_bytes() - reserve))
    else:
        torch.cuda.empty_cache()  # else what loading left there would count as taken
        free, total = torch.cuda.mem_get_info(device)
        budget = int(free - (1.0 - config.gpu_memory_utilization) * total) - CUDA_RESERVE_BYTES - reserve
    blocks = min(usable, budget // block_bytes - 1)  # one more block takes what padding rows write
    if blocks < 1:
        raise ConfigError(
            f"{max(budget, 0)} bytes are left for the KV cache, and two blocks of {config.block_size} tokens need "
            f"{2 * block_bytes}: {LESS_MEMORY}."
        )
    return blocks


def _fitting_len(config: EngineConfig, wanted_len: int, num_blocks: int) -> int:
    """The longest context: what is wanted, or what the blocks hold if nothing in particular is asked for."""
    longest = min(wanted_len, num_blocks * config.block_size)
    if config.max_model_len is not None and longest < wanted_len:
        raise ConfigError(
            f"max_model_len {wanted_len:,} needs {-(-wanted_len // config.block_size):,} KV blocks, and the cache has "
            f"{num_blocks:,}: at most {longest:,} fits, which auto takes; or raise kv_cache_memory_bytes."
        )
    return longest
