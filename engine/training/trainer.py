"""The training of an adapter, step by step. The base stays as it is, bit for bit."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from skippy.engine.adapter import S3DAdapter
from skippy.engine.errors import ConfigError, TrainingError
from skippy.engine.model import CausalLM
from skippy.engine.training.data import Sample
from skippy.engine.training.files import load_training_state, training_state
from skippy.engine.training.loss import Head, draft_loss, rows_of_vocabulary, teacher_tops
from skippy.engine.training.options import TrainOptions
from skippy.engine.training.passes import Teaching, draft_rows, teach
from skippy.engine.training.walk import Walk, walk

DEPTH_DECAY = 0.9
"""A row counts this much less than the one before it: it matters only if that one is accepted."""
WARM_UP = 20
FINAL_SHARE = 0.05
"""Of the learning rate: where the cosine ends."""
LARGEST_NORM = 1.0
"""Of the gradient."""
HELD_OUT = 96
HELD_OUT_EACH = 24
SAMPLED_TEMPERATURE = 0.8


class HeldOut(NamedTuple):
    """Texts that are never trained on, by how they were chosen."""

    greedy: list[Sample]
    sampled: list[Sample]


class Walks(NamedTuple):
    greedy: Walk
    sampled: Walk


class Trainer:
    """Trains an adapter for a model. The model must not be packed, and its parameters stay frozen.

    A step depends on the adapter, the optimizer's state, the options and its own number, and
    on nothing else: a training that is interrupted goes on as if it had not been.

    Args:
        samples: of one length; the last of them are held out.
        options: steps, batch_size, anchors, learning_rate, tv_share, seed and gradient_checkpointing of
            them matter here.

    Attributes:
        step: how many steps are done.
        training, held_out: the samples, parted.

    Raises:
        ConfigError: there are too few samples.
    """

    def __init__(self, model: CausalLM, adapter: S3DAdapter, samples: Sequence[Sample], options: TrainOptions) -> None:
        self.model, self.adapter, self.options = model.requires_grad_(False), adapter, options
        self.step = 0
        self.training, self.held_out = hold_out(samples, options.batch_size)
        self._optimizer = torch.optim.AdamW(
            adapter.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self._epoch = -1
        self._order: list[int] = []

    def run_step(self) -> float:
        """Do one step and return its loss.

        Raises:
            TrainingError: the loss or its gradient is not finite; the adapter is as it was before.
        """
        generator = torch.Generator().manual_seed(self._random("places", self.step).getrandbits(63))
        options = self.options
        loss = step_loss(
            self.model,
            self.adapter,
            self._batch(),
            options.anchors,
            self._tv_share(),
            generator,
            checkpointing=bool(options.gradient_checkpointing),
        )
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), LARGEST_NORM)
        value = loss.item()
        if not math.isfinite(value) or not norm.isfinite():
            raise TrainingError(
                f"step {self.step + 1}: the loss is {value} and its gradient's norm {norm.item()}; a lower learning "
                "rate may help."
            )
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self._optimizer.step()
        self.step += 1
        return value

    def walk(self) -> Walks:
        """Tokens per step on the held-out texts."""
        return Walks(*(walk(self.model, self.adapter, samples) for samples in self.held_out))

    def state(self) -> dict[str, Tensor]:
        """Everything that `resume` needs, by name; the tensors are not copied."""
        return training_state("adapter", self.adapter, [self._optimizer], self.step)

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another trainer, of the same arguments, was when it gave its `state`.

        Raises:
            KeyError, RuntimeError: it is the state of another adapter.
        """
        self.step = load_training_state("adapter", self.adapter, [self._optimizer], state)

    def _batch(self) -> list[Sample]:
        """The samples of the step: every epoch goes over all of them, in an order of its own."""
        size = self.options.batch_size
        epoch, place = divmod(self.step, len(self.training) // size)
        if epoch != self._epoch:
            count = len(self.training)
            self._epoch, self._order = epoch, self._random("order", epoch).sample(range(count), count)
        return [self.training[i] for i in self._order[place * size : (place + 1) * size]]

    def _random(self, purpose: str, number: int) -> random.Random:
        return random.Random(f"{self.options.seed} {purpose} {number}")

    def _learning_rate(self) -> float:
        return self.options.learning_rate * share_of_rate(self.step, self.options.steps)

    def _tv_share(self) -> float:
        """None of it in the first quarter: where drafts are all wrong, TV has no slope."""
        return self.options.tv_share if self.step >= self.options.steps // 4 else 0.0


def share_of_rate(step: int, steps: int) -> float:
    """The part of the peak learning rate that a step of a whole training has: a short rise, and half a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / WARM_UP) * (FINAL_SHARE + (1 - FINAL_SHARE) * cosine)


def hold_out(samples: Sequence[Sample], batch_size: int) -> tuple[list[Sample], HeldOut]:
    """Part the samples to train on from the last HELD_OUT, or a quarter if that is less.

    Raises:
        ConfigError: either part would be too small.
    """
    split = len(samples) - min(HELD_OUT, len(samples) // 4)
    training, last = list(samples[:split]), samples[split:]
    held_out = HeldOut(
        [s for s in last if s.temperature == 0.0][:HELD_OUT_EACH],
        [s for s in last if s.temperature == SAMPLED_TEMPERATURE][:HELD_OUT_EACH],
    )
    if len(training) < batch_size or not all(held_out):
        raise ConfigError(
            f"{len(samples)} sequences are too few for a batch of {batch_size} and some held out to judge by: raise "
            "sequences or lower batch_size."
        )
    return training, held_out


def step_loss(
    model: CausalLM,
    adapter: S3DAdapter,
    samples: Sequence[Sample],
    anchors: int,
    tv_share: float,
    generator: torch.Generator,
    *,
    checkpointing: bool = False,
) -> Tensor:
    """The loss of one batch, a scalar. All samples are of one length.

    The base's products are only applied and differentiated by their input, so it may be
    quantised in whatever way.

    Args:
        anchors: places drafted from in each sample.
        generator: chooses them; on the CPU.
        checkpointing: see `CausalLM.forward`.
    """
    device = model.model.embed_tokens.weight.device
    tokens = torch.tensor([sample.tokens for sample in samples], device=device)
    return taught_loss(
        model, adapter, teach(model, adapter, tokens), anchors, tv_share, generator, checkpointing=checkpointing
    )


def taught_loss(
    model: CausalLM,
    adapter: S3DAdapter,
    teaching: Teaching,
    anchors: int,
    tv_share: float,
    generator: torch.Generator,
    *,
    checkpointing: bool = False,
) -> Tensor:
    """The loss of `step_loss` behind its teacher pass."""
    tokens, device = teaching.tokens, teaching.tokens.device
    batch, length = tokens.shape
    width = adapter.config.num_speculative_tokens
    # Distinct places, so that no row is computed twice.
    places = torch.rand(batch, length - width, generator=generator).topk(anchors, dim=1).indices.to(device) + 1
    hidden = draft_rows(model, adapter, teaching, places, checkpointing=checkpointing).flatten(0, 1)
    ahead = places[:, :, None] + torch.arange(width, device=device)  # [B, A, G]: row j follows this place
    ids, probs = _teacher_rows(model, teaching.hidden, ahead)
    previous = tokens.gather(1, ahead.flatten(1)).view(-1, width)
    corrected = corrected_rows(model, adapter, hidden, previous).flatten(0, 1)
    rows_at_once = rows_of_vocabulary(model.config.vocab_size)
    loss = draft_loss(model.normalise(corrected), _head(model), ids, probs, tv_share, rows_at_once)
    weights = DEPTH_DECAY ** torch.arange(width, device=device)
    return (loss.view(-1, width) @ weights).mean() / weights.sum()


def _head(model: CausalLM) -> Head:
    return lambda rows: model.cap(model.lm_head(rows))


def _teacher_rows(model: CausalLM, hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """What the teacher says at some places, see `teacher_tops`. hidden [B, T, hidden_size], places [B, ...]."""
    batch, length = hidden.shape[:2]
    of_sequence = torch.arange(batch, device=places.device).view(-1, *[1] * (places.dim() - 1)) * length
    # Drafts overlap: most places are asked for by several anchors.
    rows, inverse = torch.unique(places + of_sequence, return_inverse=True)
    with torch.no_grad():
        normed = model.normalise(hidden.flatten(0, 1)[rows])
        ids, probs = teacher_tops(normed, _head(model), rows_of_vocabulary(model.config.vocab_size))
    return ids[inverse.flatten()], probs[inverse.flatten()]


def corrected_rows(model: CausalLM, adapter: S3DAdapter, hidden: Tensor, previous: Tensor) -> Tensor:
    """Hidden states behind the sequential head, given the token before each row.

    hidden [N, G, hidden_size], previous [N, G] int64.
    """
    if adapter.head is None:
        return hidden
    prepared = adapter.head.prepare(hidden)
    embedded = model.embed(previous)
    state: Tensor | None = None
    rows = []
    for row in range(hidden.shape[1]):
        state = adapter.head.step(prepared[:, row], embedded[:, row], model.embedding_scale, state)
        rows.append(adapter.head.correct(hidden[:, row], state))
    return torch.stack(rows, 1)
