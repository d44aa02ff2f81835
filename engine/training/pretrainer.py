"""The training of a small language model, step by step."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from skippy.engine.errors import ConfigError, TrainingError
from skippy.engine.training.files import load_training_state, training_state
from skippy.engine.training.repetition import (
    CONTINUED,
    KIND,
    LONGEST_OPENING,
    RUN,
    SEQUENCES,
    SHORTEST_OPENING,
    continued,
    ended_early,
    repeated,
    unlikelihood,
)
from skippy.engine.training.spans import Spans

ADAM_BETAS = (0.9, 0.95)
WARM_UP = 40
FINAL_SHARE = 0.03
"""Of the learning rate: where the decay ends."""


@dataclass(frozen=True, slots=True)
class PretrainOptions:
    """How a model is pretrained.

    Attributes:
        layers: of the model; None for as many as there are to begin with.
        from_scratch: begin with random weights instead of those of the checkpoint.
        steps, decay: steps in all, and those of them, at the end, over which the learning rate falls.
        batch_size, micro_batch_size: sequences per step, and those of them that are computed together.
        length: tokens of a sequence.
        muon, adam: learning rates, of the matrices of the layers (Muon) and of everything else (AdamW).
        python_share: what part of the sequences is Python.
        unlikelihood: weight of the loss against repetition in stories (see `repetition`); 0 for none.
        evaluate_every, held_out: steps between evaluations, and spans of each kind that they look at.

    Raises:
        ConfigError: a value is out of range.
    """

    layers: int | None = None
    from_scratch: bool = False
    steps: int = 2000
    decay: int = 600
    batch_size: int = 24
    micro_batch_size: int = 8
    length: int = 512
    muon: float = 0.01
    adam: float = 1e-3
    python_share: float = 0.6
    unlikelihood: float = 0.0
    evaluate_every: int = 200
    held_out: int = 128
    seed: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size", "evaluate_every", "held_out"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.decay <= self.steps:
            raise ConfigError(f"decay must be between 0 and the {self.steps} steps, got {self.decay}.")
        if self.length < 8:
            raise ConfigError(f"length must be at least 8, got {self.length}.")
        if not 0.0 < self.muon < math.inf or not 0.0 < self.adam < math.inf:
            raise ConfigError(f"the learning rates must be above 0, got {self.muon} and {self.adam}.")
        if not 0.0 <= self.python_share <= 1.0:
            raise ConfigError(f"python_share must be between 0 and 1, got {self.python_share}.")
        if not 0.0 <= self.unlikelihood < math.inf:
            raise ConfigError(f"unlikelihood must be at least 0, got {self.unlikelihood}.")
        if self.unlikelihood and self.python_share == 1.0:
            raise ConfigError("unlikelihood must be 0 where python_share is 1: it is of stories.")


def learning_rate_share(step: int, steps: int, decay: int) -> float:
    """What part of the full learning rate a step has: up, constant, and down over the last `decay` steps."""
    down = min(1.0, (steps - step) / decay) if decay else 1.0
    return min(1.0, (step + 1) / WARM_UP) * (FINAL_SHARE + (1 - FINAL_SHARE) * down)


class Pretrainer:
    """Trains a model on spans. A step depends on the weights, the optimizers' state, the options and its own
    number, and on nothing else: a training that is interrupted goes on as if it had not been.

    Attributes:
        step: how many steps are done.
    """

    def __init__(self, model: LlamaForCausalLM, spans: Spans, options: PretrainOptions) -> None:
        self.model, self.step = model.train(), 0
        self._spans, self._options = spans, options
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self._optimizers: tuple[tuple[torch.optim.Optimizer, float], ...] = (
            (torch.optim.Muon(matrices, lr=options.muon, weight_decay=0.0), options.muon),
            (torch.optim.AdamW(others, lr=options.adam, betas=ADAM_BETAS, weight_decay=0.0), options.adam),
        )
        self._loss = torch.compile(self._loss_of, dynamic=False) if options.compile else self._loss_of

    def run_step(self) -> float:
        """Do one step and return its loss, in nats per token, that against repetition included.

        Raises:
            TrainingError: the loss is not finite; the model is as it was before.
        """
        options, device = self._options, self.model.device
        share = learning_rate_share(self.step, options.steps, options.decay)
        total = torch.zeros((), device=device)
        batch = self._spans.batch(self.step, options.batch_size).to(device)
        for spans in torch.split(batch, options.micro_batch_size):
            loss = self._loss(spans) * (len(spans) / options.batch_size)
            torch.autograd.backward(loss)
            total += loss.detach()
        if options.unlikelihood:
            loss = options.unlikelihood * self._repetition_loss()
            torch.autograd.backward(loss)
            total += loss.detach()
        value = total.item()
        if not math.isfinite(value):
            raise TrainingError(f"step {self.step + 1}: the loss is {value}; lower learning rates may help.")
        for optimizer, rate in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return value

    def _repetition_loss(self) -> Tensor:
        """Over what the model itself writes behind some openings."""
        length = random.Random(self.step).randint(SHORTEST_OPENING, LONGEST_OPENING)
        openings = self._spans.openings(KIND, self.step, SEQUENCES, length)
        tokens = continued(self.model, openings.to(self.model.device), CONTINUED)
        written, end = tokens[:, -CONTINUED:], self.model.config.eos_token_id
        return unlikelihood(self.model, tokens, repeated(written, RUN, end) | ended_early(written, end))

    @torch.no_grad()
    def bits_per_byte(self, spans: Tensor, token_bytes: Tensor) -> float:
        """What the model needs on average to tell the bytes of spans.

        Args:
            spans: int64 [N, length + 1]; all tokens but the first of each are predicted.
            token_bytes: int64 [V], how many bytes a token stands for.
        """
        self.model.eval()
        nats = sum(
            (self._loss_of(part.to(self.model.device)) * part[:, 1:].numel()).item()
            for part in torch.split(spans, self._options.micro_batch_size)
        )
        self.model.train()
        return nats / math.log(2) / int(token_bytes[spans[:, 1:]].sum())

    def _loss_of(self, spans: Tensor) -> Tensor:
        """Mean over the tokens of spans [B, L + 1]."""
        with torch.autocast(spans.device.type, torch.bfloat16):
            hidden = self.model.model(input_ids=spans[:, :-1], use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden)
        return F.cross_entropy(logits.float().flatten(0, 1), spans[:, 1:].flatten())

    def state(self) -> dict[str, Tensor]:
        """Everything that `resume` needs, by name; the tensors are not copied."""
        return training_state("model", self.model, self._torch_optimizers, self.step)

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another trainer, of a model of the same shape, was when it gave its `state`.

        Raises:
            KeyError, RuntimeError: it is the state of another model.
        """
        self.step = load_training_state("model", self.model, self._torch_optimizers, state)

    @property
    def _torch_optimizers(self) -> list[torch.optim.Optimizer]:
        return [optimizer for optimizer, _ in self._optimizers]
