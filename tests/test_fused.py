"""Riders: the rows of the fused drafter see what they should, disturb nobody, and draft the next step."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support_engine import (
    TINY_ADAPTER,
    RandomDrafter,
    random_adapter,
    run_dry,
    tokens_of,
    write_adapter,
    write_checkpoint,
)
from support_exactness import Answers, add_drafters, assert_exact, reference_answers
from torch import Tensor

from skippy.engine import BUILTIN_MODEL, Engine, EngineConfig, Request, SamplingParams, StepStats
from skippy.engine.adapter import AdapterConfig, S3DAdapter
from skippy.engine.adapter_files import BESIDE_MODEL, load_adapter, save_adapter
from skippy.engine.build import build
from skippy.engine.config import Dtype
from skippy.engine.controller import Controller
from skippy.engine.drafters.s3d import S3DFusedDrafter
from skippy.engine.errors import AdapterError
from skippy.engine.runner import Rows, Runner
from skippy.engine.sequence import Sequence as ScheduledSequence
from skippy.engine.shape import full_plan
from skippy.engine.training.passes import draft_rows, teach
from skippy.engine.weights import load_model, open_checkpoint

FUSED: dict[str, Any] = {**TINY_ADAPTER, "fused": True, "skip_start": 0, "skip_end": 0, "bridge_rank": 0}
GREEDY = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=30, temperature=1.0, seed=7, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and an adapter without any training: some of its drafts are accepted, by luck."""
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny"))
    write_adapter(folder, scale=0.1, **FUSED)
    return folder


@pytest.fixture(scope="module")
def foreseen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose choice depends on the newest token alone, and an adapter that foresees all of it.

    Attention and MLP add nothing, riders are zero, and the sequential head maps the token
    drafted before to itself: silu(x) - silu(-x) = x. All 32 tokens are candidates.
    """
    folder = write_checkpoint(tmp_path_factory.mktemp("markov"), vocab_size=32)
    state = load_file(folder / "model.safetensors")
    for name, tensor in state.items():
        if "o_proj" in name or "down_proj" in name:
            tensor.zero_()
    save_file(state, folder / "model.safetensors")
    embeddings = state["model.embed_tokens.weight"]
    adapter = random_adapter(folder, **{**FUSED, "lora_rank": 0, "head_size": 2 * embeddings.shape[1]})
    assert adapter.head is not None
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
        identity = torch.eye(embeddings.shape[1])
        adapter.head.from_token.copy_(torch.cat((identity, -identity), 1) * embeddings.square().mean().sqrt())
        adapter.head.out.copy_(torch.cat((identity, -identity)))
    save_adapter(folder / BESIDE_MODEL, adapter, open_checkpoint(str(folder)), {})
    return folder


def make_engine(folder: Path, **changes: Any) -> Engine:
    config: dict[str, Any] = {"device": "cpu", "dtype": "float32", "block_size": 8, "max_num_seqs": 8, **changes}
    return Engine(EngineConfig(model=str(folder), **config))


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    return reference_answers(folder)


class TestExactness:
    @pytest.mark.parametrize(
        "config",
        [
            {},
            {"enable_prefix_caching": False},
            {"max_num_batched_tokens": 9, "max_num_seqs": 3},
            {"max_num_batched_tokens": 40},
            {"kv_cache_memory_bytes": 12 * 16 * 3 * 2 * 32 * 4},
        ],
        ids=["all that is usual", "no prefix cache", "chunked prompts", "rows for some riders", "preemption"],
    )
    def test_every_mode_emits_what_the_reference_emits(
        self, folder: Path, answers: Answers, config: dict[str, Any]
    ) -> None:
        tally = assert_exact(folder, answers, ("s3d",), **config)["s3d"]
        assert 0 < tally.accepted < tally.drafted
        assert ("kv_cache_memory_bytes" in config) == (tally.preemptions > 0)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_builtin_model(self, dtype: Dtype, tmp_path: Path) -> None:
        base = open_checkpoint(BUILTIN_MODEL)
        adapter = S3DAdapter(AdapterConfig(**FUSED), base.config)
        save_adapter(tmp_path, adapter, base, {})
        engine = Engine(EngineConfig(device="cpu", dtype=dtype, adapter=str(tmp_path)))
        prompts = [tuple(4 + byte for byte in b"def add(a, b):\n    return a + b"[:n]) for n in (3, 17, 30)]
        for params in (replace(GREEDY, max_tokens=16), replace(SAMPLED, max_tokens=16)):
            plain, drafted = (
                tokens_of(run_dry(engine, [Request(str(i), p, params, drafter=drafter) for i, p in enumerate(prompts)]))
                for drafter in ("none", "s3d")
            )
            assert drafted == plain


class Bench:
    """A runner with several sequences cached up to some place, and what follows there."""

    def __init__(self, model: str, dtype: Dtype) -> None:
        built = build(EngineConfig(model=model, device="cpu", dtype=dtype, block_size=8, max_model_len=256))
        self.runner: Runner = built.runner
        shape = built.checkpoint.config
        torch.manual_seed(0)
        self.adapter = S3DAdapter(AdapterConfig(**FUSED), shape).to(built.runner.pool.keys.dtype)
        for parameter in self.adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        self.plan = full_plan(shape)
        draw = random.Random(1)
        self.rows: list[Rows] = []
        free = 0
        for length, width in [(1, 1), (6, 5), (8, 1), (21, 9), (70, 4), (40, 30)]:
            table = list(range(free, free + 20))
            free += 20
            tokens = [draw.randrange(built.checkpoint.vocab_size) for _ in range(length + width)]
            self.runner.run([Rows(tokens[:length], 0, table, 0)], self.plan)
            self.rows.append(Rows(tokens[length:], length, table, width))
        self.cache = self.runner.pool.cache.clone()

    def ridden(self, counts: Sequence[int]) -> list[Rows]:
        return [
            replace(rows, riders=self.adapter.mask_ids(n), num_ridden=min(4, len(rows.tokens)))
            for rows, n in zip(self.rows, counts, strict=True)
        ]

    def run(self, rows: Sequence[Rows]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the rows, hidden states of the riders, and the cache after a pass over the same past."""
        pool = self.runner.pool
        pool.cache.copy_(self.cache)
        adapter = self.adapter.bind(None, sum(len(part.tokens) for part in rows))
        computed = self.runner.compute(rows, self.plan, adapter if any(part.riders for part in rows) else None)
        return self.runner.logits(computed.hidden), computed.riders, pool.cache.clone()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> Dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=[BUILTIN_MODEL, "tiny"])
