"""`skippy verify URL`: does a running server give the same tokens however it drafts?

Every case (a prompt with sampling options and a seed) is first answered alone and without
drafting; that answer is the reference. The same case is then asked again with drafting on
and off, alone and among many others, and every answer is compared with the reference.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from skippy.engine import SkippyError, read_prompts

_OFF: dict[str, Any] = {"drafter": "none"}

_PROMPTS = (
    "def fibonacci(n):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import json\n\n\ndef load_config(path):\n",
    "for i in range(10):\n    print(i)\nfor i in range(10):\n    print(i)\nfor i in range(10):\n",
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
    "x = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,",
    "SELECT name, COUNT(*) FROM users WHERE",
    "# Prüfe die Eingabe: naïve café, 数据, 😀\ndef prüfe(text):\n",
    "@dataclass\nclass Point:\n    x: float\n    y: float\n\n@dataclass\nclass Circle:\n",
    "try:\n    import numpy as np\nexcept ImportError:\n",
    "    def __repr__(self):\n        return f'{self.__class__.__name__}(",
    "def test_addition():\n    assert add(1, 2) == 3\n\n\ndef test_subtraction():\n",
    "a",
)

_RECIPES: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 0, "repetition_penalty": 1.1, "presence_penalty": 0.3},
    {"temperature": 1.0, "min_p": 0.05, "top_k": 50},
    {"temperature": 0.8, "frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {"10": 1.5, "11": -100}},
    {"temperature": 0.3, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.05},
)


class VerifyError(SkippyError):
    """The comparison could not be made: the server is out of reach or refused a request."""


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What to ask. `count` is the number of comparisons; each case takes part in several."""

    prompts: str | None = None
    count: int = 200
    max_tokens: int = 64
    concurrency: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "max_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise VerifyError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Case:
    """One question; `request` holds everything but how to draft."""

    number: int
    request: dict[str, Any]

    def __str__(self) -> str:
        sampling = {key: value for key, value in self.request.items() if key not in _UNREMARKABLE}
        return f"case {self.number}, prompt {self.request['prompt'][:40]!r}, {json.dumps(sampling)}"


_UNREMARKABLE = frozenset({"model", "prompt", "max_tokens", "logprobs"})


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to ask a case again."""

    name: str
    draft: dict[str, Any]
    crowd: bool


VARIANTS = (
    Variant("drafting, alone", {}, crowd=False),
    Variant("no drafting, in a crowd", _OFF, crowd=True),
    Variant("drafting, in a crowd", {}, crowd=True),
    Variant("drafting 1 token, in a crowd", {"num_speculative_tokens": 1}, crowd=True),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What of a response must not depend on drafting, and how much was drafted."""

    text: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    completion_tokens: int
    drafted: int
    accepted: int

    @classmethod
    def of(cls, body: dict[str, Any]) -> Answer:
        choice, usage = body["choices"][0], body["usage"]
        return cls(
            text=choice["text"],
            tokens=tuple(choice["logprobs"]["tokens"]),
            logprobs=tuple(choice["logprobs"]["token_logprobs"]),
            finish_reason=choice["finish_reason"],
            completion_tokens=usage["completion_tokens"],
            drafted=usage["skippy"]["drafted"],
            accepted=usage["skippy"]["accepted"],
        )


def difference(reference: Answer, answer: Answer) -> str | None:
    """Where the two part, or None. Logprobs are shown, to tell a near tie from a bug, not compared."""
    for position, (expected, got) in enumerate(zip(reference.tokens, answer.tokens, strict=False)):
        if expected != got:
            before, after = reference.logprobs[position], answer.logprobs[position]
            return f"token {position}: {expected!r} (logprob {before:.4f}), then {got!r} (logprob {after:.4f})"
    for name in ("completion_tokens", "finish_reason", "text"):
        expected, got = getattr(reference, name), getattr(answer, name)
        if expected != got:
            return f"{name}: {expected!r}, then {got!r}"
    return None


