"""Adapters on disk: what is saved comes back, and whatever is wrong with a folder is said in one line."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support_engine import TINY_ADAPTER, random_adapter, run_dry, tokens_of, write_adapter, write_checkpoint

from skippy.engine import ConfigError, Engine, EngineConfig, Request, SamplingParams
from skippy.engine.adapter import S3DAdapter
from skippy.engine.adapter_files import adapter_folder, fingerprint, load_adapter, save_adapter
from skippy.engine.errors import AdapterError
from skippy.engine.weights import Checkpoint, open_checkpoint

CPU = torch.device("cpu")
NAMES = ("adapter.json", "adapter.safetensors")
SIZES = ("skip_start", "skip_end", "num_speculative_tokens", "lora_rank", "head_size", "bridge_rank")
NOT_SIZES: tuple[object, ...] = (-1, 10**30, 2.0, True, "2", [2], {})
NONSENSE: list[tuple[str, object]] = [
    *((name, value) for name in SIZES for value in NOT_SIZES),
    ("num_speculative_tokens", 0),
    ("num_speculative_tokens", 33),
    ("skip_start", 3),
    ("skip_end", 0),
    ("skip_end", 4),
    ("lora_rank", 2**16 + 1),
    ("recurrent", 1),
    ("recurrent", "true"),
    *(("draft_vocab_size", value) for value in (*NOT_SIZES, 97)),
    ("fused", 1),
    ("fused", True),  # with a band to skip
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without an adapter."""
    return write_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def checkpoint(base: Path) -> Checkpoint:
    return open_checkpoint(str(base))


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return write_adapter(base, tmp_path / "adapter")


def load(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> S3DAdapter:
    return load_adapter(folder, checkpoint, dtype, CPU)


def describe(folder: Path, **changes: Any) -> None:
    """Change a description; a value of None drops the key."""
    file = folder / "adapter.json"
    described = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in described.items() if value is not None}))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    file = folder / "adapter.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def other_base(folder: Path, seed: int = 1) -> Path:
    """Another random model of the same shape."""
    write_checkpoint(folder)
    file = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    save_file({k: v + torch.randn(v.shape, generator=generator) * 0.1 for k, v in load_file(file).items()}, file)
    return folder


