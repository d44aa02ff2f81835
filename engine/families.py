"""The architectures that the one decoder covers, and how each tells its settings.

A family is no code of its own: it is a reading of config.json, and what it says beyond a
Llama goes into `ModelConfig`. What a family only stores in another way is brought into the
decoder's form while the weights are read (`parameters`): fused projections are parted, norms
that are kept as weight - 1 made whole, and the elements of a head that the rotary embedding
leaves alone are placed so that the rotation of all elements turns them by nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from skippy.engine.shape import ModelConfig

Raw = Mapping[str, Any]
"""config.json, as transformers 4 or 5 writes it."""

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
WITH_ORIGINAL_LENGTH = ("llama3", "yarn", "longrope")

SANDWICHED = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
BEHIND = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")

GEMMA3_DEFAULTS: Raw = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "rope_theta": 1000000.0,
    "sliding_window": 4096,
}
"""What the configurations of the larger models leave out."""

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
MULTIMODAL_PREFIXES = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.": ""}
MULTIMODAL_PARTS = ("vision_tower", "multi_modal_projector")


def architecture(raw: Raw) -> str:
    """The first that the configuration names, or "?"."""
    names = raw.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "?"


def parse_config(raw: Raw) -> ModelConfig:
    """config.json of a supported architecture to a ModelConfig.

    Raises:
        KeyError: the architecture is not supported, or a size is missing.
        TypeError, ValueError: a setting is not supported or of no use.
    """
    read, defaults = FAMILIES[architecture(raw)]
    raw = {**defaults, **text_config(raw)}
    config = read(raw, _plain(raw))
    if config.num_key_value_heads < 1 or config.head_dim < 2 or config.head_dim % 2:
        raise ValueError(f"num_key_value_heads is {config.num_key_value_heads}, head_dim is {config.head_dim}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError("num_attention_heads is not a multiple of num_key_value_heads")
    if config.sliding_window is not None and config.sliding_window < 1:
        raise ValueError(f"sliding_window is {config.sliding_window}")
    if not 2 <= config.rotary_dim <= config.head_dim or config.rotary_dim % 2:
        raise ValueError(f"the rotary embedding turns {config.rotary_dim} elements of {config.head_dim}")
    return config


def text_config(raw: Raw) -> Raw:
    """What a configuration says of the language model: of a multimodal one, the part for text."""
    return {**raw, **raw["text_config"]} if isinstance(raw.get("text_config"), dict) else raw


def _plain(raw: Raw) -> ModelConfig:
    """What all families say alike, with Llama's defaults."""
    for name in SIZES:
        if int(raw[name]) < 1:
            raise ValueError(f"{name} is {raw[name]}")
    activation = raw.get("hidden_activation") or raw.get("hidden_act") or "silu"
    if activation not in ACTIVATIONS:
        raise ValueError(f"hidden_act {activation!r} is not supported")
    given = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope, local = _rope(raw, given.get("full_attention") or given), given.get("sliding_attention")
    longest = int(raw["max_position_embeddings"])
    if rope["rope_type"] == "yarn" and rope.get("factor"):  # some tell the length before, some the length behind it
        longest = max(longest, int(rope["factor"] * rope["original_max_position_embeddings"]))
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_hidden_layers=int(raw["num_hidden_layers"]),
        num_attention_heads=int(raw["num_attention_heads"]),
        num_key_value_heads=int(raw.get("num_key_value_heads") or raw["num_attention_heads"]),
        head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // int(raw["num_attention_heads"])),
        max_position_embeddings=longest,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        rope_parameters=rope,
        local_rope_parameters=_rope(raw, local) if local else None,
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        activation=ACTIVATIONS[activation],
    )


