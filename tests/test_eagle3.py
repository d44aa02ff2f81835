"""EAGLE-3 heads: the published formula in plain PyTorch against what the engine drafts, and exactness."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support_engine import TINY_CONFIG, run_dry, tokens_of, write_checkpoint
from support_exactness import Answers, assert_exact, reference_answers, requests
from torch import Tensor

from skippy.engine import BenchOptions, ConfigError, Engine, EngineConfig, Request, SamplingParams, run_bench
from skippy.engine.drafters import eagle3
from skippy.engine.drafters.eagle3 import MAX_DRAFT, Eagle3Drafter
from skippy.engine.errors import AdapterError
from skippy.engine.reference import _DenseAttention
from skippy.engine.shape import full_plan
from skippy.engine.tensors import TokenBatch
from skippy.engine.weights import load_model, open_checkpoint

HIDDEN, VOCABULARY = TINY_CONFIG["hidden_size"], TINY_CONFIG["vocab_size"]
EAGLE_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "vocab_size": VOCABULARY,
    "draft_vocab_size": 60,
    "tie_word_embeddings": False,
}
DRAFTABLE = [*range(40), *range(70, 90)]
PROMPT = (1, 5, 9, 5, 40, 41, 42, 7)


def write_head(folder: Path, *, embeddings: bool = False, **changes: Any) -> Path:
    """A random head as it is published."""
    config = {**EAGLE_CONFIG, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    hidden, inner, draftable = config["hidden_size"], config["intermediate_size"], config["draft_vocab_size"]
    queries, kv = config["num_attention_heads"] * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    shapes = {
        "fc": (hidden, 3 * config.get("target_hidden_size", hidden)),
        "midlayer.self_attn.q_proj": (queries, 2 * hidden),
        "midlayer.self_attn.k_proj": (kv, 2 * hidden),
        "midlayer.self_attn.v_proj": (kv, 2 * hidden),
        "midlayer.self_attn.o_proj": (hidden, queries),
        "midlayer.mlp.gate_proj": (inner, hidden),
        "midlayer.mlp.up_proj": (inner, hidden),
        "midlayer.mlp.down_proj": (hidden, inner),
        "midlayer.input_layernorm": (hidden,),
        "midlayer.hidden_norm": (hidden,),
        "midlayer.post_attention_layernorm": (hidden,),
        "norm": (hidden,),
        "lm_head": (draftable, hidden),
    }
    if embeddings:
        shapes["embed_tokens"] = (config["vocab_size"], hidden)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    tensors["d2t"] = torch.tensor(DRAFTABLE[:draftable]) - torch.arange(draftable)
    tensors["t2d"] = torch.zeros(config["vocab_size"], dtype=torch.bool)
    save_file(tensors, folder / "model.safetensors")
    return folder


class Reference:
    """The formula of the published code, with no cache: every row is computed anew for every draft."""

    def __init__(self, base: Path, head: Path) -> None:
        self.config = json.loads((head / "config.json").read_text())
        self.w = load_file(head / "model.safetensors")
        checkpoint = open_checkpoint(str(base))
        self.model = load_model(checkpoint, torch.float32, torch.device("cpu"), 256)
        layers = checkpoint.config.num_hidden_layers
        given = self.config.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids")
        self.taps = given or [2, layers // 2, layers - 3]

    def draft(self, tokens: list[int], count: int) -> list[int]:
        states = self.w["fc.weight"]
        features = F.linear(self.features(tokens[:-1]), states)
        behind, drafted = tokens[1:], []
        for _ in range(count):
            out = self.layer(self.embed(behind), features)
            best = int(F.linear(self.norm(out[-1], "norm"), self.w["lm_head.weight"]).argmax())
            drafted.append(best + int(self.w["d2t"][best]))
            features, behind = torch.cat((features, out[-1:])), [*behind, drafted[-1]]
        return drafted

    @torch.inference_mode()
    def features(self, tokens: list[int]) -> Tensor:
        places = torch.arange(len(tokens))
        batch = TokenBatch(torch.tensor(tokens), places, places, [], places)
        _, tapped = self.model(batch, full_plan(self.model.config), _DenseAttention(self.model.config), None, self.taps)
        return torch.cat([tapped[layer] for layer in self.taps], -1)

    def embed(self, tokens: list[int]) -> Tensor:
        own = self.w.get("embed_tokens.weight")
        rows: Tensor = (self.model.model.embed_tokens.weight if own is None else own)[tokens]
        return rows

    def norm(self, x: Tensor, name: str) -> Tensor:
        scaled: Tensor = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        weight: Tensor = self.w[f"{name}.weight"]
        return scaled * weight

    def layer(self, embeds: Tensor, states: Tensor) -> Tensor:
        w, size = self.w, self.config["head_dim"]
        normed = self.norm(states, "midlayer.hidden_norm")
        x = torch.cat((self.norm(embeds, "midlayer.input_layernorm"), normed), -1)
        q, k, v = (F.linear(x, w[f"midlayer.self_attn.{n}_proj.weight"]).view(len(x), -1, size) for n in "qkv")
        inverse = self.config["rope_theta"] ** -(torch.arange(0, size, 2) / size)
        angles = (torch.arange(len(x))[:, None] * inverse).repeat(1, 2)[:, None]

        def rotate(y: Tensor) -> Tensor:
            half = torch.cat((-y[..., size // 2 :], y[..., : size // 2]), -1)
            turned: Tensor = y * angles.cos() + half * angles.sin()
            return turned

        group = q.shape[1] // k.shape[1]
        q, k, v = (y.transpose(0, 1) for y in (rotate(q), rotate(k), v))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
        residual = normed if self.config.get("norm_before_residual") else states
        x = residual + F.linear(out, w["midlayer.self_attn.o_proj.weight"])
        inner = self.norm(x, "midlayer.post_attention_layernorm")
        gate, up = (F.linear(inner, w[f"midlayer.mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        return x + F.linear(F.silu(gate) * up, w["midlayer.mlp.down_proj.weight"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), num_hidden_layers=6)


@pytest.fixture(scope="module")
def answers(base: Path) -> Answers:
    return reference_answers(base)


def engine_with(base: Path, head: Path, **sizes: Any) -> Engine:
    config = {"block_size": 16, **sizes}
    return Engine(EngineConfig(model=str(base), device="cpu", dtype="float32", adapter=str(head), **config))


def test_a_bench_pins_the_head(
    byte_level: Callable[..., tokenizers.Tokenizer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_checkpoint(tmp_path / "base", num_hidden_layers=6, vocab_size=258)
    byte_level().save(str(base / "tokenizer.json"))
    head, prompts = write_head(tmp_path / "head", vocab_size=258), tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abcabc"}')
    options = BenchOptions(str(prompts), ("none", "eagle3:2"), batch_sizes=(1,), max_tokens=4, repeat=1)
    assert run_bench(EngineConfig(model=str(base), adapter=str(head)), options) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["adapter_sha256"] == hashlib.sha256((head / "model.safetensors").read_bytes()).hexdigest()


Recorded = list[tuple[list[int], list[int]]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Every sequence that was drafted for, and its draft."""
    propose = Eagle3Drafter.propose
    drafts: Recorded = []

    def watched(self: Eagle3Drafter, sequences: Any, limits: Any) -> list[list[int]]:
        proposals = propose(self, sequences, limits)
        drafts.extend((list(s.tokens), draft) for s, draft in zip(sequences, proposals, strict=True))
        return proposals

    monkeypatch.setattr(Eagle3Drafter, "propose", watched)
    return drafts


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, {}),
        ({"embeddings": True, "norm_before_residual": True}, {}),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}}, {}),
        ({}, {"max_num_batched_tokens": 9, "max_num_seqs": 3}),
        ({}, {"kv_cache_memory_bytes": 12 * 16 * 7 * 2 * 32 * 4}),
    ],
    ids=["as published", "own embeddings", "other layers", "chunked prompts", "preemption"],
)
def test_it_drafts_what_the_published_formula_drafts(
    base: Path, tmp_path: Path, changes: dict[str, Any], sizes: dict[str, Any], recorded: Recorded
) -> None:
    head = write_head(tmp_path, **changes)
    params = SamplingParams(max_tokens=20, temperature=0.0, seed=0, ignore_eos=True)
    run_dry(engine_with(base, head, **sizes), requests(params, "eagle3", (4, 6)))
    reference = Reference(base, head)
    drafts = [(tokens, draft) for tokens, draft in recorded if draft]
    assert len(drafts) > 60
    assert max(len(draft) for _, draft in drafts) >= 4
    for tokens, draft in drafts[:: len(drafts) // 30]:
        assert draft == reference.draft(tokens, len(draft))


def test_a_shared_prefix_is_drafted_from_as_well(base: Path, tmp_path: Path, recorded: Recorded) -> None:
    head = write_head(tmp_path)
    engine = engine_with(base, head)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    for _ in range(2):
        recorded.clear()
        outputs = run_dry(engine, [Request("r", PROMPT * 6, params, drafter="eagle3", num_speculative_tokens=4)])
    assert outputs["r", 0][-1].cached_tokens == 32
    reference = Reference(base, head)
    for tokens, draft in recorded:
        assert draft == reference.draft(tokens, len(draft))


@pytest.mark.parametrize("min_reach", [0.0, 0.1])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"kv_cache_memory_bytes": 12 * 16 * 7 * 2 * 32 * 4, "enable_prefix_caching": False}],
    ids=["default", "preemption"],
)
def test_no_token_changes(
    base: Path,
    tmp_path: Path,
    answers: Answers,
    min_reach: float,
    sizes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eagle3, "MIN_REACH", min_reach)
    tallies = assert_exact(base, answers, ("eagle3", "hybrid"), adapter=str(write_head(tmp_path)), **sizes)
    for name in ("eagle3", "hybrid"):
        assert 0 < tallies[name].accepted < tallies[name].drafted
        assert (tallies[name].preemptions > 0) == bool(sizes)


