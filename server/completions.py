"""POST /v1/completions, whole or streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Request, Response
from msgspec import UNSET, UnsetType

from skippy.engine import SequenceOutput
from skippy.server.choices import Choice, Collected, Delta, TextOptions
from skippy.server.client import AsyncEngineClient, Generation
from skippy.server.errors import ApiError
from skippy.server.limits import Admission, read_body, until_disconnect
from skippy.server.metrics import Metrics
from skippy.server.models import ServedModel, Serving
from skippy.server.requests import PreparedPrompt, prepare
from skippy.server.schemas import (
    Completion,
    CompletionChoice,
    CompletionRequest,
    PromptTokensDetails,
    SkippyUsage,
    StreamOptions,
    Usage,
)
from skippy.server.sse import DONE, EventStream, event, json_response


def router(serving: Serving, metrics: Metrics, admission: Admission) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions", openapi_extra=_describe_body())
    async def create_completion(request: Request) -> Response:
        arrival = time.monotonic()
        body = CompletionRequest.model_validate_json(await read_body(request))
        model = serving.model(body.model)
        admission.check_size(len(body.prompt), body.n, model.info.max_num_seqs)
        completion_id = f"cmpl-{uuid.uuid4().hex}"
        prompts = await prepare(body, model, completion_id)
        run = CompletionRun(completion_id, body, model, prompts, Measured(metrics, arrival))
        if body.stream:
            return EventStream(run.stream(serving.client, admission))
        answer = run.whole(serving.client, admission)
        return json_response(await until_disconnect(request.receive, answer))

    return routes


def _describe_body() -> dict[str, Any]:
    """The body is parsed by hand, whatever its content type says; OpenAPI still shows its schema."""
    schema = CompletionRequest.model_json_schema()
    definitions = schema.pop("$defs")

    def inlined(node: Any) -> Any:
        """Its references would lead nowhere where it is put."""
        if isinstance(node, list):
            return [inlined(item) for item in node]
        if not isinstance(node, dict):
            return node
        rest = {key: inlined(value) for key, value in node.items() if key != "$ref"}
        return {**inlined(definitions[node["$ref"].rpartition("/")[2]]), **rest} if "$ref" in node else rest

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inlined(schema)}}}}


class Measured:
    """The latencies of one request; `arrival` is its time.monotonic()."""

    def __init__(self, metrics: Metrics, arrival: float) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._latest: dict[int, float] = {}
        """When each choice last got tokens."""

    def tokens(self, choice: int, count: int) -> None:
        """`count` tokens of a choice arrived."""
        if not count:
            return
        now = time.monotonic()
        if not self._latest:
            self._metrics.observe_first_token(now - self._arrival)
        if choice in self._latest:
            self._metrics.observe_tokens(now - self._latest[choice], count)
        self._latest[choice] = now

    def finish(self, reason: str) -> None:
        """One choice ended."""
        self._metrics.observe_finish(reason)

    def end(self) -> None:
        """The answer is complete, or never will be."""
        self._metrics.observe_request(time.monotonic() - self._arrival)


class CompletionRun:
    """One HTTP request from its admission to its last token. Consume `whole` or `stream`, once."""

    def __init__(
        self,
        completion_id: str,
        body: CompletionRequest,
        model: ServedModel,
        prompts: Sequence[PreparedPrompt],
        measured: Measured,
    ) -> None:
        self._id = completion_id
        self._created = int(time.time())
        self._body = body
        self._model = model
        self._requests = [prompt.request for prompt in prompts]
        self._measured = measured
        options = _text_options(body)
        self._choices: list[Choice] = []
        self._position: dict[tuple[str, int], int] = {}
        """Where in the answer a choice of an engine request stands."""
        for prompt in prompts:
            for index in range(prompt.request.n):
                self._position[prompt.request.request_id, index] = len(self._choices)
                token_ids = prompt.request.prompt_token_ids
                self._choices.append(Choice(model.tokenizer, token_ids, prompt.text, options))
        self._open = set(range(len(self._choices)))
        self._cached: dict[str, int] = {}

    async def whole(self, client: AsyncEngineClient, admission: Admission) -> Completion:
        """The finished answer.

        Raises:
            ApiError, InvalidRequest, EngineDead: there is none.
        """
        collected = [Collected() for _ in self._choices]
        with self._running(client, admission) as generation:
            async for output in generation:
                position, delta = self._absorb(output, generation)
                if delta is not None:
                    collected[position].add(delta)
        choices = [
            CompletionChoice(i, "".join(c.text), c.logprobs, c.last.finish_reason, c.last.stop_reason)
            for i, c in enumerate(collected)
        ]
        return self._message(choices, self._usage())

    async def stream(self, client: AsyncEngineClient, admission: Admission) -> AsyncGenerator[bytes, None]:
        """The answer as events: a chunk for each step of each choice that shows something."""
        options = self._body.stream_options or StreamOptions()
        wants_usage = options.include_usage or options.continuous_usage_stats
        with self._running(client, admission) as generation:
            async for output in generation:
                position, delta = self._absorb(output, generation)
                if delta is None:
                    continue
                choice = CompletionChoice(position, delta.text, delta.logprobs, delta.finish_reason, delta.stop_reason)
                usage = self._usage() if options.continuous_usage_stats else None
                yield event(self._message([choice], usage if wants_usage else UNSET))
        if options.include_usage:
            yield event(self._message([], self._usage()))
        yield DONE

    @contextmanager
    def _running(self, client: AsyncEngineClient, admission: Admission) -> Iterator[Generation]:
        """The request inside the engine; whatever is left of it at the end is aborted."""
        left_as = "abort"
        with admission.admit(len(self._choices), self._model.info.max_num_seqs):
            try:
                with client.generate(*self._requests) as generation:
                    yield generation
            except Exception:
                left_as = "error"
                raise
            finally:
                for _ in self._open:
                    self._measured.finish(left_as)
                self._measured.end()

    def _absorb(self, output: SequenceOutput, generation: Generation) -> tuple[int, Delta | None]:
        """What the output of a step adds to which choice."""
        if output.finish_reason in ("abort", "error"):
            raise ApiError(500, output.error or "The engine gave the request up.", code="engine_error")
        position = self._position[output.request_id, output.index]
        choice, before = self._choices[position], self._choices[position].completion_tokens
        delta = choice.push(output)
        self._measured.tokens(position, choice.completion_tokens - before)
        if output.index == 0:  # the others share the prompt that the first one computed
            self._cached[output.request_id] = output.cached_tokens
        if delta is not None and delta.finish_reason is not None:
            generation.drop(output.request_id, output.index)
            self._open.discard(position)
            self._measured.finish(delta.finish_reason)
        return position, delta

    def _usage(self) -> Usage:
        """The count so far; the prompt of `n` choices counts once."""
        prompt_tokens = sum(len(request.prompt_token_ids) for request in self._requests)
        tokens = sum(choice.completion_tokens for choice in self._choices)
        steps = sum(choice.counts.steps for choice in self._choices)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=tokens,
            total_tokens=prompt_tokens + tokens,
            prompt_tokens_details=PromptTokensDetails(sum(self._cached.values())),
            skippy=SkippyUsage(
                drafter=next((choice.drafter for choice in self._choices if choice.drafter), ""),
                drafted=sum(choice.counts.drafted for choice in self._choices),
                accepted=sum(choice.counts.accepted for choice in self._choices),
                steps=steps,
                tokens_per_step=round(tokens / steps, 3) if steps else 0.0,
            ),
        )

    def _message(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(self._id, self._created, self._model.id, choices, usage)


def _text_options(body: CompletionRequest) -> TextOptions:
    return TextOptions(
        stop=body.stop,
        include_stop=body.include_stop_str_in_output,
        min_tokens=body.min_tokens,
        skip_special_tokens=body.skip_special_tokens,
        echo=body.echo,
    )