def bench(request: pytest.FixtureRequest, dtype: Dtype, folder: Path) -> Bench:
    return Bench(BUILTIN_MODEL if request.param == BUILTIN_MODEL else str(folder), dtype)


class TestPasses:
    @pytest.mark.parametrize("counts", [[1] * 6, [6] * 6, [0, 3, 0, 0, 6, 1], [0, 0, 0, 0, 0, 5]])
    def test_not_a_bit_of_the_ridden_rows_changes(self, bench: Bench, counts: list[int]) -> None:
        logits, none, cache = bench.run(bench.rows)
        assert len(none) == 0
        rows = bench.ridden(counts)
        with_riders, riders, cache_with_riders = bench.run(rows)
        assert torch.equal(with_riders, logits)
        assert len(riders) == sum(n * part.num_ridden for n, part in zip(counts, rows, strict=True))
        pool, scratch = bench.runner.pool, {bench.runner.pool.padding_slot}
        for part, n in zip(rows, counts, strict=True):
            scratch |= set(pool.slots(part.table, part.end, part.end + n * part.num_ridden))
        changed = (cache_with_riders != cache).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
        assert set(changed) <= scratch, "riders write behind the rows and nowhere else"
        assert len(changed) >= len(riders)

    def test_not_even_if_the_adapter_is_broken(self, bench: Bench) -> None:
        logits, _, _ = bench.run(bench.rows)
        sound = bench.adapter.masks.detach().clone()
        with torch.no_grad():
            bench.adapter.masks[1:] = torch.tensor([torch.nan, torch.inf]).repeat(len(sound), sound.shape[1])[1:, ::2]
            bench.adapter.masks[3:] = torch.inf
        with_riders, riders, cache = bench.run(bench.ridden([6] * 6))
        with torch.no_grad():
            bench.adapter.masks.copy_(sound)
        assert riders.isnan().any()
        assert torch.equal(with_riders, logits)
        assert cache.isfinite().all()

    def test_a_group_depends_on_nothing_but_what_it_may_see(self, bench: Bench) -> None:
        """Behind any row, in any company, with fewer of its own behind it, and whatever comes later."""
        _, together, _ = bench.run(bench.ridden([6] * 6))
        place = 0
        for part in bench.rows:
            for ridden in range(max(0, len(part.tokens) - 4), len(part.tokens)):
                alone = replace(
                    part, tokens=part.tokens[: ridden + 1], num_logits=1, riders=bench.adapter.mask_ids(3), num_ridden=1
                )
                _, riders, _ = bench.run([alone])
                error = (riders - together[place : place + 3]).float().norm() / riders.float().norm()
                assert error < (1e-4 if riders.dtype == torch.float32 else 0.05)
                place += 6
        assert place == len(together)

    def test_positions_past_the_last_are_not_looked_up(self, bench: Bench) -> None:
        last = bench.runner.model.max_len - 1
        bench.runner.compute(
            [Rows([5], last, list(range(34)), 1, bench.adapter.mask_ids(6), 1)], bench.plan, bench.adapter.bind(None, 1)
        )

    def test_training_rows_are_the_rows_of_serving(self, folder: Path) -> None:
        checkpoint = open_checkpoint(str(folder))
        model = load_model(checkpoint, torch.float32, torch.device("cpu"), 256)
        adapter = load_adapter(folder / BESIDE_MODEL, checkpoint, torch.float32, torch.device("cpu"))
        assert adapter.kept == [0, 1, 2]
        tokens = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(0))
        anchors = torch.arange(1, 30).expand(2, -1)
        with torch.no_grad():
            trained = draft_rows(model, adapter, teach(model, adapter, tokens), anchors)
        runner = build(EngineConfig(model=str(folder), device="cpu", dtype="float32", block_size=8)).runner
        masks = adapter.mask_ids(6)
        for text, wanted in zip(tokens.tolist(), trained, strict=True):
            rows = [Rows(text[:-1], 0, list(range(40)), 1, masks, len(text) - 1)]
            served = runner.compute(rows, full_plan(runner.model.config), adapter.bind(None, len(text) - 1)).riders
            torch.testing.assert_close(served.view_as(wanted), wanted, rtol=1e-3, atol=1e-3)