def make_cases(model: str, options: VerifyOptions, prompts: Sequence[str]) -> list[Case]:
    """Enough cases for `options.count` comparisons; prompts meet the sampling recipes in turn."""
    cases = []
    for number in range(-(-options.count // len(VARIANTS))):
        lap, place = divmod(number, len(prompts))
        request = {
            "model": model,
            "prompt": prompts[place],
            "max_tokens": options.max_tokens,
            "logprobs": 0,
            "seed": options.seed + number,
            **_RECIPES[(place + lap) % len(_RECIPES)],
        }
        cases.append(Case(number, request))
    return cases


async def _served_model(client: httpx.AsyncClient) -> str:
    models = await _send(client, "GET", "/v1/models")
    try:
        return str(models["data"][0]["id"])
    except (LookupError, TypeError) as error:
        raise VerifyError(f"{client.base_url} names no model under /v1/models") from error


async def ask(client: httpx.AsyncClient, case: Case, draft: dict[str, Any]) -> Answer:
    response = await _send(client, "POST", "/v1/completions", json={**case.request, "skippy": draft})
    try:
        return Answer.of(response)
    except (LookupError, TypeError) as error:
        raise VerifyError(f"{client.base_url} is no Skippy server: its answer lacks {error}") from error


async def _send(client: httpx.AsyncClient, method: str, path: str, **options: Any) -> Any:
    try:
        response = await client.request(method, path, **options)
        body = response.json()
    except (httpx.HTTPError, httpx.InvalidURL, OverflowError) as error:
        raise VerifyError(f"cannot reach {client.base_url}: {error or type(error).__name__}") from error
    except ValueError as error:
        raise VerifyError(f"{client.base_url} answered {path} with something that is not JSON") from error
    if response.status_code != httpx.codes.OK:
        raise VerifyError(f"{client.base_url} answered {path} with status {response.status_code}: {_reason(body)}")
    return body


def _reason(body: Any) -> str:
    try:
        return str(body["error"]["message"])
    except (LookupError, TypeError):
        return json.dumps(body)


async def _ask_all(
    client: httpx.AsyncClient, questions: Iterable[tuple[Case, Variant]], concurrency: int
) -> list[tuple[Case, Variant, Answer]]:
    gate = asyncio.Semaphore(concurrency)

    async def one(case: Case, variant: Variant) -> tuple[Case, Variant, Answer]:
        async with gate:
            return case, variant, await ask(client, case, variant.draft)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(case, variant)) for case, variant in questions]
    except* VerifyError as errors:
        first = errors.exceptions[0]
        raise VerifyError(str(first)) from first
    return [task.result() for task in tasks]


async def compare(client: httpx.AsyncClient, options: VerifyOptions) -> int:
    """Ask, compare and report. 0: all the same; 1: some differ.

    Raises:
        VerifyError: nothing can be concluded.
        ConfigError: the prompts cannot be read.
    """
    model = await _served_model(client)
    prompts = read_prompts(options.prompts) if options.prompts else _PROMPTS
    cases = make_cases(model, options, prompts)
    questions = [(case, variant) for case in cases for variant in VARIANTS][: options.count]
    alone = [question for question in questions if not question[1].crowd]
    crowd = [question for question in questions if question[1].crowd]
    # Mixed, so that a case meets other cases and other ways of drafting in its passes.
    random.Random(options.seed).shuffle(crowd)

    print(f"{len(cases)} references: no drafting, alone", flush=True)
    reference = Variant("reference", _OFF, crowd=False)
    references = {case.number: answer for case, _, answer in await _ask_all(client, [(c, reference) for c in cases], 1)}
    print(f"{len(alone)} comparisons alone, {len(crowd)} in a crowd of {options.concurrency}", flush=True)
    answers = await _ask_all(client, alone, 1) + await _ask_all(client, crowd, options.concurrency)
    return _report(references, answers)


def _report(references: dict[int, Answer], answers: Sequence[tuple[Case, Variant, Answer]]) -> int:
    if any(answer.drafted for answer in references.values()):
        raise VerifyError('the server drafted although the request said "drafter": "none"')
    differing = 0
    for case, variant, answer in sorted(answers, key=lambda entry: entry[0].number):
        found = difference(references[case.number], answer)
        if found is not None:
            differing += 1
            print(f"{case}, {variant.name}: {found}")
    drafted = sum(answer.drafted for _, _, answer in answers)
    accepted = sum(answer.accepted for _, _, answer in answers)
    if drafted == 0 and not differing:
        raise VerifyError("the server drafted no token, so nothing was verified; start it with a drafter")
    print(f"{drafted} tokens drafted, {accepted} accepted")
    print(f"{differing} of {len(answers)} differ", flush=True)
    return 1 if differing else 0


def base_url(url: str) -> str:
    """`localhost:8000` and an OpenAI base URL that ends in /v1 are both understood."""
    if "://" not in url:
        url = f"http://{url}"
    return url.rstrip("/").removesuffix("/v1")


def run_verify(url: str, options: VerifyOptions, timeout: float) -> int:
    """The whole command. `timeout` is for one answer, in seconds."""

    async def run() -> int:
        try:
            client = httpx.AsyncClient(base_url=base_url(url), timeout=timeout)
        except httpx.InvalidURL as error:
            raise VerifyError(f"{url} is not a URL: {error}") from error
        async with client:
            return await compare(client, options)

    return asyncio.run(run())
