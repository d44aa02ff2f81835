"""The equality tests must notice what they are there to notice: each seeded mistake makes them fail."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import pytest
import torch
from support_engine import write_adapter, write_checkpoint
from support_exactness import MODES, Answers, assert_exact, reference_answers

from skippy.engine import engine as engine_module
from skippy.engine import sampling
from skippy.engine.accept import Verdict, accept
from skippy.engine.drafters.s3d import S3DDrafter
from skippy.engine.engine import Engine
from skippy.engine.kv import KVPool
from skippy.engine.runner import Runner
from skippy.engine.sampling import RowGroup, SamplingState
from skippy.engine.scheduler import Scheduler

Mutation = Callable[[pytest.MonkeyPatch], None]


def accepts_one_too_many(patch: pytest.MonkeyPatch) -> None:
    def generous(draft: SequenceOf[int], chosen: SequenceOf[int], ends: Any, room: int) -> Verdict:
        agreed = accept(draft, chosen, ends, room)
        if agreed.accepted < len(draft) and len(agreed.emitted) == agreed.accepted + 1 < room:
            return Verdict(
                [*agreed.emitted[:-1], draft[agreed.accepted], chosen[agreed.accepted + 1]], agreed.accepted + 1
            )
        return agreed

    patch.setattr(engine_module, "accept", generous)


def accepts_after_a_gap(patch: pytest.MonkeyPatch) -> None:
    def forgiving(draft: SequenceOf[int], chosen: SequenceOf[int], ends: Any, room: int) -> Verdict:
        return accept([*chosen[:1], *draft[1:]] if draft else draft, chosen, ends, room)

    patch.setattr(engine_module, "accept", forgiving)


def leaves_a_stale_slot(patch: pytest.MonkeyPatch) -> None:
    write = KVPool.write

    def forgetful(pool: KVPool, layer: int, slots: torch.Tensor, keys_values: torch.Tensor) -> None:
        # The newest token of the first sequence keeps what a rejected draft left in its slot.
        kept = slots.clone()
        kept[0] = pool.padding_slot
        write(pool, layer, kept, keys_values)

    patch.setattr(KVPool, "write", forgetful)


def confuses_two_blocks_after_a_rejection(patch: pytest.MonkeyPatch) -> None:
    commit = Scheduler.commit

    def careless_commit(scheduler: Scheduler, sequence: Any, computed: int) -> None:
        commit(scheduler, sequence, computed)
        if sequence.num_output > 2 and sequence.misses:
            sequence.table[-1], sequence.table[0] = sequence.table[0], sequence.table[-1]

    patch.setattr(Scheduler, "commit", careless_commit)


def counts_no_drafted_tokens(patch: pytest.MonkeyPatch) -> None:
    rows_after = sampling._rows_after
    patch.setattr(sampling, "_rows_after", lambda base, _, rows: rows_after(base, [], rows))


def counts_a_token_twice(patch: pytest.MonkeyPatch) -> None:
    extend = SamplingState.extend
    patch.setattr(SamplingState, "extend", lambda state, tokens: extend(state, [*tokens, tokens[-1]]))


def takes_the_noise_of_another_index(patch: pytest.MonkeyPatch) -> None:
    groups = Engine._groups

    def shifted(engine: Engine, *args: Any) -> list[RowGroup]:
        return [RowGroup(g.state, g.index + len(g.draft), g.draft) for g in groups(engine, *args)]

    patch.setattr(Engine, "_groups", shifted)


def shares_noise_between_choices(patch: pytest.MonkeyPatch) -> None:
    add = Engine.add

    def add_alike(engine: Engine, request: Any) -> None:
        add(engine, request)
        for sequence in engine._sequences[request.request_id]:
            engine.states[sequence]._choice = 0

    patch.setattr(Engine, "add", add_alike)


def shifts_the_positions_of_drafts(patch: pytest.MonkeyPatch) -> None:
    batch = Runner.batch

    def shifted(runner: Runner, rows: Any) -> Any:
        made = batch(runner, rows)
        if rows[0].position and len(rows[0].tokens) > 1:
            made.positions[1] += 1
        return made

    patch.setattr(Runner, "batch", shifted)


def reuses_blocks_of_other_prefixes(patch: pytest.MonkeyPatch) -> None:
    def careless(digests: list[bytes], tokens: SequenceOf[int], block_size: int, upto: int) -> None:
        del tokens
        while (len(digests) + 1) * block_size <= upto:
            digests.append(bytes([len(digests)]))

    patch.setattr("skippy.engine.scheduler.extend_digests", careless)


def drafts_over_committed_slots(patch: pytest.MonkeyPatch) -> None:
    propose = S3DDrafter.propose

    def early(drafter: S3DDrafter, sequences: Any, limits: Any) -> list[list[int]]:
        for sequence in sequences:
            sequence.computed -= 1
        drafts = propose(drafter, sequences, limits)
        for sequence in sequences:
            sequence.computed += 1
        return drafts

    patch.setattr(S3DDrafter, "propose", early)


def lets_the_adapter_change_verified_rows(patch: pytest.MonkeyPatch) -> None:
    compute = Runner.compute
    adapters: list[Any] = []

    def mixed_up(runner: Runner, rows: Any, plan: Any, adapter: Any = None, taps: Any = ()) -> Any:
        if adapter is not None:
            adapters[:] = [adapter]
        elif adapters and len(rows) == 1:
            adapter = adapters.pop()._adapter.bind(None)
        return compute(runner, rows, plan, adapter, taps)

    patch.setattr(Runner, "compute", mixed_up)


MUTATIONS: list[Mutation] = [
    accepts_one_too_many,
    accepts_after_a_gap,
    leaves_a_stale_slot,
    confuses_two_blocks_after_a_rejection,
    counts_no_drafted_tokens,
    counts_a_token_twice,
    takes_the_noise_of_another_index,
    shares_noise_between_choices,
    shifts_the_positions_of_drafts,
    reuses_blocks_of_other_prefixes,
    drafts_over_committed_slots,
    lets_the_adapter_change_verified_rows,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny"))
    write_adapter(folder)
    return folder


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    return reference_answers(folder)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_mistake_in_the_engine_makes_the_equality_fail(
    folder: Path, answers: Answers, mutation: Mutation, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    with pytest.raises(AssertionError, match="tokens differ"):
        assert_exact(folder, answers, modes=tuple(reversed(MODES)))  # the one that asks for everything first