def test_who_is_wrong_drafts_less_and_less(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eagle3, "MIN_REACH", 0.1)
    engine = engine_with(base, write_head(tmp_path))
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    request = Request("r", PROMPT, params, drafter="eagle3", num_speculative_tokens=4)
    first, again = (run_dry(engine, [request])["r", 0][-1].counts.drafted for _ in range(2))
    assert first > again
    engine.drafting.forget()
    assert run_dry(engine, [request])["r", 0][-1].counts.drafted == first
    drafter = engine.drafting.drafters["eagle3"]
    assert isinstance(drafter, Eagle3Drafter)
    assert drafter._calibration._open == {}


def test_drafters_of_every_kind_share_a_batch(base: Path, tmp_path: Path) -> None:
    engine = engine_with(base, write_head(tmp_path))
    assert engine.info.drafter == "hybrid"
    assert {"eagle3", "hybrid", "suffix", "recycling"} <= set(engine.info.drafters)
    assert "s3d" not in engine.info.drafters
    params = SamplingParams(max_tokens=20, temperature=0.0)
    names = ("none", "eagle3", "hybrid", "suffix", "eagle3")
    mixed = [Request(f"{i}", PROMPT, params, drafter=name, num_speculative_tokens=4) for i, name in enumerate(names)]
    first, *others = tokens_of(run_dry(engine, mixed)).values()
    assert all(tokens == first for tokens in others)


