"""What a client sees of a choice's tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from skippy.engine import DraftCounts, SequenceOutput, Tokenizer, TokenLogprobs
from skippy.server.choices import Choice, TextOptions
from skippy.server.schemas import Logprobs

BUILTIN = Tokenizer.load(Path(__file__).parents[1] / "engine" / "builtin")


def known(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5, [])


def output(ids: list[int], prompt: list[int] | None = None, finish_reason: str | None = None) -> SequenceOutput:
    """Tokens of one step; the first one's tells of the prompt, too."""
    return SequenceOutput(
        "r",
        0,
        ids,
        DraftCounts(),
        "none",
        logprobs=[known(token_id) for token_id in ids],
        prompt_logprobs=None if prompt is None else [None, *map(known, prompt[1:])],
        finish_reason=finish_reason,  # type: ignore[arg-type]
    )


def echoed(tokenizer: Tokenizer, prompt: str, *, skip_special_tokens: bool = True) -> tuple[str, Logprobs]:
    """The text of a prompt and its first tokens once more behind it, and where each token stands in it."""
    ids = tokenizer.encode(prompt)
    options = TextOptions(echo=True, skip_special_tokens=skip_special_tokens)
    delta = Choice(tokenizer, ids, prompt, options).push(output(ids[-2:], ids, "length"))
    assert delta is not None
    assert delta.logprobs is not None
    return delta.text, delta.logprobs


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_offsets_count_the_special_tokens_that_a_prompt_spells_out(skip_special_tokens: bool) -> None:
    text, logprobs = echoed(BUILTIN, "a<|endoftext|>b c", skip_special_tokens=skip_special_tokens)
    assert text == "a<|endoftext|>b cb c"
    assert logprobs.text_offset == [0, 1, 14, 15, 17, 18]
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert text[offset:].startswith(token)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_offsets_do_not_count_what_the_tokenizer_puts_before_a_prompt(
    byte_level: Callable[..., tokenizers.Tokenizer], skip_special_tokens: bool
) -> None:
    tokenizer = Tokenizer(byte_level("<s> $A"), "<s>")
    text, logprobs = echoed(tokenizer, "xyz", skip_special_tokens=skip_special_tokens)
    assert text == "xyzyz"
    assert logprobs.tokens == ["<s>", "x", "y", "z", "y", "z"]
    assert logprobs.text_offset == [0, 0, 1, 2, 3, 4]


def test_offsets_of_words_that_are_marked_by_spaces(sentencepiece: Tokenizer) -> None:
    text, logprobs = echoed(sentencepiece, "to to", skip_special_tokens=False)
    assert text == "to to to to"
    assert logprobs.tokens == ["<s>", " to", " to", " to", " to"]
    assert logprobs.text_offset == [0, 0, 2, 5, 8]


def test_offsets_do_not_count_what_the_tokenizer_puts_behind_a_prompt(
    byte_level: Callable[..., tokenizers.Tokenizer],
) -> None:
    tokenizer = Tokenizer(byte_level("<s> $A <s>"), "<s>")
    _, logprobs = echoed(tokenizer, "xyz")
    assert logprobs.tokens == ["<s>", "x", "y", "z", "<s>", "z", "<s>"]
    assert logprobs.text_offset == [0, 0, 1, 2, 3, 3, 4]


@pytest.mark.parametrize(("min_tokens", "ends"), [(0, True), (2, True), (3, False)])
def test_a_special_token_that_is_not_shown_is_a_stop_string_nevertheless(min_tokens: int, ends: bool) -> None:
    special = "<|fim_prefix|>"
    a, b, end = (BUILTIN.encode(text)[0] for text in ("a", "b", special))
    choice = Choice(BUILTIN, [a], "a", TextOptions(stop=["bc", special], min_tokens=min_tokens))
    delta = choice.push(output([a, b, end, a]))
    assert delta is not None
    if ends:
        assert (delta.text, delta.finish_reason, delta.stop_reason) == ("ab", "stop", special)
        assert choice.completion_tokens == 3
    else:
        assert (delta.text, delta.finish_reason, choice.completion_tokens) == ("aba", None, 4)


@pytest.mark.parametrize("min_tokens", range(5))
def test_a_stop_string_may_begin_within_min_tokens_and_end_behind(min_tokens: int) -> None:
    (newline,) = BUILTIN.encode("\n")
    (x,) = BUILTIN.encode("x")
    choice = Choice(BUILTIN, [x], "x", TextOptions(stop=["\n\n"], min_tokens=min_tokens))
    shown, reason = "", None
    for token_id in (x, newline, newline, x):
        delta = choice.push(output([token_id]))
        if delta is not None:
            shown, reason = shown + delta.text, delta.finish_reason
        if reason is not None:
            break
    if min_tokens < 3:
        assert (shown, reason, choice.completion_tokens) == ("x", "stop", 3)
    else:
        assert (shown, reason, choice.completion_tokens) == ("x\n\nx", None, 4)