class TestRoundTrip:
    def test_what_is_saved_comes_back(self, base: Path, folder: Path, checkpoint: Checkpoint) -> None:
        saved, loaded = random_adapter(base), load(folder, checkpoint)
        assert loaded.config == saved.config
        assert loaded.state_dict().keys() == saved.state_dict().keys()
        for name, tensor in loaded.state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, saved.state_dict()[name].half().float()), name
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert not loaded.training

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_saved_again_it_is_the_same(self, folder: Path, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        loaded = load(folder, checkpoint, dtype)
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
        save_adapter(folder, load(folder, checkpoint), checkpoint, {})
        again = load(folder, checkpoint, dtype)
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name

    @pytest.mark.parametrize(
        "changes",
        [
            {"lora_rank": 0},
            {"head_size": 0},
            {"bridge_rank": 0},
            {"recurrent": False},
            {"num_speculative_tokens": 1},
            {"draft_vocab_size": 50},
            {"skip_start": 1, "skip_end": 1, "bridge_rank": 0, "fused": True},
            {"skip_start": 0, "skip_end": 0},
            {"lora_rank": 0, "head_size": 0, "bridge_rank": 0, "num_speculative_tokens": 1},
        ],
    )
    def test_parts_may_be_left_out(
        self, base: Path, tmp_path: Path, checkpoint: Checkpoint, changes: dict[str, Any]
    ) -> None:
        saved, loaded = (
            random_adapter(base, **changes),
            load(write_adapter(base, tmp_path / "a", **changes), checkpoint),
        )
        assert loaded.config == saved.config
        assert (loaded.draft_ids is None) == (saved.draft_ids is None)
        if loaded.draft_ids is not None and saved.draft_ids is not None:
            assert torch.equal(loaded.draft_ids, saved.draft_ids)

    def test_on_disk_it_is_two_bytes_per_number(self, base: Path, folder: Path) -> None:
        assert sorted(os.listdir(folder)) == sorted(NAMES)
        numbers = sum(parameter.numel() for parameter in random_adapter(base).parameters())
        tensors = load_file(folder / "adapter.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
        assert sum(tensor.nbytes for tensor in tensors.values()) == 2 * numbers
        assert 0 < (folder / "adapter.safetensors").stat().st_size - 2 * numbers < 10_000

    def test_saving_over_an_adapter_replaces_it_whole(self, base: Path, folder: Path, checkpoint: Checkpoint) -> None:
        write_adapter(base, folder, seed=1, head_size=0)
        assert sorted(os.listdir(folder)) == sorted(NAMES)
        loaded, expected = load(folder, checkpoint), random_adapter(base, seed=1, head_size=0)
        assert torch.equal(loaded.masks, expected.masks.half().float())

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
    def test_what_is_not_finite_in_float16_is_not_saved(
        self, base: Path, folder: Path, checkpoint: Checkpoint, value: float
    ) -> None:
        before = {name: (folder / name).read_bytes() for name in NAMES}
        adapter = random_adapter(base, seed=1)
        with torch.no_grad():
            adapter.masks[0, 0] = value
        with pytest.raises(AdapterError, match="'masks' holds values that are not finite"):
            save_adapter(folder, adapter, checkpoint, {})
        assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before

    def test_what_people_add_to_the_description_is_ignored(self, folder: Path, checkpoint: Checkpoint) -> None:
        describe(folder, author="somebody", training={"anything": [1, None]})
        assert load(folder, checkpoint).config.lora_rank == TINY_ADAPTER["lora_rank"]


class TestFingerprint:
    def test_it_is_of_the_weights_and_nothing_else(self, base: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
        copy = shutil.copytree(base, tmp_path / "copy")
        (copy / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
        assert fingerprint(open_checkpoint(str(copy))) == fingerprint(checkpoint)

    def test_other_weights_have_another(self, tmp_path: Path, checkpoint: Checkpoint) -> None:
        prints = [fingerprint(open_checkpoint(str(other_base(tmp_path / str(seed), seed)))) for seed in (1, 2)]
        assert len({*prints, fingerprint(checkpoint)}) == 3

    def test_one_changed_tensor_shows(self, base: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
        copy = shutil.copytree(base, tmp_path / "copy")
        tensors = load_file(copy / "model.safetensors")
        tensors["model.layers.2.mlp.down_proj.weight"] += 1e-3
        save_file(tensors, copy / "model.safetensors")
        assert fingerprint(open_checkpoint(str(copy))) != fingerprint(checkpoint)

    def test_how_the_weights_are_spread_over_files_does_not_matter(
        self, base: Path, tmp_path: Path, checkpoint: Checkpoint
    ) -> None:
        copy = shutil.copytree(base, tmp_path / "copy")
        tensors = load_file(copy / "model.safetensors")
        (copy / "model.safetensors").unlink()
        files = {name: f"part-{place % 3}.safetensors" for place, name in enumerate(tensors)}
        for file in set(files.values()):
            save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, copy / file)
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        assert fingerprint(open_checkpoint(str(copy))) == fingerprint(checkpoint)


class TestWhereItIsLookedFor:
    def test_beside_the_model_or_where_it_is_said_to_be(self, base: Path, folder: Path, tmp_path: Path) -> None:
        model = shutil.copytree(base, tmp_path / "model")
        found = open_checkpoint(str(model))
        assert adapter_folder(model, None) is None
        write_adapter(model, seed=1)
        beside = adapter_folder(model, None)
        assert beside == model / "s3d"
        assert adapter_folder(model, str(folder)) == folder
        given, other = (load_adapter(place, found, torch.float32, CPU) for place in (folder, beside))
        assert not torch.equal(given.masks, other.masks)

    def test_home_is_understood(self, folder: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(folder.parent))
        assert adapter_folder(checkpoint.path, "~/adapter") == folder

    def test_a_name_is_one_of_the_hub(self, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("skippy.engine.adapter_files.find_trained", Path)
        assert adapter_folder(checkpoint.path, "owner/adapter") == Path("owner/adapter")

    def test_a_folder_beside_the_model_without_an_adapter_is_none(self, base: Path, tmp_path: Path) -> None:
        model = shutil.copytree(base, tmp_path / "model")
        (model / "s3d").mkdir()  # a training may be under way there
        assert Engine(EngineConfig(model=str(model), device="cpu")).info.drafter == "hybrid"

    def test_whoever_wants_no_drafts_needs_no_sound_adapter(self, base: Path, tmp_path: Path) -> None:
        model = shutil.copytree(base, tmp_path / "model")
        (model / "s3d").mkdir()
        (model / "s3d" / "adapter.json").write_text("{")
        with pytest.raises(AdapterError, match="not valid JSON"):
            Engine(EngineConfig(model=str(model), device="cpu"))
        assert "s3d" not in Engine(EngineConfig(model=str(model), device="cpu", drafter="none")).info.drafters


class TestRefused:
    """Each with one clear line that names the file and what is wrong with it."""

    def refusal(self, folder: Path, checkpoint: Checkpoint) -> str:
        with pytest.raises(AdapterError) as caught:
            load(folder, checkpoint)
        text = str(caught.value)
        assert str(folder) in text
        assert "\n" not in text
        assert len(text) < 400
        return text

    def test_nothing_there(self, tmp_path: Path, checkpoint: Checkpoint) -> None:
        assert "holds no adapter" in self.refusal(tmp_path / "missing", checkpoint)
        assert "holds no adapter" in self.refusal(tmp_path, checkpoint)

    def test_a_file_in_place_of_the_folder(self, folder: Path, checkpoint: Checkpoint) -> None:
        assert "Not a directory" in self.refusal(folder / "adapter.safetensors", checkpoint)

    @pytest.mark.parametrize("name", NAMES)
    def test_half_an_adapter(self, folder: Path, checkpoint: Checkpoint, name: str) -> None:
        (folder / name).unlink()
        assert name in self.refusal(folder, checkpoint)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "not valid JSON"),
            ("{", "not valid JSON"),
            ("\xff\xfe", "not valid JSON"),
            ("[" * 100_000, "not valid JSON"),
            ("[1]", "not hold a JSON object"),
            ("null", "not hold a JSON object"),
            ("{}", "format_version None"),
            ('{"format_version": 2}', "format_version 2; this version of Skippy reads 1"),
            ('{"format_version": "1"}', "format_version '1'"),
            ('{"format_version": 1}', "vocab_size is None"),
            ('{"format_version": 1, "base": 7}', "vocab_size is None"),
            ('{"peft_type": "LORA", "r": 8}', "format_version None"),
        ],
    )
    def test_no_description_of_ours(self, folder: Path, checkpoint: Checkpoint, text: str, message: str) -> None:
        (folder / "adapter.json").write_text(text, encoding="latin-1")
        assert message in self.refusal(folder, checkpoint)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("vocab_size", 101),
            ("hidden_size", 32),
            ("intermediate_size", 128),
            ("num_hidden_layers", 4),
            ("num_attention_heads", 2),
            ("num_key_value_heads", 1),
            ("head_dim", 8),
        ],
    )
    def test_a_model_of_another_shape(
        self, folder: Path, tmp_path: Path, checkpoint: Checkpoint, name: str, value: int
    ) -> None:
        sizes = {"head_dim": 16, name: value}
        other = open_checkpoint(str(write_checkpoint(tmp_path / "other", **sizes)))
        ours = getattr(checkpoint.config, name)
        assert f"for a model whose {name} is {ours}; this one's is {value}" in self.refusal(folder, other)

    @pytest.mark.parametrize("size", [0, 1, 50, 500, -1])
    def test_a_truncated_file(self, folder: Path, checkpoint: Checkpoint, size: int) -> None:
        file = folder / "adapter.safetensors"
        file.write_bytes(file.read_bytes()[:size])
        assert "Is it complete?" in self.refusal(folder, checkpoint)

    def test_no_safetensors_at_all(self, folder: Path, checkpoint: Checkpoint) -> None:
        (folder / "adapter.safetensors").write_bytes(b"\x80\x04" + b"pickle" * 100)
        assert "cannot be read" in self.refusal(folder, checkpoint)

    @pytest.mark.parametrize(
        ("name", "tensor"),
        [
            ("masks", None),
            ("bridge.gain", None),
            ("head.out", None),
            ("lora.0_qkv.a", None),
            ("lora.1_qkv.a", torch.zeros(64, 2)),  # a layer that is skipped
            ("extra", torch.zeros(1)),
            ("masks", torch.zeros(4, 64)),
            ("masks", torch.zeros(64, 5)),
            ("bridge.gain", torch.zeros(64, 1)),
        ],
    )
    def test_tensors_missing_left_over_or_of_another_shape(
        self, folder: Path, checkpoint: Checkpoint, name: str, tensor: torch.Tensor | None
    ) -> None:
        change_tensors(folder, **{name: tensor})
        assert f"{name!r} is missing, left over or of another shape" in self.refusal(folder, checkpoint)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_values_that_are_not_finite(self, folder: Path, checkpoint: Checkpoint, value: float) -> None:
        gain = torch.zeros(64)
        gain[7] = value
        change_tensors(folder, **{"bridge.gain": gain})
        assert "'bridge.gain' holds values that are not finite" in self.refusal(folder, checkpoint)

    def test_integers_for_tensors(self, folder: Path, checkpoint: Checkpoint) -> None:
        change_tensors(folder, **{"bridge.gain": torch.zeros(64, dtype=torch.int32)})
        assert "'bridge.gain'" in self.refusal(folder, checkpoint)

    @pytest.mark.parametrize("ids", [[3, 4, 3], [3, 4, 97], [-1, 4, 5]])
    def test_tokens_to_draft_that_there_are_not(
        self, base: Path, tmp_path: Path, checkpoint: Checkpoint, ids: list[int]
    ) -> None:
        folder = write_adapter(base, tmp_path / "a", draft_vocab_size=3)
        change_tensors(folder, draft_ids=torch.tensor(ids, dtype=torch.int32))
        assert "'draft_ids' names a token twice, or one that the model does not have" in self.refusal(
            folder, checkpoint
        )

    def test_tokens_to_draft_that_are_no_integers(self, base: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
        folder = write_adapter(base, tmp_path / "a", draft_vocab_size=3)
        change_tensors(folder, draft_ids=torch.tensor([1.0, 2.0, 3.0]))
        assert "'draft_ids' is of the type torch.float32" in self.refusal(folder, checkpoint)

    @pytest.mark.parametrize(("name", "value"), NONSENSE)
    def test_nonsense_in_the_description(self, folder: Path, checkpoint: Checkpoint, name: str, value: object) -> None:
        describe(folder, **{name: value})
        assert "is not a usable description" in self.refusal(folder, checkpoint)

    @pytest.mark.parametrize("name", TINY_ADAPTER)
    def test_a_size_missing_from_the_description(self, folder: Path, checkpoint: Checkpoint, name: str) -> None:
        describe(folder, **{name: None})
        assert f"not a usable description: {name} is missing" in self.refusal(folder, checkpoint)

    def test_a_band_that_leaves_no_layer(self, folder: Path, checkpoint: Checkpoint) -> None:
        describe(folder, skip_start=0, skip_end=3)
        assert "[0, 3) leaves no layer of 3" in self.refusal(folder, checkpoint)

    @pytest.mark.parametrize(("name", "value"), [("lora_rank", 3), ("num_speculative_tokens", 4), ("skip_end", 1)])
    def test_a_description_of_another_adapter(
        self, folder: Path, checkpoint: Checkpoint, name: str, value: int
    ) -> None:
        describe(folder, **{name: value})
        assert "missing, left over or of another shape" in self.refusal(folder, checkpoint)


class TestAnotherBaseOfTheSameShape:
    def test_it_warns_serves_and_stays_exact(
        self, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        other = other_base(tmp_path / "other")
        config = EngineConfig(model=str(other), device="cpu", dtype="float32", adapter=str(folder))
        with caplog.at_level(logging.WARNING, "skippy.engine"):
            engine = Engine(config)
        (warning,) = caplog.records
        assert str(folder) in warning.getMessage()
        assert str(other) in warning.getMessage()
        assert "exact" in warning.getMessage()
        params = SamplingParams(max_tokens=40, temperature=0.7, seed=1)
        requests = [Request(str(i), tuple(range(3, 9 + i)), params, num_speculative_tokens=5) for i in range(3)]
        drafted = run_dry(engine, requests)
        plain = run_dry(engine, [replace(request, drafter="none") for request in requests])
        assert tokens_of(drafted) == tokens_of(plain)
        assert all(parts[-1].counts.drafted > 20 for parts in drafted.values())
        assert engine.info.drafter == "hybrid"

    def test_its_own_base_brings_no_warning(
        self, folder: Path, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
    ) -> None:
        load(folder, checkpoint)
        assert not caplog.records


def skippy(*arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {name: value for name, value in os.environ.items() if not name.startswith("SKIPPY_")}
    command = [sys.executable, "-m", "skippy.server.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**settings, "OMP_NUM_THREADS": "1"}
    )


class TestCommands:
    def test_generate_tells_a_bad_adapter_in_one_line(self, folder: Path) -> None:
        done = skippy("generate", "-p", "x", "--adapter", str(folder), "--dtype", "float32")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"skippy: error: The adapter in {folder} is for a model whose vocab_size is 97")
        assert done.stderr.count("\n") == 1

    def test_serve_tells_a_missing_adapter_in_one_line(self, tmp_path: Path) -> None:
        done = skippy("serve", "--port", "0", "--adapter", str(tmp_path))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines()[-1].startswith(f"skippy: error: {tmp_path} holds no adapter")
        assert "Traceback" not in done.stderr


def test_s3d_without_an_adapter_says_what_to_do(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"s3d needs an adapter, and .* has none: train one with `skippy train`"):
        Engine(EngineConfig(model=str(base), device="cpu", drafter="s3d"))


def test_whoever_may_read_the_description_may_read_the_adapter(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base")
    folder = write_adapter(base, tmp_path / "adapter")
    modes = {file.stat().st_mode for file in folder.iterdir()}
    assert len(modes) == 1
