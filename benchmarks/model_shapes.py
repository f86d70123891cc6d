"""Configurations with the layer shapes of public models, for engines with dummy weights."""

import copy
import json
from pathlib import Path
from typing import Any

FP8_BLOCK = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

LLAMA_31_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def _qwen3_fp8() -> dict[str, Any]:
    gates = [f"model.layers.{layer}.mlp.gate" for layer in range(QWEN3_30B_A3B["num_hidden_layers"])]
    return {**QWEN3_30B_A3B, "quantization_config": {**FP8_BLOCK, "modules_to_not_convert": ["lm_head", *gates]}}


MODEL_SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b-bf16": QWEN3_30B_A3B,
    "qwen3-30b-a3b-fp8": _qwen3_fp8(),
    "llama-3.1-8b-bf16": LLAMA_31_8B,
    "llama-3.1-8b-fp8-block": {
        **LLAMA_31_8B,
        "quantization_config": {**FP8_BLOCK, "modules_to_not_convert": ["lm_head"]},
    },
    "llama-3.1-8b-fp8": {
        **LLAMA_31_8B,
        "quantization_config": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    },
}


def write_model(name: str, directory: Path, num_layers: int | None = None) -> Path:
    """Write the configuration of MODEL_SHAPES[name], cut to num_layers where given, and return its folder."""
    config = copy.deepcopy(MODEL_SHAPES[name])
    if num_layers is not None:
        config["num_hidden_layers"] = num_layers
    path = directory / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    return path
