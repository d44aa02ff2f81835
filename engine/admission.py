"""What an engine refuses at once, because it could never serve it. Pure Python."""

from __future__ import annotations

from skippy.engine.errors import InvalidRequest
from skippy.engine.types import EngineInfo, Request


def check_request(request: Request, info: EngineInfo) -> None:
    """Hold a request against the engine's limits.

    Raises:
        InvalidRequest: it names a foreign token or drafter, or is too long.
    """
    params, prompt = request.params, request.prompt_token_ids
    if len(prompt) + params.max_tokens > info.max_model_len:
        raise InvalidRequest(
            f"The prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}; together they may be "
            f"{info.max_model_len} at most.",
            "max_tokens",
        )
    for name, ids in (
        ("prompt", prompt),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", params.logit_bias),
    ):
        foreign = [token for token in ids if not 0 <= token < info.vocab_size]
        if foreign:
            raise InvalidRequest(
                f"{name} holds token id {foreign[0]}; this model's ids end at {info.vocab_size - 1}.", name
            )
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(info.eos_token_ids))
    if params.min_tokens and len(ends) >= info.vocab_size:
        raise InvalidRequest(
            "min_tokens bans every token there is: all of them would end the output.", "stop_token_ids"
        )
    if request.drafter is not None and request.drafter not in info.drafters:
        known = ", ".join(info.drafters)
        raise InvalidRequest(f"There is no drafter {request.drafter!r}; there are: {known}.", "skippy.drafter")
    if (request.num_speculative_tokens or 0) > info.max_speculative_tokens:
        raise InvalidRequest(
            f"num_speculative_tokens must be at most {info.max_speculative_tokens}, got "
            f"{request.num_speculative_tokens}.",
            "skippy.num_speculative_tokens",
        )
