"""What a caller of Engine sees: choices, limits, stops, logprobs, aborts, failures."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support_engine import OracleDrafter, run_dry, tokens_of, write_adapter, write_checkpoint

from skippy.engine import (
    ConfigError,
    Engine,
    EngineConfig,
    EngineDead,
    InvalidRequest,
    Request,
    SamplingParams,
    SequenceOutput,
    StepStats,
)
from skippy.engine.drafters.base import Followed
from skippy.engine.drafters.none import NoDrafter
from skippy.engine.model import CausalLM
from skippy.engine.reference import reference_logits
from skippy.engine.scheduler import Work
from skippy.engine.sequence import Sequence
from skippy.engine.weights import load_model, open_checkpoint

PROMPT = (1, 5, 9, 5, 9, 5, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def shared_engine(folder: Path) -> Engine:
    return Engine(EngineConfig(model=str(folder), device="cpu", dtype="float32", block_size=16))


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """An idle engine; the test must leave it idle."""
    yield shared_engine
    assert not shared_engine.has_work
    shared_engine.check()


def run(engine: Engine, prompt: tuple[int, ...] = PROMPT, n: int = 1, **params: object) -> list[SequenceOutput]:
    """All outputs of one request, in order."""
    request = Request("r", prompt, SamplingParams(**params), n=n)  # type: ignore[arg-type]
    return [output for parts in run_dry(engine, [request]).values() for output in parts]


def test_max_tokens_ends_with_length(engine: Engine) -> None:
    outputs = run(engine, max_tokens=7, temperature=0, ignore_eos=True)
    assert sum(len(o.token_ids) for o in outputs) == 7
    assert [o.finish_reason for o in outputs if o.finish_reason] == ["length"]
    assert outputs[-1].counts.steps == len(outputs)


def test_max_tokens_zero_computes_the_prompt_alone(engine: Engine) -> None:
    (output,) = run(engine, max_tokens=0, prompt_logprobs=0)
    assert (output.token_ids, output.finish_reason) == ([], "length")
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(PROMPT)


def test_a_stop_id_ends_the_output_and_is_part_of_it(engine: Engine) -> None:
    free = [t for o in run(engine, max_tokens=12, temperature=0, ignore_eos=True) for t in o.token_ids]
    stop = free[6]
    outputs = run(engine, max_tokens=12, temperature=0, ignore_eos=True, stop_token_ids=(stop,))
    tokens = [t for o in outputs for t in o.token_ids]
    assert tokens == free[: free.index(stop) + 1]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)


def test_every_eos_id_of_the_generation_config_ends_the_output(folder: Path, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m")
    free = [
        t
        for o in run(
            Engine(EngineConfig(model=str(folder), device="cpu", dtype="float32")), max_tokens=12, temperature=0
        )
        for t in o.token_ids
    ]
    (model / "generation_config.json").write_text(f'{{"eos_token_id": [96, {free[4]}]}}')
    engine = Engine(EngineConfig(model=str(model), device="cpu", dtype="float32"))
    assert set(engine.info.eos_token_ids) == {2, 96, free[4]}
    outputs = run(engine, max_tokens=12, temperature=0)
    assert [t for o in outputs for t in o.token_ids] == free[: free.index(free[4]) + 1]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", None)


def test_choices_differ_and_share_the_prompt(engine: Engine) -> None:
    prompt = tuple(range(3, 60))
    outputs = run_dry(engine, [Request("r", prompt, SamplingParams(max_tokens=8, seed=7), n=3)])
    tokens = tokens_of(outputs)
    assert len({tuple(t) for t in tokens.values()}) == 3
    assert outputs["r", 0][0].cached_tokens == 0
    # 57 tokens are three full blocks of 16; the choices behind the first take them from it.
    assert [outputs["r", i][0].cached_tokens for i in (1, 2)] == [48, 48]


def test_without_a_seed_outputs_differ_from_run_to_run(engine: Engine) -> None:
    runs = {tuple(t for o in run(engine, max_tokens=10) for t in o.token_ids) for _ in range(4)}
    assert len(runs) > 1


def test_logprobs_are_those_of_the_raw_logits(engine: Engine, folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    naive = load_model(checkpoint, torch.float32, torch.device("cpu"), 256)
    outputs = run(engine, max_tokens=10, temperature=0.7, seed=3, frequency_penalty=1.0, logprobs=3, prompt_logprobs=2)
    tokens = [t for o in outputs for t in o.token_ids]
    expected = reference_logits(naive, [*PROMPT, *tokens]).log_softmax(-1)
    entries = [entry for o in outputs for entry in o.logprobs or []]
    assert [entry.token_id for entry in entries] == tokens
    for row, entry in enumerate(entries, len(PROMPT) - 1):
        assert entry.logprob == pytest.approx(float(expected[row, entry.token_id]), abs=1e-4)
        assert [token for token, _ in entry.top] == expected[row].topk(3).indices.tolist()
    of_prompt = [p for o in outputs for p in o.prompt_logprobs or []]
    assert of_prompt[0] is None
    for row, maybe in enumerate(of_prompt[1:]):
        assert maybe is not None
        assert maybe.token_id == PROMPT[row + 1]
        assert maybe.logprob == pytest.approx(float(expected[row, maybe.token_id]), abs=1e-4)


def test_prompt_logprobs_of_a_long_prompt_come_once_and_whole(engine: Engine) -> None:
    prompt = tuple(random.Random(0).choices(range(3, 97), k=200))
    outputs = run(engine, prompt, max_tokens=2, prompt_logprobs=0)
    assert [len(o.prompt_logprobs) for o in outputs if o.prompt_logprobs] == [200]


def test_a_second_request_reuses_verified_blocks(engine: Engine) -> None:
    prompt = tuple(random.Random(1).choices(range(3, 97), k=70))
    first = run(engine, prompt, max_tokens=30, temperature=0, ignore_eos=True)
    tokens = [t for o in first for t in o.token_ids]
    again = run(engine, prompt, max_tokens=30, temperature=0, ignore_eos=True)
    assert (first[0].cached_tokens, again[0].cached_tokens) == (0, 64)
    assert [t for o in again for t in o.token_ids] == tokens
    # The output is verified as well: a follow-up finds all but the last, never cached, token.
    longer = run(engine, (*prompt, *tokens), max_tokens=1)
    assert longer[0].cached_tokens == (70 + 30 - 1) // 16 * 16


def test_abort_at_any_moment_frees_everything_and_disturbs_nobody(engine: Engine) -> None:
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    alone = tokens_of(run_dry(engine, [Request("a", PROMPT, params)]))["a", 0]
    engine.add_drafter(OracleDrafter({("a", 0): alone, ("b", 0): alone, ("b", 1): alone}))
    for moment in range(12):
        engine.add(Request("a", PROMPT, params, drafter="oracle"))
        engine.add(Request("b", PROMPT, params, n=2, drafter="oracle"))
        seen: list[int] = []
        for step in range(100):
            if step == moment:
                engine.abort("b")
                engine.abort("never heard of")
            if not engine.has_work:
                break
            seen += [t for o in engine.step().outputs if o.request_id == "a" for t in o.token_ids]
        assert seen == alone
        engine.check()


def test_a_failed_step_ends_its_requests_and_no_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    alone = tokens_of(run_dry(engine, [Request("later", PROMPT, params)]))
    engine.add(Request("doomed", PROMPT, params))
    engine.step()

    def broken(*_: object) -> None:
        raise RuntimeError("out of something")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner.model, "forward", broken)
        (output,) = engine.step().outputs
    assert (output.request_id, output.finish_reason) == ("doomed", "error")
    assert output.error is not None
    assert "out of something" in output.error
    engine.check()
    assert tokens_of(run_dry(engine, [Request("later", PROMPT, params)])) == alone


def test_a_step_that_fails_half_way_still_tells_what_it_served(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    engine.add(Request("first", PROMPT, params))
    engine.add(Request("second", PROMPT, params))
    commit_one = Engine._commit_one

    def fail_on_the_second(self: Engine, work: Work, *args: Any) -> SequenceOutput | None:
        if work.sequence.request.request_id == "second":
            raise RuntimeError("half-way")
        return commit_one(self, work, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_commit_one", fail_on_the_second)
        outputs = engine.step().outputs
    assert [(o.request_id, o.finish_reason, len(o.token_ids)) for o in outputs] == [
        ("first", "length", 1),
        ("second", "error", 0),
    ]


class TestRun:
    """A whole list of requests, so many at a time."""

    def test_no_more_than_asked_for_run_at_once(self, engine: Engine) -> None:
        params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
        requests = [Request(str(i), (*PROMPT, i), params) for i in range(5)]
        written: dict[str, list[int]] = {request.request_id: [] for request in requests}
        most = 0
        for step in engine.run(requests, at_once=2):
            most = max(most, step.stats.running + sum(o.finish_reason is not None for o in step.outputs))
            for output in step.outputs:
                written[output.request_id] += output.token_ids
        assert most == 2
        assert {(name, 0): tokens for name, tokens in written.items()} == tokens_of(run_dry(engine, requests))

    def test_one_that_fails_ends_it(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
        steps = engine.run([Request(str(i), PROMPT, params) for i in range(2)])
        assert next(steps).outputs[0].error is None

        def broken(*_: object) -> None:
            raise RuntimeError("no memory")

        monkeypatch.setattr(engine.runner, "compute", broken)
        with pytest.raises(EngineDead, match="no memory"):
            next(steps)


def nan_for(model: CausalLM, poison: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """An `embed` under which one token is not finite."""

    def embed(ids: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.embedding(ids, model.model.embed_tokens.weight)
        x[ids == poison] = float("nan")
        return x

    return embed


def test_logits_that_are_not_finite_end_one_request_and_leave_no_trace(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    alone = tokens_of(run_dry(engine, [Request("good", PROMPT, params)]))["good", 0]
    model = engine.runner.model
    poison = 96

    with monkeypatch.context() as patch:
        patch.setattr(model, "embed", nan_for(model, poison))
        engine.add(Request("bad", (5, poison, 7), params))
        engine.add(Request("good", PROMPT, params))
        ends, good = {}, []
        while engine.has_work:
            for output in engine.step().outputs:
                good += output.token_ids if output.request_id == "good" else []
                if output.finish_reason:
                    ends[output.request_id] = output.finish_reason
    assert ends == {"bad": "error", "good": "length"}
    assert caplog.messages == ["request bad: the model computed logits that are not finite"]
    assert good == alone
    assert not torch.isnan(engine.runner.pool.values[:, : engine.runner.pool.padding_slot]).any()


def test_a_prompt_that_is_not_finite_is_noticed_in_its_first_chunk_and_erased(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(
        EngineConfig(model=str(folder), device="cpu", block_size=16, max_num_seqs=2, max_num_batched_tokens=20)
    )
    model = engine.runner.model

    with monkeypatch.context() as patch:
        patch.setattr(model, "embed", nan_for(model, 96))
        engine.add(Request("bad", (5, 96, *range(3, 73)), SamplingParams(max_tokens=5)))
        (output,) = engine.step().outputs
        assert output.finish_reason == "error"
    assert not engine.has_work
    engine.check()
    assert not engine.runner.pool.cache[:, : engine.runner.pool.padding_slot].isnan().any()


class TestDraftersThatFail:
    """They cost drafts, and no answer."""

    @pytest.mark.parametrize(
        ("failing", "method", "told"),
        [
            (lambda engine: engine.drafting.drafters["ngram"], "propose", "drafting failed"),
            (lambda engine: engine.drafting.audience, "show", "did not learn"),
        ],
        ids=["in a proposal", "in what they are shown"],
    )
    def test_by_an_exception(
        self,
        engine: Engine,
        failing: Callable[[Engine], object],
        method: str,
        told: str,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        alone = tokens_of(run_dry(engine, [Request("r", PROMPT, params)]))

        def broken(*_: object) -> None:
            raise RuntimeError("no idea")

        monkeypatch.setattr(failing(engine), method, broken)
        assert tokens_of(run_dry(engine, [Request("r", PROMPT, params, drafter="ngram")])) == alone
        assert told in caplog.text

    @pytest.mark.parametrize("prefix_caching", [True, False])
    def test_with_a_token_that_the_model_cannot_bear(
        self,
        folder: Path,
        prefix_caching: bool,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        engine = Engine(
            EngineConfig(model=str(folder), device="cpu", block_size=4, enable_prefix_caching=prefix_caching)
        )
        params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        requests = [Request(str(i), (*PROMPT, i), params) for i in range(3)]
        alone = tokens_of(run_dry(engine, requests))
        seen = {token for tokens in alone.values() for token in tokens}.union(*(r.prompt_token_ids for r in requests))
        model, poison = engine.runner.model, next(token for token in range(97) if token not in seen)

        class Poisoner(NoDrafter):
            """One that is also shown what became of its drafts, in each of the ways there are."""

            name = "ngram"
            taps = (0, 1)

            def follow(self, parts: SequenceOf[Followed], tapped: Mapping[int, torch.Tensor]) -> None:
                for part in parts:
                    assert part.num_rows > 0
                    assert tapped[1][part.row : part.row + part.num_rows].isfinite().all()

            def read(self, _: SequenceOf[int], logits: torch.Tensor) -> None:
                assert logits.isfinite().all()

            def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
                return [
                    [poison] * (limit if len(s.tokens) == 12 else 0) for s, limit in zip(sequences, limits, strict=True)
                ]

        engine.drafting.add(Poisoner())
        monkeypatch.setattr(model, "embed", nan_for(model, poison))
        poisoned = [replace(r, drafter="ngram" if r.request_id == "1" else "none") for r in requests]
        assert tokens_of(run_dry(engine, poisoned)) == alone
        assert "did not learn" not in caplog.text
        assert not engine.runner.pool.values[:, : engine.runner.pool.padding_slot].isnan().any()
        engine.check()


@pytest.mark.parametrize(
    ("request_of", "param"),
    [
        (lambda: Request("r", PROMPT, SamplingParams(max_tokens=250)), "max_tokens"),
        (lambda: Request("r", (5,) * 257, SamplingParams(max_tokens=0)), "max_tokens"),
        (lambda: Request("r", (97,)), "prompt"),
        (lambda: Request("r", (-1,)), "prompt"),
        (lambda: Request("r", PROMPT, SamplingParams(stop_token_ids=(500,))), "stop_token_ids"),
        (lambda: Request("r", PROMPT, SamplingParams(logit_bias={97: 1.0})), "logit_bias"),
        (lambda: Request("r", PROMPT, drafter="psychic"), "skippy.drafter"),
        (lambda: Request("r", PROMPT, num_speculative_tokens=1000), "skippy.num_speculative_tokens"),
        (
            lambda: Request("r", PROMPT, SamplingParams(min_tokens=2, stop_token_ids=tuple(range(97)))),
            "stop_token_ids",
        ),
        (lambda: Request("r", ()), "prompt"),
        (lambda: Request("r", PROMPT, n=0), "n"),
        (lambda: Request("r", PROMPT, n=129), "n"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_by_name(engine: Engine, request_of: object, param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        engine.add(request_of())  # type: ignore[operator]
    assert refusal.value.param == param


def test_a_running_id_cannot_be_used_again(engine: Engine) -> None:
    engine.add(Request("r", PROMPT))
    with pytest.raises(InvalidRequest, match="running already"):
        engine.add(Request("r", PROMPT))
    engine.abort("r")


def test_a_request_larger_than_the_cache_is_refused_at_once(folder: Path) -> None:
    block = 16 * 3 * 2 * 2 * 16 * 4
    engine = Engine(
        EngineConfig(model=str(folder), device="cpu", dtype="float32", block_size=16, kv_cache_memory_bytes=4 * block)
    )
    assert engine.info.max_model_len == 48
    with pytest.raises(InvalidRequest):
        engine.add(Request("r", PROMPT, SamplingParams(max_tokens=60)))
    assert not engine.has_work


def test_drafts_wider_than_any_step_cannot_be_configured() -> None:
    with pytest.raises(ConfigError, match="num_speculative_tokens must be at most 32, got 33"):
        EngineConfig(num_speculative_tokens=33)


def test_an_unknown_drafter_cannot_be_configured(folder: Path) -> None:
    with pytest.raises(ConfigError, match="psychic"):
        Engine(EngineConfig(model=str(folder), device="cpu", drafter="psychic"))


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_adapter(folder, tmp_path_factory.mktemp("adapter"), num_speculative_tokens=5))


class TestDefaultDrafter:
    @pytest.mark.parametrize(
        ("drafter", "expected", "width"), [("auto", "hybrid", 16), ("s3d", "s3d", 5), ("ngram", "ngram", 4)]
    )
    def test_with_an_adapter(self, folder: Path, adapter: str, drafter: str, expected: str, width: int) -> None:
        engine = Engine(EngineConfig(model=str(folder), device="cpu", drafter=drafter, adapter=adapter))
        assert (engine.info.drafter, engine.info.num_speculative_tokens) == (expected, width)
        assert {"none", "ngram", "s3d", "hybrid"} <= set(engine.info.drafters)
        assert run(engine, max_tokens=2)[-1].drafter == expected

    def test_without_one(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "skippy.engine"):
            engine = Engine(EngineConfig(model=str(folder), device="cpu"))
        (line,) = [record.message for record in caplog.records if record.message.startswith("drafter ")]
        assert line.startswith("drafter hybrid: the model has no adapter")
        assert f"skippy train {folder} -o adapter" in line
        assert (engine.info.drafter, engine.info.num_speculative_tokens) == ("hybrid", 16)
        assert "s3d" not in engine.info.drafters
        with pytest.raises(InvalidRequest, match="no drafter 's3d'"):
            engine.add(Request("r", PROMPT, drafter="s3d"))

    def test_where_nothing_is_shared_a_request_is_looked_up_in_itself_alone(self, folder: Path) -> None:
        engine = Engine(EngineConfig(model=str(folder), device="cpu", share_drafts=False))
        assert engine.info.drafter == "suffix"
        assert not {"recycling", "hybrid"} & set(engine.info.drafters)
        params = SamplingParams(max_tokens=20, temperature=1.0, seed=4, ignore_eos=True)
        request = Request("r", PROMPT, params, num_speculative_tokens=8)
        first, second = (run_dry(engine, [request])["r", 0][-1].counts for _ in range(2))
        assert first == second

    def test_what_is_shared_makes_the_same_text_faster_the_next_time(self, folder: Path) -> None:
        engine = Engine(EngineConfig(model=str(folder), device="cpu"))
        params = SamplingParams(max_tokens=20, temperature=1.0, seed=4, ignore_eos=True)
        for drafter in ("suffix", "recycling", "hybrid"):
            request = Request("r", PROMPT, params, drafter=drafter, num_speculative_tokens=8)
            engine.drafting.forget()
            first, second = (run_dry(engine, [request])["r", 0][-1].counts for _ in range(2))
            assert second.steps < first.steps

    @pytest.mark.parametrize("drafter", ["suffix", "recycling", "hybrid"])
    def test_what_was_shared_can_be_forgotten(self, folder: Path, drafter: str) -> None:
        params = SamplingParams(max_tokens=20, temperature=1.0, seed=4, ignore_eos=True)
        request = Request("r", PROMPT, params, drafter=drafter, num_speculative_tokens=8)
        engine = Engine(EngineConfig(model=str(folder), device="cpu"))
        first = run_dry(engine, [request])["r", 0][-1].counts
        engine.drafting.forget()
        assert run_dry(engine, [request])["r", 0][-1].counts == first

    def test_a_width_that_is_given_holds_for_every_drafter(self, folder: Path, adapter: str) -> None:
        engine = Engine(EngineConfig(model=str(folder), device="cpu", adapter=adapter, num_speculative_tokens=2))
        assert engine.info.num_speculative_tokens == 2
        steps: list[StepStats] = []
        params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        run_dry(engine, [Request("r", PROMPT, params)], on_step=steps.append)
        assert [stats.draft_tokens for stats in steps[1:4]] == [2, 2, 2]


def test_without_a_draft_no_time_is_booked_as_drafting(engine: Engine) -> None:
    steps: list[StepStats] = []
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    run_dry(engine, [Request("a", PROMPT, params, drafter="none")], on_step=steps.append)
    assert [s.draft_seconds for s in steps] == [0.0] * 5
    assert [s.prefill_seconds > 0 for s in steps] == [True] + [False] * 4
    assert [s.verify_seconds > 0 for s in steps] == [False] + [True] * 4
    assert all(s.host_seconds > 0 for s in steps)


def test_stats_add_up(engine: Engine) -> None:
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    alone = tokens_of(run_dry(engine, [Request("a", PROMPT, params)]))["a", 0]
    engine.add_drafter(OracleDrafter({("a", 0): alone}))
    steps: list[StepStats] = []
    request = Request("a", PROMPT, params, drafter="oracle", num_speculative_tokens=3)
    outputs = run_dry(engine, [request], on_step=steps.append)["a", 0]
    counts = outputs[-1].counts
    assert sum(s.generation_tokens for s in steps) == 20
    assert sum(s.prompt_tokens for s in steps) == len(PROMPT) - outputs[0].cached_tokens
    assert sum(s.draft_tokens for s in steps) == counts.drafted
    assert sum(s.accepted_tokens for s in steps) == counts.accepted == counts.drafted
    assert sum(s.drafts for s in steps) == sum(len(s.accepted_per_step) for s in steps)
    assert sum(sum(s.accepted_per_pos) for s in steps) == counts.accepted
    # One token from the prompt's own pass, then steps of three drafted and one of the verifier's.
    assert counts.steps == 1 + -(-19 // 4)
    assert counts.steps + counts.accepted == 20
