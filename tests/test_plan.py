"""What is predicted from a config.json, beside published figures and beside what is really loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support_engine import write_checkpoint

from skippy.engine import CheckpointError, ConfigError, EngineConfig, PlanOptions, hub, run_plan
from skippy.engine.build import CPU_KV_BYTES, CUDA_RESERVE_BYTES, build
from skippy.engine.linear import RowLinear
from skippy.engine.model import CausalLM
from skippy.engine.plan import CUDA_CONTEXT_BYTES, model_sizes, predict
from skippy.engine.quant import Int8Product, NF4Product
from skippy.engine.roofline import CARDS
from skippy.engine.weights import open_checkpoint
from skippy.server import cli

LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    # name: (config.json, parameters, KV bytes per token in bfloat16)
    "Llama-3.1-8B": (
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
        },
        8_030_261_248,
        131_072,
    ),
    "Llama-2-7B": (
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
        6_738_415_616,
        524_288,
    ),
    "Llama-3.2-1B": (
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
        1_235_814_400,
        32_768,
    ),
    "SmolLM2-135M": (
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        134_515_008,
        23_040,
    ),
}
MIB = 2**20


def write_config(folder: Path, **changes: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, "dtype": "bfloat16", **changes}))
    return str(folder)


def predicted(model: str, gpu: str = "a10g", **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = predict(EngineConfig(model=model, **changes), PlanOptions(gpu))["predicted"]
    return found


@pytest.fixture
def eight_b(tmp_path: Path) -> str:
    return write_config(tmp_path / "8b", **PUBLISHED["Llama-3.1-8B"][0])


class TestSizes:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_parameters_and_kv_are_the_published_ones(self, name: str, tmp_path: Path) -> None:
        config, parameters, kv_bytes = PUBLISHED[name]
        record = predict(EngineConfig(model=write_config(tmp_path, **config)), PlanOptions("h100"))
        assert record["parameters"] == parameters
        assert record["predicted"]["kv"]["bytes_per_token"] == kv_bytes
        weights = record["predicted"]["weight_bytes"]
        assert weights["total"] - weights["tables"] == 2 * parameters

    @pytest.mark.parametrize(
        "changes",
        [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 32}],
    )
    def test_they_count_what_the_module_holds(self, changes: dict[str, Any], tmp_path: Path) -> None:
        config = open_checkpoint(str(write_checkpoint(tmp_path, **changes))).config
        assert model_sizes(config).parameters == sum(p.numel() for p in CausalLM(config, 8).parameters())


class TestMemory:
    def test_an_8b_model_on_24_gb(self, eight_b: str) -> None:
        weights = 2 * 8_030_261_248 + 2 * 131_072 * 128 * 2
        found = predicted(eight_b)
        assert found["weight_bytes"]["total"] == weights
        left = int(0.9 * 24e9) - CUDA_CONTEXT_BYTES - CUDA_RESERVE_BYTES - weights - found["adapter_bytes"]
        assert found["kv"]["budget_bytes"] == left
        blocks = left // (32 * 131_072) - 1
        assert found["kv"]["tokens"] == found["kv"]["max_model_len"] == 32 * blocks
        assert found["kv"]["sequences_by_length"][8192] == blocks // 256

    def test_quantised_it_leaves_more_for_the_cache(self, eight_b: str) -> None:
        tokens = [predicted(eight_b, quantization=q)["kv"]["tokens"] for q in ("none", "int8", "nf4")]
        assert tokens == sorted(tokens)
        assert tokens[-1] > 3 * tokens[0]

    @pytest.mark.parametrize(
        ("gpu", "config"),
        [
            ("t4", {}),
            ("t4", {"kv_cache_memory_bytes": 2**30}),
            ("cpu", {"kv_cache_memory_bytes": 2**35}),
            ("a10g", {"kv_cache_memory_bytes": 2**20}),  # less than two blocks
        ],
    )
    def test_what_does_not_fit_is_told_and_not_an_error(
        self, gpu: str, config: dict[str, Any], eight_b: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = predicted(eight_b, gpu, **config)
        assert not found["kv"]["fits"]
        assert found["kv"]["tokens"] == found["kv"]["max_model_len"] == 0
        assert found["speed"] == []
        assert run_plan(EngineConfig(model=eight_b, **config), PlanOptions(gpu)) == 0
        told = capsys.readouterr().out
        assert "does not fit: " in told
        assert "context" not in told

    def test_a_budget_may_be_given(self, eight_b: str) -> None:
        kv = predicted(eight_b, kv_cache_memory_bytes=2**30, max_model_len=4096)["kv"]
        assert (kv["budget_bytes"], kv["num_blocks"], kv["max_model_len"]) == (2**30, 255, 4096)


def loaded_bytes(model: CausalLM) -> int:
    """Bytes of all that a loaded model keeps, packed matrices included."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    packed: list[RowLinear] = [*model._packed_head]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        fused = (attention.qkv, attention.out, mlp.gate_up, mlp.down)  # type: ignore[union-attr]
        packed += [matrices.packed for matrices in fused]  # type: ignore[union-attr,misc]
    assert model._rope is not None
    tables = sum(table.nbytes for pair in model._rope for table in pair)
    return sum(storages.values()) + sum(map(packed_bytes, packed)) + tables


