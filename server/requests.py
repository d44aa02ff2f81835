"""From the body of a completion to the requests of the engine, or to the reason why not."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from skippy.engine import EngineInfo, InvalidRequest, Request, SamplingParams, check_request
from skippy.server.errors import ApiError
from skippy.server.models import ServedModel
from skippy.server.schemas import CompletionRequest, Prompt

DEFAULT_MAX_TOKENS = 16
SLACK = 2
LONG_TEXT = 16_384
"""Characters from which a prompt is tokenised beside the event loop: some milliseconds."""


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt as ids and, unless it came as ids, as text; and the engine's request for it."""

    text: str | None
    request: Request


async def prepare(body: CompletionRequest, model: ServedModel, completion_id: str) -> list[PreparedPrompt]:
    """The engine's request for each prompt of the body. Between two prompts others get their turn.

    Raises:
        InvalidRequest, ApiError: the body asks for what this model cannot do.
    """
    check_options(body)
    prepared = []
    for position, prompt in enumerate(body.prompt):
        prepared.append(await _prepare_one(body, prompt, model, f"{completion_id}-{position}"))
        await asyncio.sleep(0)
    return prepared


def check_options(body: CompletionRequest) -> None:
    """Raises InvalidRequest for fields that contradict each other."""
    if body.best_of not in (None, body.n):
        raise InvalidRequest("best_of is not supported unless it equals n.", "best_of")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream to be true.", "stream_options")
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens must be at least 1 unless echo is true.", "max_tokens")


async def _prepare_one(body: CompletionRequest, prompt: Prompt, model: ServedModel, request_id: str) -> PreparedPrompt:
    text = prompt if isinstance(prompt, str) else None
    token_ids = prompt if isinstance(prompt, tuple) else await _encode(prompt, model)
    request = Request(
        request_id=request_id,
        prompt_token_ids=token_ids,
        params=_params(body, _room(body, len(token_ids), model.info)),
        n=body.n,
        drafter=body.skippy.drafter,
        num_speculative_tokens=body.skippy.num_speculative_tokens,
    )
    check_request(request, model.info)
    return PreparedPrompt(text, request)


async def _encode(text: str, model: ServedModel) -> tuple[int, ...]:
    # Megabytes take seconds to tokenise, only to be refused. The slack is for tokenizers that shorten a text first.
    if len(text) > SLACK * model.info.max_model_len * model.tokenizer.longest_token:
        raise ApiError(
            400,
            f"The model's context is {model.info.max_model_len} tokens; a prompt of {len(text)} characters cannot fit.",
            param="prompt",
            code="context_length_exceeded",
        )
    if len(text) < LONG_TEXT:
        return tuple(model.tokenizer.encode(text))
    return tuple(await asyncio.to_thread(model.tokenizer.encode, text))


def _room(body: CompletionRequest, prompt_tokens: int, info: EngineInfo) -> int:
    """How many tokens to generate at most: those asked for, or OpenAI's default as far as it fits."""
    room = info.max_model_len - prompt_tokens
    wanted = body.max_tokens
    if wanted is None and room > 0:
        return min(DEFAULT_MAX_TOKENS, room)
    if wanted is not None and wanted <= room:
        return wanted
    raise ApiError(
        400,
        f"The model's context is {info.max_model_len} tokens; the prompt has {prompt_tokens}"
        f" and {1 if wanted is None else wanted} more were asked for.",
        param="prompt" if room <= 0 else "max_tokens",
        code="context_length_exceeded",
    )


def _params(body: CompletionRequest, max_tokens: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=0 if body.top_k == -1 else body.top_k,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=body.logit_bias,
        min_tokens=body.min_tokens,
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        seed=body.seed,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
