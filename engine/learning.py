"""`--learn`: the adapter learns from what is served, in the gaps between requests.

All of it happens in the engine's own thread, a piece at a time and only when nothing is to be
served: a request that comes waits for the piece at hand, and for nothing else. The longest piece
is a teacher pass over LENGTH tokens or the writing of a checkpoint: a fifth of a second
for the built-in model, more for a large one. Texts are kept in memory alone, the latest ones; what
is written is an adapter and where its training stands. The texts of one prompt in eight are held
out; from time to time the adapter that learns is held against the one that drafts, on those, and
takes its place if it is better. Output does not depend on it.

On a GPU the model that serves also teaches. On a CPU its matrices are packed in a way that no
gradient goes through, so a copy in bfloat16 teaches.
"""

from __future__ import annotations

import copy
import fcntl
import json
import logging
import os
import random
import statistics
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from skippy.engine.adapter import S3DAdapter, part_sizes
from skippy.engine.adapter_files import fingerprint, save_adapter
from skippy.engine.build import Build
from skippy.engine.config import EngineConfig
from skippy.engine.errors import ConfigError, TrainingError
from skippy.engine.model import CausalLM
from skippy.engine.sampling import SamplingState
from skippy.engine.sequence import Sequence
from skippy.engine.training.files import (
    check_recipe,
    load_tensors,
    load_training_state,
    save_tensors,
    training_state,
)
from skippy.engine.training.options import TrainOptions, fresh_shape, num_parameters
from skippy.engine.training.passes import teach
from skippy.engine.training.run import load_base
from skippy.engine.training.trainer import LARGEST_NORM, share_of_rate, taught_loss
from skippy.engine.training.walk import accepted_counts
from skippy.engine.types import SamplingParams
from skippy.engine.weights import Checkpoint

CHECKPOINT, PROGRESS, LOCK = "learning.safetensors", "learning.jsonl", "learning.lock"
"""Beside the adapter."""
TEXTS, KEPT = 512, 1024
"""The latest texts to learn from that are kept, and how many tokens of each."""
HELD_OUT = 32
HOLD_OUT_EVERY = 8
FEWEST_TEXTS = 16
"""Before it begins."""
LENGTH = 192
"""Tokens of a text that are learnt from at a time."""
SHORTEST = 24
"""Tokens of a text that is learnt from."""
FEWEST_HELD_OUT = 4
"""Before adapters are compared."""
PROMPTS = 4096
"""The latest prompts of which is known whether they are held out."""
BATCH = 8
"""Texts per step."""
PARTS, ANCHORS = 4, 12
"""Pieces that the draft rows of a text are parted into, and places drafted from in each."""
PLACES = 16
"""Drafted from at a time where the adapters are compared."""
PERIOD = 800
"""Steps from one peak of the learning rate to the next."""
LATER_PEAK = 0.25
"""Of all peaks but the first."""
TV_FROM = PERIOD // 4
"""The step from which total variation counts; before, drafts are mostly wrong, and it has no slope."""
COMPARE_EVERY = 25
"""Steps between two comparisons."""
MARGIN = 1.01
"""Tokens per step must be so many times as many to change the adapter, and more by a standard error."""
REST_AFTER = PERIOD
"""Steps without a new text after which nothing more is learnt."""
SAVE_SECONDS = 60.0
_PLAIN: dict[str, Any] = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
    "min_tokens": 0,
}

logger = logging.getLogger("skippy.engine")


def learning_bytes(checkpoint: Checkpoint, adapter: S3DAdapter | None, device: torch.device) -> int:
    """What learning takes beside the engine.

    That is, in float32, an adapter, its gradient and moments, what drafts now and what is about to; on a CPU, too, a
    teacher in bfloat16, and once more, in half precision, the matrices that the latter's LoRA is folded into, and its
    head.
    """
    base = checkpoint.config
    shape = fresh_shape(checkpoint) if adapter is None else adapter.config
    sizes = part_sizes(shape, base)
    needed = 6 * 4 * sum(sizes.values())
    if device.type == "cpu":
        kept = base.num_hidden_layers - (shape.skip_end - shape.skip_start)
        needed += 2 * num_parameters(base) + 2 * num_parameters(base) * kept // base.num_hidden_layers
        needed += 2 * sizes["head"]
    return needed


class _Text(NamedTuple):
    """The end of an output with its prompt, KEPT tokens at most: `tokens[start:]` were chosen."""

    tokens: list[int]
    start: int
    cut: int
    """How many tokens went before."""
    params: SamplingParams
    seed: int
    choice: int

    @classmethod
    def of(cls, sequence: Sequence) -> _Text:
        cut = max(0, len(sequence.tokens) - KEPT)
        start = max(1, sequence.prompt_len - cut)  # a draft wants a token before it
        return cls(sequence.tokens[cut:], start, cut, sequence.params, sequence.seed, sequence.index)

    def last(self, count: int) -> _Text:
        """Its last tokens."""
        more = max(0, len(self.tokens) - count)
        return self._replace(tokens=self.tokens[more:], start=max(1, self.start - more), cut=self.cut + more)


