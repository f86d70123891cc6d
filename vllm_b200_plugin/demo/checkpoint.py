"""Makes a tiny Qwen3-MoE checkpoint without a network: seeded random weights, a tokenizer trained on made-up text."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Every linear layer has both sides a multiple of 128, so that all of them take 128x128 blocks.
HIDDEN_SIZE = 256
MOE_INTERMEDIATE_SIZE = 256
NUM_LAYERS = 2
NUM_EXPERTS = 8
NUM_EXPERTS_PER_TOK = 2
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_DIM = 64
VOCAB_SIZE = 1024
MAX_POSITIONS = 2048
BLOCK = 128

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PROMPT = "The red boat left the harbour at noon and"

FORMATS = {
    "bf16": "bfloat16, not quantised",
    "fp8": "FP8 e4m3, 128x128 blocks (quant_method fp8)",
    "ct-fp8": "FP8 e4m3, 128x128 blocks (compressed-tensors)",
    "ct-int8": "INT8 per channel, activations INT8 per token (compressed-tensors)",
}


def make(directory: Path, fmt: str = "fp8", *, bf16_experts: bool = False, seed: int = 0) -> None:
    """Write config, tokenizer and weights in `fmt`, a key of FORMATS, to `directory`, replacing files of these names.

    bf16_experts: quantise attention only (compressed-tensors formats), where vLLM has no quantised experts.
    The same seed gives the same bf16 weights in every format, before quantisation.
    Raises ValueError for an unknown format, OSError where the directory cannot be written.
    """
    from safetensors.torch import save_file

    if fmt not in FORMATS:
        raise ValueError(f"format: takes one of {', '.join(FORMATS)}; got {fmt!r}")
    if bf16_experts and not fmt.startswith("ct-"):
        raise ValueError(f"bf16_experts: takes a compressed-tensors format; got {fmt!r}")
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory)
    _write_json(directory / "config.json", _config(fmt, bf16_experts))
    _write_json(directory / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})
    save_file(_weights(fmt, bf16_experts, seed), directory / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _sentences(count: int = 3000) -> Iterator[str]:
    """Made-up text with enough different words for VOCAB_SIZE merges."""
    rng = random.Random(0)
    colours = ("red", "green", "silver", "yellow", "dark", "painted", "little")
    things = ("boat", "train", "wagon", "balloon", "tractor", "bicycle", "ferry")
    places = ("harbour", "village", "mountain", "station", "island", "market", "lighthouse")
    ends = ("nobody waited", "the rain stopped", "children waved", "a bell rang", "it came back late")
    for _ in range(count):
        hour = rng.randint(1, 12)
        yield (
            f"The {rng.choice(colours)} {rng.choice(things)} left the {rng.choice(places)} at {hour} and "
            f"reached the {rng.choice(places)} after {rng.randint(2, 999)} minutes; {rng.choice(ends)}.\n"
        )


def write_tokenizer(directory: Path, max_length: int = MAX_POSITIONS) -> None:
    """Write a tokenizer of VOCAB_SIZE tokens to `directory`, which exists; max_length: the longest text in tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    # A text with few words runs out of merges; the rest of the ids must decode to something.
    missing = VOCAB_SIZE - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f" word{i}" for i in range(missing)])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": SPECIAL_TOKENS[0],
            "pad_token": SPECIAL_TOKENS[0],
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
            "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        },
    )


def _config(fmt: str, bf16_experts: bool) -> dict:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "moe_intermediate_size": MOE_INTERMEDIATE_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": NUM_EXPERTS_PER_TOK,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    kept = ["lm_head"] + [f"model.layers.{i}.mlp.gate" for i in range(NUM_LAYERS)]
    if bf16_experts:
        kept.append(r"re:.*\.mlp\.experts\..*")
    if fmt == "fp8":
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": kept,
        }
    elif fmt == "ct-fp8":
        config["quantization_config"] = _compressed_tensors(
            "float-quantized",
            kept,
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [BLOCK, BLOCK]},
            {"num_bits": 8, "type": "float", "strategy": "group", "group_size": BLOCK},
        )
    elif fmt == "ct-int8":
        config["quantization_config"] = _compressed_tensors(
            "int-quantized",
            kept,
            {"num_bits": 8, "type": "int", "strategy": "channel"},
            {"num_bits": 8, "type": "int", "strategy": "token"},
        )
    return config


