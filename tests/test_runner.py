"""The bitwise test: the logits of a row depend on its sequence and nothing else.

Not on who shares the pass, not on how many tokens are drafted, not on the chunks of the
prompt, not on which blocks hold the past, and not on what an adapter does to other rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support_engine import write_checkpoint
from torch import Tensor

from skippy.engine import BUILTIN_MODEL, EngineConfig
from skippy.engine.build import build
from skippy.engine.config import Dtype
from skippy.engine.linear import Tiling
from skippy.engine.runner import Rows, Runner
from skippy.engine.shape import Plan, full_plan, skipping_plan

LENGTH = 150
NEIGHBOURS = 80


@dataclass
class Bench:
    """A runner with a text of LENGTH tokens, and 80 neighbours of their own in blocks behind it."""

    runner: Runner
    plan: Plan
    text: list[int]
    neighbours: list[Rows]
    logits: Tensor
    """Of every token of the text, each computed alone, in the blocks of `table`."""

    @property
    def blocks(self) -> int:
        return -(-LENGTH // self.runner.pool.block_size)

    @property
    def table(self) -> list[int]:
        return list(range(self.blocks))

    def rows(self, start: int, stop: int, table: list[int] | None = None) -> Rows:
        """Part of the text, with logits of all of it."""
        return Rows(self.text[start:stop], start, table or self.table, stop - start)

    def run(self, rows: Sequence[Rows], adapter: Adapter | None = None) -> list[Tensor]:
        logits = self.runner.run(rows, self.plan, adapter)
        return list(torch.split(logits, [part.num_logits for part in rows]))


class Adapter:
    """Adds a little of the input, turned round, to every fused product of some rows of the pass."""

    def __init__(self, rows: slice = slice(None), last_id: int = 2**31) -> None:
        self._rows = rows
        self.first_row = rows.start or 0
        self._last_id = last_id  # greater ids are embedded like this one
        self.calls: list[tuple[int, str]] = []

    def embed(self, token_ids: Tensor, embedding: Callable[[Tensor], Tensor]) -> Tensor:
        self.calls.append((-1, "embed"))
        return embedding(token_ids.clamp(max=self._last_id))

    def enter(self, layer: int, x: Tensor) -> Tensor:
        self.calls.append((layer, "enter"))
        return x

    def product(self, layer: int, part: str, linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self.calls.append((layer, part))
        y = linear(x)
        repeated = x.flip(-1).repeat(1, -(-y.shape[1] // x.shape[1]))
        y[self._rows] += repeated[self._rows, : y.shape[1]] * 0.1
        return y


def make_bench(model: str, dtype: Dtype, block_size: int) -> Bench:
    config = EngineConfig(
        model=model, device="cpu", dtype=dtype, block_size=block_size, max_model_len=256, max_num_seqs=48
    )
    built = build(config)
    runner, plan = built.runner, full_plan(built.checkpoint.config)
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(built.checkpoint.vocab_size) for _ in range(count)]

    text = tokens(LENGTH)
    table = list(range(-(-LENGTH // block_size)))
    logits = torch.cat([runner.run([Rows([text[i]], i, table, 1)], plan) for i in range(LENGTH)])
    neighbours, free = [], 2 * len(table)
    for _ in range(NEIGHBOURS):
        history = tokens(draw.randint(1, 2 * block_size))
        own = list(range(free, free + -(-len(history) // block_size)))
        free += len(own)
        if len(history) > 1:
            runner.run([Rows(history[:-1], 0, own, 0)], plan)
        neighbours.append(Rows(history[-1:], len(history) - 1, own, 1))
    assert free <= runner.pool.num_blocks
    return Bench(runner, plan, text, neighbours, logits)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> Dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=[BUILTIN_MODEL, "tiny"])
def bench(request: pytest.FixtureRequest, dtype: Dtype, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    if request.param == BUILTIN_MODEL:
        return make_bench(BUILTIN_MODEL, dtype, EngineConfig().block_size)
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    return make_bench(str(write_checkpoint(folder)), dtype, 8)


class TestBits:
    def test_nought_to_eighty_neighbours_do_not_show(self, bench: Bench) -> None:
        probe = bench.rows(LENGTH - 1, LENGTH)
        for count in range(NEIGHBOURS + 1):
            before = bench.neighbours[: count * 7 % (count + 1)]
            after = bench.neighbours[len(before) : count]
            outputs = bench.run([*before, probe, *after])
            assert torch.equal(outputs[len(before)][0], bench.logits[-1]), f"{count} neighbours"

    def test_neighbours_do_not_notice_each_other(self, bench: Bench) -> None:
        together = bench.run(bench.neighbours)
        for neighbour, logits in zip(bench.neighbours, together, strict=True):
            (alone,) = bench.run([neighbour])
            assert torch.equal(alone, logits)

    def test_a_prompt_beside_it_does_not_show(self, bench: Bench) -> None:
        probe = bench.rows(LENGTH - 1, LENGTH)
        behind = [block + bench.blocks for block in bench.table]
        for length in (1, 17, 100, LENGTH):
            prompt = Rows(bench.text[::-1][:length], 0, behind, 0)
            outputs = bench.run([prompt, probe])
            assert torch.equal(outputs[1][0], bench.logits[-1]), f"beside {length} rows of a prompt"

    @pytest.mark.parametrize("start", [5, 28, LENGTH - 17])
    def test_drafted_tokens_do_not_show(self, bench: Bench, start: int) -> None:
        for width in range(1, 18):
            (logits,) = bench.run([bench.rows(start, start + width)])
            assert torch.equal(logits, bench.logits[start : start + width]), f"{width} rows"

    def test_drafting_widths_may_differ_within_a_pass(self, bench: Bench) -> None:
        starts = range(0, LENGTH - 17, 19)
        widths = [1 + start % 17 for start in starts]
        others = bench.neighbours[: len(widths)]
        parts = [bench.rows(start, start + width) for start, width in zip(starts, widths, strict=True)]
        outputs = bench.run([rows for pair in zip(parts, others, strict=True) for rows in pair])
        for start, width, logits in zip(starts, widths, outputs[::2], strict=True):
            assert torch.equal(logits, bench.logits[start : start + width]), f"{width} rows from {start}"

    def test_rejected_drafts_leave_no_trace(self, bench: Bench) -> None:
        start = LENGTH - 20
        wrong = [*bench.text[start : start + 2], *bench.text[:15]]
        bench.run([Rows(wrong, start, bench.table, 1)])
        (logits,) = bench.run([bench.rows(start + 2, LENGTH)])
        assert torch.equal(logits, bench.logits[start + 2 :])

    @pytest.mark.parametrize("sizes", [[LENGTH], [1, 149], [64, 64, 22], [7] * 21 + [3], [33, 100, 17]])
    def test_chunks_of_the_prompt_do_not_show(self, bench: Bench, sizes: list[int]) -> None:
        table = [block + bench.blocks for block in bench.table]
        start, chunks = 0, []
        for size in sizes:
            chunks += bench.run([bench.rows(start, start + size, table)])
            start += size
        assert torch.equal(torch.cat(chunks), bench.logits)

    def test_scattered_blocks_do_not_show(self, bench: Bench) -> None:
        table = [block + bench.blocks for block in bench.table][::-1]
        (logits,) = bench.run([bench.rows(0, LENGTH, table)])
        assert torch.equal(logits, bench.logits)


class TestAdapter:
    """What an adapter does to some rows does not show in the others."""

    def test_rows_before_the_changed_ones_are_unchanged(self, bench: Bench) -> None:
        start, stop = LENGTH - 9, LENGTH
        for first in range(9):
            (logits,) = bench.run([bench.rows(start, stop)], Adapter(slice(first, 9)))
            exact = [torch.equal(a, b) for a, b in zip(logits, bench.logits[start:stop], strict=True)]
            assert exact == [True] * first + [False] * (9 - first)
        bench.run([bench.rows(start, stop)])

    def test_neighbours_of_changed_rows_are_unchanged(self, bench: Bench) -> None:
        probe, others = bench.rows(LENGTH - 1, LENGTH), bench.neighbours[:20]
        outputs = bench.run([probe, *others], Adapter(slice(1, 21)))
        assert torch.equal(outputs[0][0], bench.logits[-1])
        for changed, unchanged in zip(outputs[1:], bench.run(others), strict=True):
            assert not torch.equal(changed, unchanged)

    def test_it_is_asked_once_for_the_embeddings_every_layer_and_product_and_the_end(self, bench: Bench) -> None:
        adapter, config = Adapter(), bench.runner.model.config
        last = config.num_hidden_layers - 1
        bench.runner.run([bench.rows(LENGTH - 1, LENGTH)], skipping_plan(config, 1, last), adapter)
        bench.run([bench.rows(LENGTH - 1, LENGTH)])
        expected = [(layer, part) for layer in (0, last) for part in ("enter", "qkv", "o", "gate_up", "down")]
        assert adapter.calls == [(-1, "embed"), *expected, (last + 1, "enter")]

    def test_it_may_give_embeddings_to_ids_beyond_the_vocabulary(self, bench: Bench) -> None:
        size = bench.runner.model.config.vocab_size
        adapter = Adapter(slice(0, 0), size - 1)
        behind = [block + bench.blocks for block in bench.table]
        foreign, last = (bench.run([Rows([5, token], 0, behind, 1)], adapter) for token in (size + 3, size - 1))
        assert torch.equal(foreign[0], last[0])


class TestTaps:
    def test_they_show_what_entered_a_layer_in_every_row(self, bench: Bench) -> None:
        config, model = bench.runner.model.config, bench.runner.model
        end = config.num_hidden_layers
        rows = [Rows(bench.text[LENGTH - 9 :], LENGTH - 9, bench.table, 4), bench.neighbours[0]]
        hidden, _, taps = bench.runner.compute(rows, bench.plan, taps=(0, 1, end))
        tokens = torch.tensor([token for part in rows for token in part.tokens])
        read = [*range(len(rows[0].tokens) - 4, len(rows[0].tokens)), *range(len(rows[0].tokens), len(tokens))]
        assert set(taps) == {0, 1, end}
        assert torch.equal(taps[0][: len(tokens)], model.model.embed_tokens(tokens))
        assert torch.equal(taps[end][read], hidden)
        shorter, *_ = bench.runner.compute(rows, bench.plan[:1])
        assert torch.equal(taps[1][read], shorter)
        assert torch.equal(bench.runner.logits(hidden)[:4], bench.logits[-4:])

    def test_they_change_no_bit(self, bench: Bench) -> None:
        rows = [bench.rows(LENGTH - 5, LENGTH)]
        every = range(bench.runner.model.config.num_hidden_layers + 1)
        hidden, *_ = bench.runner.compute(rows, bench.plan, taps=every)
        assert torch.equal(bench.runner.logits(hidden), bench.logits[-5:])


class TestPlans:
    def test_skipped_layers_are_left_alone(self, bench: Bench) -> None:
        config, pool = bench.runner.model.config, bench.runner.pool
        before = pool.keys.clone()
        block = 2 * bench.blocks - 1
        table = [*bench.table[:-1], block]
        bench.runner.run([bench.rows(LENGTH - 1, LENGTH, table)], skipping_plan(config, 1, 2))
        slot = pool.slot(table, LENGTH - 1)
        untouched = [layer for layer, keys in enumerate(pool.keys) if torch.equal(keys[slot], before[layer, slot])]
        assert untouched == [1]

    def test_a_draft_pass_writes_scratch_that_verification_overwrites(self, bench: Bench) -> None:
        config, start = bench.runner.model.config, LENGTH - 6
        bench.runner.run([bench.rows(start, LENGTH)], skipping_plan(config, 1, 2))
        (logits,) = bench.run([bench.rows(start, LENGTH)])
        assert torch.equal(logits, bench.logits[start:])


class TestRows:
    @pytest.mark.parametrize(
        ("tiling", "sizes", "riders", "rows"),
        [
            (1, [4], 0, 4),
            (1, [5], 0, 8),
            (1, [3, 4], 0, 7),
            (1, [4, 1], 0, 8),
            (2, [3, 4], 0, 8),
            (1, [5], 1, 8),  # the riders are the padding
            (1, [5], 6, 11),
        ],
    )
    def test_there_are_no_more_than_padding_and_tiling_need(
        self, bench: Bench, tiling: int, sizes: list[int], riders: int, rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where attention takes rows by fours."""
        monkeypatch.setattr(bench.runner._attention, "multiple", 4)
        monkeypatch.setattr(bench.runner, "_tiling", Tiling(tiling, 256))
        size = bench.runner.pool.block_size
        parts = [Rows(bench.text[:count], 0, bench.table, 1, [1] * riders, 1) for count in sizes]
        assert len(bench.runner.batch(parts).token_ids) == rows
        across = Rows(bench.text[:2], size - 1, bench.table, 1)
        assert len(bench.runner.batch([across]).token_ids) == -(-(1 + 4) // tiling) * tiling

    def test_only_the_rows_that_ask_get_logits(self, bench: Bench) -> None:
        silent = Rows(bench.text[:3], 0, bench.table, 0)
        one = Rows(bench.text[3:9], 3, bench.table, 1)
        two = Rows(bench.text[9:20], 9, bench.table, 2)
        outputs = bench.run([silent, one, two])
        assert [len(logits) for logits in outputs] == [0, 1, 2]
        assert torch.equal(torch.cat(outputs), bench.logits[[8, 18, 19]])

    def test_logits_are_float32_over_the_vocabulary(self, bench: Bench) -> None:
        assert bench.logits.dtype == torch.float32
        assert bench.logits.shape == (LENGTH, bench.runner.model.config.vocab_size)

    def test_a_pass_without_logits_gives_none(self, bench: Bench) -> None:
        assert bench.runner.run([Rows(bench.text[:3], 0, bench.table, 0)], bench.plan).numel() == 0

    def test_rows_see_what_precedes_them(self, bench: Bench) -> None:
        behind = [block + bench.blocks for block in bench.table]
        one, other = (bench.run([Rows([first, *bench.text[1:40]], 0, behind, 1)])[0] for first in (1, 2))
        assert not torch.equal(one, other)
