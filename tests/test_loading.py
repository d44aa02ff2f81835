"""Weights out of their files: which ones, in what type, one shard at a time, and how damage is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support_engine import shard_checkpoint, write_checkpoint
from torch import Tensor

from skippy.engine import CheckpointError
from skippy.engine.loading import INDEX, WEIGHTS, stream, weight_files, weight_names
from skippy.engine.weights import load_model, open_checkpoint, read_checkpoint

CPU = torch.device("cpu")


def everything(_file: Path, _name: str) -> bool:
    return True


def write_shards(folder: Path, *shards: dict[str, Tensor]) -> list[Path]:
    files = [folder / f"model-{i}.safetensors" for i in range(len(shards))]
    for file, tensors in zip(files, shards, strict=True):
        save_file(tensors, file)
    return files


class TestStream:
    def test_file_by_file_converted_and_copied(self, tmp_path: Path) -> None:
        files = write_shards(tmp_path, {"b": torch.full((2,), 3.0), "a": torch.ones(1)}, {"c": torch.zeros(3).half()})
        found = list(stream(files, everything, torch.bfloat16, CPU))
        assert [(files.index(file), name) for file, name, _ in found] == [(0, "a"), (0, "b"), (1, "c")]
        assert {tensor.dtype for *_, tensor in found} == {torch.bfloat16}
        assert found[1][2].tolist() == [3.0, 3.0]

    def test_nothing_refers_to_the_file_any_more(self, tmp_path: Path) -> None:
        files = write_shards(tmp_path, {"a": torch.ones(4096)})
        [(_, _, tensor)] = stream(files, everything, torch.float32, CPU)
        with files[0].open("r+b") as file:
            file.write(bytes(files[0].stat().st_size))
        assert tensor.eq(1).all()

    def test_what_is_not_wanted_is_not_read(self, tmp_path: Path) -> None:
        files = write_shards(tmp_path, {"a": torch.ones(2), "ids": torch.arange(3)})
        assert [name for _, name, _ in stream(files, lambda _, name: name == "a", torch.float32, CPU)] == ["a"]

    @settings(max_examples=20)
    @given(shapes=st.lists(st.lists(st.integers(1, 50), max_size=3), min_size=1, max_size=4), skip=st.integers(0, 3))
    def test_progress_rises_to_the_size_of_the_files(
        self, tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], skip: int
    ) -> None:
        folder = tmp_path_factory.mktemp("shards")
        shards = [{f"{i}.{j}": torch.ones(n) for j, n in enumerate(sizes)} for i, sizes in enumerate(shapes)]
        files = write_shards(folder, *shards)
        told: list[tuple[int, int]] = []

        def is_wanted(_: Path, name: str) -> bool:
            return not name.endswith(f".{skip}")

        for _ in stream(files, is_wanted, torch.float32, CPU, lambda *both: told.append(both)):
            pass
        total = sum(file.stat().st_size for file in files)
        assert told == sorted(told)
        assert told[-1] == (total, total)
        assert {of for _, of in told} == {total}

    def test_a_tensor_in_two_shards(self, tmp_path: Path) -> None:
        files = write_shards(tmp_path, {"a": torch.ones(2)}, {"a": torch.ones(2)})
        with pytest.raises(CheckpointError, match=r"model-1\.safetensors holds 'a', which another shard holds"):
            list(stream(files, everything, torch.float32, CPU))

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
    def test_quantised_tensors_are_no_weights(self, tmp_path: Path, dtype: torch.dtype) -> None:
        files = write_shards(tmp_path, {"a": torch.ones(2).to(dtype)})
        with pytest.raises(CheckpointError, match=f"'a' as {dtype}: quantised"):
            list(stream(files, everything, torch.float32, CPU))

    def test_a_truncated_shard(self, tmp_path: Path) -> None:
        files = write_shards(tmp_path, {"a": torch.ones(64)}, {"b": torch.ones(64)})
        files[1].write_bytes(files[1].read_bytes()[:-4])
        with pytest.raises(CheckpointError, match=r"model-1\.safetensors cannot be read: .* download complete"):
            list(stream(files, everything, torch.float32, CPU))


class TestFiles:
    def write_index(self, folder: Path, content: str) -> None:
        (folder / INDEX).write_text(content)

    def test_one_file_or_those_of_the_index(self, tmp_path: Path) -> None:
        assert weight_names(tmp_path) == [WEIGHTS]
        self.write_index(tmp_path, '{"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}')
        assert weight_names(tmp_path) == ["1.safetensors", "2.safetensors"]
        for name in weight_names(tmp_path):
            (tmp_path / name).touch()
        assert weight_files(tmp_path) == [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]

    @pytest.mark.parametrize(
        "content",
        ["", "[", "[]", "{}", *(f'{{"weight_map": {held}}}' for held in ("[]", "{}", '{"a": "../x"}', '{"a": "/x"}'))],
    )
    def test_an_index_of_no_use(self, tmp_path: Path, content: str) -> None:
        self.write_index(tmp_path, content)
        with pytest.raises(CheckpointError, match=rf"{re.escape(INDEX)} is not a usable index"):
            weight_names(tmp_path)

    def test_missing_shards_are_counted(self, tmp_path: Path) -> None:
        self.write_index(tmp_path, json.dumps({"weight_map": {name: f"{name}.safetensors" for name in "abc"}}))
        (tmp_path / "a.safetensors").touch()
        with pytest.raises(CheckpointError, match=r"has no b\.safetensors, which its index names \(2 of 3 shards"):
            weight_files(tmp_path)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
    def test_pickles_are_refused_with_the_reason_and_a_way_out(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        with pytest.raises(CheckpointError) as caught:
            weight_files(tmp_path)
        assert f"has no model.safetensors, but pickled weights ({name})" in str(caught.value)
        assert "can run any code" in str(caught.value)
        assert "https://huggingface.co/spaces/safetensors/convert" in str(caught.value)

    def test_pickles_beside_safetensors_do_not_matter(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"never looked at")
        (tmp_path / WEIGHTS).touch()
        assert weight_files(tmp_path) == [tmp_path / WEIGHTS]


class TestLayers:
    @pytest.mark.parametrize("shards", [1, 2, 5])
    def test_each_is_finished_once_and_whole(self, tmp_path: Path, shards: int) -> None:
        folder = shard_checkpoint(write_checkpoint(tmp_path), shards)
        finished: list[int] = []

        def finish(model: Any, layer: int) -> None:
            assert not any(parameter.is_meta for parameter in model.model.layers[layer].parameters())
            finished.append(layer)

        load_model(open_checkpoint(str(folder)), torch.float32, CPU, 8, finish_layer=finish)
        assert sorted(finished) == [0, 1, 2]

    def test_packed_one_by_one_they_compute_the_same(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(str(shard_checkpoint(write_checkpoint(tmp_path), 3)))
        early = load_model(checkpoint, torch.float32, CPU, 8, finish_layer=lambda model, layer: model.pack_layer(layer))
        late = load_model(checkpoint, torch.float32, CPU, 8)
        assert early.pack(checkpoint.vocab_size) == late.pack(checkpoint.vocab_size)
        x = torch.randn(32, checkpoint.config.hidden_size)
        for layer in range(checkpoint.config.num_hidden_layers):
            for one, other in zip(early.pack_layer(layer), late.pack_layer(layer), strict=True):
                if one.in_features == checkpoint.config.hidden_size:
                    assert torch.equal(one(x), other(x))

    def test_rotary_settings_of_no_use_are_told_before_weights_are_read(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path, rope_scaling={"rope_type": "llama3", "factor": 0.0})
        (folder / WEIGHTS).unlink()
        with pytest.raises(CheckpointError, match="rotary"):
            load_model(read_checkpoint(folder), torch.float32, CPU, 8)


CODE_BYTES = 32 * 2**20
"""Pages of libraries that only a model of some size calls for; the promise allows 2 GB beside the shard."""
MEASURE = """
import json, re, sys
import torch
from skippy.engine import EngineConfig
from skippy.engine.build import build

