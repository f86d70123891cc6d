"""The checkpoint in every format: python -m evals.small_math.quantize DIR/bf16 --out evals/small_math/checkpoints

    fp8_block       FP8 e4m3, 128x128 blocks, as Qwen3-30B-A3B-FP8 and DeepSeek-R1 (quant_method fp8)
    fp8_tensor      FP8 e4m3, one scale a weight and one, fixed, for its input (quant_method fp8, static)
    ct_fp8_block    as fp8_block, by compressed-tensors
    ct_int8         INT8, one scale an output channel, input INT8 per token, by compressed-tensors
    ct_nvfp4        NVFP4 weights and inputs (compressed-tensors, nvfp4-pack-quantized)
    modelopt_nvfp4  the same numbers in the layout of NVIDIA's ModelOpt

bf16 is copied beside them. The numbers are compressed-tensors' in each. Embedding, router and norms stay bf16.
"""

import argparse
import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

from evals.small_math import data
from evals.small_math.model import Model, Sizes

# Format -> compressed-tensors' preset, and what its tensors are called in a layout that is not compressed-tensors'.
_PRESETS = {
    "fp8_block": ("FP8_BLOCK", {"weight_scale": "weight_scale_inv"}),
    "fp8_tensor": ("FP8", {}),
    "ct_fp8_block": ("FP8_BLOCK", {}),
    "ct_int8": ("INT8", {}),
    "ct_nvfp4": ("NVFP4", {}),
    "modelopt_nvfp4": (
        "NVFP4",
        {"weight_packed": "weight", "weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale"},
    ),
}
FORMATS = ("bf16", *_PRESETS)
BLOCK = 128
_COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
# Text that the inputs' scales are measured on: training rows of a seed of their own.
_ROWS, _LENGTH, _SEED = 64, 832, 1


def load(folder: Path) -> tuple[Sizes, dict[str, torch.Tensor]]:
    """(sizes, tensors by name) of a bf16 checkpoint. Raises OSError, KeyError."""
    from safetensors.torch import load_file

    sizes = Sizes.of_config(json.loads((folder / "config.json").read_text()))
    return sizes, load_file(folder / "model.safetensors")


def is_linear(name: str) -> bool:
    """Whether this tensor is quantised."""
    return name.endswith("_proj.weight")


