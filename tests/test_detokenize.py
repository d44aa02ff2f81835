"""Streamed text equals decoded text, and stop strings are cut whatever the chunks."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skippy.engine import Tokenizer
from skippy.server.detokenize import Detokenizer, StopStrings

BUILTIN = Tokenizer.load(Path(__file__).parents[1] / "engine" / "builtin")
TEXT = "to a\n tota é 日本語 😀 e\u0301 ∑ <s> done  "


def streamed(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def mixed(data: bytes) -> bool:
    """Whether the bytes hold both good characters and bad bytes."""
    text = data.decode(errors="replace")
    return "\ufffd" in text and set(text) != {"\ufffd"}


def byte_runs_are_mixed(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    runs: list[bytes] = []
    run = b""
    for token_id in ids:
        if (tokenizer.id_to_token(token_id) or "").startswith("<0x"):
            run += tokenizer.token_bytes(token_id)
        elif token_id not in tokenizer.special_ids:
            runs, run = [*runs, run], b""
    return any(mixed(data) for data in [*runs, run])


def test_text_streams_as_it_decodes(any_tokenizer: Tokenizer) -> None:
    ids = any_tokenizer.encode(TEXT)
    pieces = streamed(Detokenizer(any_tokenizer), ids)
    assert "".join(pieces) == any_tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert all(pieces[i] for i in range(3, 6)), "ordinary characters are not held back"


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_any_tokens_stream_as_they_decode(any_tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
    """Random ids, invalid bytes included, continuing a random prompt."""
    rng = random.Random(0)
    compared = 0
    for _ in range(1500):
        ids = [rng.randrange(len(any_tokenizer)) for _ in range(rng.randint(1, 16))]
        if any_tokenizer.byte_fallback and byte_runs_are_mixed(any_tokenizer, ids):
            continue
        expected = any_tokenizer.decode(ids, skip_special_tokens)
        pieces = streamed(Detokenizer(any_tokenizer, (), skip_special_tokens), ids)
        assert "".join(pieces) == expected
        detokenizer = Detokenizer(any_tokenizer, ids[:8], skip_special_tokens)
        before = any_tokenizer.decode(ids[:8], skip_special_tokens)
        if not before.endswith("\ufffd"):
            assert before + "".join(streamed(detokenizer, ids[8:])) == expected
        compared += 1
    assert compared > 100


def test_a_continuation_keeps_its_leading_space(sentencepiece: Tokenizer) -> None:
    word = sentencepiece.token_to_id("▁to")
    assert word is not None
    bos = sentencepiece.encode("")
    assert Detokenizer(sentencepiece, sentencepiece.encode("a")).push(word) == " to"
    assert Detokenizer(sentencepiece, bos).push(word) == "to"
    assert streamed(Detokenizer(sentencepiece, bos), [word, word]) == ["to", " to", ""]


def test_a_character_that_the_prompt_began_is_completed() -> None:
    ids = BUILTIN.encode("日")
    assert len(ids) > 1
    assert "".join(streamed(Detokenizer(BUILTIN, ids[:1]), ids[1:])) == "日"


def test_an_unfinished_character_becomes_a_replacement_at_the_end(any_tokenizer: Tokenizer) -> None:
    ids = [i for i in any_tokenizer.encode("語") if any_tokenizer.token_bytes(i) in (b"\xe8", b"\xaa")][:2]
    pieces = streamed(Detokenizer(any_tokenizer), ids)
    assert pieces[:-1] == [""] * len(ids)
    assert "".join(pieces) == any_tokenizer.decode(ids)


def test_good_characters_stay_when_a_byte_run_goes_bad(sentencepiece: Tokenizer) -> None:
    ids = [sentencepiece.token_to_id(f"<0x{byte:02X}>") or 0 for byte in (0xE2, 0x82, 0xAC, 0xFF, 0xFF)]
    assert "".join(streamed(Detokenizer(sentencepiece), ids)) == "€\ufffd\ufffd"


def test_time_grows_linearly_even_for_endless_bad_bytes() -> None:
    bad = next(i for i in range(len(BUILTIN)) if BUILTIN.token_bytes(i) == b"\xe2")
    seconds = []
    for count in (2_000, 20_000):
        detokenizer = Detokenizer(BUILTIN)
        start = time.perf_counter()
        for _ in range(count):
            detokenizer.push(bad)
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < 50 * seconds[0], "100 times as long would be quadratic"


def feed(stops: StopStrings, chunks: Sequence[str], without_end: int = 0) -> tuple[str, str | None]:
    """What is shown and what matched; nothing ends the text within the first chunks."""
    shown = ""
    for place, chunk in enumerate(chunks):
        shown += stops.push(chunk, ends=place >= without_end)
        if stops.matched is not None:
            return shown, stops.matched
    return shown + stops.flush(), None


@pytest.mark.parametrize(
    ("stops", "include", "text", "shown", "matched"),
    [
        (["\n\n"], False, "a\nb\n\nc", "a\nb", "\n\n"),
        (["\n\n"], True, "a\nb\n\nc", "a\nb\n\n", "\n\n"),
        (["aab"], False, "aaab", "a", "aab"),
        (["abcd", "bc"], False, "abcd", "a", "bc"),
        (["c", "abc"], False, "xabc", "x", "abc"),
        (["END"], False, "no EN", "no EN", None),
        (["日本"], False, "x日日本", "x日", "日本"),
        ([], False, "abc", "abc", None),
    ],
)
def test_the_first_stop_string_ends_the_text(
    stops: list[str], include: bool, text: str, shown: str, matched: str | None
) -> None:
    assert feed(StopStrings(stops, include), [text]) == (shown, matched)
    assert feed(StopStrings(stops, include), list(text)) == (shown, matched)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["abc"])
    assert [stops.push(chunk) for chunk in ["xa", "b", "x", "abab", "c"]] == ["x", "", "abx", "ab", ""]
    assert stops.matched == "abc"


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
    cuts=st.lists(st.integers(0, 30), max_size=6),
    without_end=st.integers(0, 7),
)
def test_chunks_do_not_matter(text: str, stops: list[str], include: bool, cuts: list[int], without_end: int) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[start:end] for start, end in pairwise(edges)]
    first = len("".join(chunks[:without_end]))
    ends = sorted(
        (end, -len(stop), stop)
        for end in range(first + 1, len(text) + 1)
        for stop in stops
        if text[:end].endswith(stop)
    )
    expected: tuple[str, str | None] = (text, None)
    if ends:
        end, _, stop = ends[0]
        expected = (text[: end if include else end - len(stop)], stop)
    assert feed(StopStrings(stops, include), chunks, without_end) == expected