def of_process(name):
    with open("/proc/self/status") as file:
        return int(re.search(rf"^{name}:\\s*(\\d+) kB$", file.read(), re.MULTILINE)[1]) * 1024

tiny, folder, dtype = sys.argv[1:]
build(EngineConfig(model=tiny, device="cpu", dtype=dtype))  # whatever is imported and made once
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before, anonymous = of_process("VmRSS"), [of_process("RssAnon")]
built = build(
    EngineConfig(model=folder, device="cpu", dtype=dtype, kv_cache_memory_bytes=2**22),
    lambda done, total: anonymous.append(of_process("RssAnon")),
)
print(json.dumps([of_process("VmHWM") - before, max(anonymous) - anonymous[0], of_process("RssAnon") - anonymous[0]]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory in /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_load_takes_little_more_than_what_is_kept(tmp_path: Path, dtype: str) -> None:
    """Beyond what stays in memory: at most 1.3 times the largest shard, pages of files and of code included."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
    folder = write_checkpoint(tmp_path / "large", **sizes, vocab_size=4096, tie_word_embeddings=True)
    files = weight_files(shard_checkpoint(folder, 4, torch.bfloat16))
    largest = max(file.stat().st_size for file in files)
    command = [sys.executable, "-c", MEASURE, str(write_checkpoint(tmp_path / "tiny")), str(folder), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, anonymous_peak, kept = json.loads(done.stdout)
    assert kept > 0.9 * sum(file.stat().st_size for file in files), "the model is there"
    assert peak <= kept + 1.3 * largest + CODE_BYTES, (peak, anonymous_peak, kept, largest)
    assert anonymous_peak <= kept + 0.5 * largest, (peak, anonymous_peak, kept, largest)
