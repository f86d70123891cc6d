"""The fusion of RMSNorm and silu_and_mul with the FP8 and INT8 layers behind them, on graphs of models of vLLM's: how
many places are found in each kind of model, what the fused graphs compute, and what stays apart."""

import json

import pytest
from child import answer

pytest.importorskip("vllm")

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
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


def compressed_tensors(kind, weights, activations, dynamic):
    def arguments(strategy, dynamic):
        return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": dynamic}

    group = {"weights": arguments(weights, False), "input_activations": arguments(activations, dynamic)}
    groups = {"group_0": {"targets": ["Linear"], **group}}
    method = {"quant_method": "compressed-tensors", "format": f"{kind}-quantized", "ignore": ["lm_head"]}
    return {"quantization_config": method | {"config_groups": groups}}


MODELS = {
    "static": LLAMA | {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}},
    "compressed static": LLAMA | compressed_tensors("float", "tensor", "tensor", False),
    "compressed dynamic, bias": QWEN2 | compressed_tensors("float", "channel", "token", True),
    "int8": LLAMA | compressed_tensors("int", "channel", "token", True),
}

CODE = """
import collections, json, os
import torch
from fake_cuda import pretend
pretend((9, 0))
import fake_compile
from vllm import plugins
plugins.load_general_plugins()
from vllm_b200_plugin import dispatch, plugin, vllm_compat

cut = ((32, (1, 8, 1, 0), True),)
shapes = {(1024, 512): cut, (512, 512): cut, (2048, 512): cut, (512, 1024): cut, (64, 512): cut}
dispatch.TABLE = {((9, 0), "fp8"): shapes, ((9, 0), "int8"): shapes}
folders = FOLDERS
configs = {name: fake_compile.engine_config(folder) for name, folder in folders.items()}
fake_compile.prepare()
import vllm.ir.ops as ir
from vllm_b200_plugin.integration.norm_linear_fusion import NormLinearFusion

# On a CPU ours stand for vLLM's.
vllm_ops = torch.library.Library("_C", "FRAGMENT")
ours = torch.ops.vllm_b200
def static_scaled_fp8_quant(q, x, scale, group_shape=None):
    ours.per_tensor_quant(x, q, scale, None)
def silu_and_mul_quant(q, x, scale):
    ours.gated_tensor_quant(x, q, scale, 0, 0.0, 1.0, 0.0)
def cutlass(a, b, scale_a, scale_b, out_dtype, bias=None):
    y = (a.double() @ b.double()) * scale_a.double().view(-1, 1) * scale_b.double().view(1, -1)
    return (y if bias is None else y + bias).to(out_dtype)
vllm_compat.CUTLASS_GEMM.replace(cutlass)
for function in (static_scaled_fp8_quant, silu_and_mul_quant):
    vllm_ops.impl(function.__name__, function, "CPU")

def cutlass_scaled_mm(out, a, b, a_scales, b_scales, bias=None):
    out.copy_(cutlass(a, b, a_scales, b_scales, out.dtype, bias))
vllm_ops.impl("cutlass_scaled_mm", cutlass_scaled_mm, "CPU")

OPS = ("norm_scaled_linear", "add_norm_scaled_linear", "silu_scaled_linear", "scaled_linear")
def count(graph):
    ops = collections.Counter(str(n.target).split(".")[1] for n in graph.nodes if ".default" in str(n.target))
    fusion = [p for p in compiler.passes.passes if isinstance(p, NormLinearFusion)]
    return [fusion[0].matched_count if fusion else None, *[ops[op] for op in OPS]]

answers = {"models": {}}
ids = torch.zeros(16, dtype=torch.long)
for name, config in configs.items():
    compiler = fake_compile.Compiler(config)
    model = fake_compile.model(config)
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            for parameter in layer.parameters(recurse=False):
                parameter.data.copy_(torch.ones(parameter.shape))
            layer.quant_method.process_weights_after_loading(layer)
    graph, _ = compiler.optimised(model.model.forward, (ids, ids, None, None))
    answers["models"][name] = count(graph)

# What the fused graphs compute.
torch.set_default_dtype(torch.float32)
generator = torch.Generator().manual_seed(0)
def normal(*shape):
    return torch.randn(shape, generator=generator).bfloat16()
norm_weight, weight, scale = normal(512), normal(64, 512).to(torch.float8_e4m3fn).t(), torch.rand(64, 1)
int8_weight = (weight.t().float() * 20).to(torch.int8).t()
x_scale, other, bias, bf16 = torch.tensor(1 / 32), torch.ones(()), normal(64), torch.bfloat16
def layers(x, residual, wide, norm_weight):
    y, total = ir.fused_add_rms_norm(x, residual, norm_weight, 1e-6)
    hoisted = torch.empty(wide.shape[0], 512, dtype=torch.float8_e4m3fn)
    torch.ops._C.silu_and_mul_quant(hoisted, wide, x_scale)
    return (
        ours.scaled_linear(y, weight, scale, x_scale, bias, bf16), total,
        ours.scaled_linear(ir.rms_norm(x, norm_weight, 1e-5), int8_weight, scale, None, None, bf16),
        ours.scaled_linear(torch.nn.functional.silu(wide[:, :512]) * wide[:, 512:], weight, scale, None, bias, bf16),
        ours.scaled_linear(hoisted, weight, scale, x_scale, None, bf16),
    )
inputs = normal(6, 512), normal(6, 512), normal(6, 1024), norm_weight
expected, kept = layers(*inputs), inputs[1].clone()
graph, actual = compiler.optimised(layers, inputs, run=True)
errors = [float((a.float() - b.float()).abs().mean() / b.float().abs().mean()) for a, b in zip(actual, expected)]
answers["computed"] = [count(graph), torch.equal(kept, inputs[1]), errors]

def linear(y):
    return ours.scaled_linear(y, weight, scale, None, None, bf16)
def others_read(x, wide):
    y = ir.rms_norm(x, norm_weight, 1e-6)
    return linear(y), y
def another_scale(x, wide):
    q = torch.empty(wide.shape[0], 512, dtype=torch.float8_e4m3fn)
    torch.ops._C.silu_and_mul_quant(q, wide, other)
    return ours.scaled_linear(q, weight, scale, x_scale, None, bf16)
wide_weight = norm_weight.float()
apart = {
    "others read": others_read,
    "another scale": another_scale,
    "another type of weight": lambda x, wide: linear(ir.rms_norm(x, wide_weight, 1e-6)),
    "epsilon": lambda x, wide: linear(ir.rms_norm(x, norm_weight, 3e-6)),
    "up before gate": lambda x, wide: linear(wide[:, :512] * torch.nn.functional.silu(wide[:, 512:])),
    "another activation": lambda x, wide: linear(torch.nn.functional.gelu(wide[:, :512]) * wide[:, 512:]),
    "another dtype": lambda x, wide: ours.scaled_linear(
        ir.rms_norm(x, norm_weight, 1e-6), weight, scale, None, None, torch.float16),
}
answers["apart"], answers["alone"] = {}, {}
def compiled(function, run=False):
    inputs = normal(6, 512), normal(6, 1024)
    graph, actual = compiler.optimised(function, inputs, run=run)
    outside = sum(torch.float8_e4m3fn in n.args for n in graph.nodes if "convert_element_type" in str(n.target))
    return count(graph)[0], outside, (function(*inputs), actual) if run else None
for name, function in apart.items():
    answers["apart"][name] = compiled(function)[:2]
alone = {
    "an input": lambda x, wide: linear(x),
    "part of an input": lambda x, wide: linear(wide[:, 512:]),
    "int8": lambda x, wide: ours.scaled_linear(x + x, int8_weight, scale, None, None, bf16),
}
for name, function in alone.items():
    answers["alone"][name] = compiled(function)[:2]
outs = []
for given in (None, x_scale):
    def computed(x, wide):
        return ours.scaled_linear((x + x).view(-1, 512), weight, scale, given, bias, bf16)
    matched, outside, (expected, actual) = compiled(computed, run=True)
    outs.append([outside, float((actual - expected).float().abs().mean() / expected.float().abs().mean())])
answers["outside"] = outs

# With a graph of few tokens.
answers["ranges"] = {name: config.compilation_config.compile_ranges_endpoints for name, config in configs.items()}
compiler = fake_compile.Compiler(configs["static"])
def of_many(x, wide):
    y = ir.rms_norm(x, norm_weight, 1e-6)
    q = torch.empty(wide.shape[0], 512, dtype=torch.float8_e4m3fn)
    torch.ops._C.silu_and_mul_quant(q, wide, x_scale)
    return (
        ours.scaled_linear(y, weight, scale, None, bias, bf16),
        ours.scaled_linear(x, weight, scale, x_scale, None, bf16),
        ours.scaled_linear(q, weight, scale, x_scale, None, bf16),
        ours.scaled_linear(y, int8_weight, scale, None, None, bf16),
    )
inputs = normal(20, 512), normal(20, 1024)
expected = of_many(*inputs)
graph, actual = compiler.optimised(of_many, inputs, run=True, first=17)
errors = [float((a.float() - b.float()).abs().mean() / b.float().abs().mean()) for a, b in zip(actual, expected)]
answers["many"] = [sum("cutlass_scaled_mm" in str((n.target, n.args)) for n in graph.nodes), count(graph)[1:], errors]
answers["results"] = plugin.results()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folders = {name: str(tmp_path_factory.mktemp("model")) for name in MODELS}
    for name, folder in folders.items():
        with open(f"{folder}/config.json", "w") as file:
            json.dump(MODELS[name], file)
    enabled = "int8_linear"
    environment = {"VLLM_B200_ENABLE": enabled, "VLLM_B200_STRICT": "1", "HF_HUB_OFFLINE": "1"}
    return answer(CODE.replace("FOLDERS", json.dumps(folders)), **environment)


@pytest.mark.parametrize("model", MODELS)
def test_every_place_in_a_model_is_found(found, model):
    """Those behind both norms and behind the activation; left is the one behind attention."""
    assert found["results"]["norm_linear_fusion"] == "applied"
    # matched; norm, norm with residual, activation; left
    assert found["models"][model] == [3, 1, 1, 1, 1]


def test_more_tokens_keep_vllms_layers(found):
    """CUTLASS for the three FP8 layers, which also compute the same; of INT8 ours quantises."""
    assert found["results"]["few_token_graphs"] == "applied"
    assert all(ends[0] == 16 and len(ends) == 2 for ends in found["ranges"].values())
    calls, counts, errors = found["many"]
    assert calls == 3 and counts == [0, 0, 0, 1]
    assert max(errors) < 2e-2


def test_the_fused_graph_computes_the_same(found):
    counts, kept, errors = found["computed"]
    assert counts == [4, 1, 1, 2, 0]
    assert kept and max(errors) < 2e-2


def test_what_stays_apart(found):
    """Nothing is fused, and where inductor has a kernel before the layer, the quantisation goes there."""
    assert found["apart"].pop("another scale") == [0, 0]  # quantised already
    assert found["apart"].pop("another dtype") == [0, 0]  # no pattern has it
    assert found["apart"] == {name: [0, 1] for name in found["apart"]}


def test_where_the_layer_quantises(found):
    """Behind what is no kernel of inductor's, and INT8, which is no code of inductor's in vLLM either."""
    assert found["alone"] == {name: [0, 0] for name in found["alone"]}


def test_quantisation_outside_computes_the_same(found):
    for outside, error in found["outside"]:
        assert outside == 1 and error < 1e-2
