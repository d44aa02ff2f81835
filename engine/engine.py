"""The engine: requests in, verified tokens out, one step at a time."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skippy.engine.accept import accept
from skippy.engine.admission import check_request
from skippy.engine.blocks import BlockAllocator
from skippy.engine.build import Build, Reserve, build
from skippy.engine.config import MAX_SPECULATIVE_TOKENS, EngineConfig
from skippy.engine.drafters.auto import describe_choice, describe_learning
from skippy.engine.drafters.base import Drafter
from skippy.engine.drafting import Drafting
from skippy.engine.errors import EngineDead, InvalidRequest
from skippy.engine.loading import Report
from skippy.engine.runner import Computed, Rows
from skippy.engine.sampling import RowGroup, SamplingState, choose, logprobs
from skippy.engine.scheduler import Schedule, Scheduler, Work
from skippy.engine.sequence import Sequence
from skippy.engine.shape import full_plan
from skippy.engine.stats import Clock, count_pass, count_verdict
from skippy.engine.tuned import load_priors
from skippy.engine.types import (
    DraftCounts,
    EngineInfo,
    FinishReason,
    Request,
    SequenceOutput,
    StepOutput,
    StepStats,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from skippy.engine.learning import Learner

logger = logging.getLogger("skippy.engine")


class Engine:
    """Serves requests with one model on one device. Not thread-safe: one caller, step by step.

    Args:
        report: is told how much of the model is read.
        serves: begin with the plan that `skippy tune` left for the server, if there is one.

    Attributes:
        info: what was loaded.
        drafting: the drafters, and how widely they draft.
        runner, states: the model's passes, and how to choose for each live sequence; for drafters.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: the configuration cannot be met on this machine.
    """

    def __init__(self, config: EngineConfig, report: Report | None = None, *, serves: bool = False) -> None:
        self._config = config
        built = build(config, report, _reserve(config))
        self.runner = built.runner
        self._checkpoint = built.checkpoint
        self._max_model_len = built.max_model_len
        self._verify_plan = full_plan(built.checkpoint.config)
        self._blocks = BlockAllocator(built.runner.pool.num_blocks)
        self._scheduler = Scheduler(
            self._blocks,
            config.block_size,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.enable_prefix_caching,
        )
        self._sequences: dict[str, list[Sequence]] = {}
        self.states: dict[Sequence, SamplingState] = {}
        learns = config.learn is not None
        priors = load_priors(config, built, serves=serves)
        self.drafting = Drafting(built, self.states, priors, share=config.share_drafts, learns=learns)
        self._default_drafter = self.drafting.choose(config.drafter, str(built.checkpoint.path))
        if config.learn is not None and built.adapter is None:
            logger.info(describe_learning(self._default_drafter, config.learn))
        elif config.drafter == "auto" and logger.isEnabledFor(logging.INFO):
            # To say what a training would take, some products are timed.
            has_adapter = built.adapter is not None or built.eagle is not None
            logger.info(describe_choice(self._default_drafter, has_adapter, config, self._describe_training))
        self._learner = _learner(config, built, self.drafting) if learns else None
        self.info = self._describe()

    def add_drafter(self, drafter: Drafter) -> None:
        """Let requests name one more drafter."""
        self.drafting.add(drafter)
        self.info = self._describe()

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: it can never be served as it is; nothing of it is kept.
        """
        if request.request_id in self._sequences:
            raise InvalidRequest(f"A request {request.request_id!r} is running already.", "request_id")
        check_request(request, self.info)
        seed = random.getrandbits(63) if request.params.seed is None else request.params.seed
        stops = frozenset(request.params.stop_token_ids)
        ends = stops if request.params.ignore_eos else stops | frozenset(self._checkpoint.eos_token_ids)
        drafter = request.drafter or self._default_drafter
        wanted = request.num_speculative_tokens
        if wanted is None:
            wanted = self._config.num_speculative_tokens
        max_draft = min(
            self.drafting.default_width(drafter) if wanted is None else wanted, self.drafting.widest(drafter)
        )
        sequences: list[Sequence] = []
        for index in range(request.n):
            sequence = Sequence(
                request=request,
                index=index,
                seed=seed,
                drafter=drafter,
                max_draft=max_draft,
                adaptive=wanted is None and self.drafting.is_adaptive(drafter),
                end_ids=ends,
                tokens=list(request.prompt_token_ids),
                rides=self.drafting.rides(drafter),
                leader=sequences[0] if sequences else None,
            )
            state = self._sampling_state(sequence)
            self._scheduler.add(sequence)  # refuses the first choice or none: they are of one size
            sequences.append(sequence)
            self.states[sequence] = state
        self._sequences[request.request_id] = sequences

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Forget a request, or one choice of it, at any moment between steps; unknown ones are ignored."""
        for sequence in list(self._sequences.get(request_id, ())):
            if index in (None, sequence.index):
                self._finish(sequence, "abort")

    def load(self) -> StepStats:
        """How full the engine is now, as the stats of a step that did nothing."""
        return StepStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_blocks_used=self._blocks.num_held,
            kv_blocks_total=self._blocks.num_blocks,
        )

    def learn(self) -> bool:
        """With nothing to serve, do a small piece of learning; False if there is nothing to learn."""
        assert not self.has_work, "a request would wait"
        with _at_most_logged("learning ends here; serving goes on"):
            return self._learner is not None and self._learner.work()
        self._learner = None
        return False

    def close(self) -> None:
        """Nothing is to be served any more: keep what was learnt."""
        with _at_most_logged("what was learnt last is lost"):
            if self._learner is not None:
                self._learner.save()

    def step(self) -> StepOutput:
        """Propose, verify, choose, accept, commit: one pass for whatever is scheduled.

        A step that fails ends the requests that took part in it with an error, and no others.
        """
        clock = Clock(self.runner.pool.keys.device)
        stats = StepStats(kv_blocks_total=self._blocks.num_blocks)
        outputs: list[SequenceOutput] = []
        schedule = self._scheduler.schedule(self.drafting.grant(self._scheduler.running, self._scheduler.prefills_next))
        if schedule.work:
            try:
                stats.host_seconds = clock.lap()
                drafts = self._propose(schedule)
                if any(work.lookahead for work in schedule.work):
                    stats.draft_seconds = clock.lap()
                computed = self._verify(schedule, drafts)
                logits = self.runner.logits(computed.hidden)
                groups = self._groups(schedule, drafts)
                chosen = choose(_decision_rows(logits, schedule, drafts), groups) if groups else []
                count_pass(stats, schedule, clock.lap())
                # If it fails half-way, what was committed before is told all the same.
                outputs.extend(self._commit(schedule, drafts, logits, chosen, stats))
                with _at_most_logged("the drafters did not learn from this step"):
                    self.drafting.audience.show(schedule, drafts, computed, logits)
            except Exception as error:
                outputs += self._fail(schedule, outputs, error)
        self.drafting.time(schedule, stats)
        now = self.load()
        stats.running, stats.waiting, stats.kv_blocks_used = now.running, now.waiting, now.kv_blocks_used
        stats.preemptions = schedule.preempted
        stats.host_seconds += clock.lap()
        return StepOutput(outputs, stats)

    def run(self, requests: Iterable[Request], at_once: int = 1) -> Iterator[StepOutput]:
        """Serve requests of one choice each, so many at a time and nothing beside: what every step came to.

        Raises:
            InvalidRequest: one of them is refused.
            EngineDead: one of them failed.
        """
        waiting, live = deque(requests), 0
        while waiting or live:
            while waiting and live < at_once:
                self.add(waiting.popleft())
                live += 1
            step = self.step()
            for output in step.outputs:
                if output.error is not None:
                    raise EngineDead(output.error)
                live -= output.finish_reason is not None
            yield step

    def check(self) -> None:
        """Raise AssertionError unless the blocks' books balance; when idle, none may be held."""
        self._blocks.check()
        if not self.has_work:
            assert self._blocks.num_held == 0, f"{self._blocks.num_held} blocks are held, and nothing runs"
            assert not self.states, "sampling states outlive their sequences"

    def _propose(self, schedule: Schedule) -> list[list[int]]:
        with _at_most_logged("drafting failed; this step goes without"):
            return self.drafting.propose(schedule)
        return [[] for _ in schedule.work]

    def _verify(self, schedule: Schedule, drafts: SequenceOf[list[int]]) -> Computed:
        """Every layer over the newest tokens and their drafts, and over riders for the drafts of the next step."""
        fused = self.drafting.fused
        rows = [
            Rows(
                tokens=work.sequence.tokens[work.start : work.start + work.num_known] + draft,
                position=work.start,
                table=work.sequence.table,
                num_logits=work.num_logits(len(draft)),
                riders=fused.adapter.mask_ids(work.riders) if fused else (),
                num_ridden=len(draft) + 1,
            )
            for work, draft in zip(schedule.work, drafts, strict=True)
        ]
        adapter = None
        if fused and any(part.riders for part in rows):
            adapter = fused.adapter.bind(None, first_row=sum(len(part.tokens) for part in rows))
        return self.runner.compute(rows, self._verify_plan, adapter, self.drafting.audience.taps(schedule))

    def _groups(self, schedule: Schedule, drafts: SequenceOf[list[int]]) -> list[RowGroup]:
        return [
            RowGroup(self.states[work.sequence], len(work.sequence.tokens), draft)
            for work, draft in zip(schedule.work, drafts, strict=True)
            if work.chooses
        ]

    def _commit(
        self,
        schedule: Schedule,
        drafts: SequenceOf[list[int]],
        logits: Tensor,
        chosen: SequenceOf[list[int]],
        stats: StepStats,
    ) -> Iterator[SequenceOutput]:
        sound = torch.isfinite(logits.amax(-1)).tolist()
        row, choices = 0, iter(chosen)
        for work, draft in zip(schedule.work, drafts, strict=True):
            rows = slice(row, row + work.num_logits(len(draft)))
            choice = next(choices) if work.chooses else []
            row = rows.stop
            if not all(sound[rows]):
                if draft:
                    self._begin_again(work.sequence)
                else:
                    logger.error(
                        "request %s: the model computed logits that are not finite", work.sequence.request.request_id
                    )
                    yield self._end_with_error(work.sequence, "The model computed logits that are not finite.")
                continue
            output = self._commit_one(work, draft, choice, logits[rows], stats)
            if output is not None:
                yield output

    def _begin_again(self, sequence: Sequence) -> None:
        """Compute a sequence once more, and draft for it no longer: a drafted token may be what was not finite.

        What is not finite spoils even rows before it, through keys that are masked, so none of the rows can be kept.
        """
        logger.warning("request %s: logits are not finite; it goes on without drafts", sequence.request.request_id)
        sequence.max_draft = 0
        self._erase(sequence)
        self._scheduler.preempt(sequence)

    def _commit_one(
        self, work: Work, draft: list[int], chosen: list[int], logits: Tensor, stats: StepStats
    ) -> SequenceOutput | None:
        sequence = work.sequence
        known_before = len(sequence.tokens)
        stats.prompt_tokens += max(0, min(work.start + work.num_known, sequence.prompt_len) - work.start)
        self._collect_prompt_logprobs(work, logits)
        room = sequence.max_len - known_before
        if not work.chooses or room == 0:
            self._scheduler.commit(sequence, work.start + work.num_known)
            return self._output(sequence, [], None, "length") if work.chooses else None
        verdict = accept(draft, chosen, sequence.end_ids, room)
        sequence.tokens += verdict.emitted
        self.states[sequence].extend(verdict.emitted)
        self._scheduler.commit(sequence, work.start + work.num_known + min(verdict.accepted, len(verdict.emitted) - 1))
        count_verdict(stats, sequence, draft, verdict)
        finish: FinishReason | None = None
        if verdict.emitted[-1] in sequence.end_ids:
            finish = "stop"
        elif len(sequence.tokens) == sequence.max_len:
            finish = "length"
        return self._output(sequence, verdict.emitted, logits[-len(chosen) :], finish)

    def _output(
        self, sequence: Sequence, emitted: list[int], logits: Tensor | None, finish: FinishReason | None
    ) -> SequenceOutput:
        """The output of one step, and the end of the sequence if it finishes. logits [>= emitted, V]."""
        wanted = sequence.params.logprobs
        entries = None
        if wanted is not None and logits is not None:
            entries = _token_logprobs(logits[: len(emitted)], emitted, wanted)
        stops = sequence.params.stop_token_ids
        output = SequenceOutput(
            request_id=sequence.request.request_id,
            index=sequence.index,
            token_ids=emitted,
            counts=DraftCounts(sequence.counts.steps, sequence.counts.drafted, sequence.counts.accepted),
            drafter=sequence.drafter,
            logprobs=entries,
            prompt_logprobs=sequence.prompt_logprobs or None,
            cached_tokens=sequence.cached_tokens or 0,
            finish_reason=finish,
            stop_reason=emitted[-1] if finish == "stop" and emitted[-1] in stops else None,
        )
        sequence.prompt_logprobs = []
        if finish is not None:
            self._finish(sequence, finish)
        return output

    def _collect_prompt_logprobs(self, work: Work, logits: Tensor) -> None:
        """Row p of a prompt says how likely token p + 1 was."""
        sequence = work.sequence
        wanted = sequence.params.prompt_logprobs
        if wanted is None or work.start >= sequence.prompt_len or sequence.num_output:
            return
        if work.start == 0:
            sequence.prompt_logprobs = [None]
        following = sequence.tokens[work.start + 1 : work.start + 1 + work.num_known]
        sequence.prompt_logprobs += _token_logprobs(logits[: len(following)], following, wanted)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        self.drafting.release(sequence)
        if self._learner and reason != "error":
            self._learner.hear(sequence)
        self._scheduler.remove(sequence)
        del self.states[sequence]
        siblings = self._sequences[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[sequence.request.request_id]

    def _fail(self, schedule: Schedule, told: list[SequenceOutput], error: Exception) -> list[SequenceOutput]:
        """End what a failed step did not serve; what it wrote is erased before reuse.

        Raises:
            RuntimeError: the device itself failed, and nothing can be served any more.
        """
        if isinstance(error, torch.AcceleratorError):
            raise error
        served = {(output.request_id, output.index) for output in told}
        sequences = [
            w.sequence for w in schedule.work if (w.sequence.request.request_id, w.sequence.index) not in served
        ]
        logger.exception("a step failed; %d sequences end with an error", len(sequences))
        message = f"The step failed: {type(error).__name__}: {error}"
        return [self._end_with_error(sequence, message) for sequence in sequences]

    def _end_with_error(self, sequence: Sequence, message: str) -> SequenceOutput:
        self._erase(sequence)
        output = SequenceOutput(
            sequence.request.request_id,
            sequence.index,
            [],
            sequence.counts,
            sequence.drafter,
            finish_reason="error",
            error=message,
        )
        self._finish(sequence, "error")
        return output

    def _erase(self, sequence: Sequence) -> None:
        """Leave nothing in the blocks that hold more than what was verified."""
        own = sequence.table[sequence.published :]
        self._blocks.forget(own)
        self.runner.pool.zero(own)

    def _sampling_state(self, sequence: Sequence) -> SamplingState:
        return SamplingState(
            params=sequence.params,
            prompt=sequence.request.prompt_token_ids,
            seed=sequence.seed,
            choice=sequence.index,
            banned=tuple(sequence.end_ids),
            vocab_size=self._checkpoint.vocab_size,
            device=self.runner.pool.keys.device,
        )

    def _describe_training(self) -> str:
        # Serving with an adapter needs nothing of training.
        from skippy.engine.training.here import describe_training  # noqa: PLC0415

        base, device = self._checkpoint, self.runner.pool.keys.device
        try:
            return describe_training(base.config, base.dtype, self._config.quantization, device)
        except RuntimeError as error:  # the memory may be gone already, and a log line is no reason not to serve
            return f"how long that takes cannot be measured ({str(error).splitlines()[0]})"

    def _describe(self) -> EngineInfo:
        pool, checkpoint = self.runner.pool, self._checkpoint
        drafter, wanted = self._default_drafter, self._config.num_speculative_tokens
        if wanted is None:
            wanted = self.drafting.default_width(drafter)
        return EngineInfo(
            model=self._config.model,
            model_path=str(checkpoint.path),
            device=str(pool.keys.device),
            dtype=str(pool.keys.dtype).removeprefix("torch."),
            quantization=self._config.quantization,
            vocab_size=checkpoint.vocab_size,
            max_model_len=self._max_model_len,
            bos_token_id=checkpoint.bos_token_id,
            eos_token_ids=list(checkpoint.eos_token_ids),
            drafter=drafter,
            drafters=list(self.drafting.drafters),
            num_speculative_tokens=min(wanted, self.drafting.widest(drafter)),
            max_speculative_tokens=MAX_SPECULATIVE_TOKENS,
            block_size=pool.block_size,
            num_blocks=pool.num_blocks,
            kv_bytes=pool.num_bytes,
            max_num_seqs=self._config.max_num_seqs,
        )


# Serving alone needs nothing of training.


def _reserve(config: EngineConfig) -> Reserve | None:
    if config.learn is None:
        return None
    from skippy.engine.learning import learning_bytes  # noqa: PLC0415

    return learning_bytes


def _learner(config: EngineConfig, built: Build, drafting: Drafting) -> Learner:
    from skippy.engine.learning import Learner  # noqa: PLC0415

    return Learner(config, built, drafting.adopt)


@contextmanager
def _at_most_logged(message: str) -> Iterator[None]:
    """What only makes answers faster costs none of them; a device that fails ends everything."""
    try:
        yield
    except torch.AcceleratorError:
        raise
    except Exception:
        logger.exception(message)


def _decision_rows(logits: Tensor, schedule: Schedule, drafts: SequenceOf[list[int]]) -> Tensor:
    """The rows that choose a token, without those that only report on the prompt."""
    wanted: list[int] = []
    row = 0
    for work, draft in zip(schedule.work, drafts, strict=True):
        row += work.num_logits(len(draft))
        if work.chooses:
            wanted += range(row - len(draft) - 1, row)
    return logits if len(wanted) == len(logits) else logits[wanted]


def _token_logprobs(logits: Tensor, tokens: list[int], count: int) -> list[TokenLogprobs]:
    of_tokens, best = logprobs(logits, tokens, count)
    return [TokenLogprobs(t, p, top) for t, p, top in zip(tokens, of_tokens, best, strict=True)]
