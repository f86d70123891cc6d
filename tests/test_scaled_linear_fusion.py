"""The fusion of RMSNorm and silu_and_mul with FP8 and INT8 layers behind them, on graphs of vLLM's models: how many
places are found in each, and what the fused graphs compute."""

import json

import pytest
from child import answer

pytest.importorskip("vllm")

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6}


def compressed_tensors(weights, activations):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    method = {"quant_method": "compressed-tensors", "format": f"{weights['type']}-quantized", "ignore": ["lm_head"]}
    return method | {"config_groups": {"group_0": group}}


def arguments(kind, strategy, dynamic):
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": dynamic}


MODELS = {
    "static": LLAMA | {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}},
    "dynamic": LLAMA | {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
    "compressed static": LLAMA
    | {
        "quantization_config": compressed_tensors(
            arguments("float", "tensor", False), arguments("float", "tensor", False)
        )
    },
    "compressed dynamic, bias": QWEN2
    | {
        "quantization_config": compressed_tensors(
            arguments("float", "channel", False), arguments("float", "token", True)
        )
    },
    "int8": LLAMA
    | {"quantization_config": compressed_tensors(arguments("int", "channel", False), arguments("int", "token", True))},
}

CODE = """
import collections, json, os, sys
import torch
from fake_cuda import pretend
pretend((9, 0))
import fake_compile
from vllm import plugins
plugins.load_general_plugins()
from vllm_b200_plugin import dispatch, features
cut = ((32, (1, 8, 1, 0), False),)
shapes = {(1024, 512): cut, (512, 512): cut, (2048, 512): cut, (512, 1024): cut}
dispatch.TABLE = {((9, 0), "fp8"): shapes, ((9, 0), "int8"): shapes}
models = json.loads(sys.stdin.read())
prepared = False
vllm_ops = torch.library.Library("_C", "FRAGMENT")
vllm_ops.impl(
    "static_scaled_fp8_quant",
    lambda q, x, scale, group_shape=None: torch.ops.vllm_b200.per_tensor_quant(x, q, scale, None),
    "CPU",
)
answers = {}
ids = torch.zeros(16, dtype=torch.long)
OPS = ("norm_scaled_linear", "add_norm_scaled_linear", "silu_scaled_linear", "scaled_linear")
for name, folder in models.items():
    config = fake_compile.engine_config(folder)
    if not prepared:
        fake_compile.prepare()
        prepared = True
    from vllm_b200_plugin.integration.norm_linear_fusion import NormLinearFusion
    compiler = fake_compile.Compiler(config)
    fusion = [p for p in compiler.passes.passes if isinstance(p, NormLinearFusion)]
    built = fake_compile.model(config)
    for layer in built.modules():
        if getattr(getattr(layer, "quant_method", None), "apply", None) and hasattr(layer, "weight_scale"):
            for parameter in layer.parameters(recurse=False):
                parameter.data.copy_(torch.ones(parameter.shape))
            layer.quant_method.process_weights_after_loading(layer)
    graph, _ = compiler.optimised(built.model.forward, (ids, ids, None, None))
    ops = collections.Counter(str(n.target).split(".")[1] for n in graph.nodes if ".default" in str(n.target))
    answers[name] = [fusion[0].matched_count if fusion else None, *[ops[op] for op in OPS]]
    if os.environ.get("SHOW") == name: print(graph, file=sys.stderr)
print(json.dumps(answers))
"""


def test_counts(tmp_path):
    for index, (name, config) in enumerate(MODELS.items()):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "config.json").write_text(json.dumps(config))
