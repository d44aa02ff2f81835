"""Suffix decoding: what followed the longest known suffix of a text follows it again.

After SuffixDecoding (arXiv 2411.04975): the suffix is looked up in the sequence itself and
in recent outputs of the engine, and a draft goes on as long as it is likely enough. No pass
of the model is needed, only memory, which is bounded by what is indexed.

Drafts are never emitted, so a client sees nothing of another's output but how fast its own
comes, and how many drafted tokens were accepted. Who may ask for many texts can find out by
that whether one of them was written lately, as with a shared prefix cache. An engine with
`share_drafts` off keeps requests apart: each is then looked up in itself alone.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from skippy.engine.drafters.calibration import Calibration, Guess
from skippy.engine.sequence import Sequence

SIZES = (8, 4, 2)
"""The n-grams that are indexed. The shortest is the shortest suffix that counts."""
MAX_MATCH = 16
"""Longer suffixes are not told apart."""
MAX_OCCURRENCES = 8
"""The most recent occurrences of an n-gram that are looked at."""
MIN_REACH = 0.2
"""A token is drafted if it is accepted so often. Measured: rows cost 0.07 (alone) to 0.23 (16 at once) of a step."""
MAX_DRAFT = 16
MAX_INDEXED = 8192
"""Of a long prompt so many last tokens are indexed: everybody waits while that is done."""
SHARED_TOKENS = 2**15
"""Tokens of recent outputs that are kept; with their index about 600 bytes each."""
_BORDER = -1
"""Between two outputs. No token."""


class _Chains:
    """Where each n-gram of one size ended in a text last, and the time before that: the hash chains of LZ77.

    N-grams are known by their hashes alone; whoever follows a chain must compare.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._last: dict[int, int] = {}
        self._previous = array("i", [0])  # by end; 0 ends a chain, and no n-gram ends there

    def extend(self, tokens: list[int]) -> None:
        """Index what the text has grown by. Its last token waits: nothing follows it yet."""
        last, previous, size = self._last, self._previous, self.size
        previous.extend([0] * (len(tokens) - MAX_INDEXED - len(previous)))
        for end in range(len(previous), len(tokens)):
            if end < size:
                previous.append(0)
                continue
            key = hash(tuple(tokens[end - size : end]))
            previous.append(last.get(key, 0))
            last[key] = end

    def ends(self, text: SequenceOf[int]) -> Iterator[int]:
        """Where the last n-gram of `text` ended, MAX_OCCURRENCES times at most, the latest first."""
        end = self._last.get(hash(tuple(text[-self.size :])), 0)
        for _ in range(MAX_OCCURRENCES):
            if end == 0:
                return
            yield end
            end = self._previous[end]


class SuffixIndex:
    """Finds earlier occurrences of the end of a text in a text that grows.

    Attributes:
        tokens: the text, to be appended to by its owner.
    """

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self._chains = [_Chains(size) for size in SIZES]

    def __len__(self) -> int:
        return len(self.tokens)

    def update(self) -> None:
        """Index what was appended."""
        for chains in self._chains:
            chains.extend(self.tokens)

    def longest(self, text: SequenceOf[int]) -> tuple[int, list[int]]:
        """The length, MAX_MATCH at most, of the longest suffix of `text` that was indexed, and where it ends.

        Ends are positions in `tokens`, the most recent first; (0, []) if not even the shortest
        n-gram is known. Of the longest indexed n-gram only MAX_OCCURRENCES are looked at.
        """
        for chains in self._chains:
            best = 0
            ends: list[int] = []
            for end in chains.ends(text):
                length = common_suffix(self.tokens, end, text)
                if length > best:
                    best, ends = length, []
                if length == best:
                    ends.append(end)
            if best >= chains.size:
                return best, ends
        return 0, []


def common_suffix(tokens: SequenceOf[int], end: int, text: SequenceOf[int]) -> int:
    """How many tokens, MAX_MATCH at most, before `end` agree with the last of `text`."""
    length, most = 0, min(MAX_MATCH, end, len(text))
    while length < most and tokens[end - 1 - length] == text[-1 - length]:
        length += 1
    return length


