"""The engine: requests in, verified tokens out, one step at a time."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from skippy.engine.accept import accept
from skippy.engine.adapter import S3DAdapter
from skippy.engine.admission import MAX_SPECULATIVE_TOKENS, check_request
from skippy.engine.blocks import BlockAllocator
from skippy.engine.build import build
from skippy.engine.config import EngineConfig
from skippy.engine.controller import Controller, Prior
from skippy.engine.drafters.base import Drafter, Observer
from skippy.engine.drafters.hybrid import LOOKUP_WIDTH, HybridDrafter
from skippy.engine.drafters.ngram import NgramDrafter
from skippy.engine.drafters.none import NoDrafter
from skippy.engine.drafters.s3d import S3DDrafter, S3DFusedDrafter
from skippy.engine.errors import ConfigError, InvalidRequest
from skippy.engine.model import full_plan
from skippy.engine.runner import Computed, Rows
from skippy.engine.sampling import RowGroup, SamplingState, choose, logprobs
from skippy.engine.scheduler import Schedule, Scheduler, Work
from skippy.engine.sequence import Sequence
from skippy.engine.stats import Clock, count_pass, count_verdict
from skippy.engine.tensors import to_device
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

logger = logging.getLogger("skippy.engine")

_OF_ADAPTER = (S3DDrafter.name, HybridDrafter.name)
DEFAULT_SPECULATIVE_TOKENS = 4
"""For drafters that do not know better."""


class Engine:
    """Serves requests with one model on one device. Not thread-safe: one caller, step by step.

    Attributes:
        info: what was loaded.
        drafters: those that requests may name.
        runner, states: the model's passes, and how to choose for each live sequence; for drafters.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: the configuration cannot be met on this machine.
    """

    def __init__(self, config: EngineConfig) -> None:
        if (config.num_speculative_tokens or 0) > MAX_SPECULATIVE_TOKENS:
            raise ConfigError(
                f"num_speculative_tokens must be at most {MAX_SPECULATIVE_TOKENS}, got {config.num_speculative_tokens}."
            )
        self._config = config
        built = build(config)
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
        known: list[Drafter] = [NoDrafter(), NgramDrafter()]
        self._fused: S3DFusedDrafter | None = None
        if built.adapter is not None and built.adapter.config.fused:
            self._fused = S3DFusedDrafter(built.runner, built.adapter, self.states)
            known += [self._fused, HybridDrafter(self._fused)]
        elif built.adapter is not None:
            # Each learns from its own sequences.
            separate, within = (S3DDrafter(built.runner, built.adapter, self.states) for _ in range(2))
            known += [separate, HybridDrafter(within)]
        self.drafters: dict[str, Drafter] = {}
        self._observers: dict[str, Observer] = {}
        for drafter in known:
            self._know(drafter)
        self._default_drafter = self._choose_drafter()
        self._controllers = _controllers(built.adapter, self.drafters, load_priors(config, built))
        self.info = self._describe()

    def add_drafter(self, drafter: Drafter) -> None:
        """Let requests name one more drafter."""
        self._know(drafter)
        self.info = self._describe()

    @property
    def controlled(self) -> tuple[str, ...]:
        """The drafters whose width a controller chooses."""
        return tuple(self._controllers)

    def control(self, drafter: str, controller: Controller) -> None:
        """Let another controller choose the width of one of `controlled`."""
        self._controllers[drafter] = controller

    def widest(self, drafter: str) -> int:
        """The most tokens that a drafter drafts in one step."""
        controller = self._controllers.get(drafter)
        return controller.most if controller else MAX_SPECULATIVE_TOKENS

    def _know(self, drafter: Drafter) -> None:
        self.drafters[drafter.name] = drafter
        self._observers.pop(drafter.name, None)
        if isinstance(drafter, Observer):
            self._observers[drafter.name] = drafter

    def _choose_drafter(self) -> str:
        """The drafter of requests that name none."""
        wanted = self._config.drafter
        if wanted == "auto":
            return HybridDrafter.name if HybridDrafter.name in self.drafters else NgramDrafter.name
        if wanted in _OF_ADAPTER and wanted not in self.drafters:
            raise ConfigError(
                f"The drafter {wanted} needs an adapter, and {self._checkpoint.path} has none: train one with "
                "`skippy train`, or name its folder with --adapter."
            )
        if wanted not in self.drafters:
            raise ConfigError(f"There is no drafter {wanted!r}; there are: auto, {', '.join(self.drafters)}.")
        return wanted

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
        max_draft = 0 if drafter == NoDrafter.name else self._default_width(drafter) if wanted is None else wanted
        max_draft = min(max_draft, self.widest(drafter))
        sequences: list[Sequence] = []
        for index in range(request.n):
            sequence = Sequence(
                request=request,
                index=index,
                seed=seed,
                drafter=drafter,
                max_draft=max_draft,
                adaptive=wanted is None and drafter in self._controllers,
                end_ids=ends,
                tokens=list(request.prompt_token_ids),
                rides=self._fused is not None and drafter in _OF_ADAPTER,
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

    def step(self) -> StepOutput:
        """Propose, verify, choose, accept, commit: one pass for whatever is scheduled.

        A step that fails ends the requests that took part in it with an error, and no others.
        """
        clock = Clock(self.runner.pool.keys.device)
        stats = StepStats(kv_blocks_total=self._blocks.num_blocks)
        outputs: list[SequenceOutput] = []
        widths = self._widths()
        schedule = self._scheduler.schedule(widths)
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
                self._show_drafters(schedule, drafts, computed)
            except Exception as error:
                outputs += self._fail(schedule, outputs, error)
        self._inform_controllers(schedule, stats)
        now = self.load()
        stats.running, stats.waiting, stats.kv_blocks_used = now.running, now.waiting, now.kv_blocks_used
        stats.preemptions = schedule.preempted
        stats.host_seconds += clock.lap()
        return StepOutput(outputs, stats)

    def _widths(self) -> dict[str, int]:
        """By drafter, how many tokens to draft for each sequence that leaves it to the controller."""
        batch = Counter(s.drafter for s in self._scheduler.running if s.adaptive and s.decoding)
        return {
            name: controller.width(batch[name]) if batch[name] else controller.most
            for name, controller in self._controllers.items()
        }

    def _inform_controllers(self, schedule: Schedule, stats: StepStats) -> None:
        """Show the controllers what a step without prompts took, by the width that its sequences were granted."""
        if stats.prefill_seconds or not stats.verify_seconds:
            return
        for name, controller in self._controllers.items():
            work = [w for w in schedule.work if w.sequence.drafter == name and w.sequence.adaptive]
            if not work or any(w.num_known > 1 for w in work):
                continue
            width = round(sum(w.lookahead for w in work) / len(work))
            if any(w.lookahead < w.riders for w in work):
                continue  # the step before let fewer masks ride
            drafted = [w.sequence.last_accepted for w in work]
            controller.observe(len(work), width, stats.draft_seconds + stats.verify_seconds, drafted)

    def check(self) -> None:
        """Raise AssertionError unless the blocks' books balance; when idle, none may be held."""
        self._blocks.check()
        if not self.has_work:
            assert self._blocks.num_held == 0, f"{self._blocks.num_held} blocks are held, and nothing runs"
            assert not self.states, "sampling states outlive their sequences"

    def _propose(self, schedule: Schedule) -> list[list[int]]:
        """The drafts of every piece of work, in order; empty where nothing is drafted."""
        drafts: list[list[int]] = [[] for _ in schedule.work]
        for name, drafter in self.drafters.items():
            places = [i for i, work in enumerate(schedule.work) if work.lookahead and work.sequence.drafter == name]
            if places:
                work = [schedule.work[i] for i in places]
                proposals = drafter.propose([w.sequence for w in work], [w.lookahead for w in work])
                for place, proposal in zip(places, proposals, strict=True):
                    assert len(proposal) <= schedule.work[place].lookahead
                    drafts[place] = proposal
        return drafts

    def _verify(self, schedule: Schedule, drafts: SequenceOf[list[int]]) -> Computed:
        """Every layer over the newest tokens and their drafts, and over riders for the drafts of the next step."""
        rows = [
            Rows(
                tokens=work.sequence.tokens[work.start : work.start + work.num_known] + draft,
                position=work.start,
                table=work.sequence.table,
                num_logits=work.num_logits(len(draft)),
                riders=self._fused.adapter.mask_ids(work.riders) if self._fused else (),
                num_ridden=len(draft) + 1,
            )
            for work, draft in zip(schedule.work, drafts, strict=True)
        ]
        adapter = None
        if self._fused and any(part.riders for part in rows):
            adapter = self._fused.bind(first_row=sum(len(part.tokens) for part in rows))
        drafters = {work.sequence.drafter for work in schedule.work}
        taps = {layer for name, observer in self._observers.items() if name in drafters for layer in observer.taps}
        return self.runner.compute(rows, self._verify_plan, adapter, taps)

    def _default_width(self, drafter: str) -> int:
        """The most tokens to draft for a request that does not say."""
        controller = self._controllers.get(drafter)
        return controller.most if controller else DEFAULT_SPECULATIVE_TOKENS

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
                yield self._end_with_error(work.sequence, "The model computed logits that are not finite.")
                continue
            output = self._commit_one(work, draft, choice, logits[rows], stats)
            if output is not None:
                yield output

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

    def _show_drafters(self, schedule: Schedule, drafts: SequenceOf[list[int]], computed: Computed) -> None:
        """Let drafters see what the pass computed at their sequences' newest computed tokens, and behind them."""
        newest: dict[str, list[Sequence]] = {name: [] for name in self.drafters}
        row_of: dict[Sequence, int] = {}
        riders_of: dict[Sequence, Tensor] = {}
        rows = riders = 0
        for work, draft in zip(schedule.work, drafts, strict=True):
            rows += work.num_logits(len(draft))
            riders += (len(draft) + 1) * work.riders
            sequence = work.sequence
            if sequence.finish_reason is None:
                unaccepted = work.start + work.num_known + len(draft) - sequence.computed
                end = riders - unaccepted * work.riders
                newest[sequence.drafter].append(sequence)
                row_of[sequence] = rows - 1 - unaccepted
                if self._fused:
                    riders_of[sequence] = computed.riders[end - work.riders : end]
                    sequence.ridden = work.riders
        if self._fused:
            self._fused.collect(riders_of)
        for name, observer in self._observers.items():
            if newest[name]:
                places = to_device([row_of[sequence] for sequence in newest[name]], computed.hidden.device)
                tapped = {layer: x[places] for layer, x in computed.tapped.items()}
                observer.observe(newest[name], computed.hidden[places], tapped)

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
        own = sequence.table[sequence.published :]
        self._blocks.forget(own)
        self.runner.pool.zero(own)
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

    def _describe(self) -> EngineInfo:
        pool, checkpoint = self.runner.pool, self._checkpoint
        wanted = self._config.num_speculative_tokens
        if wanted is None:
            wanted = self._default_width(self._default_drafter)
        return EngineInfo(
            model=self._config.model,
            model_path=str(checkpoint.path),
            device=str(pool.keys.device),
            dtype=str(pool.keys.dtype).removeprefix("torch."),
            vocab_size=checkpoint.vocab_size,
            max_model_len=self._max_model_len,
            bos_token_id=checkpoint.bos_token_id,
            eos_token_ids=list(checkpoint.eos_token_ids),
            drafter=self._default_drafter,
            drafters=list(self.drafters),
            num_speculative_tokens=min(wanted, self.widest(self._default_drafter)),
            max_speculative_tokens=MAX_SPECULATIVE_TOKENS,
            block_size=pool.block_size,
            num_blocks=pool.num_blocks,
            kv_bytes=pool.num_bytes,
            max_num_seqs=self._config.max_num_seqs,
        )


def _controllers(
    adapter: S3DAdapter | None, drafters: Collection[str], priors: Mapping[str, Prior]
) -> dict[str, Controller]:
    """One for every drafter whose drafts cost a pass, or rows of one."""
    if adapter is None:
        return {}
    width, fused = adapter.config.num_speculative_tokens, adapter.config.fused
    # A fused adapter has no more masks to let ride behind a draft than it drafts itself.
    widest = {S3DDrafter.name: width, HybridDrafter.name: width if fused else max(width, LOOKUP_WIDTH)}
    return {name: Controller(most, priors.get(name)) for name, most in widest.items() if name in drafters}


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
