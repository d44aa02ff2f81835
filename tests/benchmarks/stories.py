"""What a model writes by itself: 20 stories and some code, greedily, and how much of it repeats.

    python tests/benchmarks/stories.py [MODEL] [--max-tokens N] [--temperature T]

Prints every text, with the share of its 4-grams of tokens that are distinct (a loop has few);
JSON on the last line. Coherent is what reads so: the figure only tells loops.
"""

from __future__ import annotations

import argparse
import json
import statistics

from skippy.engine import BUILTIN_MODEL, Engine, EngineConfig, SamplingParams, Tokenizer
from skippy.engine.measure import LOOPING_BELOW, decode, distinct_grams

STORIES = (
    "Once upon a time there was a small hedgehog who was afraid of the dark. One night",
    "Anna had a kite with a long blue tail. On a windy day she",
    "Tom and his sister Mia wanted to bake bread for their grandpa.",
    "There was an old clock in the kitchen that never stopped. But one morning",
    'The little frog looked at the big pond and said, "I',
    "It was raining, and Ben could not find his yellow boots.",
    "A farmer had a goat who loved to eat hats. Every day the goat",
    "Lucy saw something shiny under the bridge. She",
    "Max was the slowest turtle of all, but he had a good idea.",
    "In the forest lived a bear who wanted to learn how to swim.",
    "Mom told Sam not to open the red box. Sam",
    "The snowman stood in the garden and felt lonely. Then a bird",
    "Nina found a lost puppy in front of the bakery.",
    "One day, a cloud came down to the ground to play with the children.",
    "Jack and Lily were building a boat out of wood.",
    "The moon was sad because nobody talked to it.",
    "Grandma gave Leo a tiny seed and told him to be patient.",
    "Two mice lived in an old shoe. One of them",
    "Ella did not want to share her new drum with her friend.",
    "A brave little train had to climb a very steep hill.",
)
CODE = (
    'def celsius_to_fahrenheit(celsius):\n    """Convert a temperature from Celsius to Fahrenheit."""\n',
    "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, item):\n",
    "import json\nfrom pathlib import Path\n\n\ndef load_config(path):\n",
    "def read_lines(path):\n    with open(path) as file:\n",
    "import argparse\n\n\ndef main():\n    parser = argparse.ArgumentParser()\n",
    'def count_words(text):\n    """Return a dictionary from each word to how often it occurs."""\n',
)
BATCH_SIZE = 16


def main() -> None:
    options = _parse()
    engine = Engine(EngineConfig(model=options.model, drafter="none", num_threads=options.threads))
    tokenizer = Tokenizer.load(engine.info.model_path)
    openings = STORIES + CODE
    params = SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature, seed=0)
    prompts = [tuple(tokenizer.encode(opening)) for opening in openings]
    written = decode(engine, prompts, "none", BATCH_SIZE, params).outputs
    shares = [distinct_grams(tokens) for tokens in written]
    for opening, tokens, share in zip(openings, written, shares, strict=True):
        print(f"--- {len(tokens)} tokens, distinct 4-grams {share:.2f}\n{opening}[>]{tokenizer.decode(tokens)}\n")
    stories, code = shares[: len(STORIES)], shares[len(STORIES) :]
    print(
        json.dumps(
            {
                "bench": "stories",
                **vars(options),
                "stories_distinct_4grams": statistics.mean(stories),
                "stories_least": min(stories),
                "stories_looping": sum(share < LOOPING_BELOW for share in stories),
                "code_distinct_4grams": statistics.mean(code),
            }
        )
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=BUILTIN_MODEL)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
