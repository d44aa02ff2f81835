"""Training: the rows of serving, the loss of the textbook, the walk of the engine."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support_engine import run_dry, write_checkpoint
from support_training import OPTIONS, training_config
from torch import Tensor

from skippy.engine import ConfigError, Engine, EngineConfig, Request, SamplingParams
from skippy.engine.adapter import S3DAdapter
from skippy.engine.adapter_files import load_adapter, save_adapter
from skippy.engine.chain import Link, draft_chain
from skippy.engine.drafters import s3d
from skippy.engine.drafters.none import NoDrafter
from skippy.engine.errors import TrainingError
from skippy.engine.families import parse_config
from skippy.engine.model import CausalLM
from skippy.engine.sampling import SamplingState
from skippy.engine.training import data
from skippy.engine.training import trainer as trainer_module
from skippy.engine.training.data import (
    FREE_EVERY,
    SHORTEST_OPENING,
    Sample,
    generate_samples,
    temperature_of,
    without_overlap,
)
from skippy.engine.training.files import load_samples, save_samples
from skippy.engine.training.loss import draft_loss, teacher_tops
from skippy.engine.training.options import TrainOptions, adapter_budget, default_band
from skippy.engine.training.passes import draft_rows, teach
from skippy.engine.training.run import load_base
from skippy.engine.training.trainer import Trainer, hold_out, step_loss
from skippy.engine.training.walk import accepted_counts
from skippy.engine.types import StepOutput
from skippy.engine.weights import open_checkpoint


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return training_config(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(config: EngineConfig) -> CausalLM:
    return load_base(open_checkpoint(config.model), config, 256)


@pytest.fixture(scope="module")
def samples(config: EngineConfig) -> list[Sample]:
    return generate_samples(Engine(replace(config, drafter="none")), [], 48, 40, 0, lambda _: None)


@pytest.fixture(params=[False, True], ids=["separate", "fused"])
def adapter(request: pytest.FixtureRequest, config: EngineConfig, tmp_path: Path) -> S3DAdapter:
    """One whose every part does something, as it is read back from `tmp_path`."""
    checkpoint = open_checkpoint(config.model)
    torch.manual_seed(1)
    options = replace(OPTIONS, fused=request.param, bridge_rank=None if request.param else OPTIONS.bridge_rank)
    adapter = S3DAdapter(options.adapter_config(checkpoint.config, 1_000_000), checkpoint.config)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_adapter(tmp_path, adapter, checkpoint, {})
    return load_adapter(tmp_path, checkpoint, torch.float32, torch.device("cpu"))


def trainable(adapter: S3DAdapter) -> S3DAdapter:
    return adapter.requires_grad_(True)


class TestData:
    def test_a_sample_is_what_the_engine_answers_to_its_opening(
        self, config: EngineConfig, samples: list[Sample]
    ) -> None:
        sample = samples[5]
        assert sample.temperature == 0.8
        params = SamplingParams(
            max_tokens=len(sample.tokens) - sample.start,
            temperature=sample.temperature,
            seed=sample.seed,
            ignore_eos=True,
        )
        outputs = run_dry(Engine(config), [Request("x", tuple(sample.tokens[: sample.start]), params)])
        assert [t for part in outputs["x", 0] for t in part.token_ids] == sample.tokens[sample.start :]

    def test_sequences_are_of_one_length_of_every_temperature_and_repeatable(
        self, config: EngineConfig, samples: list[Sample]
    ) -> None:
        assert {len(sample.tokens) for sample in samples} == {40}
        assert [sample.temperature for sample in samples] == [temperature_of(place) for place in range(48)]
        for first in range(FREE_EVERY):
            assert sorted(map(temperature_of, range(first, 16, FREE_EVERY))) == [0.0, 0.0, 0.8, 1.0]
        assert all(SHORTEST_OPENING < sample.start <= 20 for sample in samples)
        again = generate_samples(Engine(config), [], 8, 40, 3, lambda _: None)
        assert again == generate_samples(Engine(config), [], 8, 40, 3, lambda _: None)
        assert again != generate_samples(Engine(config), [], 8, 40, 4, lambda _: None)

    def test_drafts_are_accepted_and_change_nothing(
        self, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = Engine(replace(config, drafter="none"))
        drafted = Engine(replace(config, drafter="none"))
        accepted: list[int] = []
        run = drafted.run

        def counted(requests: Iterable[Request], at_once: int) -> Iterator[StepOutput]:
            for step in run(requests, at_once):
                accepted.append(step.stats.accepted_tokens)
                yield step

        monkeypatch.setattr(drafted, "run", counted)
        texts = generate_samples(drafted, [], 16, 40, 5, lambda _: None)
        assert sum(accepted) > 0
        monkeypatch.setattr(data, "HybridDrafter", NoDrafter)
        assert generate_samples(plain, [], 16, 40, 5, lambda _: None) == texts

    def test_prompts_open_three_in_four_sequences_at_most_and_each_one_only(self, config: EngineConfig) -> None:
        few = [[5, 6, 7], [8] * 30, [5, 6, 7]]
        opened = generate_samples(Engine(config), few, 12, 40, 0, lambda _: None)
        starts = [tuple(sample.tokens[: sample.start]) for sample in opened]
        assert starts.count((5, 6, 7)) == 1
        assert starts.count((8,) * 20) == 1
        many = [[10 + i, 3] for i in range(40)]
        opened = generate_samples(Engine(config), many, 12, 40, 0, lambda _: None)
        assert [sample.start == 2 for sample in opened] == [False, True, True, True] * 3

    def test_texts_that_overlap_with_evaluation_texts_are_dropped(self) -> None:
        words = [f"w{i}" for i in range(40)]
        texts: dict[tuple[int, ...], str] = {
            (0,): " ".join(words[:20]),
            (1,): "x " + "\n ".join(words[7:20]).upper() + " y",  # 13 words
            (2,): "x " + " ".join(words[8:20]) + " y",  # 12 words
            (3,): "",
        }
        samples = [Sample(list(tokens), 0, 0.0, 0) for tokens in texts]
        kept = without_overlap(samples, lambda tokens: texts[tuple(tokens)], [" ".join(words[5:30]), "short"])
        assert [sample.tokens for sample in kept] == [[2], [3]]

    def test_samples_survive_the_disk(self, tmp_path: Path, samples: list[Sample]) -> None:
        save_samples(tmp_path / "d.safetensors", samples, {"seconds": 1.5})
        assert load_samples(tmp_path / "d.safetensors") == (samples, {"seconds": 1.5})
        assert os.listdir(tmp_path) == ["d.safetensors"]

    def test_a_damaged_file_is_told(self, tmp_path: Path, samples: list[Sample]) -> None:
        file = tmp_path / "d.safetensors"
        save_samples(file, samples, {})
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(TrainingError, match="cannot be read"):
            load_samples(file)


class TestOptions:
    @pytest.mark.parametrize(
        ("layers", "band"), [(1, (0, 0)), (2, (0, 1)), (3, (1, 2)), (5, (1, 3)), (10, (2, 7)), (32, (6, 22))]
    )
    def test_the_default_band(self, layers: int, band: tuple[int, int]) -> None:
        assert default_band(layers) == band

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize(
        ("sizes", "weight_bytes", "share"),
        [
            ((8192, 256, 704, 10, 4, 2), 18_960_680, 0.1),
            ((512, 64, 172, 5, 8, 4), 1_044_992, 0.1),
            ((128256, 2048, 8192, 16, 32, 8), 2_471_000_000, 0.01),
        ],
    )
    def test_the_default_sizes_fill_the_budget(
        self, sizes: tuple[int, ...], weight_bytes: int, share: float, fused: bool
    ) -> None:
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        raw: dict[str, Any] = dict(zip((*names, "num_key_value_heads"), sizes, strict=True))
        raw |= {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512, "tie_word_embeddings": True}
        base = parse_config(raw)
        shape = TrainOptions(fused=fused).adapter_config(base, weight_bytes)
        with torch.device("meta"):
            count = sum(p.numel() for p in S3DAdapter(shape, base).parameters())
        assert count <= adapter_budget(base, weight_bytes) == int(weight_bytes * share / 2)
        assert count > 0.7 * adapter_budget(base, weight_bytes)

    def test_what_is_given_stands(self, model: CausalLM) -> None:
        shape = replace(OPTIONS, skip_start=1, skip_end=2, recurrent=False).adapter_config(model.config, 10)
        assert (shape.skip_start, shape.skip_end, shape.recurrent) == (1, 2, False)
        assert (shape.lora_rank, shape.head_size, shape.bridge_rank) == (2, 16, 4)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"steps": 0}, "steps must be at least 1"),
            ({"seed": -1}, "seed must be"),
            ({"learning_rate": math.nan}, "learning_rate must be above 0"),
            ({"tv_share": 1.5}, "tv_share must be between 0 and 1"),
            ({"anchors": 38}, "length 40 has no room for 38 anchors"),
        ],
    )
    def test_values_out_of_range(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            replace(OPTIONS, **changes)


class TestRows:
    def test_training_rows_are_serving_rows(
        self,
        config: EngineConfig,
        model: CausalLM,
        adapter: S3DAdapter,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        seen: list[tuple[int, Tensor]] = []

        def record(
            model: CausalLM, adapter: S3DAdapter, hidden: list[Tensor], newest: Tensor, prospects: Any, *rest: Any
        ) -> list[list[Link]]:
            seen.append((prospects[0].index - 1, hidden[0].clone()))
            return draft_chain(model, adapter, hidden, newest, prospects, *rest)

        monkeypatch.setattr(s3d, "draft_chain", record)
        engine = Engine(replace(config, adapter=str(tmp_path), drafter="s3d"))
        drafter = engine.drafting.drafters["s3d"]
        assert isinstance(drafter, s3d.S3DDrafter | s3d.S3DFusedDrafter)
        drafter.adapter.folded.clear()  # rounded to float16
        params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
        prompt = (1, 7, 30, 11)
        outputs = run_dry(engine, [Request("x", prompt, params, num_speculative_tokens=3)])
        tokens = [*prompt, *(t for part in outputs["x", 0] for t in part.token_ids)]
        teaching = teach(model, adapter, torch.tensor([tokens]))
        assert len(seen) > 10
        for anchor, hidden in seen:
            trained = draft_rows(model, adapter, teaching, torch.tensor([[anchor]]))[0, 0]
            torch.testing.assert_close(trained[: len(hidden)], hidden, atol=1e-4, rtol=1e-4)

    def test_anchors_do_not_see_each_other_nor_the_future(self, model: CausalLM, adapter: S3DAdapter) -> None:
        tokens = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(0))
        changed = tokens.clone()
        changed[:, 13:] = 5
        anchors = torch.tensor([[12, 3, 20], [12, 8, 25]])
        rows = draft_rows(model, adapter, teach(model, adapter, tokens), anchors)
        alone = draft_rows(model, adapter, teach(model, adapter, changed), anchors[:, :1])
        torch.testing.assert_close(rows[:, :1], alone, atol=1e-5, rtol=1e-5)


class TestLoss:
    @pytest.mark.parametrize("tv_share", [0.0, 0.7, 1.0])
    @pytest.mark.parametrize("softcap", [None, 3.0])
    def test_value_and_gradient_are_the_textbooks(self, tv_share: float, softcap: float | None) -> None:
        torch.manual_seed(0)
        head, teacher = torch.randn(97, 16), torch.randn(11, 16)
        drafter = torch.randn(11, 16, requires_grad=True)

        def cap(logits: Tensor) -> Tensor:
            return logits if softcap is None else softcap * torch.tanh(logits / softcap)

        ids, probs = teacher_tops(teacher, lambda x: cap(x @ head.t()), rows_at_once=4)  # the last chunk is smaller
        p = cap(teacher @ head.t()).softmax(-1)
        torch.testing.assert_close(probs, p.gather(1, ids))
        assert (probs.sum(-1) > 0.8).all()

        q = cap(drafter @ head.t()).softmax(-1).gather(1, ids)
        kl, tv = (probs * (probs / q).log()).sum(-1), (probs - torch.minimum(probs, q)).sum(-1)
        naive = tv_share * tv + (1 - tv_share) * kl
        weights = torch.rand(11)
        (wanted,) = torch.autograd.grad((naive * weights).sum(), drafter)
        loss = draft_loss(drafter, lambda x: cap(x @ head.t()), ids, probs, tv_share, rows_at_once=4)
        (gradient,) = torch.autograd.grad((loss * weights).sum(), drafter)
        torch.testing.assert_close(loss, naive)
        torch.testing.assert_close(gradient, wanted)

    def test_a_drafter_that_is_sure_and_wrong_costs_much_but_not_infinitely(self) -> None:
        head = torch.eye(97) * 200
        ids, probs = teacher_tops(torch.eye(97)[:3], lambda x: x @ head, 2)
        drafter = torch.eye(97)[3:6].clone().requires_grad_()
        loss = draft_loss(drafter, lambda x: x @ head, ids, probs, 0.5, 2)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        assert drafter.grad is not None
        assert loss.isfinite().all()
        assert drafter.grad.isfinite().all()

    def test_a_drafter_that_is_the_model_costs_nothing(self, model: CausalLM, samples: list[Sample]) -> None:
        """With nothing skipped and no adapter, the first rows are the model's own."""
        options = TrainOptions(
            skip_start=0,
            skip_end=0,
            lora_rank=0,
            head_size=0,
            bridge_rank=0,
            num_speculative_tokens=1,
            length=40,
            anchors=9,
        )
        adapter = S3DAdapter(options.adapter_config(model.config, 10), model.config)
        loss = step_loss(model, adapter, samples[:4], 9, 0.5, torch.Generator().manual_seed(0))
        assert loss.item() < 1e-4


