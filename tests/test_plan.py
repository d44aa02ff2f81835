"""What is predicted from a config.json, beside published figures and beside what is really loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from support_engine import write_checkpoint

from skippy.engine import CheckpointError, ConfigError, EngineConfig, PlanOptions, TrainOptions, run_plan
from skippy.engine import plan as plan_module
from skippy.engine.adapter import S3DAdapter
from skippy.engine.build import CPU_KV_BYTES, CUDA_RESERVE_BYTES, build
from skippy.engine.linear import RowLinear
from skippy.engine.model import CausalLM
from skippy.engine.plan import CUDA_CONTEXT_BYTES, model_sizes, open_config, predict
from skippy.engine.roofline import BYTES_PER_TRAINED, CARDS, training_bytes, weights_on_gpu
from skippy.engine.training.data import Sample
from skippy.engine.training.trainer import step_loss
from skippy.engine.weights import load_model, open_checkpoint, parse_config
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


def predicted(model: str, gpu: str = "a10g", quantization: str = "none", **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = predict(EngineConfig(model=model, **changes), PlanOptions(gpu, quantization))["predicted"]
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

    def test_what_does_not_fit_is_told_and_not_an_error(self, eight_b: str, capsys: pytest.CaptureFixture[str]) -> None:
        found = predicted(eight_b, "t4")
        assert found["kv"]["max_model_len"] == 0
        assert found["speed"] == []
        assert run_plan(EngineConfig(model=eight_b), PlanOptions("t4")) == 0
        assert "context 0 of 131,072" in capsys.readouterr().out

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
    tables = sum(table.nbytes for table in model._rope)
    return sum(storages.values()) + sum(map(packed_bytes, packed)) + tables


def packed_bytes(linear: RowLinear) -> int:
    """Of the matrix that a kernel keeps in its closure."""
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

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_weights(self, model: str, dtype: str) -> None:
        loading: dict[str, Any] = {"device": "cpu", "dtype": dtype, "drafter": "none"}
        loaded = loaded_bytes(build(EngineConfig(model=model, **loading)).runner.model)
        found = predicted(model, "cpu", dtype=dtype)["weight_bytes"]["total"]
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
        assert not predicted(eight_b)["training"]["fits"]
        assert predicted(eight_b, quantization="nf4")["training"]["fits"]
        assert predicted("builtin")["training"]["adapter_parameters"] == 805_760


def test_training_memory_is_what_a_step_saves_for_its_gradient(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path, hidden_size=128, intermediate_size=344, num_hidden_layers=6, vocab_size=1000, num_key_value_heads=2
    )
    checkpoint = open_checkpoint(str(folder))
    model = load_model(checkpoint, torch.float32, torch.device("cpu"), 64)
    options = TrainOptions(length=64, anchors=16, batch_size=4)
    shape = options.adapter_config(checkpoint.config, 10**7)
    adapter = S3DAdapter(shape, checkpoint.config)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)  # or its memory would be used again
        return tensor

    kept: list[torch.Tensor] = []
    samples = [Sample([(7 * i + j) % 1000 for j in range(64)], 0, 0.0, 0) for i in range(4)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step_loss(model, adapter, samples, 16, 0.0, torch.Generator().manual_seed(0))
    parameters = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *adapter.parameters()]}
    sizes = model_sizes(checkpoint.config)
    weights = weights_on_gpu(sizes, 4, "none", 64)
    training = plan_module._training_shape(options, shape, checkpoint.config)
    activations = training_bytes(sizes, weights, training, 4) - weights.total - BYTES_PER_TRAINED * training.adapter
    found = sum(nbytes for place, nbytes in saved.items() if place not in parameters)
    assert activations == pytest.approx(found, rel=0.25)


class TestWhereConfigsComeFrom:
    def test_only_config_json_is_asked_of_the_hub(self, eight_b: str, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def download(repo: str, file: str) -> str:
            asked.append((repo, file))
            return f"{eight_b}/config.json"

        monkeypatch.setattr(plan_module, "hf_hub_download", download)
        assert open_config("meta-llama/Llama-3.1-8B").config == open_config(eight_b).config
        assert asked == [("meta-llama/Llama-3.1-8B", "config.json")]

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (GatedRepoError, "is gated: accept its licence at https://huggingface.co/a/b, and set HF_TOKEN"),
            (RepositoryNotFoundError, "no folder a/b, and no such model on the hub"),
            (LocalEntryNotFoundError, "config.json of a/b cannot be had: offline, or not there"),
            (OSError, "cannot be had"),
        ],
    )
    def test_what_the_hub_refuses_is_told_in_one_line(
        self,
        error: type[Exception],
        message: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def download(*_: str) -> str:
            raise error.__new__(error, "no\nconnection")

        monkeypatch.setattr(plan_module, "hf_hub_download", download)
        assert cli.main(["plan", "a/b", "--gpu", "l4"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err

    def test_another_family_is_named(self, tmp_path: Path) -> None:
        folder = write_config(tmp_path, architectures=["NoSuchLM"])
        with pytest.raises(CheckpointError, match="NoSuchLM"):
            predicted(folder)

    def test_no_weights_are_needed(self, eight_b: str) -> None:
        assert [path.name for path in Path(eight_b).iterdir()] == ["config.json"]
        assert parse_config(json.loads((Path(eight_b) / "config.json").read_text())).hidden_size == 4096
        assert predicted(eight_b)


class TestCommand:
    def test_every_line_of_a_prediction_says_so(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["plan", "--gpu", "l4", "--quantization", "int8"]) == 0
        told = capsys.readouterr().out.splitlines()
        assert told[0].startswith("builtin: 9,475,328 parameters")
        assert told[1].startswith(f"{CARDS['l4'].name}: 24.00 GB, 300 GB/s")
        assert len(told) > 6
        assert all(line.startswith("predicted  ") for line in told[2:])

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
            ("--gpu l4 --quantization int3", "quantization is 'int3', which is not one of none, int8, nf4"),
            ("--gpu l4 --max-model-len 4096", "max_model_len 4096 exceeds the 2048 positions"),
            ("--gpu cpu --dtype float16", "float16 is not supported on CPU"),
        ],
    )
    def test_mistakes_are_told_in_one_line(self, flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["plan", "builtin", *flags.split()]) == 2
        assert message in capsys.readouterr().err

    def test_options_are_checked(self) -> None:
        with pytest.raises(ConfigError):
            PlanOptions("a10g", "int4")
