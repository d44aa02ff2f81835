"""How the built-in model's drafts fare at every place of its own texts, for replays of the controller.

    python tests/benchmarks/record_drafts.py > tests/data/builtin_drafts.json

At each place of each output the drafters are asked, and what they say is held against what
the model writes there; none of it is verified, so every place is visited. A record holds
three strings of one base-36 digit per place: how many tokens s3d drafted, how many of them
were right, and how many of a lookup's ten were ("-" where nothing was found). JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence as SequenceOf

from skippy.engine import Engine, EngineConfig, Request, SamplingParams, Tokenizer
from skippy.engine.drafters.ngram import lookup
from skippy.engine.drafters.s3d import S3DDrafter
from skippy.engine.sequence import Sequence

LOOKUP_WIDTH, MIN_MATCH = 10, 6
"""Of the lookups recorded: how much they draft, and how many tokens must have occurred before."""
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
OPENINGS = (
    "def fibonacci(n):\n",
    "import os\n\n\ndef walk(path):\n    ",
    "class Stack:\n    def __init__(self):\n",
    'def is_prime(n):\n    """Whether n is prime."""\n',
    "for i in range(10):\n    print(",
    "def read_lines(path):\n    with open(path) as file:\n",
    "class Matrix:\n    def __init__(self, rows):\n        self.rows = rows\n\n    def transpose(self):\n",
    "import json\nimport sys\n\n\ndef main():\n    ",
    'def merge(left, right):\n    """Merge two sorted lists into one."""\n    result = []\n',
    "def test_addition():\n    assert ",
    'def word_count(text):\n    """How often each word occurs in a text."""\n    counts = {}\n',
    "class Node:\n    def __init__(self, value, left=None, right=None):\n",
    "x = [1, 2, 3]\ny = ",
    'def gcd(a, b):\n    """The greatest common divisor of two integers."""\n',
    "try:\n    import numpy\nexcept ImportError:\n    ",
    'def binary_search(items, wanted):\n    """The index of wanted in sorted items, or -1."""\n',
)


class Recorder:
    """Asks a drafter, and drafts nothing itself."""

    name = "recorder"

    def __init__(self, s3d: S3DDrafter) -> None:
        self._s3d = s3d
        self.taps = s3d.taps
        self.follow = s3d.follow
        self.drafts: list[list[int]] = []

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        self.drafts += self._s3d.propose(sequences, limits)
        return [[] for _ in sequences]


def num_right(draft: SequenceOf[int], following: SequenceOf[int]) -> int:
    pairs = zip(draft, following, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(draft), len(following)))


def record(engine: Engine, prompt: tuple[int, ...], params: SamplingParams, width: int) -> dict[str, str]:
    s3d = engine.drafting.drafters[S3DDrafter.name]
    assert isinstance(s3d, S3DDrafter), "only a separate adapter drafts without riders"
    recorder = Recorder(s3d)
    engine.add_drafter(recorder)
    engine.add(Request("0", prompt, params, drafter=recorder.name, num_speculative_tokens=width))
    output: list[int] = []
    while engine.has_work:
        output += [token for one in engine.step().outputs for token in one.token_ids]
    lines = {"drafted": "", "right": "", "looked_up": ""}
    # The first token comes of the prompt's pass; near the end a draft must leave room for the last one.
    for place, draft in enumerate(recorder.drafts[: len(output) - LOOKUP_WIDTH], 1):
        following = output[place:]
        found = lookup([*prompt, *output[:place]], LOOKUP_WIDTH, MIN_MATCH)
        lines["drafted"] += DIGITS[len(draft)]
        lines["right"] += DIGITS[num_right(draft, following)]
        lines["looked_up"] += DIGITS[num_right(found, following)] if found else "-"
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--width", type=int, default=6)
    options = parser.parse_args()
    engine = Engine(EngineConfig(enable_prefix_caching=False))
    tokenizer = Tokenizer.load(engine.info.model_path)
    records = {}
    for temperature in (0.0, 0.8):
        params = SamplingParams(max_tokens=options.max_tokens, temperature=temperature, seed=0, ignore_eos=True)
        prompts = (tuple(tokenizer.encode(opening)) for opening in OPENINGS)
        records[str(temperature)] = [record(engine, prompt, params, options.width) for prompt in prompts]
    print(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
