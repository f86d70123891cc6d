"""The fusion pass for packed scales, behind vLLM's own passes and on the graphs of a model of vLLM's."""

import json

import pytest
from child import answer

pytest.importorskip("vllm")

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}

CODE = """
import collections, json, os
import torch
from fake_cuda import pretend
pretend((10, 0))
import fake_compile
from vllm import plugins
plugins.load_general_plugins()
config = fake_compile.engine_config("FOLDER")
fake_compile.prepare()
from vllm.compilation.passes.inductor_pass import pass_context
from vllm.config.utils import Range
from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8_packed_for_deepgemm
import vllm.ir.ops as ir
from vllm_b200_plugin import plugin, vllm_compat
from vllm_b200_plugin.integration.fp8_block_op import Engine, fp8_block_linear
from vllm_b200_plugin.integration.packed_quant_fusion import PackedQuantFusion
from vllm_b200_plugin.ops.small_m_gemm import unpack_scale

compiler = fake_compile.Compiler(config)
passes = compiler.passes.passes

def count(graph):
    ops = collections.Counter(str(n.target).split(".")[1] for n in graph.nodes if ".default" in str(n.target))
    names = ("rms_norm_group_quant", "add_rms_norm_group_quant", "gated_group_quant", "fp8_block_gemm_packed",
             "fp8_block_linear", "per_token_group_fp8_quant_packed")
    return [passes[-1].matched_count, *[ops[name] for name in names]]

answers = {}
ids = torch.zeros(16, dtype=torch.long)
for kernel, disabled in (("vllm", "B200DeepGemmFp8BlockKernel"), ("ours", "")):
    os.environ["VLLM_DISABLED_KERNELS"] = disabled
    model = fake_compile.model(config)
    graph, _ = compiler.optimised(model.model.forward, (ids, ids, None, None))
    answers[kernel] = count(graph)
with pass_context(Range(1, 2048)):
    keys = [compiler.passes.uuid()]
    ours = passes.pop()
    keys.append(compiler.passes.uuid())
    passes.append(ours)
answers["same key"] = keys[0] == keys[1]

# What the fused graphs compute.
ops = torch.library.Library("_C", "FRAGMENT")
ops.impl("per_token_group_fp8_quant_packed", lambda x, q, scale, group_size, eps, low, high:
    torch.ops.vllm_b200.per_token_group_quant(x, q, scale, group_size, eps, True, True), "CPU")

def gemm(activation, weights, out, **options):
    q, scale = activation
    x = q.float() * unpack_scale(scale, q.shape[1] // 128).repeat_interleave(128, 1)
    out.copy_(x @ weights[0].float().t())

vllm_compat.FP8_GEMM_NT.replace(gemm)
generator = torch.Generator().manual_seed(0)
def normal(*shape):
    return torch.randn(shape, generator=generator).bfloat16()
x, residual, wide = normal(6, 512), normal(6, 512), normal(6, 1024)
norm_weight = normal(512)
weight, weight_scale = normal(64, 512).to(torch.float8_e4m3fn), torch.ones(64, 1, dtype=torch.int32)

def quantise(x):
    return per_token_group_quant_fp8_packed_for_deepgemm(x, 128, use_ue8m0=True)

def linear(x):
    return (fp8_block_linear(x, weight, weight_scale, (128, 128), torch.bfloat16, Engine.DEEP_GEMM),)

def silu_and_mul(x):
    return torch.nn.functional.silu(x[:, :512]) * x[:, 512:]

for name, end in (("quantise", quantise), ("linear", linear)):
    def layers(x, residual, wide, norm_weight):
        y, total = ir.fused_add_rms_norm(x, residual, norm_weight, 1e-6)
        return *end(y), total, *end(ir.rms_norm(x, norm_weight, 1e-5)), *end(silu_and_mul(wide))
    inputs = (x, residual, wide, norm_weight)
    expected = layers(*inputs)
    graph, actual = compiler.optimised(layers, inputs, run=True)
    kept = torch.equal(inputs[1], residual)
    errors = [float((a.float() - b.float()).abs().mean() / b.float().abs().mean()) for a, b in zip(actual, expected)]
    answers[name] = [count(graph), kept, errors, [list(a.stride()) == list(b.stride())
        for a, b in zip(actual, expected)]]

# What has to stay apart: a norm that others read, too; a weight of another type; an epsilon that vLLM does not know.
def others_read(x):
    y = ir.rms_norm(x, norm_weight, 1e-6)
    return *quantise(y), y
def by_op(wide):
    out = wide.new_empty(wide.shape[0], 512)
    torch.ops._C.silu_and_mul(out, wide)
    return quantise(out)
wide_weight = norm_weight.float()
apart = {
    "others read": others_read,
    "fp32 weight": lambda x: quantise(ir.rms_norm(x, wide_weight, 1e-6)),
    "epsilon": lambda x: quantise(ir.rms_norm(x, norm_weight, 3e-6)),
    "nothing before": lambda x: quantise(x + x),
}
answers["apart"] = {}
for name, function in apart.items():
    graph, _ = compiler.optimised(function, (x,))
    answers["apart"][name] = count(graph)[0]
graph, _ = compiler.optimised(by_op, (wide,))
answers["silu_and_mul by its op"] = count(graph)[:4]
passes[-1] = PackedQuantFusion(torch.bfloat16, norms=False, activations=True)
graph, _ = compiler.optimised(layers, inputs)
answers["activations alone"] = count(graph)[0]
answers["result"] = plugin.results()["packed_quant_fusion"]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    environment = {"VLLM_B200_ENABLE": "packed_quant_fusion", "VLLM_B200_STRICT": "1", "HF_HUB_OFFLINE": "1"}
    return answer(CODE.replace("FOLDER", str(folder)), **environment)


def test_every_place_in_a_model_is_found(found):
    """Of each layer the projections behind both norms and behind the activation, not the one behind attention."""
    assert found["result"] == "applied"
    # matched; norm, norm with residual, activation; GEMM alone; left: our linear layer, vLLM's quantisation
    assert found["vllm"] == [6, 1, 3, 2, 0, 0, 2]
    assert found["ours"] == [6, 1, 3, 2, 6, 2, 0]


def test_the_cache_key_knows_it(found):
    assert not found["same key"]


@pytest.mark.parametrize("end", ["quantise", "linear"])
def test_the_fused_graph_computes_the_same(found, end):
    counts, kept, errors, strides = found[end]
    assert counts[:4] == [3, 1, 1, 1]
    assert kept and all(strides)
    assert max(errors) < 2e-2 if end == "linear" else max(errors) < 1e-2


def test_what_stays_apart(found):
    assert found["apart"] == dict.fromkeys(found["apart"], 0)


def test_what_else_is_found(found):
    assert found["silu_and_mul by its op"] == [1, 0, 0, 1]
    assert found["activations alone"] == 1