@torch.no_grad()
def input_maxima(sizes: Sizes, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Linear layer -> the largest absolute value of its input on training text.

    An expert's first two layers take the maximum over all tokens, so that it is the same for all experts.
    """
    model = Model(sizes)
    model.load(tensors)
    model.bfloat16()
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)

    def record(name: str, operand: torch.Tensor) -> torch.Tensor:
        if name != "weight":
            # [rows, length, experts, intermediate] before the experts' last layer, else [rows, length, columns]
            seen[name].append(operand.abs().amax((0, 1, 3) if operand.ndim == 4 else None).float())
        return operand

    rows = data.training_rows(_SEED, 0, _ROWS, _LENGTH)
    for ids in torch.from_numpy(rows.inputs).long().split(8):
        model.hidden(ids, record)
    maxima = {}
    for layer in range(sizes.num_layers):
        prefix = f"model.layers.{layer}"
        # Each batch calls every layer once, in order.
        found = {name: torch.stack(values[layer :: sizes.num_layers]).amax(0) for name, values in seen.items()}
        for name in ("q_proj", "k_proj", "v_proj"):
            maxima[f"{prefix}.self_attn.{name}"] = found["qkv"].item()
        maxima[f"{prefix}.self_attn.o_proj"] = found["o_proj"].item()
        for expert in range(sizes.num_experts):
            name = f"{prefix}.mlp.experts.{expert}"
            maxima[f"{name}.gate_proj"] = maxima[f"{name}.up_proj"] = found["gate_up"].item()
            maxima[f"{name}.down_proj"] = found["down_proj"][expert].item()
    return maxima


def fused(name: str) -> str:
    """Name of what a kernel multiplies by at once, and takes one weight scale and one input scale for."""
    for part, whole in (
        ("q_proj", "qkv"),
        ("k_proj", "qkv"),
        ("v_proj", "qkv"),
        ("gate_proj", "gate_up"),
        ("up_proj", "gate_up"),
    ):
        name = name.replace(part, whole)
    return name


def quantise(
    fmt: str, tensors: dict[str, torch.Tensor], maxima: dict[str, float]
) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, quantization_config) of the checkpoint in `fmt`, a key of _PRESETS. maxima: from input_maxima().

    Raises ValueError for another format.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

    if fmt not in _PRESETS:
        raise ValueError(f"fmt: takes one of {', '.join(_PRESETS)}; got {fmt!r}")
    preset, names = _PRESETS[fmt]
    unquantised = ["lm_head", *(name.removesuffix(".weight") for name in tensors if name.endswith(".mlp.gate.weight"))]
    linears = _tree({name.removesuffix(".weight"): weight for name, weight in tensors.items() if is_linear(name)})
    scheme = preset_name_to_scheme(preset, ["Linear"])
    apply_quantization_config(linears, QuantizationConfig(config_groups={"group_0": scheme}))
    _set_scales(linears, maxima)
    compressor = ModelCompressor.from_pretrained_model(linears)
    with torch.compiler.set_stance("force_eager"):  # compiling what packs FP4 takes longer than packing
        compressor.compress_model(linears)
    made = {name: tensor for name, tensor in tensors.items() if not is_linear(name)}
    for name, tensor in linears.state_dict().items():
        linear, _, kind = name.rpartition(".")
        if fmt == "modelopt_nvfp4" and kind.endswith("_global_scale"):  # it stores the reciprocal, as a scalar
            tensor = 1 / tensor.reshape(())
        made[f"{linear}.{names.get(kind, kind)}"] = tensor.contiguous()
    config = compressor.quantization_config.model_dump(exclude=["quant_method"])
    config = {"quant_method": "compressed-tensors", **config, "ignore": unquantised}
    if fmt == "fp8_block":
        config = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": unquantised,
        }
    elif fmt == "fp8_tensor":
        config = {"quant_method": "fp8", "activation_scheme": "static", "modules_to_not_convert": unquantised}
    elif fmt == "modelopt_nvfp4":
        numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
        config = {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": numbers, "input_activations": numbers}},
            "ignore": unquantised,
        }
    return made, config


def _hf_quant_config(config: dict) -> dict:
    """The file in which ModelOpt says the same once more, for readers that look there only."""
    quantization = {"quant_algo": config["quant_algo"], "kv_cache_quant_algo": None, "group_size": 16}
    return {"quantization": {**quantization, "exclude_modules": config["ignore"]}}


def _tree(weights: dict[str, torch.Tensor]) -> nn.Module:
    """Modules whose linear layers have these names, and these weights in fp32."""
    root = nn.Module()
    for name, weight in weights.items():
        module = root
        *path, last = name.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.float(), requires_grad=False)
        module.add_module(last, linear)
    return root


def _set_scales(linears: nn.Module, maxima: dict[str, float]) -> None:
    """Fill in the scales that apply_quantization_config() made, from the weights' and the inputs' largest values."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    modules = {name: module for name, module in linears.named_modules() if isinstance(module, nn.Linear)}
    largest: dict[str, torch.Tensor] = {}
    for name, module in modules.items():
        largest[fused(name)] = max(module.weight.abs().amax(), largest.get(fused(name), torch.zeros(())))
    for name, module in modules.items():
        weights, inputs = module.quantization_scheme.weights, module.quantization_scheme.input_activations
        global_scale = None
        if hasattr(module, "weight_global_scale"):
            global_scale = generate_gparam(-largest[fused(name)], largest[fused(name)])
            module.weight_global_scale.data.copy_(global_scale)
        shape = module.weight_scale.shape if module.weight_scale.ndim == 2 else (1, 1)
        rows, columns = module.weight.shape
        blocks = module.weight.view(shape[0], rows // shape[0], shape[1], columns // shape[1])
        maximum = blocks.abs().amax((1, 3)).view(module.weight_scale.shape)
        scale, _ = calculate_qparams(-maximum, maximum, weights, global_scale)
        module.weight_scale.data.copy_(scale)
        limit = torch.tensor(maxima[name])
        if hasattr(module, "input_global_scale"):
            module.input_global_scale.data.copy_(generate_gparam(-limit, limit))
        if hasattr(module, "input_scale"):
            module.input_scale.data.copy_(calculate_qparams(-limit, limit, inputs)[0])


def write(source: Path, out: Path) -> None:
    """All FORMATS of the bf16 checkpoint `source` as folders of `out`, replacing files. Raises OSError, KeyError."""
    from safetensors.torch import save_file

    sizes, tensors = load(source)
    maxima = input_maxima(sizes, tensors)
    for fmt in FORMATS:
        folder = out / fmt
        folder.mkdir(parents=True, exist_ok=True)
        made, config = tensors, json.loads((source / "config.json").read_text())
        if fmt != "bf16":
            made, config["quantization_config"] = quantise(fmt, tensors, maxima)
        if fmt == "modelopt_nvfp4":
            _write_json(folder / "hf_quant_config.json", _hf_quant_config(config["quantization_config"]))
        _write_json(folder / "config.json", config)
        save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
        for name in _COPIED:
            if (source / name).resolve() != (folder / name).resolve():
                shutil.copyfile(source / name, folder / name)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.small_math.quantize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="folder of the bf16 checkpoint that evals.small_math.train wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder, made where it is missing")
    options = parser.parse_args(arguments)
    if not (options.source / "config.json").is_file():
        parser.error(f"{options.source} is no checkpoint: there is no config.json")
    try:
        write(options.source, options.out)
    except OSError as error:
        parser.error(f"{options.out} cannot be written: {error}")
    for fmt in FORMATS:
        size = sum(file.stat().st_size for file in (options.out / fmt).iterdir())
        print(f"{fmt:<15} {size / 1e6:5.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