def _rope(raw: Raw, given: Raw) -> dict[str, Any]:
    """One rotary embedding, in the terms of transformers 5."""
    given = dict(given)
    rope = {key: value for key, value in given.items() if key != "type" and value is not None}
    rope.setdefault("rope_type", given.get("type") or "default")
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    share = rope.pop("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if share not in (None, 1.0):
        rope["partial_rotary_factor"] = share
    if rope["rope_type"] == "su":  # an early name
        rope["rope_type"] = "longrope"
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(f"rope_type {rope['rope_type']!r} is not supported")
    if rope["rope_type"] in WITH_ORIGINAL_LENGTH:
        rope.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
        if raw.get("original_max_position_embeddings"):
            rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    return rope


def _windowed(raw: Raw, config: ModelConfig, slides: Iterable[bool]) -> ModelConfig:
    """With the window on the layers of `layer_types`, or those that `slides` tells if there is no such list."""
    kinds = raw.get("layer_types") or ["sliding_attention" if slide else "full_attention" for slide in slides]
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise ValueError(f"layer type {kind!r} is not supported")
    if len(kinds) < config.num_hidden_layers:
        raise ValueError(f"layer_types names {len(kinds)} of {config.num_hidden_layers} layers")
    if not raw.get("sliding_window"):
        return config
    sliding = frozenset(i for i in _layers(config) if kinds[i] == "sliding_attention")
    return replace(config, sliding_window=int(raw["sliding_window"]), sliding_layers=sliding)


def _layers(config: ModelConfig) -> range:
    return range(config.num_hidden_layers)


def _llama(raw: Raw, config: ModelConfig) -> ModelConfig:
    del raw
    return config


def _mistral(raw: Raw, config: ModelConfig) -> ModelConfig:
    return _windowed({**raw, "layer_types": None}, config, [True] * config.num_hidden_layers)


def _ministral(raw: Raw, config: ModelConfig) -> ModelConfig:
    return _windowed(raw, config, [True] * config.num_hidden_layers)


def _cwm(raw: Raw, config: ModelConfig) -> ModelConfig:
    return _windowed(raw, config, [layer % 4 != 0 for layer in _layers(config)])


def _seed_oss(raw: Raw, config: ModelConfig) -> ModelConfig:
    return replace(config, attention_out_bias=bool(raw.get("attention_out_bias", False)))


def _qwen2(raw: Raw, config: ModelConfig) -> ModelConfig:
    return _upper_layers_windowed(raw, replace(config, attention_bias=True, attention_out_bias=False))


def _qwen3(raw: Raw, config: ModelConfig) -> ModelConfig:
    return _upper_layers_windowed(raw, replace(config, qk_norm="head"))


def _upper_layers_windowed(raw: Raw, config: ModelConfig) -> ModelConfig:
    if not raw.get("use_sliding_window"):
        return config
    return _windowed(raw, config, [layer >= int(raw.get("max_window_layers", 28)) for layer in _layers(config)])


def _phi3(raw: Raw, config: ModelConfig) -> ModelConfig:
    if config.rope_parameters["rope_type"] == "yarn":  # so called in early configurations
        config = replace(config, rope_parameters={**config.rope_parameters, "rope_type": "longrope"})
    return _windowed({**raw, "layer_types": None}, config, [True] * config.num_hidden_layers)


def _gemma2(raw: Raw, config: ModelConfig) -> ModelConfig:
    if raw.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention is not supported")
    config = replace(
        config,
        norm_names=SANDWICHED,
        norm_offset=1.0,
        query_scale=1.0 / math.sqrt(raw["query_pre_attn_scalar"]),
        attention_softcap=_softcap(raw, "attn_logit_softcapping"),
        logit_softcap=_softcap(raw, "final_logit_softcapping"),
        embedding_multiplier=math.sqrt(config.hidden_size),
    )
    return _windowed(raw, config, [layer % 2 == 0 for layer in _layers(config)])


def _softcap(raw: Raw, name: str) -> float | None:
    if raw.get(name) is None:
        return None
    if not float(raw[name]) > 0.0:
        raise ValueError(f"{name} is {raw[name]}")
    return float(raw[name])


def _gemma3(raw: Raw, config: ModelConfig) -> ModelConfig:
    pattern = int(raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6)
    config = replace(_gemma2(raw, config), qk_norm="head", sliding_layers=frozenset())
    config = _windowed(raw, config, [(layer + 1) % pattern != 0 for layer in _layers(config)])
    return _with_local_rope(config, raw.get("rope_local_base_freq", 10000.0))


def _with_local_rope(config: ModelConfig, theta: float) -> ModelConfig:
    """With a plain rotary embedding on the layers with a window, unless they have one already."""
    plain = {"rope_type": "default", "rope_theta": theta}
    return replace(config, local_rope_parameters=config.local_rope_parameters or plain)


def _olmo2(raw: Raw, config: ModelConfig) -> ModelConfig:
    del raw
    return replace(config, norm_names=BEHIND, qk_norm="all")


def _olmo3(raw: Raw, config: ModelConfig) -> ModelConfig:
    config = _windowed(raw, _olmo2(raw, config), [(layer + 1) % 4 != 0 for layer in _layers(config)])
    # The window's layers keep the embedding of before the context was lengthened.
    return _with_local_rope(config, config.rope_parameters["rope_theta"])


def _smollm3(raw: Raw, config: ModelConfig) -> ModelConfig:
    interval = int(raw.get("no_rope_layer_interval", 4))
    turns = list(raw.get("no_rope_layers") or [(layer + 1) % interval for layer in _layers(config)])
    if len(turns) < config.num_hidden_layers:
        raise ValueError(f"no_rope_layers names {len(turns)} of {config.num_hidden_layers} layers")
    nope = frozenset(layer for layer in _layers(config) if not turns[layer])
    config = replace(config, nope_layers=nope)
    return _windowed(raw, config, [not turn for turn in turns]) if raw.get("use_sliding_window") else config


def _exaone4(raw: Raw, config: ModelConfig) -> ModelConfig:
    pattern = raw.get("sliding_window_pattern") or 4
    if not raw.get("layer_types") and not isinstance(pattern, int):
        raise ValueError(f"sliding_window_pattern {pattern!r} without layer_types is not supported")
    slides = [] if raw.get("layer_types") else [(layer + 1) % pattern != 0 for layer in _layers(config)]
    config = _windowed(raw, replace(config, norm_names=BEHIND, qk_norm="head"), slides)
    # Where only some layers have a window, the others have no rotary embedding.
    nope = frozenset(_layers(config)) - config.sliding_layers
    return replace(config, nope_layers=nope) if config.sliding_window else config


def _granite(raw: Raw, config: ModelConfig) -> ModelConfig:
    return replace(
        config,
        query_scale=float(raw.get("attention_multiplier", 1.0)),
        embedding_multiplier=float(raw.get("embedding_multiplier", 1.0)),
        residual_multiplier=float(raw.get("residual_multiplier", 1.0)),
        logit_scale=1.0 / float(raw.get("logits_scaling", 1.0)),
    )


Read = Callable[[Raw, ModelConfig], ModelConfig]
_TIED: Raw = {"tie_word_embeddings": True}

FAMILIES: Mapping[str, tuple[Read, Raw]] = {
    "LlamaForCausalLM": (_llama, {}),
    "MistralForCausalLM": (_mistral, {}),
    "MinistralForCausalLM": (_ministral, {}),
    "Qwen2ForCausalLM": (_qwen2, {}),
    "Qwen3ForCausalLM": (_qwen3, {"head_dim": 128}),
    "Phi3ForCausalLM": (_phi3, {}),
    "Gemma2ForCausalLM": (_gemma2, {**_TIED, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}),
    "Gemma3ForCausalLM": (_gemma3, {**_TIED, **GEMMA3_DEFAULTS}),
    "Gemma3ForConditionalGeneration": (_gemma3, {**_TIED, **GEMMA3_DEFAULTS}),
    "Olmo2ForCausalLM": (_olmo2, {}),
    "Olmo3ForCausalLM": (_olmo3, {}),
    "SmolLM3ForCausalLM": (_smollm3, {**_TIED, "rope_theta": 2000000.0}),
    "GraniteForCausalLM": (_granite, {}),
    "Exaone4ForCausalLM": (_exaone4, {}),
    "CwmForCausalLM": (_cwm, {}),
    "SeedOssForCausalLM": (_seed_oss, {}),
}
"""By architecture, how to read it and what to take where config.json is silent."""


def parameter_names(stored: str) -> tuple[str, ...]:
    """The decoder's parameters that a tensor of a weight file holds; none for the parts of a multimodal model."""
    for prefix, ours in MULTIMODAL_PREFIXES.items():
        if stored.startswith(prefix):
            stored = ours + stored.removeprefix(prefix)
    if stored.removeprefix("model.").startswith(MULTIMODAL_PARTS):
        return ()
    module, _, kind = stored.rpartition(".")
    parent, _, projection = module.rpartition(".")
    return tuple(f"{parent}.{part}.{kind}" for part in FUSED[projection]) if projection in FUSED else (stored,)


def parameters(stored: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """What a tensor of a weight file is in the decoder: names and values, in the form that it computes with.

    The function that a layer computes stays the same. A tensor of another shape than `config`
    implies comes out as it is, for the caller to refuse.
    """
    names = parameter_names(stored)
    parts: Sequence[Tensor] = [tensor] * len(names)
    if len(names) > 1:
        kv = config.num_key_value_heads * config.head_dim
        of_qkv = [config.num_attention_heads * config.head_dim, kv, kv]
        sizes = of_qkv if len(names) == 3 else [config.intermediate_size] * 2
        if len(tensor) == sum(sizes):
            parts = torch.split(tensor, sizes)
    for name, part in zip(names, parts, strict=True):
        yield name, _arranged(name, part, config)


def _arranged(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """In the order that the decoder wants heads and the elements of a head in, norms whole."""
    if name.endswith("norm.weight") and config.norm_offset:
        # As Gemma adds it: in float32, and kept so, because a sum near 1 would lose digits.
        tensor = tensor.float() + config.norm_offset
    module = name.split(".")[-2] if "." in name else ""
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(module[:1], 0)
    if module in ("q_proj", "k_proj") or (module in ("q_norm", "k_norm") and config.qk_norm == "all"):
        if len(tensor) != heads * config.head_dim:
            return tensor
        split = _rotary_order(tensor.view(heads, config.head_dim, *tensor.shape[1:]), config)
        return (split[_head_order(config, tensor)] if module[:1] == "q" else split).flatten(0, 1)
    if module in ("q_norm", "k_norm") and len(tensor) == config.head_dim:
        return _rotary_order(tensor[None], config)[0]
    if module == "o_proj" and tensor.dim() == 2 and tensor.shape[1] == config.num_attention_heads * config.head_dim:
        split = tensor.view(len(tensor), config.num_attention_heads, -1)
        return split[:, _head_order(config, tensor)].flatten(1)
    return tensor


def _head_order(config: ModelConfig, like: Tensor) -> Tensor:
    """Query heads from h // group == KV head to h % num_kv_heads == KV head.

    So the query heads of one KV head can be read as rows of one product without a copy.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return torch.arange(heads, device=like.device).view(kv_heads, heads // kv_heads).t().flatten()


def _rotary_order(heads: Tensor, config: ModelConfig) -> Tensor:
    """heads [H, head_dim, ...] with the elements that are turned at the front of both halves of a head.

    Element i is then turned with element i + head_dim / 2 whatever share of them is turned.
    """
    dim, turned = config.head_dim, config.rotary_dim
    if turned == dim:
        return heads
    elements = torch.arange(dim, device=heads.device)
    first, second = elements[:turned].chunk(2)
    rest, other = elements[turned:].chunk(2)
    return heads[:, torch.cat((first, rest, second, other))]
