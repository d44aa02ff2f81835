"""The predicted cost of a training: what is counted is what the code does."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from skippy.engine.adapter import AdapterConfig, S3DAdapter
from skippy.engine.model import CausalLM
from skippy.engine.shape import ModelConfig
from skippy.engine.training.data import Sample
from skippy.engine.training.estimate import (
    BFLOAT16,
    FLOAT32,
    INT8,
    LLAMAS,
    NF4,
    Estimate,
    Precision,
    Processor,
    Work,
    _expected_places,
    estimate,
    main,
)
from skippy.engine.training.options import TrainOptions, num_parameters
from skippy.engine.training.passes import draft_rows, teach
from skippy.engine.training.trainer import step_loss

BASE = ModelConfig(211, 64, 176, 5, 4, 2, 16, 256, 1e-5, tie_word_embeddings=True)
SHAPE = AdapterConfig(1, 3, 4, lora_rank=4, head_size=24, bridge_rank=6, recurrent=True)
OPTIONS = TrainOptions(length=48, batch_size=3, anchors=10, num_speculative_tokens=4)


def make(base: ModelConfig = BASE, shape: AdapterConfig = SHAPE) -> tuple[CausalLM, S3DAdapter]:
    torch.manual_seed(0)
    return CausalLM(base, 64).requires_grad_(False), S3DAdapter(shape, base)


def random_samples() -> list[Sample]:
    tokens = torch.randint(0, BASE.vocab_size, (OPTIONS.batch_size, OPTIONS.length)).tolist()
    return [Sample(text, 1, 0.0, 0) for text in tokens]


def kept_bytes(compute: Callable[[], object], known: list[Tensor]) -> int:
    """Of the tensors, the known ones apart, that a computation keeps for its backward pass."""
    kept: dict[int, int] = {}
    skipped = {tensor.untyped_storage().data_ptr() for tensor in known}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skipped:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    del result
    return sum(kept.values())


class Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the FLOPs of all products."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


class TestCounts:
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_flops_are_those_that_pytorch_counts(self, checkpointing: bool) -> None:
        model, adapter = make()
        with Flops() as counter:  # type: ignore[no-untyped-call]
            step_loss(
                model, adapter, random_samples(), 10, 0.5, torch.Generator().manual_seed(0), checkpointing=checkpointing
            ).backward()  # type: ignore[no-untyped-call]
        options = replace(OPTIONS, gradient_checkpointing=checkpointing)
        step = estimate(BASE, SHAPE, options, FLOAT32).step
        # That of the teacher is a fused operator, which PyTorch counts on GPUs only.
        predicted = sum(work.flops for name, work in step.items() if name != "teacher, attention")
        assert predicted == pytest.approx(counter.total, rel=0.05)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_the_draft_keeps_what_was_counted(self, checkpointing: bool) -> None:
        model, adapter = make()
        teaching = teach(model, adapter, torch.tensor([sample.tokens for sample in random_samples()]))
        anchors = torch.arange(1, 11).expand(3, -1)
        known = [*model.parameters(), *adapter.parameters(), teaching.context]
        known += [tensor for pair in teaching.keys_values.values() for tensor in pair]
        kept = kept_bytes(lambda: draft_rows(model, adapter, teaching, anchors, checkpointing=checkpointing), known)
        memory = estimate(BASE, SHAPE, replace(OPTIONS, gradient_checkpointing=checkpointing), FLOAT32).memory
        layers = memory["what enters the draft's layers" if checkpointing else "the draft's layers"]
        rows = 3 * 10 * 4 * 4  # bytes of a number of every row
        # The bridge and the ends keep some, too: the context, its norm, the masks' places.
        assert layers <= kept <= 1.05 * layers + 5 * BASE.hidden_size * rows

    @pytest.mark.parametrize("changes", [{}, {"recurrent": False, "bridge_rank": 0}, {"head_size": 0, "lora_rank": 0}])
    def test_the_adapter_counts_four_times(self, changes: dict[str, Any]) -> None:
        shape = replace(SHAPE, **changes)
        _, adapter = make(shape=shape)
        numbers = sum(parameter.numel() for parameter in adapter.parameters())
        assert estimate(BASE, shape, OPTIONS, BFLOAT16).memory["adapter and optimizer"] == 16 * numbers

    @pytest.mark.parametrize(("name", "billions"), [("1B", 1.236), ("3B", 3.213), ("8B", 8.030)])
    def test_the_llamas_are_as_large_as_published(self, name: str, billions: float) -> None:
        assert num_parameters(LLAMAS[name]) == pytest.approx(billions * 1e9, rel=1e-3)

    @given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 99))
    @settings(max_examples=30, deadline=None)
    def test_expected_places(self, width: int, anchors: int, seed: int) -> None:
        chooser, length = random.Random(seed), 60
        draws = [chooser.sample(range(length - width), anchors) for _ in range(200)]
        mean = sum(len({place + j for place in draw for j in range(width)}) for draw in draws) / len(draws)
        assert _expected_places(length, anchors, width) == pytest.approx(mean, rel=0.15)


def cost(precision: Precision = BFLOAT16, base: ModelConfig = LLAMAS["8B"], **changes: Any) -> Estimate:
    options = replace(TrainOptions(), **changes)
    return estimate(base, options.adapter_config(base, 2 * num_parameters(base)), options, precision)


class TestPrediction:
    def test_time_is_the_slower_of_multiplying_and_reading_and_then_the_rest(self) -> None:
        processor = Processor(flops=100.0, bandwidth=10.0)
        assert Work(flops=500, weight_bytes=20, moved_bytes=30).seconds(processor) == 5 + 3
        assert Work(flops=500, weight_bytes=80, moved_bytes=30).seconds(processor) == 8 + 3

    def test_checkpointing_trades_time_for_memory(self) -> None:
        processor = Processor(50e12, 600e9)
        plain, again = cost(gradient_checkpointing=False), cost(gradient_checkpointing=True)
        assert again.peak_bytes < 0.8 * plain.peak_bytes
        assert plain.step_seconds(processor) < again.step_seconds(processor) < 1.35 * plain.step_seconds(processor)

    def test_a_quantised_base_is_smaller_and_slower(self) -> None:
        processor = Processor(50e12, 600e9)
        sizes = [cost(precision).memory["weights"] for precision in (BFLOAT16, INT8, NF4)]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] == pytest.approx(2 * num_parameters(LLAMAS["8B"]))
        assert cost(NF4).step_seconds(processor) > cost().step_seconds(processor)

    @pytest.mark.parametrize("name", ["batch_size", "anchors", "length"])
    def test_more_of_anything_costs_more(self, name: str) -> None:
        less, more = cost(), cost(**{name: 2 * getattr(TrainOptions(), name)})
        assert more.peak_bytes > less.peak_bytes
        assert more.step_seconds(Processor(1e12, 1e11)) > less.step_seconds(Processor(1e12, 1e11))

    def test_tokens_beyond_the_first_cost_rows_but_no_logits(self) -> None:
        one, six = (cost(base=LLAMAS["1B"], num_speculative_tokens=width) for width in (1, 6))
        assert one.memory["logits"] == six.memory["logits"]
        assert 5 < six.memory["the draft's layers"] / one.memory["the draft's layers"] < 7

    def test_the_command(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.argv", ["estimate", "--memory-gb", "24"])
        assert main() == 0
        lines = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
        assert len(lines) == 18
        fits = {
            (model.strip(), base.strip(), twice.strip()): yes.strip() for _, model, base, twice, _, _, yes, *_ in lines
        }
        assert fits["8B", "bfloat16", "no"] == "no"
        assert {yes for key, yes in fits.items() if key != ("8B", "bfloat16", "no")} == {"yes"}
