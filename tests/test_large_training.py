"""What lets a large model be trained for: few logits at a time, bfloat16, checkpointing, quantised products."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support_engine import random_adapter, write_checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from skippy.engine import Engine, EngineConfig
from skippy.engine.adapter import S3DAdapter
from skippy.engine.config import Quantization
from skippy.engine.errors import ConfigError
from skippy.engine.linear import RowLinear, plain
from skippy.engine.model import CausalLM, DecoderLayer, _Fused
from skippy.engine.quant import NF4Product
from skippy.engine.training import loss as loss_module
from skippy.engine.training import run as run_module
from skippy.engine.training.data import Sample, temperature_of
from skippy.engine.training.options import TrainOptions
from skippy.engine.training.run import load_base, run_training
from skippy.engine.training.trainer import Trainer, step_loss
from skippy.engine.weights import open_checkpoint

VOCAB = 1031
OPTIONS = TrainOptions(steps=8, sequences=32, length=32, batch_size=4, anchors=6, num_speculative_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=4, vocab_size=VOCAB)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, folder: Path) -> CausalLM:
    return load(folder, request.param)


def load(folder: Path, dtype: torch.dtype, quantization: Quantization = "none") -> CausalLM:
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        dtype="float32" if dtype == torch.float32 else "bfloat16",
        quantization=quantization,
    )
    return load_base(open_checkpoint(str(folder)), config, 64)


def samples(count: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (count, OPTIONS.length), generator=generator).tolist()
    return [Sample(text, 8, temperature_of(place), place) for place, text in enumerate(tokens)]


def gradients(model: CausalLM, adapter: S3DAdapter, *, checkpointing: bool = False) -> dict[str, Tensor]:
    """Of the loss of one batch, by parameter."""
    generator = torch.Generator().manual_seed(1)
    loss = step_loss(model, adapter, samples(4), 6, 0.5, generator, checkpointing=checkpointing)
    found = torch.autograd.grad(loss, list(adapter.parameters()))
    return dict(zip((name for name, _ in adapter.named_parameters()), found, strict=True))


class LiveLogits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the numbers of those tensors alive whose rows are as wide as the vocabulary.

    Attributes:
        most: of them at any time.
    """

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._now = 0
        self._known = {weight.untyped_storage().data_ptr() for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and VOCAB in tensor.shape:
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._known:
            self._known.add(key)
            self._now += tensor.numel()
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._forget, key, tensor.numel())

    def _forget(self, key: int, numbers: int) -> None:
        self._known.discard(key)
        self._now -= numbers


