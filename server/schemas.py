"""The bodies of the API: what a client may ask (checked) and what it gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

Prompt = str | tuple[int, ...]
"""One prompt: text, or token ids to take as they are."""

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024

NO_EFFECT: Mapping[str, object] = {
    "suffix": None,
    "add_special_tokens": True,
    "length_penalty": 1.0,
    "response_format": {"type": "text"},
    "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None,
    "use_beam_search": False,
}
"""Fields that clients of other servers send, each with the one value, beside null, that asks for nothing."""


def _prompts(value: object) -> list[Prompt]:
    """One prompt or several, in either form, as a list of prompts."""
    match value:
        case str():
            return [value]
        case list() if not value:
            raise ValueError("it is an empty list")
        case list() if _are_ids(value):
            return [tuple(value)]
        case list() if all(isinstance(item, str) for item in value):
            return list(value)
        case list() if all(isinstance(item, list) and _are_ids(item) for item in value):
            return [tuple(item) for item in value]
    raise ValueError("it must be a string, a list of strings, a list of token ids or a list of such lists")


def _are_ids(value: list[Any]) -> bool:
    return all(type(item) is int and item >= 0 for item in value)


def _stops(value: object) -> object:
    """OpenAI takes one stop string or several."""
    return [value] if isinstance(value, str) else value


def _biases(value: object) -> object:
    """JSON has no integer keys, so OpenAI's map has strings."""
    if not isinstance(value, dict):
        return value
    if not all(isinstance(key, str) and key.isdecimal() for key in value):
        raise ValueError("its keys must be token ids")
    return {int(key): bias for key, bias in value.items()}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class StreamOptions(_Body):
    include_usage: bool = Field(default=False, description="a last chunk without choices carries the usage")
    continuous_usage_stats: bool = Field(default=False, description="every chunk carries the usage so far")
    include_obfuscation: Literal[False] = Field(default=False, description="padding of chunks is not supported")


class SkippyOptions(_Body):
    """What only this server has. Changes the speed, never the tokens."""

    drafter: str | None = None
    num_speculative_tokens: int | None = None


class CompletionRequest(_Body):
    """OpenAI's legacy completions, with the common extensions. Ranges are checked by the engine's types."""

    prompt: Annotated[
        list[Prompt], PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
    ]
    model: str | None = None
    max_tokens: int | None = None
    n: int = 1
    best_of: int | None = Field(default=None, description="only equal to n")
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
        BeforeValidator(_stops, json_schema_input_type=str | list[str]),
        Field(max_length=MAX_STOP_STRINGS),
    ] = []
    include_stop_str_in_output: bool = False
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    min_tokens: int = 0
    echo: bool = False
    logprobs: int | None = None
    seed: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = Field(default=0, description="0 or -1 keeps every token")
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Annotated[dict[int, float], BeforeValidator(_biases, json_schema_input_type=dict[str, float])] = {}
    skip_special_tokens: bool = True
    user: str | None = Field(default=None, description="ignored")
    skippy: SkippyOptions = SkippyOptions()

    @model_validator(mode="before")
    @classmethod
    def _drop_what_has_no_effect(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if name not in NO_EFFECT or value != NO_EFFECT[name]}


class Logprobs(msgspec.Struct):
    """Parallel lists, one entry per token; `text_offset` counts characters of the choice's text."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []

    def extend(self, other: Logprobs) -> None:
        for name in self.__struct_fields__:
            getattr(self, name).extend(getattr(other, name))


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the text."""


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class SkippyUsage(msgspec.Struct):
    """What drafting did for this answer, over all its choices."""

    drafter: str
    drafted: int
    accepted: int
    steps: int
    tokens_per_step: float


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    skippy: SkippyUsage


class Completion(msgspec.Struct):
    """A whole answer, or one chunk of a streamed one."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"


class ModelCard(msgspec.Struct):
    id: str
    created: int
    max_model_len: int
    root: str
    parent: str | None = None
    object: str = "model"
    owned_by: str = "skippy"


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: str = "list"
