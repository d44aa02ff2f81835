"""What a request body may look like."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from skippy.server.errors import as_api_error
from skippy.server.schemas import CompletionRequest, Logprobs


def parse(body: str) -> CompletionRequest:
    return CompletionRequest.model_validate_json(body)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ('"a"', ["a"]),
        ('""', [""]),
        ('["a", "b"]', ["a", "b"]),
        ("[1, 2]", [(1, 2)]),
        ("[[1], [2, 3]]", [(1,), (2, 3)]),
    ],
)
def test_prompts_become_a_list(prompt: str, prompts: list[object]) -> None:
    assert parse(f'{{"prompt": {prompt}}}').prompt == prompts


def test_null_is_the_default_and_no_ops_are_accepted() -> None:
    plain = parse('{"prompt": "a"}')
    names = [name for name in CompletionRequest.model_fields if name != "prompt"]
    nulls = ", ".join(f'"{name}": null' for name in names)
    assert parse(f'{{"prompt": "a", {nulls}}}') == plain
    assert parse('{"prompt": "a", "suffix": null, "use_beam_search": false, "length_penalty": 1}') == plain
    assert parse('{"prompt": "a", "response_format": {"type": "text"}}') == plain
    assert parse('{"prompt": "a", "response_format": null, "add_special_tokens": null}') == plain
    assert parse('{"prompt": "a", "tools": null, "skippy": {"foo": null}}') == plain


def test_maps_and_single_stop_strings() -> None:
    body = parse('{"prompt": "a", "logit_bias": {"5": 1, "7": -2.5}, "stop": "x", "temperature": 1}')
    assert body.logit_bias == {5: 1.0, 7: -2.5}
    assert body.stop == ["x"]
    assert body.temperature == 1.0


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ("{", None, "invalid_json"),
        ('{"prompt": "\\ud800"}', None, "invalid_json"),
        ("[" * 5000, None, "invalid_json"),
        ("[1]", None, "invalid_type"),
        ("{}", "prompt", "missing_required_parameter"),
        ('{"prompt": null}', "prompt", "missing_required_parameter"),
        ('{"prompt": {}}', "prompt", "invalid_value"),
        ('{"prompt": [true]}', "prompt", "invalid_value"),
        ('{"prompt": [1, "a"]}', "prompt", "invalid_value"),
        ('{"prompt": "a", "n": "1"}', "n", "invalid_type"),
        ('{"prompt": "a", "n": 1.0}', "n", "invalid_type"),
        ('{"prompt": "a", "n": true}', "n", "invalid_type"),
        ('{"prompt": "a", "stream": 1}', "stream", "invalid_type"),
        ('{"prompt": "a", "temperature": NaN}', "temperature", "invalid_value"),
        ('{"prompt": "a", "temperature": 1e999}', "temperature", "invalid_value"),
        ('{"prompt": "a", "temperature": "hot"}', "temperature", "invalid_type"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias", "invalid_value"),
        ('{"prompt": "a", "logit_bias": [1]}', "logit_bias", "invalid_type"),
        ('{"prompt": "a", "stop": ["a", 5]}', "stop", "invalid_type"),
        ('{"prompt": "a", "stop": ""}', "stop", "invalid_value"),
        ('{"prompt": "a", "foo": 0}', "foo", "unknown_parameter"),
        ('{"prompt": "a", "use_beam_search": true}', "use_beam_search", "unknown_parameter"),
        ('{"prompt": "a", "skippy": {"drafter": 5}}', "skippy.drafter", "invalid_type"),
        ('{"prompt": "a", "stream_options": {"x": 1}}', "stream_options.x", "unknown_parameter"),
        ('{"prompt": "a", "foo-bar": 1}', "foo-bar", "unknown_parameter"),
        ('{"prompt": "a", "stream_options": {"x-y": 1}}', "stream_options.x-y", "unknown_parameter"),
        (
            '{"prompt": "a", "stream_options": {"include_obfuscation": true}}',
            "stream_options.include_obfuscation",
            None,
        ),
    ],
)
def test_what_is_wrong_is_named(body: str, param: str | None, code: str | None) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(body)
    error = as_api_error(caught.value)
    assert error.status == 400
    assert error.body.param == param
    assert code is None or error.body.code == code
    assert param is None or param in error.body.message


def test_logprobs_are_joined_column_by_column() -> None:
    joined = Logprobs(["a"], [None], [None], [0])
    joined.extend(Logprobs(["b"], [-1.0], [{"b": -1.0}], [1]))
    assert joined == Logprobs(["a", "b"], [None, -1.0], [None, {"b": -1.0}], [0, 1])
    assert Logprobs() == Logprobs([], [], [], []), "defaults are not shared"
