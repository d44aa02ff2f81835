"""The drafter in the engine: exact whatever it drafts, no memory of its own, and drafts worth having."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support_engine import OracleDrafter, run_dry, tokens_of, write_adapter, write_checkpoint
from support_exactness import MODES, Answers, assert_exact, reference_answers, requests
from torch import Tensor

from skippy.engine import Engine, EngineConfig, Request, SamplingParams, SequenceOutput, StepStats, chain
from skippy.engine.chain import Link
from skippy.engine.drafters import s3d
from skippy.engine.drafters.base import Followed
from skippy.engine.drafters.s3d import S3DDrafter
from skippy.engine.runner import Rows
from skippy.engine.scheduler import Work
from skippy.engine.sequence import Sequence
from skippy.engine.shape import full_plan

PROMPT = (1, 5, 9, 5, 9, 5, 9)
WHOLE = {"skip_start": 1, "skip_end": 1, "lora_rank": 0, "bridge_rank": 0, "head_size": 0}
"""Nothing is skipped and nothing added: the first row of a draft is the model's own."""
FUSED = {"skip_start": 1, "skip_end": 1, "bridge_rank": 0, "fused": True}

ADAPTERS: dict[str, dict[str, Any]] = {
    "a head that forgets": {"recurrent": False},
    "no head": {"head_size": 0},
    "no bridge": {"bridge_rank": 0},
    "no LoRA": {"lora_rank": 0},
    "masks alone": {"lora_rank": 0, "bridge_rank": 0, "head_size": 0},
    "the first layers skipped": {"skip_start": 0, "skip_end": 2},
    "the last layers skipped": {"skip_start": 1, "skip_end": 3},
    "the last layer skipped": {"skip_start": 2, "skip_end": 3},
    "nothing skipped": WHOLE,
    "one row": {"num_speculative_tokens": 1},
    "many rows": {"num_speculative_tokens": 20},
    "far from the model": {"scale": 0.5},
    "few tokens worth drafting": {"draft_vocab_size": 40},
    "few of them and no head": {"draft_vocab_size": 60, "head_size": 0},
    "fused": FUSED,
    "fused without a head": {**FUSED, "head_size": 0},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without an adapter."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def answers(base: Path) -> Answers:
    return reference_answers(base)


@pytest.fixture
def engine_with(base: Path, tmp_path: Path) -> Callable[..., Engine]:
    """Makes an engine with a random adapter; `sizes` are of the engine."""

    def make(adapter: Mapping[str, Any] | None = None, **sizes: Any) -> Engine:
        folder = write_adapter(base, tmp_path / "adapter", **(adapter or {}))
        return make_engine(base, folder, **sizes)

    return make


def make_engine(base: Path, adapter: Path | None, **sizes: Any) -> Engine:
    drafter = "s3d" if adapter else "ngram"
    config: dict[str, Any] = {"dtype": "float32", "block_size": 16, "drafter": drafter, **sizes}
    return Engine(EngineConfig(model=str(base), device="cpu", adapter=str(adapter) if adapter else None, **config))


def s3d_of(engine: Engine) -> S3DDrafter:
    drafter = engine.drafting.drafters["s3d"]
    assert isinstance(drafter, S3DDrafter)
    return drafter


def counts(outputs: Mapping[tuple[str, int], list[SequenceOutput]]) -> tuple[int, int]:
    """Drafted and accepted."""
    totals = [parts[-1].counts for parts in outputs.values()]
    return sum(c.drafted for c in totals), sum(c.accepted for c in totals)


class TestExactness:
    @pytest.mark.parametrize("changes", ADAPTERS.values(), ids=list(ADAPTERS))
    def test_every_kind_of_adapter(self, base: Path, tmp_path: Path, answers: Answers, changes: dict[str, Any]) -> None:
        folder = write_adapter(base, tmp_path / "a", **changes)
        tally = assert_exact(base, answers, ("s3d",), ("everything",), (6, 1, 3, 20), block_size=4, adapter=str(folder))
        assert 0 < tally["s3d"].accepted < tally["s3d"].drafted

    @pytest.mark.parametrize("width", range(1, 7))
    def test_every_width(self, base: Path, tmp_path: Path, answers: Answers, width: int) -> None:
        folder = write_adapter(base, tmp_path / "a")
        sizes = {"block_size": 8, "adapter": str(folder)}
        tally = assert_exact(base, answers, ("s3d",), ("greedy",), (width,), **sizes)
        assert 0 < tally["s3d"].accepted < tally["s3d"].drafted

    def test_preemption_with_small_blocks(self, base: Path, tmp_path: Path, answers: Answers) -> None:
        folder, block_bytes = write_adapter(base, tmp_path / "a"), 4 * 3 * 2 * 32 * 4
        tally = assert_exact(
            base,
            answers,
            ("s3d",),
            ("plain sampling",),
            (6, 2),
            block_size=4,
            kv_cache_memory_bytes=34 * block_bytes,
            adapter=str(folder),
        )
        assert tally["s3d"].preemptions > 0
        assert tally["s3d"].accepted > 0

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
    @pytest.mark.parametrize("length", [0, 1, 8])
    def test_an_adapter_of_nonsense(
        self,
        engine_with: Callable[..., Engine],
        answers: Answers,
        value: float,
        length: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """What its drafts leave in the cache never reaches a verified row, however few of them are verified."""
        chain = [Link(5, 0, 1.0)] * length
        monkeypatch.setattr(s3d, "draft_chain", lambda _, __, hidden, *___: [chain[: len(rows)] for rows in hidden])
        engine = engine_with(block_size=8)
        for parameter in s3d_of(engine).adapter.parameters():
            parameter.fill_(value)
        outputs = run_dry(engine, requests(MODES["everything"], "s3d"))
        assert tokens_of(outputs) == answers["everything"]
        assert (counts(outputs)[0] > 50) == (length > 0)
        assert engine.runner.pool.cache[:, : engine.runner.pool.padding_slot].isfinite().all()

    def test_modes_mixed_in_one_batch(self, engine_with: Callable[..., Engine], answers: Answers) -> None:
        engine = engine_with()
        mixed = [
            replace(request, request_id=f"{mode} {request.request_id}")
            for mode, params in MODES.items()
            for request in requests(params, "s3d", (4, 0, 6))
        ]
        random.Random(0).shuffle(mixed)
        expected = {
            (f"{mode} {name}", choice): tokens
            for mode, of_mode in answers.items()
            for (name, choice), tokens in of_mode.items()
        }
        assert tokens_of(run_dry(engine, mixed)) == expected

    def test_drafters_mixed_in_one_batch(self, engine_with: Callable[..., Engine], answers: Answers) -> None:
        engine, drafters = engine_with(), ("s3d", "none", "hybrid", "ngram", "suffix", "recycling")
        mixed = [
            replace(request, request_id=f"{name} {request.request_id}")
            for name in drafters
            for request in requests(MODES["greedy"], name)
        ]
        outputs = run_dry(engine, mixed)
        for (name, choice), tokens in tokens_of(outputs).items():
            assert tokens == answers["greedy"][name.split()[1], choice]
            assert {output.drafter for output in outputs[name, choice]} == {name.split()[0]}

    def test_the_width_that_the_engine_chooses(self, engine_with: Callable[..., Engine], answers: Answers) -> None:
        engine = engine_with()
        for mode, params in MODES.items():
            left_open = [replace(request, num_speculative_tokens=None) for request in requests(params, "s3d")]
            assert tokens_of(run_dry(engine, left_open)) == answers[mode]

    def test_logprobs_and_cached_prompts_are_as_without_drafts(self, engine_with: Callable[..., Engine]) -> None:
        params = SamplingParams(max_tokens=20, temperature=0.6, seed=4, logprobs=3, ignore_eos=True)
        request = Request("r", tuple(range(3, 60)), params, n=3, num_speculative_tokens=5)

        def told(drafter: str) -> Any:
            engine = engine_with()
            twice = [run_dry(engine, [replace(request, drafter=drafter)]) for _ in range(2)]
            if drafter == "s3d":
                assert all(drafted > 50 for drafted, _ in map(counts, twice))
            return [
                {
                    choice: (parts[0].cached_tokens, [entry for output in parts for entry in output.logprobs or []])
                    for choice, parts in outputs.items()
                }
                for outputs in twice
            ]

        plain, drafted = told("none"), told("s3d")
        assert plain == drafted
        assert [cached for cached, _ in drafted[1].values()] == [48, 48, 48]

    @pytest.mark.parametrize("max_tokens", [0, 1, 2, 3, 7, 255])
    @pytest.mark.parametrize("prompt_len", [1, 16])
    def test_the_ends_of_the_context(
        self, engine_with: Callable[..., Engine], prompt_len: int, max_tokens: int
    ) -> None:
        engine = engine_with()
        size = min(max_tokens, engine.info.max_model_len - prompt_len)
        params = SamplingParams(max_tokens=size, temperature=0.0, ignore_eos=True)
        request = Request("r", tuple(range(3, 3 + prompt_len)), params, num_speculative_tokens=6)
        assert engine.info.drafter == "s3d"
        drafted, plain = run_dry(engine, [request]), run_dry(engine, [replace(request, drafter="none")])
        assert tokens_of(drafted) == tokens_of(plain)
        assert len(tokens_of(plain)["r", 0]) == size

    def test_aborts_at_any_moment_disturb_nobody(self, engine_with: Callable[..., Engine]) -> None:
        engine = engine_with()
        params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        alone = tokens_of(run_dry(engine, [Request("a", PROMPT, params)]))["a", 0]
        for moment in range(10):
            engine.add(Request("b", PROMPT[1:], params, n=2, num_speculative_tokens=6))
            engine.add(Request("a", PROMPT, params, num_speculative_tokens=2))
            seen: list[int] = []
            for step in range(100):
                if step == moment:
                    engine.abort("b")
                if not engine.has_work:
                    break
                seen += [t for o in engine.step().outputs if o.request_id == "a" for t in o.token_ids]
            assert seen == alone
            engine.check()

    @pytest.mark.parametrize("failing_step", [0, 1, 3])
    def test_who_is_served_by_a_step_that_fails_half_way_goes_on(
        self, engine_with: Callable[..., Engine], failing_step: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = engine_with()
        params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        alone = tokens_of(run_dry(engine, [Request("a", PROMPT, params)]))["a", 0]
        engine.add(Request("a", PROMPT, params, num_speculative_tokens=3))
        engine.add(Request("b", PROMPT[1:], params, num_speculative_tokens=3))
        commit_one = Engine._commit_one

        def fail_on_the_second(self: Engine, work: Work, *args: Any) -> SequenceOutput | None:
            if work.sequence.request.request_id == "b":
                raise RuntimeError("half-way")
            return commit_one(self, work, *args)

        outputs = [output for _ in range(failing_step) for output in engine.step().outputs]
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_commit_one", fail_on_the_second)
            outputs += engine.step().outputs
        while engine.has_work:
            outputs += engine.step().outputs
        assert [output.finish_reason for output in outputs if output.finish_reason] == ["error", "length"]
        assert [token for output in outputs if output.request_id == "a" for token in output.token_ids] == alone


@pytest.fixture(scope="module")
def engines(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Engine]:
    """One for each of a few adapters and block sizes."""
    kinds: list[dict[str, Any]] = [
        {},
        {"head_size": 0, "skip_start": 0, "skip_end": 1},
        {**WHOLE, "lora_rank": 3},
        FUSED,
    ]
    return [
        make_engine(
            base,
            write_adapter(base, tmp_path_factory.mktemp("a"), **changes),
            block_size=size,
            max_num_seqs=4,
            max_num_batched_tokens=budget,
            kv_cache_memory_bytes=(260 // size + 2) * size * 3 * 2 * 32 * 4,
        )
        for changes, size, budget in zip(kinds, (3, 16, 7, 5), (512, 11, 40, 512), strict=True)
    ]


@st.composite
def batches(draw: st.DrawFn) -> list[Request]:
    made = []
    for name in range(draw(st.integers(1, 6))):
        length, max_tokens = draw(st.integers(1, 40)), draw(st.integers(0, 24))
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=draw(st.sampled_from((0.0, 0.7, 1.5))),
            seed=draw(st.integers(0, 9)),
            top_p=draw(st.sampled_from((1.0, 0.9))),
            top_k=draw(st.sampled_from((0, 5))),
            frequency_penalty=draw(st.sampled_from((0.0, 0.5))),
            repetition_penalty=draw(st.sampled_from((1.0, 1.2))),
            logit_bias=draw(st.sampled_from(({}, {4: 3.0}))),
            min_tokens=draw(st.integers(0, min(4, max_tokens))),
            stop_token_ids=draw(st.sampled_from(((), (30, 31, 32, 33)))),
        )
        prompt = tuple(draw(st.sampled_from(((1, 5, 9), (40,), (3, 4, 3)))) * length)[:length]
        n, width = draw(st.integers(1, 3)), draw(st.sampled_from((None, 0, 1, 2, 4, 7)))
        made.append(Request(str(name), prompt, params, n=n, drafter="s3d", num_speculative_tokens=width))
    return made


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(which=st.integers(0, 3), made=batches(), at_once=st.integers(1, 6))
def test_whatever_is_asked_for_drafts_change_nothing(
    engines: list[Engine], which: int, made: list[Request], at_once: int
) -> None:
    engine = engines[which]
    plain = tokens_of(run_dry(engine, [replace(request, drafter="none") for request in made], 1))
    assert tokens_of(run_dry(engine, made, at_once)) == plain


class TestConfidence:
    """Drafts end before tokens that are hardly ever accepted, as far as the drafter has seen."""

    PARAMS = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)

    def run(self, engine: Engine, name: str) -> list[tuple[int, int]]:
        """Drafted and accepted up to each output."""
        parts = run_dry(engine, [Request(name, PROMPT, self.PARAMS, num_speculative_tokens=1)])[name, 0]
        return [(part.counts.drafted, part.counts.accepted) for part in parts]

    def test_who_is_unsure_and_right_is_trusted(
        self, engine_with: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3d, "MIN_REACH", 0.5)
        engine = engine_with(WHOLE)  # a random model: each of its tokens has a small share
        first = self.run(engine, "first")
        assert first[1] == (0, 0)
        drafted, accepted = first[-1]
        assert drafted == accepted > 10
        again = self.run(engine, "again")
        assert again[-1][0] > drafted
        engine.drafting.forget()
        assert self.run(engine, "anew") == first

    def test_who_is_wrong_drafts_no_more(
        self, engine_with: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3d, "MIN_REACH", 0.3)
        engine = engine_with({"scale": 2.0})  # sure of many tokens, and wrong
        first, again = (self.run(engine, name)[-1] for name in ("first", "again"))
        assert (first[1], again[1]) == (0, 0)
        assert 15 > first[0] > 2 * again[0]

    @pytest.mark.parametrize("drafter", ["s3d", "hybrid"])
    def test_wherever_drafts_end_no_token_changes(
        self, base: Path, tmp_path: Path, answers: Answers, drafter: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3d, "MIN_REACH", 0.1)
        folder = write_adapter(base, tmp_path / "a")
        modes = ("greedy", "everything")
        tally = assert_exact(base, answers, (drafter,), modes, (6, 1, 3, 20), block_size=4, adapter=str(folder))
        assert 0 < tally[drafter].accepted < tally[drafter].drafted

    def test_nothing_is_kept_of_who_has_ended(self, engine_with: Callable[..., Engine]) -> None:
        engine = engine_with()
        self.run(engine, "a")
        assert s3d_of(engine)._calibration._open == {}


class TestMemory:
    """The drafter has none of its own."""

    def test_a_draft_writes_lookahead_slots_of_kept_layers_and_nothing_else(
        self, engine_with: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = engine_with({"skip_start": 1, "skip_end": 2}, block_size=4)
        pool, drafts = engine.runner.pool, 0
        propose = S3DDrafter.propose

        def watched(self: S3DDrafter, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
            nonlocal drafts
            tables = [list(sequence.table) for sequence in sequences]
            # What a slot held must not look like what is written.
            for sequence, limit in zip(sequences, limits, strict=True):
                for position in range(sequence.computed, sequence.computed + limit + 1):
                    pool.cache[:, pool.slot(sequence.table, position)] = 7.0
            before = pool.cache.clone()
            proposals = propose(self, sequences, limits)
            changed = (pool.cache != before).flatten(2).any(-1)[:, : pool.padding_slot]
            expected = torch.zeros_like(changed)
            for sequence, draft in zip(sequences, proposals, strict=True):
                for position in range(sequence.computed, sequence.computed + len(draft)):
                    expected[[0, 2], pool.slot(sequence.table, position)] = True
                    drafts += 1
            assert torch.equal(changed, expected)
            assert [sequence.table for sequence in sequences] == tables
            return proposals

        monkeypatch.setattr(S3DDrafter, "propose", watched)
        run_dry(engine, requests(MODES["plain sampling"], "s3d", (5, 2, 6)))
        assert drafts > 50

    def test_the_cache_is_as_large_as_without_an_adapter(self, base: Path, engine_with: Callable[..., Engine]) -> None:
        for sizes in ({}, {"kv_cache_memory_bytes": 2**20}):
            plain, drafting = make_engine(base, None, **sizes).info, engine_with(**sizes).info
            assert (plain.num_blocks, plain.kv_bytes) == (drafting.num_blocks, drafting.kv_bytes)
            assert (plain.drafter, drafting.drafter) == ("ngram", "s3d")

    def test_no_more_blocks_are_used_than_by_the_same_drafts_from_nowhere(
        self, engine_with: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = engine_with(block_size=4)
        written: dict[tuple[str, int, int], list[int]] = {}
        propose = S3DDrafter.propose

        def recorded(self: S3DDrafter, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
            proposals = propose(self, sequences, limits)
            for s, draft in zip(sequences, proposals, strict=True):
                written[s.request.request_id, s.index, len(s.tokens)] = draft
            return proposals

        class Replay:
            name = "replay"

            def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
                del limits
                return [written[s.request.request_id, s.index, len(s.tokens)] for s in sequences]

        def blocks_used(drafter: str) -> list[int]:
            used: list[StepStats] = []
            run_dry(engine, requests(MODES["truncated"], drafter, (6, 3, 1)), on_step=used.append)
            return [stats.kv_blocks_used for stats in used]

        monkeypatch.setattr(S3DDrafter, "propose", recorded)
        engine.add_drafter(Replay())
        blocks_used("none")  # so that both find the same in the prefix cache
        ours = blocks_used("s3d")
        assert blocks_used("replay") == ours
        assert max(ours) > 20


class TestWhatItSees:
    def test_the_context_is_that_of_the_token_before_the_newest(
        self, engine_with: Callable[..., Engine], base: Path, answers: Answers
    ) -> None:
        """However many drafted tokens were accepted: held against a pass over the whole text."""
        engine = engine_with({"skip_start": 1, "skip_end": 3})
        drafter, taps = s3d_of(engine), (1, 3)
        scratch = make_engine(base, None)
        seen, widths = 0, set()

        class Informed(OracleDrafter):
            """Drafts what is right up to a point, and listens like the drafter under test."""

            name = "informed"
            taps = drafter.taps

            def __init__(self, answers: dict[tuple[str, int], list[int]]) -> None:
                super().__init__(answers)
                self._random = random.Random(0)

            def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
                drafts = super().propose(sequences, limits)
                for draft in drafts:
                    for place in range(self._random.randint(0, len(draft)), len(draft)):
                        draft[place] = 3
                return drafts

            def follow(self, parts: SequenceOf[Followed], tapped: Mapping[int, Tensor]) -> None:
                nonlocal seen
                drafter.follow(parts, tapped)
                assert drafter._context is not None
                for sequence in (part.sequence for part in parts):
                    rows = Rows(sequence.tokens[: sequence.computed], 0, list(range(16)), 1)
                    computed = scratch.runner.compute([rows], full_plan(scratch.runner.model.config), taps=taps)
                    last = len(rows.tokens) - 1
                    change = computed.tapped[3][[last]] - computed.tapped[1][[last]]
                    expected = torch.stack((change, computed.hidden), 1)
                    torch.testing.assert_close(drafter._context[[drafter._place[sequence]]], expected)
                    widths.add(sequence.counts.accepted)
                    seen += 1

        engine.add_drafter(Informed(answers["greedy"]))
        assert tokens_of(run_dry(engine, requests(MODES["greedy"], "informed", (5, 2)))) == answers["greedy"]
        assert seen > 40
        assert len(widths) > 8

    @pytest.mark.parametrize("mode", MODES)
    def test_the_first_token_of_a_draft_that_skips_nothing_is_always_accepted(
        self, engine_with: Callable[..., Engine], mode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It foresees noise, penalties, bias and bans: the verifier agrees with itself."""
        monkeypatch.setattr(chain, "NUM_SAMPLED", 97)
        engine = engine_with(WHOLE)
        steps: list[StepStats] = []
        run_dry(engine, requests(MODES[mode], "s3d", (1, 4)), on_step=steps.append)
        drafts = sum(stats.drafts for stats in steps)
        assert sum(stats.accepted_per_pos[0] for stats in steps if stats.drafts) == drafts > 20

    def test_no_draft_is_wider_than_asked_for_or_trained(self, engine_with: Callable[..., Engine]) -> None:
        engine = engine_with({"num_speculative_tokens": 3})
        params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
        for width, most in ((0, 0), (1, 1), (2, 2), (3, 3), (9, 3)):
            steps: list[StepStats] = []
            run_dry(engine, [Request("r", PROMPT, params, num_speculative_tokens=width)], on_step=steps.append)
            assert max(stats.draft_tokens for stats in steps) == most
