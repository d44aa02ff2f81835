"""What a step did, as it is counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import torch

from skippy.engine.accept import Verdict
from skippy.engine.scheduler import Schedule
from skippy.engine.sequence import Sequence
from skippy.engine.types import StepStats


class Clock:
    """Wall-clock laps that include the work a device was given."""

    def __init__(self, device: torch.device) -> None:
        self._wait: Callable[[], None] | None = torch.cuda.synchronize if device.type == "cuda" else None
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or since the start."""
        if self._wait is not None:
            self._wait()
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


def count_pass(stats: StepStats, schedule: Schedule, seconds: float) -> None:
    """Book a pass as prefill if it carried any prompt token, else as verification."""
    if any(not work.sequence.prompt_computed for work in schedule.work):
        stats.prefill_seconds = seconds
    else:
        stats.verify_seconds = seconds


def count_verdict(stats: StepStats, sequence: Sequence, draft: SequenceOf[int], verdict: Verdict) -> None:
    """Count what a sequence emitted, and how its draft fared, in the step and in the sequence."""
    sequence.counts.steps += 1
    stats.decode_sequences += 1
    stats.generation_tokens += len(verdict.emitted)
    sequence.last_accepted = verdict.accepted
    if not draft:
        return
    sequence.counts.drafted += len(draft)
    sequence.counts.accepted += verdict.accepted
    sequence.misses = 0 if verdict.accepted else sequence.misses + 1
    stats.drafts += 1
    stats.draft_tokens += len(draft)
    stats.accepted_tokens += verdict.accepted
    stats.accepted_per_step.append(verdict.accepted)
    stats.accepted_per_pos += [0] * (len(draft) - len(stats.accepted_per_pos))
    for place in range(verdict.accepted):
        stats.accepted_per_pos[place] += 1
