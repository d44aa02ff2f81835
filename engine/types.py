"""What goes into and comes out of the engine. Pure Python: no torch, no HTTP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from skippy.engine.errors import InvalidRequest

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20
MAX_CHOICES = 128
GREEDY_TEMPERATURE = 1e-5
"""Below this temperature sampling is argmax, as in vLLM."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    The processing order of a row of logits is: repetition, presence and frequency
    penalties, logit_bias, bans (min_tokens), temperature, top_k, top_p, min_p.

    Attributes:
        max_tokens: most tokens to generate; 0 only computes the prompt (its logprobs).
        temperature: 0 is greedy (so is anything below 1e-5).
        top_k: 0 keeps every token.
        repetition_penalty: over prompt and output; presence and frequency count the output.
        min_tokens: EOS and stop ids are banned before this many tokens.
        stop_token_ids: end the output, and are part of it (as EOS is).
        ignore_eos: EOS ids of the model neither end the output nor count as stop ids.
        seed: None draws one at admission.
        logprobs: how many alternatives to report beside each chosen token; None for no logprobs.
        prompt_logprobs: the same for prompt tokens.

    Raises:
        InvalidRequest: a value is out of range; `param` names it.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, param: str, rule: str) -> None:
            if not ok:
                raise InvalidRequest(f"{param} must be {rule}, got {getattr(self, param)}.", param)

        def within(value: float, low: float, high: float) -> bool:
            return math.isfinite(value) and low <= value <= high

        check(self.max_tokens >= 0, "max_tokens", "at least 0")
        check(within(self.temperature, 0.0, 100.0), "temperature", "between 0 and 100")
        check(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]")
        check(0 <= self.top_k < 2**31, "top_k", "between 0 and 2147483647")
        check(0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]")
        check(within(self.presence_penalty, -2.0, 2.0), "presence_penalty", "between -2 and 2")
        check(within(self.frequency_penalty, -2.0, 2.0), "frequency_penalty", "between -2 and 2")
        check(within(self.repetition_penalty, 0.01, 100.0), "repetition_penalty", "between 0.01 and 100")
        check(
            all(token >= 0 and within(bias, -100.0, 100.0) for token, bias in self.logit_bias.items()),
            "logit_bias",
            "a map of token ids to values between -100 and 100",
        )
        check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", f"between 0 and max_tokens ({self.max_tokens})")
        check(all(token >= 0 for token in self.stop_token_ids), "stop_token_ids", "a list of token ids")
        check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            check(count is None or 0 <= count <= MAX_LOGPROBS, name, f"between 0 and {MAX_LOGPROBS}")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def penalises(self) -> bool:
        """Whether what was said before changes how likely a token is."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and `n` continuations of it.

    `drafter` and `num_speculative_tokens` override the engine's own for this request;
    they change its speed, never its tokens.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    drafter: str | None = None
    num_speculative_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise InvalidRequest("The prompt is empty: it must hold at least one token.", "prompt")
        if not 1 <= self.n <= MAX_CHOICES:
            raise InvalidRequest(f"n must be between 1 and {MAX_CHOICES}, got {self.n}.", "n")
        if self.num_speculative_tokens is not None and self.num_speculative_tokens < 0:
            raise InvalidRequest(
                f"num_speculative_tokens must be at least 0, got {self.num_speculative_tokens}.",
                "skippy.num_speculative_tokens",
            )


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities, in nats, of the raw logits at one position.

    `top` holds (token id, logprob) pairs, best first, the most likely ones asked for;
    the chosen token is not added to it.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(slots=True)
class DraftCounts:
    """What drafting did for one sequence so far."""

    steps: int = 0
    """Verify rows that chose a token: passes that emitted something for this sequence."""
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """The new tokens of one choice of one request, from one step."""

    request_id: str
    index: int
    token_ids: list[int]
    counts: DraftCounts
    drafter: str
    """The drafter that serves this sequence."""
    logprobs: list[TokenLogprobs] | None = None
    """As long as token_ids, when logprobs were asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Once, when the whole prompt is computed; None for the first prompt token."""
    cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    """The stop id that ended the output; None for an EOS id that was not named as one."""
    error: str | None = None
    """Why, when finish_reason is "error"."""


@dataclass(slots=True)
class StepStats:
    """What one engine step did. Seconds are wall-clock."""

    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    prefill_seconds: float = 0.0
    """The pass, when it carried prompt tokens; `verify_seconds` when it did not."""
    host_seconds: float = 0.0
    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prompt_tokens: int = 0
    """Prompt tokens computed in this step (cached ones are not)."""
    generation_tokens: int = 0
    drafts: int = 0
    """Sequences that verified at least one drafted token."""
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_pos: list[int] = field(default_factory=list)
    """Entry j counts the drafts whose token j was accepted."""
    accepted_per_step: list[int] = field(default_factory=list)
    """One entry per sequence that verified a draft: how many tokens it accepted."""
    decode_sequences: int = 0
    """Sequences that emitted at least one token."""
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    outputs: list[SequenceOutput]
    stats: StepStats


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a server needs to know of a loaded engine."""

    model: str
    """The folder that was loaded, as given ("builtin" for the built-in model)."""
    model_path: str
    """The folder that holds tokenizer.json and its config."""
    device: str
    dtype: str
    quantization: str
    vocab_size: int
    max_model_len: int
    bos_token_id: int | None
    eos_token_ids: list[int]
    drafter: str
    drafters: list[str]
    """Every drafter that a request may name."""
    num_speculative_tokens: int
    max_speculative_tokens: int
    """The most tokens one step may draft for one sequence."""
    block_size: int
    num_blocks: int
    kv_bytes: int
    max_num_seqs: int
