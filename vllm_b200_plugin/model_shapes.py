"""Configurations with the layer shapes of public models: for explain, and for engines with dummy weights."""

from typing import Any

FP8_BLOCK = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
FP8_TENSOR = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

QWEN3_30B_A3B: dict[str, Any] = {
    **_COMMON,
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
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

QWEN3_235B_A22B: dict[str, Any] = {
    **QWEN3_30B_A3B,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
}

TINY_QWEN3_MOE: dict[str, Any] = {
    **QWEN3_30B_A3B,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

LLAMA_31_8B: dict[str, Any] = {
    **_COMMON,
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
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}

LLAMA_31_70B: dict[str, Any] = {
    **LLAMA_31_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}

MISTRAL_MEDIUM: dict[str, Any] = {
    **_COMMON,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 12288,
    "intermediate_size": 28672,
    "num_hidden_layers": 88,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131072,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "rms_norm_eps": 1e-5,
}

# One of eight tensor-parallel ranks of the above.
MISTRAL_MEDIUM_TP8: dict[str, Any] = {
    **MISTRAL_MEDIUM,
    "intermediate_size": 3584,
    "num_attention_heads": 12,
    "num_key_value_heads": 1,
    "vocab_size": 16384,
}

DEEPSEEK_V3: dict[str, Any] = {
    **_COMMON,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "rms_norm_eps": 1e-6,
}

DEEPSEEK_V32: dict[str, Any] = {
    **DEEPSEEK_V3,
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
}

KIMI_K2: dict[str, Any] = {
    **DEEPSEEK_V3,
    "model_type": "kimi_k2",
    "first_k_dense_replace": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "vocab_size": 163840,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        **DEEPSEEK_V3["rope_parameters"],
        "rope_theta": 50000.0,
        "factor": 32.0,
        "beta_fast": 1.0,
    },
}

GLM_45: dict[str, Any] = {
    **_COMMON,
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 92,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 3,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": True,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "vocab_size": 151552,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default", "partial_rotary_factor": 0.5},
    "rms_norm_eps": 1e-5,
}

GPT_OSS_120B: dict[str, Any] = {
    **_COMMON,
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "attention_bias": True,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "rms_norm_eps": 1e-5,
}

MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def _fp8_channel() -> dict[str, Any]:
    """compressed-tensors: a scale for each output channel, one for each token, found as it comes."""
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**fp8, "strategy": "channel", "dynamic": False},
        "input_activations": {**fp8, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", r"re:.*\.mlp\.gate$"],
        "config_groups": {"group_0": group},
    }


def _int8() -> dict[str, Any]:
    """compressed-tensors W8A8: a scale for each output channel, one for each token, found as it comes."""
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**int8, "strategy": "channel", "dynamic": False},
        "input_activations": {**int8, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def _nvfp4(*ignore: str) -> dict[str, Any]:
    """ModelOpt NVFP4, groups of 16, as config.json has it; `ignore`: patterns of modules that stay in bf16."""
    values = {"num_bits": 4, "type": "float", "dynamic": False, "group_size": 16}
    return {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": values, "input_activations": values}},
        "ignore": ["lm_head", *ignore],
    }


def _ct_nvfp4(*ignore: str) -> dict[str, Any]:
    """The same as compressed-tensors writes it."""
    values = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    group = {
        "targets": ["Linear"],
        "weights": {**values, "dynamic": False},
        "input_activations": {**values, "dynamic": "local"},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *ignore],
        "config_groups": {"group_0": group},
    }


def _fp8_block(config: dict[str, Any]) -> dict[str, Any]:
    """`config` in FP8 with blocks of 128x128, its routers and its lm_head in bf16."""
    moe = any("experts" in key for key in config)
    gates = [f"model.layers.{layer}.mlp.gate" for layer in range(config["num_hidden_layers"]) if moe]
    return {**config, "quantization_config": {**FP8_BLOCK, "modules_to_not_convert": ["lm_head", *gates]}}


MODEL_SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b-bf16": QWEN3_30B_A3B,
    "qwen3-30b-a3b-fp8": _fp8_block(QWEN3_30B_A3B),
    "qwen3-30b-a3b-nvfp4": {**QWEN3_30B_A3B, "quantization_config": _nvfp4("model.layers.*.mlp.gate")},
    "qwen3-30b-a3b-ct-nvfp4": {**QWEN3_30B_A3B, "quantization_config": _ct_nvfp4("re:.*mlp.gate$")},
    "qwen3-235b-a22b-fp8": _fp8_block(QWEN3_235B_A22B),
    "llama-3.1-8b-bf16": LLAMA_31_8B,
    "llama-3.1-8b-fp8-block": _fp8_block(LLAMA_31_8B),
    "llama-3.1-8b-fp8": {**LLAMA_31_8B, "quantization_config": FP8_TENSOR},
    "llama-3.1-8b-int8": {**LLAMA_31_8B, "quantization_config": _int8()},
    "llama-3.1-70b-fp8": {**LLAMA_31_70B, "quantization_config": FP8_TENSOR},
    "mistral-medium-fp8": {**MISTRAL_MEDIUM, "quantization_config": FP8_TENSOR},
    "mistral-medium-tp8-fp8": {**MISTRAL_MEDIUM_TP8, "quantization_config": FP8_TENSOR},
    "deepseek-v3-fp8": _fp8_block(DEEPSEEK_V3),  # DeepSeek-R1 has the same shapes
    "deepseek-v3.2-nvfp4": {
        **DEEPSEEK_V32,
        "quantization_config": _nvfp4("model.layers.*.self_attn*", "model.layers.*.mlp.gate"),
    },
    "kimi-k2-fp8": _fp8_block(KIMI_K2),
    "glm-4.5-fp8": {**GLM_45, "quantization_config": _fp8_channel()},
    "gpt-oss-120b-mxfp4": {**GPT_OSS_120B, "quantization_config": MXFP4},
    "tiny-qwen3-moe-bf16": TINY_QWEN3_MOE,
    "tiny-qwen3-moe-fp8": _fp8_block(TINY_QWEN3_MOE),
}