def test_the_cache_of_the_head_is_counted(base: Path, tmp_path: Path) -> None:
    """Two kv heads of 24 beside six layers of two kv heads of 16."""
    size = 2**20
    plain = Engine(EngineConfig(model=str(base), device="cpu", dtype="float32", kv_cache_memory_bytes=size))
    drafting = engine_with(base, write_head(tmp_path), kv_cache_memory_bytes=size, block_size=32)
    ratio = drafting.info.num_blocks / plain.info.num_blocks
    assert ratio == pytest.approx(6 * 16 / (6 * 16 + 24), abs=0.02)


def test_widths_are_limited(base: Path, tmp_path: Path) -> None:
    assert engine_with(base, write_head(tmp_path)).drafting.widest("eagle3") == MAX_DRAFT


def test_without_a_head_there_is_no_eagle3(base: Path) -> None:
    with pytest.raises(ConfigError, match="eagle3 needs an adapter"):
        Engine(EngineConfig(model=str(base), device="cpu", drafter="eagle3"))


def _with_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def _with_config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return apply


def _as_a_model_of_which_nothing_is_read(folder: Path) -> None:
    _with_config(architectures=["LlamaForCausalLM"])(folder)
    (folder / "model.safetensors").write_bytes(b"no tensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_with_config(architectures=["LlamaForCausalLM"]), "is no adapter"),
        (_as_a_model_of_which_nothing_is_read, "is no adapter"),
        (_with_config(target_hidden_size=32), "hidden_size is 32; this one's is 64"),
        (_with_config(num_hidden_layers=2), "only one is supported"),
        (_with_config(attention_bias=True), "biases are not supported"),
        (_with_config(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}), r"reads the layers \[1, 2, 9\]"),
        (_with_config(draft_vocab_size=50), "missing, left over or of another shape"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a usable configuration"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 20), "cannot be read"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "can run any code"),
        (_with_tensors(lambda t: t.pop("fc.weight")), "fc.weight.* is missing"),
        (_with_tensors(lambda t: t["d2t"].add_(90)), "tokens that the model does not have"),
        (_with_tensors(lambda t: t["norm.weight"].fill_(float("nan"))), "not finite"),
    ],
)
def test_what_cannot_be_used_is_refused(
    base: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(write_head(tmp_path))
    with pytest.raises(AdapterError, match=message):
        engine_with(base, tmp_path)