class Learner:
    """Trains one adapter, and hands it over when it is better than the one in use.

    Args:
        built: of the engine that serves.
        adopt: is given an adapter, ready to draft.

    Attributes:
        step: how many steps are done, in all its life.

    Raises:
        ConfigError: the folder holds something else, or cannot be written.
        TrainingError: a file in the folder is damaged.
    """

    def __init__(self, config: EngineConfig, built: Build, adopt: Callable[[S3DAdapter], None]) -> None:
        assert config.learn is not None
        self._folder = Path(os.path.expanduser(config.learn))
        # Not the whole of `built`: its adapter is replaced one day.
        self._checkpoint, self._runner = built.checkpoint, built.runner
        self._adopt, self._options = adopt, TrainOptions()
        self._device = built.runner.pool.keys.device
        self._model = self._teacher(config)
        self._quantised = config.quantization != "none"
        self._adapter, self._serving = self._adapters(built.adapter)
        self._is_new = self._serving is None
        self._optimizer = torch.optim.AdamW(self._adapter.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
        self._texts: deque[_Text] = deque(maxlen=TEXTS)
        self._held_out: deque[_Text] = deque(maxlen=HELD_OUT)
        self._is_held_out: OrderedDict[int, bool] = OrderedDict()
        self._prompts = 0
        self._random = random.Random(self._options.seed)
        self._generator = torch.Generator().manual_seed(self._options.seed)
        self.step = self._last_new = 0
        self._seconds, self._longest, self._saved = 0.0, 0.0, time.monotonic()
        self._recipe: dict[str, Any] = {**asdict(self._adapter.config), "model": fingerprint(built.checkpoint)}
        self._resume()
        self._saved_step = self.step
        self._pieces = self._learn()

    def hear(self, sequence: Sequence) -> None:
        """Take a sequence that has ended for a text to learn from, or to judge by."""
        if sequence.num_output == 0 or len(sequence.tokens) < SHORTEST + self._adapter.config.num_speculative_tokens:
            return
        prompt = hash(sequence.request.prompt_token_ids)
        if prompt not in self._is_held_out:
            self._prompts += 1
            self._is_held_out[prompt] = self._prompts % HOLD_OUT_EVERY == HOLD_OUT_EVERY // 2
            if len(self._is_held_out) > PROMPTS:
                self._is_held_out.popitem(last=False)
        (self._held_out if self._is_held_out[prompt] else self._texts).append(_Text.of(sequence))
        self._last_new = self.step

    def work(self) -> bool:
        """Do a piece; False if there is nothing to do."""
        few = len(self._texts) < FEWEST_TEXTS or len(self._held_out) < FEWEST_HELD_OUT
        if few or self.step - self._last_new >= REST_AFTER:
            return False
        began = time.perf_counter()
        next(self._pieces)
        seconds = time.perf_counter() - began
        self._seconds += seconds
        self._longest = max(self._longest, seconds)
        return True

    def save(self) -> None:
        """Keep what was learnt since the last time, as of the last step that is complete."""
        if self.step != self._saved_step:
            self._save()

    # --- the pieces; each yields where a request may come in between ---

    def _learn(self) -> Iterator[None]:
        while True:
            yield from self._train_step()
            if self.step % COMPARE_EVERY == 0:
                yield from self._compare()
            if time.monotonic() - self._saved >= SAVE_SECONDS:
                self._save()
                yield

    def _train_step(self) -> Iterator[None]:
        self._optimizer.zero_grad()
        for text in self._random.sample(list(self._texts), BATCH):
            tokens = torch.tensor([self._window(text)], device=self._device)
            teaching = teach(self._model, self._adapter, tokens)
            yield
            anchors = min(ANCHORS, tokens.shape[1] - self._adapter.config.num_speculative_tokens)
            for _ in range(PARTS):
                with torch.enable_grad():
                    loss = taught_loss(self._model, self._adapter, teaching, anchors, self._tv_share(), self._generator)
                    (loss / (BATCH * PARTS)).backward()  # type: ignore[no-untyped-call]
                yield
        norm = torch.nn.utils.clip_grad_norm_(self._adapter.parameters(), LARGEST_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        if norm.isfinite():  # a text that makes the model overflow teaches nothing
            self._optimizer.step()
        self.step += 1
        yield

    def _compare(self) -> Iterator[None]:
        """Hold the adapter against the one that drafts, and let it draft if it is better."""
        texts = [text.last(LENGTH) for text in self._held_out]
        old = [1.0] * len(texts) if self._serving is None else (yield from self._walk(self._serving, texts))
        new = yield from self._walk(self._adapter, texts)
        gains = [b - a for a, b in zip(old, new, strict=True)]
        gain, before = statistics.fmean(gains), statistics.fmean(old)
        adopted = gain > max((MARGIN - 1.0) * before, statistics.stdev(gains) / len(gains) ** 0.5)
        if adopted:
            yield from self._hand_over()
            logger.info(
                "learnt: %.2f tokens per step on texts held out, %.2f before (step %d)",
                before + gain,
                before,
                self.step,
            )
        self._tell({"serving": before, "learning": before + gain, "texts": len(texts), "adopted": adopted})

    def _walk(self, adapter: S3DAdapter, texts: list[_Text]) -> Generator[None, None, list[float]]:
        """Tokens per step along the decode of each text."""
        found = []
        for text in texts:
            # Penalties and bans, which want to know the whole text, are left out for both adapters.
            params = replace(text.params, **_PLAIN)
            size = self._checkpoint.vocab_size
            state = SamplingState(params, text.tokens[: text.start], text.seed, text.choice, (), size, self._device)
            accepted = []
            walked = accepted_counts(self._model, adapter, text.tokens, text.start, state, places=PLACES, cut=text.cut)
            for count in walked:
                accepted.append(count)
                if len(accepted) % (PLACES // 2) == 0:
                    yield
            found.append(1.0 + statistics.fmean(accepted) if accepted else 1.0)
            yield
        return found

    def _tell(self, figures: dict[str, Any]) -> None:
        line = {"step": self.step, "seconds": round(self._seconds, 3), "longest_piece": round(self._longest, 4)}
        with (self._folder / PROGRESS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, **figures}) + "\n")
        self._longest = 0.0

    def _hand_over(self) -> Iterator[None]:
        drafting = copy.deepcopy(self._adapter).requires_grad_(False).eval().to(self._runner.pool.keys.dtype)
        if self._model is not self._runner.model and not self._quantised:
            for layer in drafting.kept:
                drafting.fold(self._model, layer)
                yield
        if drafting.head is not None and self._device.type == "cpu":
            drafting.head.pack()
        save_adapter(self._folder, self._adapter, self._checkpoint, {"learnt_steps": self.step})
        yield
        self._serving = copy.deepcopy(self._adapter)
        self._adopt(drafting)

    # --- what they are made of ---

    def _teacher(self, config: EngineConfig) -> CausalLM:
        model = self._runner.model
        if self._device.type != "cuda":
            # For as long texts as the model that serves: some rotary embeddings depend on that.
            return load_base(self._checkpoint, replace(config, dtype="auto"), model.max_len)
        if self._runner.pool.keys.dtype == torch.float16:
            raise ConfigError(
                "float16 has too small a range to learn in: serve in bfloat16 (--dtype), or without --learn."
            )
        return model

    def _adapters(self, found: S3DAdapter | None) -> tuple[S3DAdapter, S3DAdapter | None]:
        """The one that learns, in float32, and a copy of it if it drafts already."""
        shape = fresh_shape(self._checkpoint) if found is None else found.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._options.seed)
            adapter = S3DAdapter(shape, self._checkpoint.config).to(self._device)
        if found is None:
            return adapter, None
        adapter.load_state_dict(found.state_dict())
        return adapter, copy.deepcopy(adapter)

    def _window(self, text: _Text) -> list[int]:
        """At most LENGTH tokens of a text, from anywhere in it."""
        first = self._random.randint(0, max(0, len(text.tokens) - LENGTH))
        return text.tokens[first : first + LENGTH]

    def _learning_rate(self) -> float:
        period, step = divmod(self.step, PERIOD)
        peak = 1.0 if self._is_new and period == 0 else LATER_PEAK
        return self._options.learning_rate * peak * share_of_rate(step, PERIOD)

    def _tv_share(self) -> float:
        return 0.0 if self._is_new and self.step < TV_FROM else self._options.tv_share

    def _save(self) -> None:
        about = {"recipe": self._recipe, "seconds": self._seconds, "is_new": self._is_new}
        state = training_state("adapter", self._adapter, [self._optimizer], self.step)
        save_tensors(self._folder / CHECKPOINT, state, about)
        self._saved, self._saved_step = time.monotonic(), self.step

    def _resume(self) -> None:
        """Go on from the folder's checkpoint, if it has one, and see that another can be written, by nobody else."""
        path = self._folder / CHECKPOINT
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self._folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            weakref.finalize(self, os.close, lock)  # it is held as long as it is open
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"Another server learns in {self._folder}: give --learn another folder.") from error
        except OSError as error:
            raise ConfigError(f"--learn cannot write to {self._folder}: {error.strerror}.") from error
        if not path.exists():
            return
        state, about = load_tensors(path)
        check_recipe(path, about.get("recipe"), self._recipe)
        try:
            self.step = self._last_new = load_training_state("adapter", self._adapter, [self._optimizer], state)
            self._seconds, self._is_new = about["seconds"], about["is_new"]
        except (KeyError, RuntimeError) as error:
            raise TrainingError(f"{path} cannot be used: {error}. Remove it to begin anew.") from error
