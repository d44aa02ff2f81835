"""The naive oracle: what the engine must emit, computed in the plainest way.

No cache, no batch, no draft, no packing except of a model that is quantised: every token
costs a pass over all that precedes it. Only the definition of the noise is shared with the
fast path. It is slow, and meant for tests and for reading.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from skippy.engine.model import CausalLM
from skippy.engine.sampling import SamplingState, exponential, fold, noise_bits
from skippy.engine.shape import ModelConfig, full_plan
from skippy.engine.tensors import TokenBatch
from skippy.engine.types import SamplingParams


class _DenseAttention:
    """Causal attention over the rows of one pass, which hold one whole sequence."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def __call__(self, layer: int, queries: Tensor, keys_values: Tensor) -> Tensor:
        config = self._config
        q = queries.transpose(0, 1)
        k, v = keys_values.transpose(0, 1).chunk(2)
        group = len(q) // len(k)
        k, v = k.repeat(group, 1, 1), v.repeat(group, 1, 1)
        scores = q @ k.transpose(1, 2) * config.attention_scale
        if config.attention_softcap is not None:
            scores = (scores / config.attention_softcap).tanh() * config.attention_softcap
        ahead = torch.arange(len(queries)) - torch.arange(len(queries))[:, None]
        seen = (ahead <= 0) & (ahead > -(config.windows[layer] or math.inf))
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return (weights @ v).transpose(0, 1).reshape(len(queries), -1)


@torch.inference_mode()
def reference_logits(model: CausalLM, tokens: Sequence[int]) -> Tensor:
    """Logits of every position, [len(tokens), vocabulary] float32. Only a quantised model is packed."""
    count = len(tokens)
    batch = TokenBatch(
        token_ids=torch.tensor(tokens),
        positions=torch.arange(count),
        slots=torch.arange(count),
        segments=[],
        logit_rows=torch.arange(count),
    )
    hidden, _ = model(batch, full_plan(model.config), _DenseAttention(model.config))
    return model.logits(hidden)


def reference_choice(
    logits: Tensor, params: SamplingParams, prompt_len: int, tokens: Sequence[int], ends: Collection[int], key: int
) -> tuple[int, float]:
    """The token that follows `tokens`, and by how much it won (in logits, noise included). logits [V]."""
    x = logits.double().clone()
    output = list(tokens[prompt_len:])
    for token in set(tokens):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= output.count(token) * params.frequency_penalty + params.presence_penalty
    for token, bias in params.logit_bias.items():
        x[token] += bias
    if len(output) < params.min_tokens:
        x[list(ends)] = -math.inf
    if not params.greedy:
        x = _truncate((x / params.temperature).log_softmax(-1), params)
        ids = torch.arange(len(x), dtype=torch.int32)
        x = x - exponential(noise_bits(torch.tensor(fold(key), dtype=torch.int32), ids)).log()
    first, second = x.topk(2).values.tolist()
    return int(x.argmax()), first - second


def _truncate(logp: Tensor, params: SamplingParams) -> Tensor:
    order = logp.argsort(descending=True, stable=True)
    if params.top_k:
        logp[order[params.top_k :]] = -math.inf
    mass_before, total = 0.0, float(logp.exp().sum())
    for token in order.tolist():
        if mass_before >= params.top_p * total:
            logp[token] = -math.inf
        mass_before += math.exp(logp[token])
    if params.min_p:
        logp[logp < logp.max() + math.log(params.min_p)] = -math.inf
    return logp


def reference_generate(
    model: CausalLM, prompt: Sequence[int], params: SamplingParams, eos_ids: Collection[int], choice: int = 0
) -> tuple[list[int], list[float]]:
    """The tokens that follow `prompt`, and the margin by which each was chosen."""
    assert params.seed is not None
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_ids))
    # Only its key is used: the logits are altered above, in a way of its own.
    state = SamplingState(params, prompt, params.seed, choice, (), model.config.vocab_size, torch.device("cpu"))
    tokens, margins = list(prompt), []
    while len(tokens) < len(prompt) + params.max_tokens:
        logits = reference_logits(model, tokens)[-1]
        token, margin = reference_choice(logits, params, len(prompt), tokens, ends, state.key(len(tokens)))
        tokens.append(token)
        margins.append(margin)
        if token in ends:
            break
    return tokens[len(prompt) :], margins
