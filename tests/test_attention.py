"""The reference attention against dense attention in float64, and its bits against themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from skippy.engine.attention import SDPAAttention
from skippy.engine.kv import KVPool
from skippy.engine.tensors import RiderSegment, Segment

BLOCK, DIM, KV_HEADS, MAX_LEN = 8, 16, 2, 128
NUM_BLOCKS = 40
GROUPS = [1, 2, 4]
DTYPES = [torch.float32, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
groups = pytest.mark.parametrize("group", GROUPS)


class Kind(NamedTuple):
    """What a row sees, and how its scores are bent."""

    window: int | None = None
    softcap: float | None = None


PLAIN = Kind()
KINDS = [PLAIN, Kind(window=11), Kind(window=BLOCK), Kind(softcap=2.0), Kind(window=27, softcap=2.0)]
kinds = pytest.mark.parametrize("kind", KINDS, ids=["plain", "window", "window of a block", "softcap", "both"])


@dataclass
class Past:
    """A whole sequence as dense tensors: queries [T, heads, dim], keys and values [T, kv_heads, dim]."""

    queries: Tensor
    keys: Tensor
    values: Tensor

    @staticmethod
    def random(length: int, group: int, dtype: torch.dtype, seed: int) -> Past:
        generator = torch.Generator().manual_seed(seed)
        queries, keys, values = (
            torch.randn(length, heads, DIM, generator=generator).to(dtype)
            for heads in (KV_HEADS * group, KV_HEADS, KV_HEADS)
        )
        return Past(queries, keys, values)

    def attend(self, start: int, stop: int, kind: Kind = PLAIN) -> Tensor:
        """What rows start..stop should come to, [stop - start, heads * dim] float64."""
        group = self.queries.shape[1] // KV_HEADS
        q = self.queries[start:stop].double()
        k, v = (t[:stop].double().repeat(1, group, 1) for t in (self.keys, self.values))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(DIM)
        if kind.softcap is not None:
            scores = (scores / kind.softcap).tanh() * kind.softcap
        ahead = torch.arange(stop)[None, :] - torch.arange(start, stop)[:, None]
        hidden = (ahead > 0) | (ahead <= -(kind.window or math.inf))
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


@dataclass
class Piece:
    """Rows start..stop of a sequence whose blocks are those of `table`."""

    past: Past
    table: list[int]
    start: int
    stop: int


class Bench:
    """A pool, the attention over it, and passes of pieces of sequences."""

    def __init__(self, group: int, dtype: torch.dtype = torch.float32, kind: Kind = PLAIN) -> None:
        self.group, self.dtype, self.kind = group, dtype, kind
        self.pool = KVPool(1, NUM_BLOCKS, BLOCK, KV_HEADS, DIM, dtype, torch.device("cpu"))
        self.attention = SDPAAttention(
            self.pool, KV_HEADS * group, MAX_LEN, DIM**-0.5, windows=[kind.window], softcap=kind.softcap
        )

    def past(self, length: int, seed: int = 0) -> Past:
        return Past.random(length, self.group, self.dtype, seed)

    def cache(self, past: Past, table: list[int], length: int) -> None:
        slots = torch.tensor([self.pool.slot(table, position) for position in range(length)], dtype=torch.int64)
        self.pool.write(0, slots, torch.cat((past.keys, past.values), 1)[:length])

    def run(self, *pieces: Piece) -> list[Tensor]:
        """One pass over all the pieces, cut where blocks end; the rows of each."""
        segments: list[Segment] = []
        slots: list[int] = []
        for piece in pieces:
            start = piece.start
            while start < piece.stop:
                stop = min(piece.stop, (start // BLOCK + 1) * BLOCK)
                segments.append(Segment(len(slots), stop - start, start, piece.table[: start // BLOCK + 1]))
                slots += [self.pool.slot(piece.table, position) for position in range(start, stop)]
                start = stop
        slack = self.attention.rows_read(segments) - len(slots)
        slots += [self.pool.padding_slot] * slack

        def rows(name: str) -> Tensor:
            parts = [getattr(piece.past, name)[piece.start : piece.stop] for piece in pieces]
            return torch.cat([*parts, torch.ones(slack, *parts[0].shape[1:], dtype=self.dtype)])

        attend = self.attention.begin(segments, torch.tensor(slots))
        out = attend(0, rows("queries"), torch.cat((rows("keys"), rows("values")), 1))
        return list(torch.split(out[: len(slots) - slack], [piece.stop - piece.start for piece in pieces]))


class TestAgainstDense:
    @kinds
    @groups
    @pytest.mark.parametrize(
        ("start", "stop"), [(0, 1), (0, 5), (0, 50), (7, 8), (8, 9), (6, 19), (31, 34), (49, 50), (0, MAX_LEN)]
    )
    def test_rows_attend_to_all_that_precedes(self, group: int, kind: Kind, start: int, stop: int) -> None:
        bench = Bench(group, kind=kind)
        past, table = bench.past(MAX_LEN), list(range(3, 3 + MAX_LEN // BLOCK))
        bench.cache(past, table, start)
        (out,) = bench.run(Piece(past, table, start, stop))
        torch.testing.assert_close(out.double(), past.attend(start, stop, kind), rtol=1e-5, atol=1e-5)

    @kinds
    @groups
    def test_many_sequences_share_a_pass(self, group: int, kind: Kind) -> None:
        bench = Bench(group, kind=kind)
        pieces = []
        for seed, (start, stop) in enumerate([(0, 20), (5, 6), (0, 1), (23, 33), (39, 40)]):
            past, table = bench.past(stop, seed), list(range(seed * 6, seed * 6 + 6))
            bench.cache(past, table, start)
            pieces.append(Piece(past, table, start, stop))
        for piece, out in zip(pieces, bench.run(*pieces), strict=True):
            torch.testing.assert_close(
                out.double(), piece.past.attend(piece.start, piece.stop, kind), rtol=1e-5, atol=1e-5
            )

    @kinds
    @groups
    def test_bfloat16_is_near(self, group: int, kind: Kind) -> None:
        bench = Bench(group, torch.bfloat16, kind)
        past, table = bench.past(50), list(range(7))
        bench.cache(past, table, 30)
        (out,) = bench.run(Piece(past, table, 30, 50))
        torch.testing.assert_close(out.double(), past.attend(30, 50, kind), rtol=2e-2, atol=2e-2)


class TestBits:
    """The result of a row depends on its own past and nothing else."""

    @dtypes
    @kinds
    @groups
    def test_scattered_blocks_equal_neighbouring_ones(self, group: int, dtype: torch.dtype, kind: Kind) -> None:
        bench = Bench(group, dtype, kind)
        past = bench.past(45)
        outputs = []
        for table in ([0, 1, 2, 3, 4, 5], [11, 7, 30, 9, 8, 20], [39, 38, 37, 36, 35, 34]):
            bench.cache(past, table, 33)
            (out,) = bench.run(Piece(past, table, 33, 45))
            outputs.append(out)
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])

    @dtypes
    @kinds
    @groups
    def test_rows_at_once_equal_rows_one_by_one(self, group: int, dtype: torch.dtype, kind: Kind) -> None:
        bench = Bench(group, dtype, kind)
        past, table = bench.past(70), list(range(9))
        singles = []
        for position in range(70):
            (out,) = bench.run(Piece(past, table, position, position + 1))
            singles.append(out)
        alone = torch.cat(singles)
        for start, stop in [(0, 70), (0, 8), (3, 20), (30, 47), (60, 70)]:
            (out,) = bench.run(Piece(past, table, start, stop))
            assert torch.equal(out, alone[start:stop]), f"rows {start} to {stop}"

    @dtypes
    @kinds
    @groups
    def test_neighbours_do_not_show(self, group: int, dtype: torch.dtype, kind: Kind) -> None:
        bench = Bench(group, dtype, kind)
        past, table = bench.past(30), [0, 1, 2, 3]
        bench.cache(past, table, 29)
        probe = Piece(past, table, 29, 30)
        (alone,) = bench.run(probe)
        others = []
        for seed in range(1, 31):
            stop = seed % BLOCK + 1
            others.append(Piece(bench.past(stop, seed), [3 + seed], stop - 1, stop))
        for count in range(1, len(others) + 1):
            before, after = others[: count // 2], others[count // 2 : count]
            outs = bench.run(*before, probe, *after)
            assert torch.equal(outs[len(before)], alone), f"{count} neighbours"

    @dtypes
    @kinds
    @groups
    def test_nan_of_another_sequence_does_not_leak(self, group: int, dtype: torch.dtype, kind: Kind) -> None:
        bench = Bench(group, dtype, kind)
        past, table = bench.past(20), [5, 6, 9]
        bench.cache(past, table, 19)
        probe = Piece(past, table, 19, 20)
        (clean,) = bench.run(probe)
        poison = bench.past(20, seed=1)
        for tensor in (poison.queries, poison.keys, poison.values):
            tensor.fill_(math.nan)
        poisoned = Piece(poison, [4, 7, 8], 0, 20)
        outs = bench.run(poisoned, probe, Piece(poison, [10, 11, 12], 0, 20))
        assert outs[0].isnan().all(), "the sequence that is broken is seen to be"
        assert torch.equal(outs[1], clean)
        (later,) = bench.run(probe)
        assert torch.equal(later, clean)

    @dtypes
    @kinds
    @groups
    def test_what_lies_beyond_a_row_does_not_show(self, group: int, dtype: torch.dtype, kind: Kind) -> None:
        bench = Bench(group, dtype, kind)
        past, table = bench.past(20), [0, 1, 2]
        bench.cache(past, table, 17)
        (fresh,) = bench.run(Piece(past, table, 17, 18))
        bench.cache(bench.past(24, seed=1), table, 24)  # scratch of a rejected draft, say
        bench.cache(past, table, 17)
        (stale,) = bench.run(Piece(past, table, 17, 18))
        assert torch.equal(fresh, stale)


class TestMask:
    @groups
    def test_a_row_sees_its_position_and_all_before(self, group: int) -> None:
        attention = Bench(group).attention
        for position in (0, 3, BLOCK - 1, BLOCK, 21, MAX_LEN - 1):
            rows = BLOCK - position % BLOCK
            mask = attention.mask(position, rows)
            assert mask.shape == (rows * group, (position // BLOCK + 1) * BLOCK)
            visible = (mask == 0).sum(-1).view(rows, group)
            assert (visible == torch.arange(position + 1, position + 1 + rows)[:, None]).all()
            assert ((mask == 0) | (mask == -math.inf)).all()

    @groups
    @pytest.mark.parametrize("window", [1, 5, BLOCK, BLOCK + 1, 20])
    def test_a_window_hides_what_lies_before_it(self, group: int, window: int) -> None:
        attention = Bench(group, kind=Kind(window=window)).attention
        for position in (0, 3, BLOCK - 1, BLOCK, 21, MAX_LEN - 1):
            rows = BLOCK - position % BLOCK
            first = attention.first_block(position, window) * BLOCK
            mask = attention.mask(position, rows, window)
            assert mask.shape == (rows * group, (position // BLOCK + 1) * BLOCK - first)
            for row in range(rows):
                for head in range(group):
                    seen = (first + (mask[row * group + head] == 0).nonzero().flatten()).tolist()
                    end = position + row
                    assert seen == list(range(max(0, end - window + 1), end + 1))

    @pytest.mark.parametrize("window", [1, 5, BLOCK, BLOCK + 1, 20])
    def test_rows_of_a_block_read_the_same_blocks(self, window: int) -> None:
        """Else what a row reads would depend on which rows of its block share the pass."""
        attention = Bench(1, kind=Kind(window=window)).attention
        for position in range(MAX_LEN):
            start = position - position % BLOCK
            first = attention.first_block(position, window)
            assert first == attention.first_block(start, window)
            assert first * BLOCK <= max(0, start - window + 1) < (first + 1) * BLOCK, "no block is read for nothing"

    def test_windows_that_no_sequence_outgrows_are_dropped(self) -> None:
        assert Bench(1, kind=Kind(window=MAX_LEN)).attention.windows == [None]
        assert Bench(1, kind=Kind(window=MAX_LEN - 1)).attention.windows == [MAX_LEN - 1]

    @groups
    @pytest.mark.parametrize("window", [None, 3, 6, 20])
    @pytest.mark.parametrize(("position", "ridden", "width"), [(0, 1, 1), (5, 3, 2), (7, 1, 4), (8, 2, 3), (30, 9, 8)])
    def test_a_rider_sees_what_its_row_sees_and_its_own_before_it(
        self, *, group: int, window: int | None, position: int, ridden: int, width: int
    ) -> None:
        attention = Bench(group).attention
        blocks = -(-(position + ridden * (1 + width)) // BLOCK)
        mask = attention.rider_mask(RiderSegment(0, width, ridden, position, list(range(blocks))), window)
        assert ((mask == 0) | (mask == -math.inf)).all()
        seen = (mask == 0).view(ridden, width, group, blocks * BLOCK)
        for row in range(ridden):
            for place in range(width):
                own = position + ridden + row * width
                at = position + row + 1 + place  # what it stands for
                first = 0 if window is None else max(0, at - window + 1)
                wanted = {*range(first, position + row + 1)}
                wanted |= {own + other for other in range(place + 1) if position + row + 1 + other >= first}
                for head in range(group):
                    assert set(seen[row, place, head].nonzero().flatten().tolist()) == wanted

    @pytest.mark.parametrize(
        ("multiple", "sizes", "rows"),
        [(1, [5], 5), (2, [4], 4), (2, [5], 6), (4, [5], 8), (4, [1, 4], 5), (4, [3, 1], 7), (4, [4, 1, 1], 9)],
    )
    def test_a_batch_has_the_rows_that_its_last_segments_are_padded_with(
        self, multiple: int, sizes: list[int], rows: int
    ) -> None:
        attention = Bench(2).attention
        attention.multiple = multiple
        segments = [Segment(sum(sizes[:i]), size, 0, [0]) for i, size in enumerate(sizes)]
        assert attention.rows_read(segments) == rows
        parts = [attention.part(segment, None) for segment in segments]
        assert max(part.first + part.padded for part in parts) == rows * attention.kernel.group