def _compressed_tensors(fmt: str, ignore: list[str], weights: dict, activations: dict) -> dict:
    group = {
        "targets": ["Linear"],
        "format": fmt,
        "weights": {"symmetric": True, "dynamic": False, **weights},
        "input_activations": {"symmetric": True, "dynamic": True, **activations},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": ignore,
        "config_groups": {"group_0": group},
    }


def _weights(fmt: str, bf16_experts: bool, seed: int) -> "dict[str, torch.Tensor]":
    """All tensors of the checkpoint: [out_features, in_features] weights, and their scales where quantised."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    def linear(name: str, rows: int, columns: int) -> None:
        kept = bf16_experts and ".mlp.experts." in name
        tensors.update(_quantised(name, matrix(rows, columns), "bf16" if kept else fmt))

    def norm(name: str, size: int) -> None:
        tensors[f"{name}.weight"] = torch.ones(size, dtype=torch.bfloat16)

    # Rows of unit size, as a trained model's are after its first norm.
    tensors["model.embed_tokens.weight"] = matrix(VOCAB_SIZE, HIDDEN_SIZE) * HIDDEN_SIZE**0.5
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        norm(f"{prefix}.input_layernorm", HIDDEN_SIZE)
        norm(f"{prefix}.post_attention_layernorm", HIDDEN_SIZE)
        norm(f"{prefix}.self_attn.q_norm", HEAD_DIM)
        norm(f"{prefix}.self_attn.k_norm", HEAD_DIM)
        linear(f"{prefix}.self_attn.q_proj", NUM_HEADS * HEAD_DIM, HIDDEN_SIZE)
        linear(f"{prefix}.self_attn.k_proj", NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE)
        linear(f"{prefix}.self_attn.v_proj", NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE)
        linear(f"{prefix}.self_attn.o_proj", HIDDEN_SIZE, NUM_HEADS * HEAD_DIM)
        tensors[f"{prefix}.mlp.gate.weight"] = matrix(NUM_EXPERTS, HIDDEN_SIZE)
        for expert in range(NUM_EXPERTS):
            linear(f"{prefix}.mlp.experts.{expert}.gate_proj", MOE_INTERMEDIATE_SIZE, HIDDEN_SIZE)
            linear(f"{prefix}.mlp.experts.{expert}.up_proj", MOE_INTERMEDIATE_SIZE, HIDDEN_SIZE)
            linear(f"{prefix}.mlp.experts.{expert}.down_proj", HIDDEN_SIZE, MOE_INTERMEDIATE_SIZE)
    norm("model.norm", HIDDEN_SIZE)
    tensors["lm_head.weight"] = matrix(VOCAB_SIZE, HIDDEN_SIZE)
    return tensors


def _quantised(name: str, weight: "torch.Tensor", fmt: str) -> "dict[str, torch.Tensor]":
    """The checkpoint's tensors for one weight [rows, columns]: dequantised value = stored value * scale."""
    import torch

    if fmt == "bf16":
        return {f"{name}.weight": weight}
    if fmt == "ct-int8":
        scale = (weight.float().abs().amax(dim=1, keepdim=True) / 127).bfloat16()
        values = (weight.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
        return {f"{name}.weight": values, f"{name}.weight_scale": scale}
    # [row blocks, 128, column blocks, 128], one scale a block
    rows, columns = weight.shape
    blocks = weight.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    limit = torch.finfo(torch.float8_e4m3fn).max
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / limit
    values = (blocks / scale).clamp(-limit, limit).view(rows, columns).to(torch.float8_e4m3fn)
    suffix = "weight_scale_inv" if fmt == "fp8" else "weight_scale"
    return {f"{name}.weight": values, f"{name}.{suffix}": scale.view(rows // BLOCK, columns // BLOCK)}