class SharedOutputs:
    """The most recent outputs of an engine, SHARED_TOKENS at most, in two generations.

    When the younger one is full, the older one is dropped as a whole: nothing is ever deleted
    from an index.
    """

    def __init__(self) -> None:
        self.generations = [SuffixIndex([]), SuffixIndex([])]  # the younger first

    def clear(self) -> None:
        self.generations = [SuffixIndex([]), SuffixIndex([])]

    def add(self, output: SequenceOf[int]) -> None:
        """Keep a finished output, its last SHARED_TOKENS / 2 tokens at most."""
        half = SHARED_TOKENS // 2
        output = output[-half + 1 :]
        if len(self.generations[0]) + len(output) + 1 > half:
            self.generations = [SuffixIndex([]), self.generations[0]]
        young = self.generations[0]
        young.tokens += [*output, _BORDER]
        young.update()


class Lookup(NamedTuple):
    """What a sequence's draft would be, and how many tokens of it are expected to be accepted."""

    draft: list[int]
    promise: float


class SuffixDrafter:
    """Looks up every sequence in itself and, unless they are kept apart, in recent outputs.

    Among the longest matches the majority decides each token, and a match in the sequence
    itself goes before one elsewhere. How likely a token is comes from the share of the
    matches that agree and from how often matches of that length were right lately.
    """

    name = "suffix"

    def __init__(self, shared: SharedOutputs | None) -> None:
        self._shared = shared
        self._own: dict[Sequence, SuffixIndex] = {}
        self._calibration = Calibration()

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        return [self.look_up(sequence, limit).draft for sequence, limit in zip(sequences, limits, strict=True)]

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended, but for its output."""
        self._calibration.settle(sequence)
        if self._own.pop(sequence, None) is not None and self._shared is not None:
            self._shared.add(sequence.tokens[sequence.prompt_len :])

    def forget(self) -> None:
        self._calibration = Calibration()
        if self._shared is not None:
            self._shared.clear()

    def look_up(self, sequence: Sequence, limit: int) -> Lookup:
        """The draft of one sequence, of at most `limit` tokens."""
        self._calibration.settle(sequence)
        if (own := self._own.get(sequence)) is None:
            own = self._own[sequence] = SuffixIndex(sequence.tokens)
        own.update()
        best, ends, found = 0, [], own
        for index in (own, *(self._shared.generations if self._shared else ())):
            length, places = index.longest(sequence.tokens)
            if length > best:
                best, ends, found = length, places, index
        draft: list[int] = []
        noted: list[Guess] = []
        reach, promise = 1.0, 0.0
        for token, share in _continuation(found, ends, own is found):
            ground = found is own, min(best + len(draft), MAX_MATCH)
            noted.append(Guess(token, ground))
            reach *= share * self._calibration.chance(ground)
            if reach < MIN_REACH or len(draft) >= min(limit, MAX_DRAFT):
                break
            draft.append(token)
            promise += reach
        self._calibration.note(sequence, noted)
        return Lookup(draft, promise)


def _continuation(index: SuffixIndex, ends: list[int], loops: bool) -> Iterator[tuple[int, float]]:
    """The tokens that followed at most of `ends`, each with the share that it had; without end for a loop.

    Where the text ends, it goes on with what was just said to follow it if it loops.
    """
    text = index.tokens
    followed: list[int] = []
    while ends:
        at = [end + len(followed) for end in ends]
        if loops:
            tokens = [text[i] if i < len(text) else followed[i - len(text)] for i in at]
        else:
            tokens = [text[i] if i < len(text) else _BORDER for i in at]
        token, votes = tokens[0], tokens.count(tokens[0])
        if votes < len(tokens):
            token, votes = Counter(tokens).most_common(1)[0]  # of those met as often, the first, the most recent
        if token == _BORDER:
            return
        yield token, votes / len(ends)
        ends = [end for end, other in zip(ends, tokens, strict=True) if other == token]
        followed.append(token)