def packed_bytes(linear: RowLinear) -> int:
    """Of the matrix that a kernel keeps, mostly in its closure."""
    if isinstance(linear._product, Int8Product | NF4Product):
        return linear._product.weight.nbytes + linear._product.scale.nbytes
    held = [cell.cell_contents for cell in linear._product.__closure__ or ()]
    for value in held:
        if isinstance(value, torch.ScriptObject):
            return 2 * torch.ops.quantized.linear_unpack_fp16(value)[0].numel()  # type: ignore[no-any-return]
        if isinstance(value, torch.Tensor) and value.numel() == linear.out_features * linear.in_features:
            return value.numel() * value.element_size()
    raise AssertionError("no matrix")


class TestBesideWhatIsLoaded:
    """The promise is 10 %."""

    @pytest.fixture(params=["builtin", "float32", "bfloat16", "tied"])
    def model(self, request: pytest.FixtureRequest, tmp_path: Path) -> str:
        sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000, "num_key_value_heads": 2}
        match request.param:
            case "builtin":
                return "builtin"
            case "tied":
                return str(write_checkpoint(tmp_path, **sizes, tie_word_embeddings=True))
            case dtype:
                folder = write_checkpoint(tmp_path, **sizes, dtype=dtype)
                self._store_as(folder / "model.safetensors", getattr(torch, dtype))
                return str(folder)

    @staticmethod
    def _store_as(file: Path, dtype: torch.dtype) -> None:
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)

    @pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_weights(self, model: str, dtype: str, quantization: str) -> None:
        loading: dict[str, Any] = {"dtype": dtype, "quantization": quantization}
        loaded = loaded_bytes(build(EngineConfig(model=model, device="cpu", drafter="none", **loading)).runner.model)
        found = predicted(model, "cpu", **loading)["weight_bytes"]["total"]
        assert found == pytest.approx(loaded, rel=0.1)

    @pytest.mark.parametrize("budget", [None, 8 * MIB, 64 * MIB])
    @pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
    def test_kv_capacity(self, model: str, budget: int | None, dtype: str) -> None:
        sizing: dict[str, Any] = {"kv_cache_memory_bytes": budget, "dtype": dtype, "max_num_seqs": 20}
        pool = build(EngineConfig(model=model, device="cpu", drafter="none", **sizing)).runner.pool
        kv = predicted(model, "cpu", **sizing)["kv"]
        assert kv["num_blocks"] == pool.num_blocks
        if budget is None:
            assert kv["budget_bytes"] == CPU_KV_BYTES


