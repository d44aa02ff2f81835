"""Token recycling: the verifier's likeliest tokens after each token, kept and drafted again (arXiv 2408.08696).

Of every row that the verifier computes, the few likeliest tokens are put into a table under
the row's own token. A draft follows the table from the newest token on. What differs from
the paper: a chain is drafted instead of a tree, because chains are what is verified here,
and a sampled sequence chooses among the candidates with the very noise that the verifier
will use. Penalties, bias and truncation are not foreseen.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from skippy.engine.drafters.calibration import Calibration, Guess
from skippy.engine.drafters.suffix import MIN_REACH
from skippy.engine.sampling import SamplingState, exponential_of, fold
from skippy.engine.sequence import Sequence

if TYPE_CHECKING:
    from torch import Tensor

NUM_CANDIDATES = 8
MAX_DRAFT = 8
_UNKNOWN = -1


class CandidateTable:
    """The likeliest successors of every token: 8 bytes for each of K candidates of V tokens.

    That is 8 MiB for a vocabulary of 128k.

    Args:
        vocab_size: V.
        width: K.
    """

    def __init__(self, vocab_size: int, width: int) -> None:
        self._width = width
        self._size = vocab_size * width
        self.clear()

    def clear(self) -> None:
        self._ids = array("i", [_UNKNOWN]) * self._size
        self._logits = array("f", [0.0]) * self._size

    def put(self, tokens: SequenceOf[int], ids: SequenceOf[list[int]], logits: SequenceOf[list[float]]) -> None:
        """Replace the candidates of some tokens, the likeliest first. ids and logits [len(tokens), K]."""
        for token, successors, scores in zip(tokens, ids, logits, strict=True):
            place = slice(token * self._width, (token + 1) * self._width)
            self._ids[place] = array("i", successors)
            self._logits[place] = array("f", scores)

    def get(self, token: int) -> tuple[array[int], array[float]] | None:
        """The candidates of a token and their logits, the likeliest first; None if it was never put."""
        place = slice(token * self._width, (token + 1) * self._width)
        ids = self._ids[place]
        return None if ids[0] == _UNKNOWN else (ids, self._logits[place])


class RecyclingDrafter:
    """Follows a table of the verifier's own candidates.

    Args:
        states: how each live sequence chooses its tokens.
    """

    name = "recycling"

    def __init__(self, vocab_size: int, states: Mapping[Sequence, SamplingState]) -> None:
        self.table = CandidateTable(vocab_size, min(NUM_CANDIDATES, vocab_size))
        self._states = states
        self._calibration = Calibration()

    def read(self, tokens: SequenceOf[int], logits: Tensor) -> None:
        """Learn from verified rows: logits[i] is of what follows tokens[i]. logits [len(tokens), V]."""
        best = logits.topk(min(NUM_CANDIDATES, logits.shape[-1]), dim=-1)
        self.table.put(tokens, best.indices.tolist(), best.values.tolist())

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        self._calibration.settle(sequence)

    def forget(self) -> None:
        self._calibration = Calibration()
        self.table.clear()

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        return [self._draft(sequence, limit) for sequence, limit in zip(sequences, limits, strict=True)]

    def _draft(self, sequence: Sequence, limit: int) -> list[int]:
        self._calibration.settle(sequence)
        state = self._states[sequence]
        draft: list[int] = []
        noted: list[Guess] = []
        token, reach = sequence.tokens[-1], 1.0
        while candidates := self.table.get(token):
            token, share = _choose(*candidates, state, len(sequence.tokens) + len(draft))
            ground = state.params.greedy, int(share * 8)
            noted.append(Guess(token, ground))
            reach *= self._calibration.chance(ground)
            if reach < MIN_REACH or len(draft) >= min(limit, MAX_DRAFT):
                break
            draft.append(token)
        self._calibration.note(sequence, noted)
        return draft


def _choose(ids: SequenceOf[int], logits: SequenceOf[float], state: SamplingState, index: int) -> tuple[int, float]:
    """What would be chosen at absolute index `index` if there were no other candidates, and how clearly, 0 to 1.

    That is its share of the softmax over the scores, noise included, as in `chain`.
    """
    params = state.params
    scores = list(logits)
    if not params.greedy:
        key = fold(state.key(index))
        scores = [
            score / params.temperature - math.log(exponential_of(key, token))
            for score, token in zip(logits, ids, strict=True)
        ]
    best = max(scores)
    return ids[scores.index(best)], 1.0 / math.fsum(math.exp(score - best) for score in scores)
