"""Everything is sized once, at start; what cannot be met is refused with what to change."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support_engine import TINY_CONFIG, write_checkpoint

from skippy.engine import CheckpointError, ConfigError, EngineConfig
from skippy.engine.build import CPU_KV_BYTES, Build, _dtype, build, gpu_dtype
from skippy.engine.weights import open_checkpoint

BLOCK_BYTES = 2 * 3 * 32 * 2 * 16 * 4
"""Keys and values, layers, tokens, KV heads, head_dim, float32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


def build_with(folder: Path, **changes: Any) -> Build:
    return build(EngineConfig(**{"model": str(folder), "device": "cpu", "dtype": "float32", **changes}))


class TestDtypeAndDevice:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_dtype_asked_for_is_that_of_weights_and_cache(self, folder: Path, dtype: str) -> None:
        runner = build_with(folder, dtype=dtype).runner
        assert runner.pool.keys.dtype == runner.pool.values.dtype == getattr(torch, dtype)
        assert runner.model.model.embed_tokens.weight.dtype == getattr(torch, dtype)

    @pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
    def test_on_cpu_auto_is_float32_whatever_is_stored(self, tmp_path: Path, stored: str) -> None:
        folder = write_checkpoint(tmp_path, dtype=stored)
        assert build_with(folder, dtype="auto").runner.pool.keys.dtype == torch.float32

    def test_half_precision_is_refused_on_cpu(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match=r"float16 .* CPU; use float32 or bfloat16"):
            build_with(folder, dtype="float16")

    def test_without_a_gpu_cuda_is_refused_and_auto_is_the_cpu(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ConfigError, match="device is cuda, but PyTorch finds no usable GPU"):
            build_with(folder, device="cuda")
        assert build_with(folder, device="auto").runner.pool.keys.device.type == "cpu"

    def test_on_a_gpu_a_block_has_a_multiple_of_8_tokens(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(ConfigError, match="block_size must be a multiple of 8 on a GPU, got 12"):
            build_with(folder, device="cuda", block_size=12)

    def test_the_number_of_threads_is_set(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[int] = []
        monkeypatch.setattr(torch, "set_num_threads", asked.append)
        build_with(folder)
        assert asked == []
        build_with(folder, num_threads=3)
        assert asked == [3]

    @pytest.mark.parametrize(
        ("capability", "stored", "taken"),
        [((7, 5), "bfloat16", "float16"), ((8, 6), "bfloat16", "bfloat16"), ((7, 5), "float32", "float32")],
    )
    def test_a_gpu_without_bfloat16_takes_float16(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], stored: str, taken: str
    ) -> None:
        checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, dtype=stored)))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        assert _dtype(EngineConfig(), checkpoint, torch.device("cuda")) == getattr(torch, taken)

    def test_a_gemma_does_not_fit_into_float16(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, dtype="bfloat16")))
        gemma = replace(checkpoint, config=replace(checkpoint.config, norm_offset=1.0))
        assert gpu_dtype(gemma, has_bfloat16=False) == torch.float32
        assert gpu_dtype(gemma, has_bfloat16=True) == torch.bfloat16

    def test_a_gpu_that_is_too_small_is_told_with_a_way_out(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the manual.")

        monkeypatch.setattr("skippy.engine.build._load", load)
        with pytest.raises(ConfigError, match=r"does not fit .*2\.00 GiB.*quantization int8 or nf4"):
            build_with(folder)


class TestCache:
    def test_it_is_no_larger_than_all_places_can_use(self, folder: Path) -> None:
        built = build_with(folder, max_num_seqs=3)
        assert built.runner.pool.num_blocks == 3 * 256 // 32
        assert built.max_model_len == TINY_CONFIG["max_position_embeddings"]

    def test_blocks_that_are_not_quite_filled_count(self, folder: Path) -> None:
        assert build_with(folder, max_num_seqs=3, max_model_len=100).runner.pool.num_blocks == 3 * 4
        assert build_with(folder, max_num_seqs=3, block_size=24).runner.pool.num_blocks == 3 * 11

    @pytest.mark.parametrize(("blocks", "spare"), [(12, 0), (12, BLOCK_BYTES - 1), (8, 0)])
    def test_it_keeps_within_the_memory_allowed(self, folder: Path, blocks: int, spare: int) -> None:
        budget = (blocks + 1) * BLOCK_BYTES + spare
        pool = build_with(folder, kv_cache_memory_bytes=budget).runner.pool
        assert pool.num_blocks == blocks, "one more takes what padding rows write"
        assert budget - BLOCK_BYTES < pool.num_bytes <= budget

    def test_one_sequence_of_full_length_may_have_half_of_what_the_host_has_left(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("skippy.engine.build.CPU_KV_BYTES", 3 * BLOCK_BYTES)
        for available, blocks in ((0, 2), (10 * BLOCK_BYTES, 4), (18 * BLOCK_BYTES, 8), (1000 * BLOCK_BYTES, 8)):
            monkeypatch.setattr("skippy.engine.build.available_bytes", lambda available=available: available)
            assert build_with(folder).runner.pool.num_blocks == blocks
            assert build_with(folder).max_model_len == 32 * blocks

    def test_the_cpu_has_an_allowance_of_its_own(self, folder: Path) -> None:
        pool = build_with(folder, max_num_seqs=100_000, max_num_batched_tokens=100_000).runner.pool
        assert CPU_KV_BYTES - BLOCK_BYTES < pool.num_bytes <= CPU_KV_BYTES

    def test_bfloat16_holds_twice_as_much(self, folder: Path) -> None:
        blocks = [
            build_with(folder, kv_cache_memory_bytes=20 * BLOCK_BYTES, dtype=dtype).runner.pool.num_blocks
            for dtype in ("float32", "bfloat16")
        ]
        assert blocks == [19, 39]

    def test_memory_for_less_than_a_block_is_refused(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match=f"two blocks of 32 tokens need {2 * BLOCK_BYTES}"):
            build_with(folder, kv_cache_memory_bytes=2 * BLOCK_BYTES - 1)


class TestContext:
    def test_it_may_be_shorter_than_the_model_allows(self, folder: Path) -> None:
        assert build_with(folder, max_model_len=77).max_model_len == 77

    def test_longer_than_the_model_allows_is_refused(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="max_model_len 257 exceeds the 256 positions of the model"):
            build_with(folder, max_model_len=257)

    def test_it_shrinks_to_the_cache_and_says_so(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "skippy.engine"):
            assert build_with(folder, kv_cache_memory_bytes=4 * BLOCK_BYTES).max_model_len == 3 * 32
        assert "context 96 of 256" in caplog.text

    def test_thousands_are_set_apart(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = write_checkpoint(tmp_path, max_position_embeddings=131_072)
        with caplog.at_level(logging.INFO, "skippy.engine"):
            built = build_with(folder, kv_cache_memory_bytes=976 * BLOCK_BYTES)
        assert built.max_model_len == 31_200
        assert "context 31,200 of 131,072" in caplog.text

    def test_it_is_said_where_all_of_it_fits(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "skippy.engine"):
            build_with(folder)
        assert "context 256 of 256" in caplog.text

    def test_asked_for_it_does_not_shrink(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="100 needs 4 KV blocks, and the cache has 3: at most 96 fits"):
            build_with(folder, kv_cache_memory_bytes=4 * BLOCK_BYTES, max_model_len=100)
        built = build_with(folder, kv_cache_memory_bytes=4 * BLOCK_BYTES, max_model_len=96)
        assert built.max_model_len == 96


def test_a_damaged_checkpoint_is_no_matter_of_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        build_with(tmp_path)
