"""One continuation of one request, as the scheduler sees it. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass, field

from skippy.engine.blocks import Digest
from skippy.engine.types import DraftCounts, FinishReason, Request, SamplingParams, TokenLogprobs


@dataclass(slots=True, eq=False)
class Sequence:
    """The tokens of one choice and how far the engine has come with them.

    Between steps a sequence that decodes has `computed == len(tokens) - 1`: the KV of every
    token but the newest is cached at full depth. Slots at and beyond `computed` are scratch.
    """

    request: Request
    index: int
    seed: int
    drafter: str
    max_draft: int
    """The most tokens to draft in one step."""
    adaptive: bool
    """Whether each step's controller may draft fewer."""
    end_ids: frozenset[int]
    """Tokens that end the output: EOS ids (unless ignored) and stop ids."""
    tokens: list[int]
    rides: bool = False
    """Whether its drafts are made by rows that ride in the verify pass, so many behind each of its rows."""
    ridden: int = 0
    """How many rode behind its newest computed token: the most that the next step can draft."""
    computed: int = 0
    table: list[int] = field(default_factory=list)
    """The KV blocks that hold it, in order."""
    digests: list[Digest] = field(default_factory=list)
    published: int = 0
    """How many leading blocks other sequences may reuse."""
    cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache at the first admission."""
    counts: DraftCounts = field(default_factory=DraftCounts)
    misses: int = 0
    """How many drafts in a row had nothing accepted."""
    last_accepted: int = 0
    """How many tokens of its last draft were accepted; 0 without a draft."""
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    leader: Sequence | None = None
    """The sibling whose prompt this one waits for, to share its blocks."""

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def decoding(self) -> bool:
        """Every known token but the newest is computed, so a draft may follow it."""
        return self.computed == len(self.tokens) - 1 and self.computed >= self.prompt_len

    @property
    def max_len(self) -> int:
        return self.prompt_len + self.params.max_tokens

    @property
    def prompt_computed(self) -> bool:
        return self.computed >= self.prompt_len
