"""Tiny random checkpoints under the published settings of named models, and transformers' own models of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LONGROPE: dict[str, Any] = {"type": "longrope", "short_factor": [], "long_factor": []}
"""Its factors, one for each pair of elements that turns, belong to the width: see `tiny`."""


def plain(architecture: str, model_type: str, **settings: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type, "torch_dtype": "bfloat16", **settings}


def sizes(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def llama(**settings: Any) -> dict[str, Any]:
    return plain(
        "LlamaForCausalLM",
        "llama",
        **{
            "attention_bias": False,
            "hidden_act": "silu",
            "mlp_bias": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "max_position_embeddings": 131072,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "tie_word_embeddings": False,
            **settings,
        },
    )


def mistral(**settings: Any) -> dict[str, Any]:
    own = {"bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "rms_norm_eps": 1e-05}
    own |= {"max_position_embeddings": 32768, "tie_word_embeddings": False}
    return plain("MistralForCausalLM", "mistral", **own, **settings)


def qwen(architecture: str, model_type: str, **settings: Any) -> dict[str, Any]:
    own = {"bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu", "rms_norm_eps": 1e-06}
    own |= {"rope_theta": 1000000.0, "tie_word_embeddings": False, "use_sliding_window": False}
    return plain(architecture, model_type, **own, **settings)


def phi3(**settings: Any) -> dict[str, Any]:
    own = {"hidden_act": "silu", "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "attention_bias": False}
    own |= {"original_max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 32000}
    return plain("Phi3ForCausalLM", "phi3", **{**own, "tie_word_embeddings": False, **settings})


def phi3_mini(**settings: Any) -> dict[str, Any]:
    return phi3(**sizes(32064, 3072, 8192, 32, 32, 32), **settings)


def granite(**settings: Any) -> dict[str, Any]:
    own = {"hidden_act": "silu", "rms_norm_eps": 1e-05, "attention_bias": False, "mlp_bias": False}
    own |= {"rope_theta": 10000000.0, "max_position_embeddings": 131072, "bos_token_id": 0, "eos_token_id": 0}
    return plain("GraniteForCausalLM", "granite", **own, **settings)


GEMMA3 = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window_pattern": 6,
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7B": llama(
        **sizes(32000, 4096, 11008, 32, 32, 32),
        rope_theta=10000.0,
        rope_scaling=None,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "Llama-3.1-8B": llama(
        **sizes(128256, 4096, 14336, 32, 32, 8), rope_scaling=LLAMA3_ROPE, eos_token_id=[128001, 128008, 128009]
    ),
    "Llama-3.2-1B": llama(
        **sizes(128256, 2048, 8192, 16, 32, 8),
        head_dim=64,
        rope_scaling={**LLAMA3_ROPE, "factor": 32.0},
        tie_word_embeddings=True,
    ),
    "Mistral-7B-v0.1": mistral(**sizes(32000, 4096, 14336, 32, 32, 8), sliding_window=4096, rope_theta=10000.0),
    "Mistral-7B-v0.3": mistral(**sizes(32768, 4096, 14336, 32, 32, 8), sliding_window=None, rope_theta=1000000.0),
    "Qwen2.5-7B": qwen(
        "Qwen2ForCausalLM",
        "qwen2",
        **sizes(152064, 3584, 18944, 28, 28, 4),
        max_position_embeddings=32768,
        max_window_layers=28,
        sliding_window=131072,
    ),
    "Qwen2.5-7B with YaRN": qwen(
        "Qwen2ForCausalLM",
        "qwen2",
        **sizes(152064, 3584, 18944, 28, 28, 4),
        max_position_embeddings=32768,
        max_window_layers=28,
        sliding_window=131072,
        rope_scaling=YARN,
    ),
    "Qwen3-8B": qwen(
        "Qwen3ForCausalLM",
        "qwen3",
        **sizes(151936, 4096, 12288, 36, 32, 8),
        head_dim=128,
        attention_bias=False,
        max_position_embeddings=40960,
        max_window_layers=36,
        sliding_window=None,
        rope_scaling=None,
    ),
    "Phi-3-mini-4k": phi3_mini(max_position_embeddings=4096, rope_scaling=None, sliding_window=2047),
    "Phi-3-mini-128k": phi3_mini(max_position_embeddings=131072, rope_scaling=LONGROPE, sliding_window=262144),
    "Phi-4-mini": phi3(
        **sizes(200064, 3072, 8192, 32, 24, 8),
        max_position_embeddings=131072,
        partial_rotary_factor=0.75,
        rope_scaling=LONGROPE,
        sliding_window=262144,
        tie_word_embeddings=True,
        bos_token_id=199999,
        eos_token_id=199999,
    ),
    "Gemma-2-9B": plain(
        "Gemma2ForCausalLM",
        "gemma2",
        **sizes(256000, 3584, 14336, 42, 16, 8),
        attention_bias=False,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        head_dim=256,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        max_position_embeddings=8192,
        query_pre_attn_scalar=256,
        rms_norm_eps=1e-06,
        rope_theta=10000.0,
        sliding_window=4096,
        bos_token_id=2,
        eos_token_id=1,
    ),
    "Gemma-3-1B": plain(
        "Gemma3ForCausalLM",
        "gemma3_text",
        **GEMMA3,
        **sizes(262144, 1152, 6912, 26, 4, 1),
        head_dim=256,
        max_position_embeddings=32768,
        sliding_window=512,
        bos_token_id=2,
        eos_token_id=[1, 106],
    ),
    "Gemma-3-4B": plain(
        "Gemma3ForConditionalGeneration",
        "gemma3",
        text_config={
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        eos_token_id=[1, 106],
        image_token_index=262144,
        vision_config={"model_type": "siglip_vision_model"},
    ),
    "OLMo-2-7B": plain(
        "Olmo2ForCausalLM",
        "olmo2",
        **sizes(100352, 4096, 11008, 32, 32, 32),
        attention_bias=False,
        hidden_act="silu",
        max_position_embeddings=4096,
        rms_norm_eps=1e-06,
        rope_theta=500000,
        tie_word_embeddings=False,
        eos_token_id=100257,
    ),
    "Olmo-3-7B": plain(
        "Olmo3ForCausalLM",
        "olmo3",
        **sizes(100278, 4096, 11008, 32, 32, 32),
        attention_bias=False,
        hidden_act="silu",
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 8,
        max_position_embeddings=65536,
        rms_norm_eps=1e-06,
        rope_scaling={
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        rope_theta=500000,
        sliding_window=4096,
        tie_word_embeddings=False,
        eos_token_id=100257,
    ),
    "SmolLM3-3B": plain(
        "SmolLM3ForCausalLM",
        "smollm3",
        **sizes(128256, 2048, 11008, 36, 16, 4),
        attention_bias=False,
        hidden_act="silu",
        max_position_embeddings=65536,
        mlp_bias=False,
        no_rope_layer_interval=4,
        no_rope_layers=[1, 1, 1, 0] * 9,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=5000000.0,
        use_sliding_window=False,
        bos_token_id=128000,
        eos_token_id=128012,
    ),
    "Granite-3.3-2B": granite(
        **sizes(49159, 2048, 8192, 40, 32, 8),
        attention_multiplier=0.015625,
        embedding_multiplier=12.0,
        logits_scaling=8.0,
        residual_multiplier=0.22,
        tie_word_embeddings=True,
    ),
    "EXAONE-4.0-32B": plain(
        "Exaone4ForCausalLM",
        "exaone4",
        **sizes(102400, 5120, 27392, 64, 40, 8),
        head_dim=128,
        hidden_act="silu",
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 16,
        max_position_embeddings=131072,
        rms_norm_eps=1e-05,
        rope_scaling={**LLAMA3_ROPE, "factor": 16.0},
        rope_theta=1000000,
        sliding_window=4096,
        sliding_window_pattern="LLLG",
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=361,
    ),
    "CWM": plain(
        "CwmForCausalLM",
        "cwm",
        **sizes(128256, 6144, 21504, 64, 48, 8),
        head_dim=128,
        hidden_act="silu",
        max_position_embeddings=131072,
        rms_norm_eps=1e-05,
        rope_theta=1000000.0,
        rope_scaling={**LLAMA3_ROPE, "factor": 16.0},
        sliding_window=8192,
        tie_word_embeddings=False,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
    ),
    "Seed-OSS-36B": plain(
        "SeedOssForCausalLM",
        "seed_oss",
        **sizes(155136, 5120, 27648, 64, 80, 8),
        attention_bias=True,
        attention_out_bias=False,
        head_dim=128,
        hidden_act="silu",
        max_position_embeddings=524288,
        mlp_bias=False,
        rms_norm_eps=1e-06,
        rope_theta=10000000.0,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=2,
    ),
    "Ministral": plain(
        "MinistralForCausalLM",
        "ministral",
        **sizes(131072, 4096, 12288, 36, 32, 8),
        head_dim=128,
        hidden_act="silu",
        layer_types=(["full_attention"] + ["sliding_attention"] * 3) * 9,
        max_position_embeddings=32768,
        rms_norm_eps=1e-05,
        rope_theta=100000000.0,
        sliding_window=32768,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
"""config.json as published, by model, less what nobody reads. Of the last, the pattern of its layers is ours."""

WINDOW = 24
"""Instead of the published one, so that short texts outgrow it."""
VOCABULARY = 97
EOS = 2


def tiny(name: str, *, window: int | None = WINDOW, **changes: Any) -> dict[str, Any]:
    """The settings of a published model in small widths, with `changes`. A window of None leaves the published one."""
    raw = json.loads(json.dumps(PUBLISHED[name]))
    text = raw.get("text_config", raw)
    grouped = text.get("num_key_value_heads", 0) != text.get("num_attention_heads", 1)
    layers = 6 if "Gemma-3" in name else 4
    text |= sizes(VOCABULARY, 64, 96, layers, 4, 2 if grouped else 4)
    text["head_dim"] = 16
    for key in ("layer_types", "no_rope_layers"):
        if key in text:
            text[key] = text[key][:layers]
    if "Gemma" in name:
        text["query_pre_attn_scalar"] = 4  # a width, too; scores must be large enough for a softcap to show
    if window is not None and text.get("sliding_window"):
        text["sliding_window"] = window
    if (text.get("rope_scaling") or {}).get("type") == "longrope":
        turning = int(16 * text.get("partial_rotary_factor", 1.0)) // 2
        text["rope_scaling"] |= {
            "short_factor": [1.0 + 0.05 * i for i in range(turning)],
            "long_factor": [1.07 + 4.0 * i for i in range(turning)],
        }
    text |= {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0, **changes}
    return {**raw, "torch_dtype": "float32"}


def write_family(folder: Path, raw: dict[str, Any]) -> PreTrainedModel:
    """A random checkpoint of this configuration, and transformers' own model of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        getattr(config, "text_config", config), attn_implementation="eager"
    )
    shifted = "Gemma" in raw["architectures"][0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Wide enough that logits differ clearly and the text does not settle into a loop at once.
            mean, deviation = (0.0 if shifted else 1.0, 0.2) if name.endswith("norm.weight") else (0.0, 0.2)
            parameter.copy_(torch.randn_like(parameter) * deviation + mean)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    if "text_config" in raw:
        state = {f"language_model.{name}": tensor for name, tensor in state.items()}
        state["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(4)
        state["multi_modal_projector.mm_soft_emb_norm.weight"] = torch.ones(4)
    save_file(state, folder / "model.safetensors")
    model.eval()  # type: ignore[no-untyped-call]
    return model
