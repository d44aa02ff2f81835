"""Every family against transformers' own model of it, under the published settings of named models."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support_engine import random_adapter, run_dry, tokens_of
from support_families import EOS, PUBLISHED, VOCABULARY, WINDOW, tiny, write_family
from torch import Tensor
from transformers import PreTrainedModel

from skippy.engine import CheckpointError, Engine, EngineConfig, Request, SamplingParams
from skippy.engine.build import build
from skippy.engine.families import FAMILIES, parse_config
from skippy.engine.reference import reference_logits
from skippy.engine.runner import Rows, Runner
from skippy.engine.shape import full_plan, skipping_plan
from skippy.engine.training.passes import draft_rows, teach
from skippy.engine.weights import UNUSABLE, load_model, open_checkpoint

CPU = torch.device("cpu")
BLOCK = 16


def text(length: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(0)).tolist()


class Family(NamedTuple):
    name: str
    folder: Path
    theirs: PreTrainedModel


@pytest.fixture(scope="module", params=PUBLISHED)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("family")
    return Family(request.param, folder, write_family(folder, tiny(request.param)))


def expected(theirs: PreTrainedModel, tokens: list[int], last: int = 0) -> Tensor:
    """Logits of the last positions, or of all."""
    with torch.inference_mode():
        return theirs(torch.tensor([tokens]), logits_to_keep=last).logits[0].float()  # type: ignore[no-any-return]


def make_runner(folder: Path, max_len: int = 256) -> Runner:
    sizes: dict[str, Any] = {"block_size": BLOCK, "max_num_seqs": 1, "max_model_len": max_len}
    return build(EngineConfig(model=str(folder), device="cpu", dtype="float32", drafter="none", **sizes)).runner


def computed(runner: Runner, tokens: list[int], first: int, last: int = 0) -> Tensor:
    """Logits of the last positions, or of all, through pool and attention, `first` tokens in a pass of their own."""
    table = list(range(-(-len(tokens) // BLOCK)))[::-1]
    plan = full_plan(runner.model.config)
    logits = runner.run([Rows(tokens[:first], 0, table, 0 if last else first)], plan)
    rest = runner.run([Rows(tokens[first:], first, table, last or len(tokens) - first)], plan)
    return torch.cat((logits, rest)) if len(logits) else rest


class TestAgainstTransformers:
    def test_logits_are_equal_at_every_length(self, family: Family) -> None:
        """On both sides of the window, and of where blocks begin to be skipped."""
        tokens = text(5 * WINDOW)
        wanted = expected(family.theirs, tokens)
        assert wanted.std() > 0.2, "the logits tell tokens apart"
        naive = load_model(open_checkpoint(str(family.folder)), torch.float32, CPU, 256)
        torch.testing.assert_close(reference_logits(naive, tokens), wanted, rtol=0, atol=1e-4)
        logits = computed(make_runner(family.folder), tokens, first=2 * WINDOW + 5)
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)

    def test_greedy_texts_are_equal(self, family: Family) -> None:
        prompts = [text(5), text(WINDOW + 3)[::-1]]
        engine = Engine(EngineConfig(model=str(family.folder), device="cpu", dtype="float32", max_model_len=256))
        params = SamplingParams(max_tokens=24, temperature=0.0)
        ours = tokens_of(run_dry(engine, [Request(str(i), tuple(p), params) for i, p in enumerate(prompts)]))
        for i, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            theirs = family.theirs.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=EOS
            )
            assert ours[str(i), 0] == theirs[0, len(prompt) :].tolist()

    def test_what_transformers_saves_reads_the_same(self, family: Family, tmp_path: Path) -> None:
        family.theirs.config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        saved["architectures"] = [type(family.theirs).__name__]
        assert parse_config(saved) == parse_config(tiny(family.name))


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3 rope": ("Llama-3.1-8B", {"rope_scaling": None}),
    "linear rope": ("Gemma-3-4B", {"rope_scaling": None}),
    "yarn": ("Qwen2.5-7B with YaRN", {"rope_scaling": None}),
    "longrope": ("Phi-3-mini-128k", {"rope_scaling": None}),
    "partial rope": ("Phi-4-mini", {"partial_rotary_factor": 1.0, "rope_scaling": None}),
    "local rope": ("Gemma-3-1B", {"rope_local_base_freq": 1000000}),
    "layers without rope": ("SmolLM3-3B", {"no_rope_layers": [1, 1, 1, 1]}),
    "window": ("Mistral-7B-v0.1", {"sliding_window": None}),
    "alternating windows": ("Gemma-2-9B", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    "attention softcap": ("Gemma-2-9B", {"attn_logit_softcapping": None}),
    "logit softcap": ("Gemma-2-9B", {"final_logit_softcapping": None}),
    "query scale": ("Gemma-2-9B", {"query_pre_attn_scalar": 16}),
    "embedding multiplier": ("Granite-3.3-2B", {"embedding_multiplier": 1.0}),
    "residual multiplier": ("Granite-3.3-2B", {"residual_multiplier": 1.0}),
    "logits scaling": ("Granite-3.3-2B", {"logits_scaling": 1.0}),
}


@pytest.mark.parametrize(("name", "without"), OPTIONS.values(), ids=OPTIONS)
def test_an_option_changes_the_logits(name: str, without: dict[str, Any], tmp_path: Path) -> None:
    """So that a setting which both sides ignored would not pass for agreement; without it they agree as well."""
    tokens = text(4 * WINDOW)
    plain = write_family(tmp_path / "plain", tiny(name, **without))
    logits = computed(make_runner(tmp_path / "plain"), tokens, first=7)
    torch.testing.assert_close(logits, expected(plain, tokens), rtol=0, atol=1e-4)
    write_family(tmp_path / "with", tiny(name))
    assert (computed(make_runner(tmp_path / "with"), tokens, first=7) - logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Qwen2.5-7B", {"max_window_layers": 2}),
        ("Qwen3-8B", {"max_window_layers": 1}),
        ("SmolLM3-3B", {}),
    ],
)
def test_windows_that_published_models_leave_off(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    tokens = text(4 * WINDOW)
    write_family(tmp_path / "plain", tiny(name))
    plain = computed(make_runner(tmp_path / "plain"), tokens, first=7)
    windowed = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": None, **settings}
    theirs = write_family(tmp_path / "with", tiny(name, **windowed))
    logits = computed(make_runner(tmp_path / "with"), tokens, first=7)
    torch.testing.assert_close(logits, expected(theirs, tokens), rtol=0, atol=1e-4)
    assert (logits - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "window"), [("Gemma-3-1B", 512), ("Gemma-3-4B", 1024), ("Phi-3-mini-4k", 2047), ("Mistral-7B-v0.1", 4096)]
)
def test_published_windows(name: str, window: int, tmp_path: Path) -> None:
    tokens, around = text(window + BLOCK + 3), 2 * BLOCK
    raw = tiny(name, window=None, num_hidden_layers=2, layer_types=["sliding_attention"] * 2)
    theirs = write_family(tmp_path, raw)
    theirs.set_attn_implementation("sdpa")
    runner = make_runner(tmp_path, max_len=4096 if "Phi" in name else 5000)
    assert runner.model.config.sliding_window == window
    logits = computed(runner, tokens, first=len(tokens) - around, last=around)
    torch.testing.assert_close(logits, expected(theirs, tokens, around), rtol=0, atol=1e-4)
    short = computed(runner, tokens[: window - 1], first=window - 9, last=8)
    torch.testing.assert_close(short, expected(theirs, tokens[: window - 1], 8), rtol=0, atol=1e-4)


class TestLongrope:
    """Its factors are chosen once, by the longest text there may be, where transformers looks at each text."""

    ORIGINAL = 4096

    @pytest.mark.parametrize("name", ["Phi-3-mini-128k", "Phi-4-mini"])
    def test_the_factors_are_those_of_the_longest_text(self, name: str, tmp_path: Path) -> None:
        raw = tiny(name, window=None, num_hidden_layers=2)
        theirs = write_family(tmp_path, raw)
        theirs.set_attn_implementation("sdpa")
        short, long = text(self.ORIGINAL), text(self.ORIGINAL + 1)
        within, beyond = make_runner(tmp_path, self.ORIGINAL), make_runner(tmp_path, self.ORIGINAL + 1)
        for runner, tokens in ((within, short), (beyond, long)):
            logits = computed(runner, tokens, first=self.ORIGINAL - 8, last=8)
            torch.testing.assert_close(logits, expected(theirs, tokens, 8), rtol=0, atol=1e-4)
        few = text(50)
        torch.testing.assert_close(computed(within, few, first=9), expected(theirs, few), rtol=0, atol=1e-4)
        raw["rope_scaling"]["short_factor"] = raw["rope_scaling"]["long_factor"]
        always_long = expected(write_family(tmp_path / "long", raw), few)
        torch.testing.assert_close(computed(beyond, few, first=9), always_long, rtol=0, atol=1e-4)
        assert (always_long - expected(theirs, few)).abs().max() > 1e-2

    def test_dynamic_scaling_does_nothing_within_the_models_length(self, tmp_path: Path) -> None:
        raw = tiny("Llama-2-7B", rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=96)
        theirs = write_family(tmp_path, raw)
        tokens = text(96)
        logits = computed(make_runner(tmp_path, 96), tokens, first=9)
        torch.testing.assert_close(logits, expected(theirs, tokens), rtol=0, atol=1e-4)

    def test_yarn_lengthens_the_context(self) -> None:
        assert parse_config(PUBLISHED["Qwen2.5-7B with YaRN"]).max_position_embeddings == 4 * 32768
        assert parse_config(PUBLISHED["Olmo-3-7B"]).max_position_embeddings == 65536


class TestDraftPasses:
    """What an adapter is trained on is what the engine computes with it."""

    def test_training_sees_the_engines_rows(self, family: Family) -> None:
        adapter = random_adapter(family.folder, bridge_rank=0).requires_grad_(False)
        config, tokens, runner = adapter.config, text(3 * WINDOW), make_runner(family.folder)
        naive = load_model(open_checkpoint(str(family.folder)), torch.float32, CPU, 256)
        teaching = teach(naive, adapter, torch.tensor([tokens]))
        table = list(range(8))
        for anchor in (WINDOW - 3, 2 * WINDOW + 1, 2 * WINDOW + 8):
            trained = draft_rows(naive, adapter, teaching, torch.tensor([[anchor]]))[0, 0]
            runner.run([Rows(tokens[:anchor], 0, table, 0)], full_plan(naive.config))
            drafted = [tokens[anchor], *adapter.mask_ids(config.num_masks)]
            plan = skipping_plan(naive.config, config.skip_start, config.skip_end)
            rows = [Rows(drafted, anchor, table, len(drafted))]
            torch.testing.assert_close(
                runner.compute(rows, plan, adapter.bind(None)).hidden, trained, atol=1e-4, rtol=1e-4
            )

    def test_riders_see_the_same_window(self, family: Family) -> None:
        """A rider stands for a token: what it comes to is what a row of its own at that place would."""
        adapter = random_adapter(
            family.folder, bridge_rank=0, lora_rank=0, fused=True, skip_start=0, skip_end=0, num_speculative_tokens=2
        ).requires_grad_(False)
        tokens, runner = text(3 * WINDOW), make_runner(family.folder)
        plan, masks = full_plan(runner.model.config), adapter.mask_ids(2)
        for length in (WINDOW - 1, 2 * WINDOW + 9):
            table = list(range(8))
            ridden = [Rows(tokens[:length], 0, table, 1, riders=masks, num_ridden=1)]
            riders = runner.compute(ridden, plan, adapter.bind(None, length)).riders
            runner.run([Rows(tokens[:length], 0, table, 0)], plan)
            alone = runner.compute([Rows(masks, length, table, 2)], plan, adapter.bind(None)).hidden
            torch.testing.assert_close(riders, alone, atol=1e-4, rtol=1e-4)


class TestReading:
    @pytest.mark.parametrize(
        ("name", "generation", "ids"),
        [
            ("Llama-3.1-8B", {"eos_token_id": [128001, 128008, 128009]}, (128001, 128008, 128009)),
            ("Qwen2.5-7B", {"eos_token_id": [151645, 151643]}, (151645, 151643)),
            ("Phi-3-mini-4k", {"eos_token_id": [32000, 32001, 32007]}, (32000, 32001, 32007)),
            ("Phi-4-mini", {"eos_token_id": [200020, 199999]}, (199999, 200020)),
            ("Gemma-3-4B", {"eos_token_id": [1, 106]}, (1, 106)),
        ],
    )
    def test_every_end_of_the_published_files(
        self, name: str, generation: dict[str, Any], ids: tuple[int, ...], tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        assert open_checkpoint(str(tmp_path)).eos_token_ids == ids

    def test_what_sparse_files_leave_out(self) -> None:
        config = parse_config(PUBLISHED["Gemma-3-4B"])
        assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
        assert config.tie_word_embeddings
        assert config.attention_scale == 1 / 16
        assert [layer for layer in range(34) if layer not in config.sliding_layers] == [5, 11, 17, 23, 29]

    def test_every_family_is_compared(self) -> None:
        assert {raw["architectures"][0] for raw in PUBLISHED.values()} == set(FAMILIES)

    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("Llama-2-7B", {"rope_scaling": {"type": "mrope"}}, "rope_type 'mrope' is not supported"),
            ("Llama-2-7B", {"hidden_act": "relu2"}, "hidden_act 'relu2' is not supported"),
            ("Olmo-3-7B", {"layer_types": ["chunked_attention"] * 4}, "layer type 'chunked_attention'"),
            ("Olmo-3-7B", {"layer_types": ["full_attention"] * 3}, "layer_types names 3 of 4 layers"),
            ("Mistral-7B-v0.1", {"sliding_window": -1}, "sliding_window is -1"),
            ("Phi-4-mini", {"partial_rotary_factor": 1.5}, "turns 24 elements of 16"),
            ("Gemma-3-1B", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
            ("EXAONE-4.0-32B", {"layer_types": None}, "without layer_types"),
            ("SmolLM3-3B", {"no_rope_layers": [1]}, "no_rope_layers names 1 of 4 layers"),
            ("Gemma-2-9B", {"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0"),
        ],
    )
    def test_settings_of_no_use_are_told_in_one_line(
        self, name: str, changes: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text(json.dumps(tiny(name, **changes)))
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(str(tmp_path))
        assert "\n" not in str(caught.value)

    @settings(max_examples=300, deadline=None)
    @given(data=st.data())
    def test_nonsense_is_refused_or_read_but_breaks_nothing(self, data: st.DataObject) -> None:
        raw = tiny(data.draw(st.sampled_from(list(PUBLISHED))))
        text_part = raw.get("text_config", raw)
        key = data.draw(st.sampled_from(sorted(text_part)))
        text_part[key] = data.draw(st.sampled_from([None, "x", -1, 0, 1, 0.5, [], ["x"], [1], {}, {"x": 1}, True]))
        with suppress(*UNUSABLE):
            parse_config(raw)

    @pytest.mark.parametrize("architecture", ["Cohere2ForCausalLM", "Qwen3NextForCausalLM", "MixtralForCausalLM"])
    def test_another_architecture_is_named_beside_what_is_supported(self, architecture: str, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        with pytest.raises(CheckpointError, match=f"holds a {architecture}, which is not supported") as caught:
            open_checkpoint(str(tmp_path))
        assert all(name in str(caught.value) for name in FAMILIES)
        assert "\n" not in str(caught.value)

    def test_a_fused_projection_of_another_size_is_told(self, tmp_path: Path) -> None:
        write_family(tmp_path, tiny("Phi-3-mini-4k"))
        raw = tiny("Phi-3-mini-4k", num_key_value_heads=2)
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with pytest.raises(CheckpointError, match=r"qkv_proj.* in shape \[192, 64\].*\[64, 64\] of '[^']*q_proj"):
            load_model(open_checkpoint(str(tmp_path)), torch.float32, CPU, 16)

    def test_norms_that_lack_their_one_keep_their_digits(self, tmp_path: Path) -> None:
        theirs = write_family(tmp_path, tiny("Gemma-2-9B"))
        model = load_model(open_checkpoint(str(tmp_path)), torch.bfloat16, CPU, 16)
        norm = model.model.norm.weight
        assert norm.dtype == torch.float32
        stored = theirs.get_parameter("model.norm.weight").bfloat16()
        assert torch.equal(norm, stored.float() + 1.0)
        assert model.embed(torch.tensor([5])).dtype == torch.bfloat16