class TestWalk:
    @pytest.mark.parametrize("temperature", [0.0, 0.8])
    def test_it_accepts_what_the_engine_accepts(
        self,
        config: EngineConfig,
        model: CausalLM,
        adapter: S3DAdapter,
        samples: list[Sample],
        tmp_path: Path,
        temperature: float,
    ) -> None:
        engine = Engine(replace(config, adapter=str(tmp_path), drafter="s3d"))
        accepted: list[int] = []
        for sample in [s for s in samples if s.temperature == temperature][:8]:
            params = SamplingParams(
                max_tokens=len(sample.tokens) - sample.start,
                temperature=temperature,
                seed=sample.seed,
                ignore_eos=True,
            )
            request = Request("x", tuple(sample.tokens[: sample.start]), params, num_speculative_tokens=3)
            outputs = run_dry(engine, [request])["x", 0]
            assert [t for part in outputs for t in part.token_ids] == sample.tokens[sample.start :]
            params = SamplingParams(temperature=sample.temperature, seed=sample.seed)
            prompt = sample.tokens[: sample.start]
            state = SamplingState(params, prompt, sample.seed, 0, (), model.lm_head.out_features, torch.device("cpu"))
            walked = list(accepted_counts(model, adapter, sample.tokens, sample.start, state))
            # The first step computes the prompt; the last ones draft beyond the end of the text.
            assert walked == [len(part.token_ids) - 1 for part in outputs[1 : 1 + len(walked)]]
            assert sum(len(part.token_ids) for part in outputs[1 + len(walked) :]) <= 3
            accepted += walked
        assert any(accepted)


