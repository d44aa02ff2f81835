"""Token ids to text, one token at a time, and the search for stop strings in it."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import lru_cache

from skippy.engine import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_MOST_TOKENS_OF_A_CHARACTER = 4
"""UTF-8 takes at most 4 bytes, and a token that adds any adds one or more."""


class Detokenizer:
    """The text of a growing sequence of tokens, in amortised constant time per token.

    Bytes of an unfinished UTF-8 character are held back until the rest arrives. What
    `push` and `flush` return, joined, is `decode(prompt + tokens)` after `decode(prompt)`,
    with one exception that streaming rules out: a tokenizer with byte fallback decodes a
    run of byte tokens as a whole, so that one bad byte also spoils good characters before
    it, which may have been sent already; here they stay.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        # Byte fallback shows one replacement character for each bad byte, byte-level
        # decoding one for each maximal bad sequence, which is what "replace" means.
        self._per_byte = tokenizer.byte_fallback
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape" if self._per_byte else "replace")
        self._at_start = all(token_id in self._hidden for token_id in prompt_token_ids)
        for token_id in prompt_token_ids[-_MOST_TOKENS_OF_A_CHARACTER:]:
            if token_id not in self._hidden:
                self._decoder.decode(tokenizer.token_bytes(token_id))

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        if token_id in self._hidden:
            return ""
        if self._at_start:
            self._at_start = False
            return self._text(self._tokenizer.first_token_bytes(token_id))
        return self._text(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is still held back, as replacement characters. The end of the text."""
        return self._text(b"", final=True)

    def _text(self, data: bytes, final: bool = False) -> str:
        text = self._decoder.decode(data, final)
        return _ESCAPED_BYTE.sub(REPLACEMENT, text) if self._per_byte else text


@lru_cache(maxsize=256)
def _fallbacks(pattern: str) -> list[int]:
    """For each prefix of a pattern, how much of it still matches after a mismatch. Shared by all choices."""
    fallback = [0] * len(pattern)
    for i in range(1, len(pattern)):
        matched = fallback[i - 1]
        while matched and pattern[matched] != pattern[i]:
            matched = fallback[matched - 1]
        fallback[i] = matched + (pattern[matched] == pattern[i])
    return fallback


class _Matcher:
    """Finds one string in text that arrives a character at a time (Knuth, Morris, Pratt)."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.matched = 0
        """How many of the pattern's first characters the text now ends with."""
        self._fallback = _fallbacks(pattern)

    def push(self, char: str) -> bool:
        """Whether `char` completes the pattern. If it does, `go_on` before the next one."""
        self.matched = self._advance(self.matched, char)
        return self.matched == len(self.pattern)

    def go_on(self) -> None:
        """Look for the pattern again, where it overlaps with the one just found at the earliest."""
        self.matched = self._fallback[-1]

    def _advance(self, matched: int, char: str) -> int:
        while matched and self.pattern[matched] != char:
            matched = self._fallback[matched - 1]
        return matched + (self.pattern[matched] == char)


class StopStrings:
    """Lets text through up to the first stop string, and nothing that may become part of one.

    The first is the one whose last character comes first, whatever chunks the text
    arrives in; of two that end together, the longer. With `include` the output ends with
    the stop string, otherwise before it.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._matchers = [_Matcher(stop) for stop in sorted(stops, key=len, reverse=True)]
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, ends: bool = True) -> str:
        """The text that may be shown now; `matched` is set once a stop string is complete.

        Args:
            ends: whether one that is complete within this text counts. If not, it is text like any other.
        """
        if not self._matchers:
            return text
        text, new = self._held + text, text
        for end, char in enumerate(new, start=len(text) - len(new) + 1):
            # Every matcher sees every character, also when another one is complete.
            complete = [matcher for matcher in self._matchers if matcher.push(char)]
            if complete and ends:
                self.matched, self._held = complete[0].pattern, ""
                return text[: end if self._include else end - len(self.matched)]
            for matcher in complete:
                matcher.go_on()
        shown = len(text) - max(matcher.matched for matcher in self._matchers)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back. The end of the text."""
        held, self._held = self._held, ""
        return held
