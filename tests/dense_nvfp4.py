"""A dense NVFP4 model made up for tests, as compressed-tensors and ModelOpt store it, and what it should answer."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_b200_plugin.ops.nvfp4_quant import nvfp4_dequant, nvfp4_quant

HIDDEN, INNER, VOCAB = 128, 256, 96
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_NUMBERS = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
_GROUP = {"symmetric": True, "strategy": "tensor_group"}
QUANTIZATION = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**_NUMBERS, **_GROUP},
                "input_activations": {**_NUMBERS, **_GROUP, "dynamic": "local"},
            }
        },
    },
    "modelopt": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": _NUMBERS, "input_activations": _NUMBERS}},
    },
}
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (64, HIDDEN),
    "self_attn.v_proj": (64, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
# Layers that vLLM fuses differ in how large their weights are, and so would their global scales.
SPREAD = {"self_attn.k_proj": 4.0, "self_attn.v_proj": 0.25, "mlp.up_proj": 0.3}
_FUSED = {"self_attn.q_proj": "qkv", "self_attn.k_proj": "qkv", "self_attn.v_proj": "qkv"} | {
    "mlp.gate_proj": "gate_up",
    "mlp.up_proj": "gate_up",
}
INPUT_SCALE = 2688 / 6.0  # largest |x| that does not saturate: 6


def make(shared: bool) -> tuple[dict, dict]:
    """(tensors that are not quantised, linear layer -> (q, scale, global_scale)).

    shared: whether layers that vLLM fuses have one global scale.
    """
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    plain = {"model.embed_tokens.weight": normal(VOCAB, HIDDEN), "lm_head.weight": normal(VOCAB, HIDDEN) / 4}
    for name in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"):
        plain[f"{name}.weight"] = torch.ones(HIDDEN)
    weights = {name: normal(*shape) * SPREAD.get(name, 1.0) / shape[1] ** 0.5 for name, shape in LINEARS.items()}
    largest: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        key = _FUSED.get(name, name) if shared else name
        largest[key] = max(weight.abs().max(), largest.get(key, torch.zeros(())))
    scales = {name: 2688 / largest[_FUSED.get(name, name) if shared else name] for name in weights}
    linears = {name: (*nvfp4_quant(weight, scales[name]), scales[name]) for name, weight in weights.items()}
    return {name: tensor.bfloat16() for name, tensor in plain.items()}, linears


def write(folder: Path, fmt: str, shared: bool) -> None:
    """fmt: "compressed-tensors" or "modelopt"."""
    tensors, linears = make(shared)
    for name, (q, scale, global_scale) in linears.items():
        prefix, factor = f"model.layers.0.{name}", torch.tensor(INPUT_SCALE)
        tensors[f"{prefix}.weight_scale"] = scale
        if fmt == "modelopt":
            extra = {"weight": q, "weight_scale_2": 1 / global_scale, "input_scale": 1 / factor}
        else:
            extra = {"weight_packed": q, "weight_global_scale": global_scale.view(1)}
            extra["input_global_scale"] = factor.view(1)
        tensors |= {f"{prefix}.{kind}": tensor for kind, tensor in extra.items()}
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": QUANTIZATION[fmt]}))


def logprobs(ids: list[int], shared: bool) -> torch.Tensor:
    """[VOCAB] of the token after `ids`: transformers' Llama in float64 with what NVFP4 leaves of both operands."""
    from transformers import LlamaConfig, LlamaForCausalLM

    plain, linears = make(shared)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).double()
    state = {name: tensor.double() for name, tensor in plain.items()}
    for name, parts in linears.items():
        state[f"model.layers.0.{name}.weight"] = nvfp4_dequant(*parts).double()
        module = model.get_submodule(f"model.layers.0.{name}")
        module.register_forward_pre_hook(lambda _, args: (_round(args[0]),))
    model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def _round(x: torch.Tensor) -> torch.Tensor:
    factor = torch.tensor(INPUT_SCALE)
    rows = x.flatten(0, -2).bfloat16()
    return nvfp4_dequant(*nvfp4_quant(rows, factor), factor).view(x.shape).double()
