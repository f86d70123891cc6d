"""Makes the demo's checkpoint: the small trained model of evals/small_math, in the format that is asked for."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_b200_plugin.environment import CannotRun

if TYPE_CHECKING:
    import torch

# The trained model in bfloat16: where a wheel has it, and where the source has it. Every format is made from it, so
# that a wheel carries 8 MB instead of a checkpoint for each.
_FOLDERS = (
    Path(__file__).parent / "small_math" / "bf16",
    Path(__file__).parents[2] / "evals" / "small_math" / "checkpoints" / "bf16",
)
_COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
BLOCK = 128

# Of a kind that the model was trained on, with numbers that it was not.
QUESTION = "Grace buys 7 tickets for 9 dollars and 5 drinks for 5 dollars. How many dollars does Grace pay?"
# As the model was trained, and as lm-eval's gsm8k asks.
PROMPT = f"Question: {QUESTION}\nAnswer:"

FORMATS = {
    "bf16": "bfloat16, not quantised",
    "fp8": "FP8 e4m3, 128x128 blocks (quant_method fp8)",
    "ct-fp8": "FP8 e4m3, 128x128 blocks (compressed-tensors)",
    "ct-int8": "INT8 per channel, activations INT8 per token (compressed-tensors)",
    "ct-nvfp4": "NVFP4 weights, activations bfloat16 (compressed-tensors)",
}


def trained() -> Path:
    """Folder of the trained model in bfloat16. Raises CannotRun where this installation has none."""
    for folder in _FOLDERS:
        if (folder / "model.safetensors").is_file():
            return folder
    raise CannotRun(f"the demo's model is missing: install the package again, {_FOLDERS[0]} should hold it.")


def make(directory: Path, fmt: str = "fp8", *, bf16_experts: bool = False) -> None:
    """Write config, tokenizer and weights in `fmt`, a key of FORMATS, to `directory`, replacing files of these names.

    bf16_experts: quantise attention only (compressed-tensors formats), where vLLM has no quantised experts.
    Raises ValueError for an unknown format, CannotRun as trained(), OSError where the directory cannot be written.
    """
    from safetensors.torch import load_file, save_file

    if fmt not in FORMATS:
        raise ValueError(f"format: takes one of {', '.join(FORMATS)}; got {fmt!r}")
    if bf16_experts and not fmt.startswith("ct-"):
        raise ValueError(f"bf16_experts: takes a compressed-tensors format; got {fmt!r}")
    source = trained()
    directory.mkdir(parents=True, exist_ok=True)
    for name in _COPIED:
        shutil.copyfile(source / name, directory / name)
    config = json.loads((source / "config.json").read_text())
    if quantization := _quantization(fmt, config["num_hidden_layers"], bf16_experts):
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        kept = "_proj." not in name or (bf16_experts and ".mlp.experts." in name)
        tensors.update({name: tensor} if kept else _quantised(name.removesuffix(".weight"), tensor, fmt))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _quantization(fmt: str, num_layers: int, bf16_experts: bool) -> dict | None:
    """The config's quantization_config."""
    kept = ["lm_head"] + [f"model.layers.{i}.mlp.gate" for i in range(num_layers)]
    if bf16_experts:
        kept.append(r"re:.*\.mlp\.experts\..*")
    if fmt == "fp8":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": kept,
        }
    if fmt == "ct-fp8":
        return _compressed_tensors(
            "float-quantized",
            kept,
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [BLOCK, BLOCK]},
            {"num_bits": 8, "type": "float", "strategy": "group", "group_size": BLOCK},
        )
    if fmt == "ct-int8":
        return _compressed_tensors(
            "int-quantized",
            kept,
            {"num_bits": 8, "type": "int", "strategy": "channel"},
            {"num_bits": 8, "type": "int", "strategy": "token"},
        )
    if fmt == "ct-nvfp4":
        weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
        return _compressed_tensors("nvfp4-pack-quantized", kept, weights, None)
    return None


def _compressed_tensors(fmt: str, ignore: list[str], weights: dict, activations: dict | None) -> dict:
    group = {
        "targets": ["Linear"],
        "format": fmt,
        "weights": {"symmetric": True, "dynamic": False, **weights},
        "input_activations": activations and {"symmetric": True, "dynamic": True, **activations},
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


def _quantised(name: str, weight: "torch.Tensor", fmt: str) -> "dict[str, torch.Tensor]":
    """The checkpoint's tensors for one weight [rows, columns]: dequantised value = stored value * scale."""
    import torch

    if fmt == "bf16":
        return {f"{name}.weight": weight}
    if fmt == "ct-int8":
        scale = (weight.float().abs().amax(dim=1, keepdim=True) / 127).bfloat16()
        values = (weight.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
        return {f"{name}.weight": values, f"{name}.weight_scale": scale}
    if fmt == "ct-nvfp4":
        from vllm_b200_plugin.ops.nvfp4_quant import nvfp4_global_scale, nvfp4_quant

        global_scale = nvfp4_global_scale(weight)
        packed, scale = nvfp4_quant(weight.clone(), global_scale)  # in a file nothing is aligned
        return {
            f"{name}.weight_packed": packed,
            f"{name}.weight_scale": scale,
            f"{name}.weight_global_scale": global_scale,
        }
    # [row blocks, 128, column blocks, 128], one scale a block
    rows, columns = weight.shape
    blocks = weight.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    limit = torch.finfo(torch.float8_e4m3fn).max
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / limit
    values = (blocks / scale).clamp(-limit, limit).view(rows, columns).to(torch.float8_e4m3fn)
    suffix = "weight_scale_inv" if fmt == "fp8" else "weight_scale"
    return {f"{name}.weight": values, f"{name}.{suffix}": scale.view(rows // BLOCK, columns // BLOCK)}