class TestLogits:
    @pytest.mark.parametrize("width", [2, 3, 6])
    def test_as_many_are_alive_however_many_tokens_are_drafted(
        self, folder: Path, width: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loss_module, "CHUNK", 0)
        monkeypatch.setattr(loss_module, "LEAST_ROWS", 16)
        model = load(folder, torch.float32)
        adapter = random_adapter(folder, num_speculative_tokens=width, recurrent=False)
        with LiveLogits(*model.parameters()) as live:
            gradients(model, adapter)
        # Logits and probabilities of one chunk; the gradient takes the place of the probabilities.
        assert live.most == 2 * 16 * VOCAB

    def test_the_chunk_changes_nothing(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, adapter = load(folder, torch.float32), random_adapter(folder)
        whole = gradients(model, adapter)
        monkeypatch.setattr(loss_module, "CHUNK", 0)
        monkeypatch.setattr(loss_module, "LEAST_ROWS", 7)
        for name, gradient in gradients(model, adapter).items():
            torch.testing.assert_close(gradient, whole[name], msg=name)

    @pytest.mark.parametrize(("vocab_size", "rows"), [(8192, 512), (32000, 256), (128256, 256)])
    def test_rows_at_a_time(self, vocab_size: int, rows: int) -> None:
        assert loss_module.rows_of_vocabulary(vocab_size) == rows


def saved_bytes(compute: Callable[[], object]) -> int:
    """Kept for a backward pass, whatever keeps it."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(kept.values())


class TestPrecision:
    @pytest.mark.parametrize("fused", [False, True])
    def test_checkpointing_gives_the_same_gradients(self, model: CausalLM, folder: Path, fused: bool) -> None:
        shape = {"skip_start": 0, "skip_end": 0, "bridge_rank": 0} if fused else {}
        adapter = random_adapter(folder, fused=fused, **shape)
        plain, again = gradients(model, adapter), gradients(model, adapter, checkpointing=True)
        assert all(torch.equal(gradient, again[name]) for name, gradient in plain.items())
        assert all(gradient.any() for gradient in plain.values())

    def test_the_adapter_stays_in_float32(self, model: CausalLM, folder: Path) -> None:
        trainer = Trainer(model, random_adapter(folder), samples(32), OPTIONS)
        trainer.run_step()
        assert {tensor.dtype for name, tensor in trainer.state().items() if name != "step"} == {torch.float32}
        assert {p.grad.dtype for p in trainer.adapter.parameters() if p.grad is not None} == {torch.float32}
        # Far smaller than bfloat16 would tell from no change at all.
        before = trainer.adapter.masks.detach().clone()
        for group in trainer._optimizer.param_groups:
            group["lr"] = 1e-6
        trainer._optimizer.step()
        assert 0 < (trainer.adapter.masks - before).abs().max() < 1e-5

    def test_bfloat16_points_the_same_way(self, folder: Path) -> None:
        adapter = random_adapter(folder)
        exact, rounded = (
            torch.cat([gradient.flatten() for gradient in gradients(load(folder, dtype), adapter).values()])
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert F.cosine_similarity(exact, rounded, dim=0) > 0.97

    def test_a_training_goes_on_with_checkpointing_as_without(self, model: CausalLM, folder: Path) -> None:
        def losses(*checkpointing: bool) -> list[float]:
            trainer = Trainer(model, random_adapter(folder), samples(32), OPTIONS)
            values = []
            for each in checkpointing:
                trainer.options = replace(OPTIONS, gradient_checkpointing=each)
                values.append(trainer.run_step())
            return values

        assert losses(False, True, False) == losses(True, False, True) == losses(False, False, False)


class TestQuantised:
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_gradients_are_those_of_the_weights_it_stands_for(self, folder: Path, checkpointing: bool) -> None:
        adapter, unpacked, quantised = (
            random_adapter(folder),
            load(folder, torch.float32),
            load(folder, torch.float32, "nf4"),
        )
        for fresh, packed in zip(matrices(unpacked), matrices(quantised), strict=True):
            weight, bias = fresh.parameters()
            product = NF4Product.of(weight, bias)
            fresh.packed = RowLinear(product.dequantised(torch.float32), bias, lambda w, b: (plain(w, b), plain))
            assert packed.packed is not None
        wanted = gradients(unpacked, adapter)
        for name, gradient in gradients(quantised, adapter, checkpointing=checkpointing).items():
            torch.testing.assert_close(gradient, wanted[name], msg=name)

    @pytest.mark.parametrize("quantization", ["int8", "nf4"])
    def test_an_adapter_of_it_is_trained_and_drafts(
        self, folder: Path, tmp_path: Path, quantization: Quantization
    ) -> None:
        config = EngineConfig(
            model=str(folder), device="cpu", dtype="float32", quantization=quantization, num_threads=1
        )
        options = replace(OPTIONS, steps=2, lora_rank=2, head_size=8, bridge_rank=2)
        assert run_training(config, options, str(tmp_path)) == 0
        with pytest.raises(ConfigError, match="quantization"):
            run_training(replace(config, quantization="none"), options, str(tmp_path))
        engine = Engine(replace(config, adapter=str(tmp_path)))
        assert "s3d" in engine.drafting.drafters

    def test_nothing_unpacked_is_kept_for_the_backward_pass(self) -> None:
        product = NF4Product.of(torch.randn(256, 128), None)
        kept: list[int] = []

        def pack(x: Tensor) -> Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            product(torch.randn(2, 128, requires_grad=True)).sum()
        assert max(kept, default=0) < 256 * 128


def matrices(model: CausalLM) -> Iterator[_Fused]:
    """Every product of the layers."""
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        yield from (layer.self_attn.qkv, layer.self_attn.out, layer.mlp.gate_up, layer.mlp.down)


class TestRun:
    @pytest.mark.parametrize(("given", "memory", "chosen"), [(None, 1, True), (None, 2**28, False), (False, 1, False)])
    def test_checkpointing_is_chosen_by_memory(
        self,
        folder: Path,
        tmp_path: Path,
        given: bool | None,
        memory: int,
        chosen: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        seen: list[bool | None] = []

        class Stop(Exception):
            pass

        def record(_model: object, _adapter: object, _samples: object, options: TrainOptions) -> Trainer:
            seen.append(options.gradient_checkpointing)
            raise Stop

        monkeypatch.setattr(run_module, "Trainer", record)
        monkeypatch.setattr(run_module, "memory_of", lambda _: memory)
        options = replace(OPTIONS, gradient_checkpointing=given)
        config = EngineConfig(model=str(folder), device="cpu", dtype="float32", num_threads=1)
        with pytest.raises(Stop):
            run_training(config, options, str(tmp_path))
        assert seen == [chosen]

    def test_it_is_no_part_of_the_recipe(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = EngineConfig(model=str(folder), device="cpu", dtype="float32", num_threads=1)
        small = replace(OPTIONS, steps=2, lora_rank=2, head_size=8, bridge_rank=2)
        assert run_training(config, replace(small, gradient_checkpointing=True), str(tmp_path / "a")) == 0
        assert run_training(config, replace(small, gradient_checkpointing=False), str(tmp_path / "a")) == 0
        assert "nothing to do" in capsys.readouterr().err
        assert run_training(config, small, str(tmp_path / "b")) == 0
        one, other = ((tmp_path / name / "adapter.safetensors").read_bytes() for name in "ab")
        assert one == other

    def test_the_engine_that_wrote_the_text_is_gone_before_the_training(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engines: list[weakref.ref[Engine]] = []

        class Watched(Engine):
            def __init__(self, config: EngineConfig) -> None:
                super().__init__(config)
                engines.append(weakref.ref(self))

        alive: list[bool] = []

        def load_and_look(*arguments: Any) -> CausalLM:
            alive.extend(engine() is not None for engine in engines)
            return load_base(*arguments)

        monkeypatch.setattr(run_module, "Engine", Watched)
        monkeypatch.setattr(run_module, "load_base", load_and_look)
        config = EngineConfig(model=str(folder), device="cpu", dtype="float32", num_threads=1)
        run_training(config, replace(OPTIONS, steps=1, lora_rank=2, head_size=8, bridge_rank=2), str(tmp_path))
        assert alive == [False]
