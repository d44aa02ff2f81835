"""The tokens of one choice, step by step, into what its client sees of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from skippy.engine import DraftCounts, SequenceOutput, Tokenizer, TokenLogprobs
from skippy.server.detokenize import Detokenizer, StopStrings
from skippy.server.schemas import Logprobs


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text, the same for every choice of a request.

    Attributes:
        min_tokens: a stop string counts if its last character comes behind this many tokens.
    """

    stop: Sequence[str] = ()
    include_stop: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    echo: bool = False


@dataclass(slots=True)
class Delta:
    """What became visible of a choice."""

    text: str
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Choice:
    """The state of one choice.

    Args:
        prompt_token_ids: what the text continues.
        prompt_text: the prompt as its author wrote it, or None if it came as ids.

    Attributes:
        completion_tokens: tokens up to the one that ended the choice. Tokens that came
            in the same step behind a stop string do not count, so that drafting does
            not change the number.
        counts: what drafting did.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        prompt_text: str | None,
        options: TextOptions,
    ) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._prompt = prompt_token_ids
        self._prompt_text = prompt_text
        # An echoed prompt of ids goes through the detokenizer itself.
        seen = () if options.echo else prompt_token_ids
        self._text = Detokenizer(tokenizer, seen, options.skip_special_tokens)
        self._stops = StopStrings(options.stop, options.include_stop)
        spelled = {tokenizer.token_to_id(stop): stop for stop in options.stop if options.skip_special_tokens}
        self._hidden_stops = {i: stop for i, stop in spelled.items() if i in tokenizer.special_ids}
        """Stop strings that are special tokens, and never become text."""
        self._logprobs = Logprobs()
        """Those of tokens whose text is not out yet."""
        self._length = 0
        """Characters up to here, shown or held back."""
        self._started = False
        self.completion_tokens = 0
        self.counts = DraftCounts()
        self.drafter = ""

    def push(self, output: SequenceOutput) -> Delta | None:
        """What the tokens of one step make visible; None if all of it is held back."""
        self.counts, self.drafter = output.counts, output.drafter
        shown = [] if self._started else [self._begin(output)]
        self._started = True
        for position, token_id in enumerate(output.token_ids):
            self.completion_tokens += 1
            if output.logprobs is not None:
                self._add_logprobs(token_id, output.logprobs[position])
            if not self._hides(output, position):
                shown.append(self._search(self._text.push(token_id)))
            if self._stops.matched is not None:
                return self._delta(shown, "stop", self._stops.matched)
            if token_id in self._hidden_stops and self.completion_tokens > self._options.min_tokens:
                return self._last(shown, "stop", self._hidden_stops[token_id])
        if output.finish_reason is None:
            return self._delta(shown) if any(shown) else None
        return self._last(shown, output.finish_reason, output.stop_reason)

    def _last(self, shown: list[str], finish_reason: str, stop_reason: str | int | None) -> Delta:
        """Everything that was held back, up to a stop string that it completes."""
        shown.append(self._search(self._text.flush()))
        if self._stops.matched is not None:
            return self._delta(shown, "stop", self._stops.matched)
        shown.append(self._stops.flush())
        return self._delta(shown, finish_reason, stop_reason)

    def _hides(self, output: SequenceOutput, position: int) -> bool:
        """Whether a token is the one that ended the text; like a stop string it shows only if asked for."""
        ends = output.finish_reason == "stop" and position == len(output.token_ids) - 1
        return ends and not self._options.include_stop

    def _begin(self, output: SequenceOutput) -> str:
        """The echoed prompt."""
        if not self._options.echo:
            return ""
        pieces = [self._text.push(token_id) for token_id in self._prompt]
        text = "".join(pieces) if self._prompt_text is None else self._prompt_text
        if output.prompt_logprobs is not None:
            places = self._places(text, pieces)
            for token_id, known, place in zip(self._prompt, output.prompt_logprobs, places, strict=True):
                self._length = place
                self._add_logprobs(token_id, known)
        self._length = len(text)
        return text

    def _places(self, text: str, pieces: list[str]) -> Iterator[int]:
        """Where each token of the prompt begins in its text, if these are the pieces that became visible of it."""
        place = 0
        if self._prompt_text is not None:
            # Special tokens that its author wrote are in it, and what the tokenizer puts around it is not.
            spelled = Detokenizer(self._tokenizer, skip_special_tokens=False)
            pieces = [spelled.push(token_id) for token_id in self._prompt]
            if self._prompt[0] in self._tokenizer.special_ids and not text.startswith(pieces[0]):
                place = -len(pieces[0])
                place -= "".join(pieces[1:2]).startswith(" ") and not text.startswith(" ")
        for piece in pieces:
            yield min(max(0, place), len(text))
            place += len(piece)

    def _search(self, text: str) -> str:
        self._length += len(text)
        return self._stops.push(text, ends=self.completion_tokens > self._options.min_tokens)

    def _delta(self, shown: list[str], finish_reason: str | None = None, stop_reason: str | int | None = None) -> Delta:
        logprobs, self._logprobs = self._logprobs, Logprobs()
        return Delta("".join(shown), logprobs if logprobs.tokens else None, finish_reason, stop_reason)

    def _add_logprobs(self, token_id: int, known: TokenLogprobs | None) -> None:
        """`known` is None for the first token of a prompt, which nothing predicts."""
        entries = self._logprobs
        entries.tokens.append(self._spell(token_id))
        entries.text_offset.append(self._length)
        if known is None:
            entries.token_logprobs.append(None)
            entries.top_logprobs.append(None)
            return
        entries.token_logprobs.append(known.logprob)
        top: dict[str, float] = {}
        for other, logprob in [*known.top, (token_id, known.logprob)]:
            top.setdefault(self._spell(other), logprob)  # the likelier of two that are spelled alike
        entries.top_logprobs.append(top)

    def _spell(self, token_id: int) -> str:
        """A token by itself; part of a character as OpenAI writes it: bytes:\\xe2\\x82."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass(slots=True)
class Collected:
    """A choice that is not streamed."""

    text: list[str] = field(default_factory=list)
    logprobs: Logprobs | None = None
    last: Delta = field(default_factory=lambda: Delta(""))

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        if self.logprobs is None:
            self.logprobs = delta.logprobs
        elif delta.logprobs is not None:
            self.logprobs.extend(delta.logprobs)
        self.last = delta