class TestTrainer:
    def test_the_base_stays_and_the_adapter_changes(
        self, model: CausalLM, adapter: S3DAdapter, samples: list[Sample]
    ) -> None:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        parts = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
        trainer = Trainer(model, trainable(adapter), samples, OPTIONS)
        for _ in range(4):  # KL alone, and then with TV
            assert math.isfinite(trainer.run_step())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert [name for name, tensor in adapter.state_dict().items() if torch.equal(tensor, parts[name])] == []

    def test_held_out_texts_are_never_trained_on(
        self, model: CausalLM, adapter: S3DAdapter, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[int, ...]] = []

        def record(_model: CausalLM, _adapter: S3DAdapter, batch: list[Sample], *_: object, **__: object) -> Tensor:
            seen.extend(tuple(sample.tokens) for sample in batch)
            return sum((p.sum() * 0 for p in adapter.parameters()), torch.zeros(()))

        monkeypatch.setattr(trainer_module, "step_loss", record)
        trainer = Trainer(model, trainable(adapter), samples, OPTIONS)
        for _ in range(18):  # two epochs of 36 sequences
            trainer.run_step()
        assert sorted(seen) == sorted([tuple(sample.tokens) for sample in samples[:36]] * 2)
        assert seen[:36] != seen[36:]
        assert all(sample in samples[36:] for part in trainer.held_out for sample in part)
        assert {s.temperature for s in trainer.held_out.greedy} == {0.0}
        assert {s.temperature for s in trainer.held_out.sampled} == {0.8}

    @pytest.mark.parametrize("stopped_at", [0, 3, 9])
    def test_another_trainer_goes_on_from_its_state(
        self, model: CausalLM, adapter: S3DAdapter, samples: list[Sample], stopped_at: int
    ) -> None:
        def begin() -> Trainer:
            return Trainer(model, trainable(copy.deepcopy(adapter)), samples, OPTIONS)

        first, second = begin(), begin()
        for _ in range(stopped_at):
            first.run_step()
        second.resume(copy.deepcopy(first.state()))
        assert [first.run_step() for _ in range(3)] == [second.run_step() for _ in range(3)]
        expected = second.state()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in first.state().items())

    def test_at_most_so_many_are_held_out(self) -> None:
        samples = [Sample([i], 0, temperature_of(i), i) for i in range(2048)]
        training, held_out = hold_out(samples, 8)
        assert training == samples[:-96]
        assert (len(held_out.greedy), len(held_out.sampled)) == (24, 24)

    @pytest.mark.parametrize(("count", "batch_size"), [(0, 1), (8, 1), (48, 37)])
    def test_too_few_sequences(self, count: int, batch_size: int) -> None:
        with pytest.raises(ConfigError, match=f"{count} sequences are too few"):
            hold_out([Sample([i], 0, temperature_of(i), i) for i in range(count)], batch_size)

    def test_a_loss_that_is_not_finite_ends_it_and_changes_nothing(
        self, model: CausalLM, adapter: S3DAdapter, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = Trainer(model, trainable(adapter), samples, OPTIONS)
        before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
        monkeypatch.setattr(
            trainer_module, "step_loss", lambda *_, **__: sum(p.sum() for p in adapter.parameters()) * math.nan
        )
        with pytest.raises(TrainingError, match="step 1: the loss is nan"):
            trainer.run_step()
        assert trainer.step == 0
        assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())

    def test_a_short_training_drafts_better(self, config: EngineConfig, tmp_path: Path) -> None:
        small = write_checkpoint(tmp_path / "small", num_hidden_layers=4, vocab_size=24, hidden_size=32)
        config = replace(config, model=str(small))
        samples = generate_samples(Engine(config), [], 128, 40, 0, lambda _: None)
        checkpoint = open_checkpoint(config.model)
        options = replace(OPTIONS, steps=80, batch_size=8, anchors=24, learning_rate=5e-3, lora_rank=8, head_size=64)
        torch.manual_seed(0)
        adapter = S3DAdapter(options.adapter_config(checkpoint.config, 10), checkpoint.config)
        trainer = Trainer(load_base(checkpoint, config, 40), adapter, samples, options)
        before = trainer.walk()
        losses = [trainer.run_step() for _ in range(options.steps)]
        after = trainer.walk()
        assert sum(losses[-8:]) < sum(losses[:8])
        assert after.greedy.tokens_per_step > before.greedy.tokens_per_step + 0.1
        assert after.sampled.tokens_per_step > before.sampled.tokens_per_step + 0.1
        depths = after.greedy.by_depth
        assert depths == sorted(depths, reverse=True)
        assert after.greedy.tokens_per_step == pytest.approx(1 + sum(depths))