class TestEngine:
    def serve(
        self, engine: Engine, params: SamplingParams, prompts: Sequence[tuple[int, ...]] = ((5, 9, 11),), **changes: Any
    ) -> tuple[dict[tuple[str, int], list[int]], list[StepStats]]:
        """The tokens under s3d, equal to those without drafting, and its steps."""
        steps: list[StepStats] = []

        def requests(drafter: str) -> list[Request]:
            return [
                Request(str(i), prompt, params, **{"drafter": drafter, "num_speculative_tokens": 4, **changes})
                for i, prompt in enumerate(prompts)
            ]

        plain = tokens_of(run_dry(engine, requests("none")))
        drafted = tokens_of(run_dry(engine, requests("s3d"), on_step=steps.append))
        assert drafted == plain
        return drafted, steps

    @pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
    def test_what_is_foreseen_is_accepted_from_the_first_step_on(self, foreseen: Path, params: SamplingParams) -> None:
        _, steps = self.serve(make_engine(foreseen), params)
        assert [step.generation_tokens for step in steps] == [1, 5, 5, 5, 5, 5, 4]
        assert [step.draft_tokens for step in steps] == [0, 4, 4, 4, 4, 4, 3]
        assert all(step.accepted_tokens == step.draft_tokens for step in steps)

    def test_drafts_come_from_the_riders_behind_the_last_accepted_row(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many were accepted, they are what training would compute at the newest token."""
        seen: list[tuple[list[int], Tensor]] = []

        def collect(_: S3DFusedDrafter, riders: dict[ScheduledSequence, Tensor]) -> None:
            seen.extend((list(sequence.tokens), hidden) for sequence, hidden in riders.items() if len(hidden))

        engine = make_engine(folder)
        prompts = [(5, 9) * 8, (7,) * 20, (1, 2, 3)]
        requests = [Request(str(i), prompt, GREEDY, drafter="none") for i, prompt in enumerate(prompts)]
        lucky = RandomDrafter(tokens_of(run_dry(engine, requests)), 97)
        monkeypatch.setattr(S3DFusedDrafter, "collect", collect)
        monkeypatch.setattr(S3DFusedDrafter, "propose", lambda _, sequences, limits: lucky.propose(sequences, limits))
        _, steps = self.serve(engine, GREEDY, prompts)
        assert {count for step in steps for count in step.accepted_per_step} == {0, 1, 2, 3, 4}
        assert len(seen) > 30
        checkpoint = open_checkpoint(str(folder))
        model = load_model(checkpoint, torch.float32, torch.device("cpu"), 256)
        adapter = load_adapter(folder / BESIDE_MODEL, checkpoint, torch.float32, torch.device("cpu"))
        for tokens, hidden in seen:
            text = torch.tensor([tokens])
            with torch.no_grad():
                wanted = draft_rows(model, adapter, teach(model, adapter, text), torch.tensor([[len(tokens) - 1]]))
            torch.testing.assert_close(hidden, wanted[0, 0, : len(hidden)], rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("max_tokens", range(1, 9))
    def test_any_length_ends_where_it_should(self, foreseen: Path, max_tokens: int) -> None:
        tokens, steps = self.serve(make_engine(foreseen), replace(GREEDY, max_tokens=max_tokens))
        assert len(tokens["0", 0]) == max_tokens
        assert len(steps) == 1 + -(-(max_tokens - 1) // 5)

    def test_the_context_may_be_filled_to_the_last_position(self, foreseen: Path) -> None:
        engine = make_engine(foreseen, max_model_len=64, max_num_seqs=1)
        tokens, steps = self.serve(engine, replace(GREEDY, max_tokens=61))
        assert len(tokens["0", 0]) == 61
        assert len(steps) < 20, "the whole cache is one sequence long, so in the end fewer can ride"

    def test_choices_batches_and_chunks(self, foreseen: Path) -> None:
        engine = make_engine(foreseen, max_num_batched_tokens=64)
        prompts = [tuple(random.Random(i).randrange(32) for _ in range(9 * i + 1)) for i in range(5)]
        _, steps = self.serve(engine, SAMPLED, prompts, n=2)
        assert sum(step.accepted_tokens for step in steps) == sum(step.draft_tokens for step in steps) > 100

    def test_a_preempted_sequence_drafts_again(self, foreseen: Path) -> None:
        engine = make_engine(foreseen, kv_cache_memory_bytes=14 * 8 * 3 * 2 * 32 * 4, max_model_len=100)
        prompts = [tuple(range(i, i + 9)) for i in range(4)]
        _, steps = self.serve(engine, replace(GREEDY, max_tokens=40), prompts)
        assert sum(step.preemptions for step in steps) > 0
        assert sum(step.accepted_tokens for step in steps) == sum(step.draft_tokens for step in steps) > 60

    def test_a_request_may_decline(self, foreseen: Path) -> None:
        _, steps = self.serve(make_engine(foreseen), GREEDY, num_speculative_tokens=0)
        assert sum(step.draft_tokens for step in steps) == 0
        assert len(steps) == 30

    def test_more_than_the_adapter_has_masks_for_is_cut(self, foreseen: Path) -> None:
        _, steps = self.serve(make_engine(foreseen), GREEDY, num_speculative_tokens=16)
        assert max(step.draft_tokens for step in steps) == 6

    def test_hybrid_rides_as_well(self, foreseen: Path) -> None:
        engine = make_engine(foreseen)
        prompts = [(1, 2, 3, 4, 5, 6, 7, 8) * 3, (9, 7)]
        plain, drafted = (
            run_dry(engine, [Request(str(i), p, SAMPLED, drafter=drafter) for i, p in enumerate(prompts)])
            for drafter in ("none", "hybrid")
        )
        assert tokens_of(drafted) == tokens_of(plain)
        assert sum(parts[-1].counts.accepted for parts in drafted.values()) > 20

    def test_drafters_share_a_batch(self, foreseen: Path) -> None:
        engine = make_engine(foreseen)
        prompts = [(3, 4, 5), (6, 7), (8,), tuple(range(20))]
        plain = tokens_of(run_dry(engine, [Request(str(i), p, SAMPLED, drafter="none") for i, p in enumerate(prompts)]))
        add_drafters(engine, plain)
        drafters = ("s3d", "random", "s3d", "ngram")
        outputs = run_dry(
            engine, [Request(str(i), prompts[i], SAMPLED, drafter=drafter) for i, drafter in enumerate(drafters)]
        )
        assert tokens_of(outputs) == plain
        for i, drafter in enumerate(drafters):
            counts = outputs[str(i), 0][-1].counts
            assert counts.drafted > 0
            assert drafter != "s3d" or counts.accepted == counts.drafted

    def test_the_controller_is_shown_what_it_asks_for(self, foreseen: Path) -> None:
        """Though a step drafts no more than the one before had riders."""
        engine = make_engine(foreseen)
        _, steps = self.serve(engine, replace(GREEDY, max_tokens=240), num_speculative_tokens=None)
        assert {step.draft_tokens for step in steps} >= {0, 2, 6}

    def test_the_controller_looks_at_other_widths_again(self) -> None:
        """Here, too, a step drafts no more than the one before had riders, and drafting never pays."""
        controller, riders = Controller(6), 0
        timed: list[int] = []
        for _ in range(2000):
            width = controller.width(1)
            if min(width, riders) == width:
                timed.append(width)
                controller.observe(1, width, 1.0 + 0.5 * width, [0])
            riders = width
        first, later = timed[:6], timed[6:]
        assert sorted(first) == [0, 0, 2, 2, 6, 6]
        assert set(later) >= {0, 1, 2}
        assert later.count(0) > 0.9 * len(later)

    def test_a_failing_step_ends_those_that_took_part_and_no_others(
        self, foreseen: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = make_engine(foreseen)
        engine.add(Request("broken", (5, 9), GREEDY))
        for _ in range(2):
            engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(Runner, "logits", lambda *_: 1 / 0)
            (output,) = engine.step().outputs
        assert output.finish_reason == "error"
        self.serve(engine, GREEDY)

    def test_a_step_that_fails_after_it_has_told_costs_a_draft_at_most(
        self, foreseen: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = make_engine(foreseen)
        (plain,) = tokens_of(run_dry(engine, [Request("0", (5, 9), GREEDY, drafter="none")])).values()
        for failing in range(4):
            tokens: list[int] = []
            engine.add(Request("0", (5, 9), GREEDY))
            for step in count():
                with monkeypatch.context() as patch:
                    if step == failing:
                        patch.setattr(S3DFusedDrafter, "collect", lambda *_: 1 / 0)
                    tokens += [token for output in engine.step().outputs for token in output.token_ids]
                if not engine.has_work:
                    break
            assert tokens == plain

    def test_aborted_between_steps(self, foreseen: Path) -> None:
        engine = make_engine(foreseen)
        for name in "abc":
            engine.add(Request(name, (5, 9), GREEDY))
        for name in "cab":
            engine.step()
            engine.abort(name)
        engine.step()
        engine.check()
        self.serve(engine, GREEDY)

    def test_blocks_of_riders_are_not_held_between_steps(self, foreseen: Path) -> None:
        engine = make_engine(foreseen)
        engine.add(Request("0", (5, 9, 11), GREEDY, num_speculative_tokens=6))
        while engine.has_work:
            stats = engine.step().stats
            (sequence,) = engine.states or (None,)
            assert stats.kv_blocks_used == (-(-len(sequence.tokens) // 8) if sequence else 0)


class TestFiles:
    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"fused": "yes"}, "fused"),
            ({"fused": None}, "fused"),
            ({"skip_end": 1}, "skips no layer"),
            ({"bridge_rank": 2}, "bridge"),
            ({"fused": False}, "masks"),
        ],
    )
    def test_a_description_that_makes_no_sense(
        self, folder: Path, tmp_path: Path, change: dict[str, Any], complaint: str
    ) -> None:
        write_adapter(folder, tmp_path, **FUSED)
        described = json.loads((tmp_path / "adapter.json").read_text())
        assert described["fused"] is True
        (tmp_path / "adapter.json").write_text(json.dumps({**described, **change}))
        with pytest.raises(AdapterError, match=complaint):
            load_adapter(tmp_path, open_checkpoint(str(folder)), torch.float32, torch.device("cpu"))

    def test_fused_must_be_said(self, folder: Path, tmp_path: Path) -> None:
        write_adapter(folder, tmp_path, **FUSED)
        described = json.loads((tmp_path / "adapter.json").read_text())
        del described["fused"]
        (tmp_path / "adapter.json").write_text(json.dumps(described))
        with pytest.raises(AdapterError, match="fused"):
            load_adapter(tmp_path, open_checkpoint(str(folder)), torch.float32, torch.device("cpu"))
