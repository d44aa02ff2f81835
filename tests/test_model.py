"""The decoder against transformers' own, family trait by family trait."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support_engine import TINY_CONFIG, write_checkpoint
from torch import Tensor
from transformers import LlamaForCausalLM

from skippy.engine import EngineConfig
from skippy.engine.build import build
from skippy.engine.reference import reference_logits
from skippy.engine.runner import Rows
from skippy.engine.shape import full_plan
from skippy.engine.tensors import TokenBatch
from skippy.engine.weights import load_model, open_checkpoint

CPU = torch.device("cpu")
TEXT = torch.randint(TINY_CONFIG["vocab_size"], (150,), generator=torch.Generator().manual_seed(0)).tolist()
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

TRAITS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one KV head": {"num_key_value_heads": 1},
    "as many KV heads": {"num_key_value_heads": 4},
    "KV heads not said": {"num_key_value_heads": None},
    "attention bias": {"attention_bias": True},
    "MLP bias": {"mlp_bias": True},
    "tied embeddings": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 32},
    "narrow heads": {"head_dim": 8},
    "large theta": {"rope_theta": 500000.0},
    "llama3 rope": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "rope as before": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "rope of transformers 5": {"rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 10000.0}},
    "large epsilon": {"rms_norm_eps": 1e-2},
}


@pytest.fixture(params=list(TRAITS.values()), ids=list(TRAITS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, **request.param)


def theirs(folder: Path) -> Tensor:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return model(torch.tensor([TEXT])).logits[0]  # type: ignore[no-any-return]


def packed(folder: Path) -> Tensor:
    """Through pool, attention and fused products, the text in two chunks."""
    built = build(EngineConfig(model=str(folder), device="cpu", dtype="float32", block_size=16, max_num_seqs=2))
    table, plan = list(range(10))[::-1], full_plan(built.checkpoint.config)
    chunks = [Rows(TEXT[:70], 0, table, 70), Rows(TEXT[70:], 70, table, 80)]
    return torch.cat([built.runner.run([chunk], plan) for chunk in chunks])


def test_logits_equal_those_of_transformers(folder: Path) -> None:
    expected = theirs(folder)
    assert expected.std() > 0.5, "the logits tell tokens apart"
    checkpoint = open_checkpoint(str(folder))
    unpacked = reference_logits(load_model(checkpoint, torch.float32, CPU, 256), TEXT)
    torch.testing.assert_close(unpacked, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(packed(folder), expected, rtol=0, atol=1e-4)


def test_rope_scaling_changes_the_logits(tmp_path: Path) -> None:
    """So that a scaling which both sides ignored would not pass for agreement."""
    plain = packed(write_checkpoint(tmp_path / "plain"))
    for name in ("llama3 rope", "linear rope", "rope of transformers 5"):
        scaled = packed(write_checkpoint(tmp_path / name, **TRAITS[name]))
        assert not torch.allclose(plain, scaled, atol=0.1), name


def test_bfloat16_is_near(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    built = build(EngineConfig(model=str(folder), device="cpu", dtype="bfloat16", max_num_seqs=1))
    logits = built.runner.run([Rows(TEXT, 0, list(range(5)), len(TEXT))], full_plan(built.checkpoint.config))
    assert logits.dtype == torch.float32
    expected = theirs(folder)
    assert (logits - expected).abs().mean() < 0.05 * expected.std()


class TestPaddedVocabulary:
    """A checkpoint may pad its embedding; the tokenizer says where the tokens end."""

    VOCABULARY = 90

    def checkpoint(self, folder: Path, **changes: Any) -> Path:
        write_checkpoint(folder, **changes)
        vocabulary = {f"t{i}": i for i in range(self.VOCABULARY)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary}}))
        return folder

    @pytest.mark.parametrize("tied", [False, True])
    def test_padded_rows_have_no_logits(self, tmp_path: Path, tied: bool) -> None:
        folder = self.checkpoint(tmp_path, tie_word_embeddings=tied)
        expected = theirs(folder)
        logits = packed(folder)
        assert logits.shape == (len(TEXT), self.VOCABULARY)
        torch.testing.assert_close(logits, expected[:, : self.VOCABULARY], rtol=0, atol=1e-4)

    def test_the_embedding_stays_whole(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(str(self.checkpoint(tmp_path, tie_word_embeddings=True)))
        model = load_model(checkpoint, torch.float32, CPU, 8)
        model.pack(checkpoint.vocab_size)
        assert model.model.embed_tokens.weight.shape[0] == TINY_CONFIG["vocab_size"]

    @pytest.mark.parametrize("tied", [False, True])
    def test_the_heads_rows_can_be_read_after_packing(self, tmp_path: Path, tied: bool) -> None:
        checkpoint = open_checkpoint(str(self.checkpoint(tmp_path, tie_word_embeddings=tied)))
        model = load_model(checkpoint, torch.float32, CPU, 8)
        ids = torch.tensor([[3, 89], [0, 3]])
        expected = model.lm_head.weight[ids]
        model.pack(checkpoint.vocab_size, keep_head_rows=not tied)
        assert torch.equal(model.head_rows(ids), expected)

    def test_rows_of_the_head_that_nobody_reads_are_given_back(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(str(self.checkpoint(tmp_path)))
        model = load_model(checkpoint, torch.float32, CPU, 8)
        model.pack(checkpoint.vocab_size)
        assert model.lm_head.weight.numel() == 0


class TestModule:
    def test_parameters_have_the_names_of_the_checkpoint(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path)
        model = load_model(open_checkpoint(str(folder)), torch.float32, CPU, 8)
        assert set(model.state_dict()) == set(LlamaForCausalLM.from_pretrained(folder).state_dict())

    def test_unpacked_it_can_be_trained(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, attention_bias=True, mlp_bias=True)))
        model = load_model(checkpoint, torch.float32, CPU, 64).requires_grad_(True)
        group = model.config.num_attention_heads // model.config.num_key_value_heads
        rows = torch.arange(5)
        batch = TokenBatch(token_ids=rows, positions=rows, slots=rows, segments=[], logit_rows=rows)

        def mix(layer: int, queries: Tensor, keys_values: Tensor) -> Tensor:
            del layer
            keys, values = keys_values.chunk(2, 1)
            return (queries + (keys + values).repeat(1, group, 1)).flatten(1)

        hidden, _ = model(batch, full_plan(model.config), mix)
        model.logits(hidden).square().sum().backward()  # type: ignore[no-untyped-call]
        idle = [
            name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
        ]
        assert not idle, "every parameter learns"