class TestSpeed:
    def test_drafting_pays_and_never_loses(self, eight_b: str) -> None:
        for row in predicted(eight_b)["speed"]:
            low, high = (one["tokens_per_second"] for one in row["drafted"])
            assert row["tokens_per_second"] <= low <= high
        assert row["batch"] <= 32, "max_num_seqs"

    def test_a_single_sequence_reads_the_weights_for_every_token(self, eight_b: str) -> None:
        first = predicted(eight_b)["speed"][0]
        assert first["tokens_per_second"] == pytest.approx(600e9 / (2 * 8.03e9 - 1.05e9 + 2048 * 131072), rel=0.01)

    def test_training_says_whether_it_fits(self, eight_b: str) -> None:
        assert not predicted(eight_b, "t4")["training"]["fits"]
        assert predicted(eight_b, quantization="nf4")["training"]["fits"]
        assert predicted("builtin")["training"]["adapter_parameters"] == 930_688

    @pytest.mark.parametrize(("share", "checkpointing"), [(0.9, True), (0.8, False)])
    def test_training_without_checkpointing_leaves_as_much_memory_free_as_skippy_train(
        self, eight_b: str, share: float, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = predicted(eight_b, "h100", quantization="nf4")["training"]
        assert not plain["gradient_checkpointing"]
        card = replace(CARDS["h100"], memory_bytes=round(plain["bytes"] / share))
        monkeypatch.setitem(CARDS, "h100", card)
        assert predicted(eight_b, "h100", quantization="nf4")["training"]["gradient_checkpointing"] == checkpointing


class TestWhereConfigsComeFrom:
    def test_only_small_files_are_asked_of_the_hub(self, eight_b: str, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def download(model: str, revision: str | None, patterns: Sequence[str]) -> Path:
            asked.append((model, revision, patterns))
            return Path(eight_b)

        monkeypatch.setattr(hub, "download", download)
        assert predicted("meta-llama/Llama-3.1-8B", revision="v1") == predicted(eight_b)
        assert asked == [("meta-llama/Llama-3.1-8B", "v1", hub.SMALL_FILES)]

    def test_another_family_is_named(self, tmp_path: Path) -> None:
        folder = write_config(tmp_path, architectures=["NoSuchLM"])
        with pytest.raises(CheckpointError, match="NoSuchLM"):
            predicted(folder)

    def test_no_weights_are_needed(self, eight_b: str) -> None:
        assert [path.name for path in Path(eight_b).iterdir()] == ["config.json"]
        assert predicted(eight_b)


class TestCommand:
    def test_every_line_of_a_prediction_says_so(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["plan", "--gpu", "l4", "--quantization", "int8"]) == 0
        told = capsys.readouterr().out.splitlines()
        assert told[0].startswith("builtin: 12,426,496 parameters")
        assert told[1].startswith(f"{CARDS['l4'].name}: 24.00 GB, 300 GB/s")
        assert len(told) > 6
        assert all(line.startswith("predicted  ") for line in told[2:])

    def test_the_readme_shows_what_it_prints(self, eight_b: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_plan(EngineConfig(model=eight_b, quantization="nf4"), PlanOptions("a10g")) == 0
        told = capsys.readouterr().out.replace(eight_b, "meta-llama/Llama-3.1-8B")
        assert f"```\n{told}```\n" in (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")

    def test_json_is_one_line_with_predictions_apart(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["plan", "builtin", "--gpu", "cpu", "--json"]) == 0
        [line] = capsys.readouterr().out.splitlines()
        record = json.loads(line)
        assert record["card"]["memory_bytes"] == CARDS["cpu"].memory_bytes
        assert record["predicted"].keys() >= {"weight_bytes", "kv", "speed", "training"}

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("", "plan needs --gpu NAME"),
            ("--gpu a100", "gpu is 'a100', which is not one of a10g, t4, l4, 3090, 4090, h100, cpu"),
            ("--gpu l4 --quantization int3", "bad value 'int3' for quantization"),
            ("--gpu l4 --max-model-len 4096", "max_model_len 4096 exceeds the 2048 positions"),
            ("--gpu cpu --dtype float16", "float16 is not supported on CPU"),
        ],
    )
    def test_mistakes_are_told_in_one_line(self, flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["plan", "builtin", *flags.split()]) == 2
        assert message in capsys.readouterr().err

    def test_options_are_checked(self) -> None:
        with pytest.raises(ConfigError):
            PlanOptions("a100")
