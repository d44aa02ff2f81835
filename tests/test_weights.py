"""Checkpoint folders: what is read from them, and how each kind of damage is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support_engine import TINY_CONFIG, shard_checkpoint, write_checkpoint
from torch import Tensor

from skippy.engine import BUILTIN_MODEL, CheckpointError, weights
from skippy.engine.model import CausalLM
from skippy.engine.weights import Checkpoint, load_model, open_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny")


def load(folder: Path) -> CausalLM:
    return load_model(open_checkpoint(str(folder)), torch.float32, CPU, 16)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    write_json(folder / "config.json", {k: v for k, v in config.items() if v is not None})


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


class TestTokens:
    @pytest.mark.parametrize(
        ("config", "generation", "ids"),
        [
            (2, None, (2,)),
            ([2, 5], None, (2, 5)),
            (2, {"eos_token_id": 7}, (2, 7)),
            (2, {"eos_token_id": [7, 2, 9]}, (2, 7, 9)),
            ([2, 5], {"eos_token_id": [5, 6]}, (2, 5, 6)),
            (None, {"eos_token_id": 7}, (7,)),
            (2, {"temperature": 0.6}, (2,)),
            (None, None, ()),
        ],
    )
    def test_every_eos_id_of_either_file_counts(
        self, folder: Path, config: Any, generation: Any, ids: tuple[int, ...]
    ) -> None:
        change_config(folder, eos_token_id=config)
        if generation is not None:
            write_json(folder / "generation_config.json", generation)
        assert open_checkpoint(str(folder)).eos_token_ids == ids

    @pytest.mark.parametrize(("raw", "bos"), [(1, 1), ([4, 5], 4), (0, 0), (None, None), ([], None)])
    def test_one_bos_id_or_none(self, folder: Path, raw: Any, bos: int | None) -> None:
        change_config(folder, bos_token_id=raw)
        assert open_checkpoint(str(folder)).bos_token_id == bos

    @pytest.mark.parametrize(
        ("tokenizer", "size"),
        [
            (None, 97),
            ({"model": {"vocab": {"a": 0, "b": 89}}}, 90),
            ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 93, "content": "<s>"}]}, 94),
            ({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": None}, 2),
            ({"model": {"vocab": {"a": 0, "b": 120}}}, 97),
        ],
        ids=["no tokenizer", "vocabulary", "added tokens", "unigram", "larger than the model"],
    )
    def test_rows_beyond_the_tokenizer_pad_the_vocabulary(self, folder: Path, tokenizer: Any, size: int) -> None:
        if tokenizer is not None:
            write_json(folder / "tokenizer.json", tokenizer)
        checkpoint = open_checkpoint(str(folder))
        assert checkpoint.vocab_size == size
        assert checkpoint.config.vocab_size == 97, "the embedding keeps its shape"


class TestConfig:
    def test_defaults_are_those_of_hugging_face(self, folder: Path) -> None:
        change_config(folder, num_key_value_heads=None, rms_norm_eps=None, tie_word_embeddings=None, rope_theta=None)
        config = open_checkpoint(str(folder)).config
        assert config.num_key_value_heads == 4
        assert config.head_dim == 16
        assert config.rms_norm_eps == 1e-6
        assert not config.tie_word_embeddings
        assert not config.attention_bias
        assert config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}

    @pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
    def test_the_dtype_is_the_one_it_is_stored_in(self, folder: Path, key: str) -> None:
        change_config(folder, dtype=None)
        assert open_checkpoint(str(folder)).dtype == torch.float32
        change_config(folder, **{key: "bfloat16"})
        assert open_checkpoint(str(folder)).dtype == torch.bfloat16

    def test_the_builtin_model_has_a_name(self) -> None:
        checkpoint = open_checkpoint(BUILTIN_MODEL)
        assert (checkpoint.path / "model.safetensors").is_file()
        assert checkpoint.eos_token_ids == (0,)
        assert checkpoint.vocab_size == 8192


class TestLoading:
    def test_every_tensor_arrives(self, folder: Path) -> None:
        """Perhaps with its heads in another order: what they compute is compared in test_model."""
        state, stored = load(folder).state_dict(), load_file(folder / "model.safetensors")
        assert state.keys() == stored.keys()
        for name, tensor in stored.items():
            assert state[name].shape == tensor.shape
            assert torch.equal(state[name].flatten().sort().values, tensor.flatten().sort().values)

    def test_they_are_converted_to_the_dtype_asked_for(self, folder: Path) -> None:
        model = load_model(open_checkpoint(str(folder)), torch.bfloat16, CPU, 16)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_shards_are_read_by_their_index(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        whole = load(folder).state_dict()
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
        for file, members in shards.items():
            save_file({name: tensors[name] for name in members}, folder / file)
        index = {name: file for file, members in shards.items() for name in members}
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
        sharded = load(folder).state_dict()
        assert all(torch.equal(sharded[name], whole[name]) for name in whole)

    def test_tied_weights_are_one_tensor(self, tmp_path: Path) -> None:
        model = load(write_checkpoint(tmp_path, tie_word_embeddings=True))
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_what_older_exports_add_is_ignored(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path, tie_word_embeddings=True)
        change_tensors(
            folder,
            lambda tensors: tensors.update(
                {
                    "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
                    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
                }
            ),
        )
        assert load(folder).lm_head.weight.shape == (97, 64)


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


NORM = "model.norm.weight"


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: change_config(folder, **changes)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    return lambda folder: change_tensors(folder, change)


INDEX = "model.safetensors.index.json"
Q_NORM = "model.layers.0.self_attn.q_norm.weight"

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (without("config.json"), r"config\.json is missing"),
    "empty config": (write("config.json", ""), r"config\.json is not valid JSON"),
    "broken config": (write("config.json", '{"a": '), r"config\.json is not valid JSON"),
    "binary config": (write("config.json", b"\xff\xfe\x00"), r"config\.json is not valid JSON"),
    "config is a list": (write("config.json", "[1]"), r"config\.json does not hold a JSON object"),
    "foreign": (config(architectures=["GPT2LMHeadModel"]), r"tiny.*GPT2LMHeadModel.*LlamaForCausalLM"),
    "own code": (
        config(architectures=["OwnForCausalLM"], auto_map={"AutoModelForCausalLM": "own.OwnForCausalLM"}),
        r"tiny.*OwnForCausalLM.*needs code of its own \(auto_map\), which Skippy never runs; supported: Llama",
    ),
    "no architecture": (config(architectures=None), r"tiny.*not supported"),
    "architectures is a number": (config(architectures=5), r"tiny.*not supported"),
    "no sizes": (config(hidden_size=None), r"config\.json .*hidden_size"),
    "size is no number": (config(hidden_size="wide"), r"config\.json .*wide"),
    "no heads": (config(num_attention_heads=0), r"config\.json .*num_attention_heads"),
    "fewer than no layers": (config(num_hidden_layers=-1), r"config\.json .*num_hidden_layers"),
    "heads do not divide": (config(num_key_value_heads=3), r"config\.json .*num_key_value_heads"),
    "activation": (config(hidden_act="gelu"), r"config\.json .*hidden_act 'gelu'"),
    "rope": (config(rope_scaling={"rope_type": "mrope", "factor": 2}), r"config\.json .*'mrope'"),
    "rope is a word": (config(rope_scaling="linear"), r"config\.json is not a usable configuration"),
    "eos is a word": (config(eos_token_id="</s>"), r"config\.json .*</s>"),
    "dtype": (config(dtype="load"), r"config\.json .*dtype 'load'"),
    "generation config": (write("generation_config.json", "{"), r"generation_config\.json is not valid JSON"),
    "tokenizer": (write("tokenizer.json", "{"), r"tokenizer\.json is not valid JSON"),
    "no vocabulary": (write("tokenizer.json", '{"model": {}}'), r"tokenizer\.json is not a usable tokenizer.*vocab"),
    "no tokens": (write("tokenizer.json", '{"model": {"vocab": {}}}'), r"tokenizer\.json is not a usable tokenizer"),
    "no weights": (without("model.safetensors"), r"tiny has no model\.safetensors; maybe its weights are pickled"),
    "pickled weights": (as_pickle, r"no model\.safetensors, but pickled .*_model\.bin.* can run any code"),
    "lost shard": (
        write(INDEX, '{"weight_map": {"lm_head.weight": "lost.safetensors"}}'),
        r"tiny has no lost\.safetensors",
    ),
    "index is no map": (write(INDEX, '{"weight_map": [1]}'), r"index\.json is not a usable index"),
    "index without map": (write(INDEX, '{"metadata": {}}'), r"index\.json is not a usable index: .*weight_map"),
    "truncated": (truncate, r"model\.safetensors cannot be read"),
    "no safetensors": (write("model.safetensors", "x" * 50), r"model\.safetensors cannot be read"),
    "empty weights": (write("model.safetensors", ""), r"model\.safetensors cannot be read"),
    "missing tensor": (tensors(lambda held: held.pop(NORM)), rf"tiny lacks the tensor '{NORM}'"),
    "wrong shape": (
        tensors(lambda held: held.update({NORM: torch.ones(63)})),
        rf"model\.safetensors holds '{NORM}' in shape \[63\].*\[64\]",
    ),
    "left-over tensor": (
        tensors(lambda held: held.update({Q_NORM: torch.ones(16)})),
        rf"model\.safetensors holds '{Q_NORM}'",
    ),
    "more layers than said": (config(num_hidden_layers=2), r"model\.safetensors holds 'model\.layers\.2"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_told_with_the_file_that_has_it(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value), "one line, for a terminal"


def test_code_beside_a_known_architecture_is_not_run(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModelForCausalLM": "own.LlamaForCausalLM"})
    (folder / "own.py").write_text("raise SystemExit")
    assert load(folder).max_len == 16


class TestHub:
    @pytest.fixture
    def downloads(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, list[str]]]:
        """What is downloaded behind the small files of a model that is in `folder`."""
        asked: list[tuple[str, str | None, list[str]]] = []
        monkeypatch.setattr(weights, "find_model", lambda _name, _revision: folder)
        monkeypatch.setattr(weights, "download", lambda *what: asked.append(what))
        return asked

    @pytest.mark.parametrize("shards", [1, 3])
    def test_weights_come_from_the_same_commit(
        self, folder: Path, shards: int, downloads: list[tuple[str, str | None, list[str]]]
    ) -> None:
        if shards > 1:
            shard_checkpoint(folder, shards)
        names = sorted(file.name for file in folder.glob("*.safetensors"))
        assert len(names) == shards
        assert open_checkpoint("owner/model", "v1").path == folder
        assert downloads == [("owner/model", folder.name, names)]

    def test_weights_that_cannot_be_used_are_not_downloaded(
        self, folder: Path, downloads: list[tuple[str, str | None, list[str]]]
    ) -> None:
        change_config(folder, architectures=["GPT2LMHeadModel"])
        with pytest.raises(CheckpointError, match="GPT2LMHeadModel"):
            open_checkpoint("owner/model")
        assert downloads == []


def test_the_tiny_checkpoint_is_sound(folder: Path) -> None:
    """Every damage above is the only one."""
    checkpoint: Checkpoint = open_checkpoint(str(folder))
    assert checkpoint.config.vocab_size == TINY_CONFIG["vocab_size"]
    assert load(folder).max_len == 16
