"""The fusion of RMSNorm and silu_and_mul with the FP8 block-scaled linear layer behind them, on the graphs that vLLM's
own passes leave."""

import json

import pytest
from child import answer
from test_packed_quant_fusion import CONFIG

pytest.importorskip("vllm")

CODE = """
import collections, json
import torch
from fake_cuda import pretend
pretend((9, 0))
import fake_compile
from vllm import plugins
plugins.load_general_plugins()
config = fake_compile.engine_config("FOLDER")
fake_compile.prepare()
import vllm.ir.ops as ir
from vllm.compilation.passes.inductor_pass import pass_context
from vllm.config.utils import Range
from vllm_b200_plugin import dispatch, plugin, vllm_compat
from vllm_b200_plugin.integration.fp8_block_op import Engine, fp8_block_linear
from vllm_b200_plugin.integration.norm_linear_fusion import NormLinearFusion

compiler = fake_compile.Compiler(config)
passes = compiler.passes.passes

def count(graph):
    ops = collections.Counter(str(n.target).split(".")[1] for n in graph.nodes if ".default" in str(n.target))
    fusions = [p for p in passes if isinstance(p, NormLinearFusion)]
    names = ("norm_fp8_block_linear", "add_norm_fp8_block_linear", "silu_fp8_block_linear", "fp8_block_linear")
    return [fusions[0].matched_count if fusions else None, *[ops[name] for name in names]]

answers = {}
ids = torch.zeros(16, dtype=torch.long)
model = fake_compile.model(config)
graph, _ = compiler.optimised(model.model.forward, (ids, ids, None, None))
answers["model"] = count(graph)
with pass_context(Range(1, 2048)):
    keys = [compiler.passes.uuid()]
    ours = passes.pop()
    keys.append(compiler.passes.uuid())
    passes.append(ours)
answers["same key"] = keys[0] == keys[1]

def product(q, scale, weight, weight_scale):
    x = q.float() * scale.repeat_interleave(128, 1)
    return x @ (weight.float() * weight_scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)).t()

calls = collections.Counter()
def deep_gemm(activation, weights, out, **options):
    calls["deep_gemm"] += 1
    out.copy_(product(*activation, *weights))

def flashinfer(input, weight, input_scale, weight_scale, out_dtype):
    calls["flashinfer"] += 1
    return product(input, input_scale, weight, weight_scale).to(out_dtype)

vllm_compat.FP8_GEMM_NT.replace(deep_gemm)
vllm_compat.FLASHINFER_GEMM.replace(flashinfer)
generator = torch.Generator().manual_seed(0)
def normal(*shape):
    return torch.randn(shape, generator=generator).bfloat16()
norm_weight = normal(512)
weight, weight_scale = normal(64, 512).to(torch.float8_e4m3fn), torch.ones(1, 4, dtype=torch.float32)
def layers(x, residual, wide, norm_weight):
    def linear(y):
        return fp8_block_linear(y, weight, weight_scale, (128, 128), torch.bfloat16, Engine.FLASHINFER_DEEP_GEMM)
    y, total = ir.fused_add_rms_norm(x, residual, norm_weight, 1e-6)
    gated = torch.nn.functional.silu(wide[:, :512]) * wide[:, 512:]
    return linear(y), total, linear(ir.rms_norm(x, norm_weight, 1e-5)), linear(gated)

answers["rows"] = {}
for rows in (1, 6, 20, 40):
    inputs = normal(rows, 512), normal(rows, 512), normal(rows, 1024), norm_weight
    expected = layers(*inputs)
    kept = inputs[1].clone()
    calls.clear()
    graph, actual = compiler.optimised(layers, inputs, run=True)
    errors = [float((a.float() - b.float()).abs().mean() / b.float().abs().mean()) for a, b in zip(actual, expected)]
    answers["rows"][rows] = [count(graph), torch.equal(kept, inputs[1]), errors, dict(calls)]

small = dispatch.SmallMChoice(dispatch.SMALL_M, "test", (1, 8, 1, 0))
dispatch.small_m_gemm = lambda *args, **kwargs: small
calls.clear()
inputs = normal(3, 512), normal(3, 512), normal(3, 1024), norm_weight
graph, actual = compiler.optimised(layers, inputs, run=True)
answers["few"] = [count(graph), dict(calls), bool(torch.isfinite(actual[0]).all())]

def others_read(x):
    y = ir.rms_norm(x, norm_weight, 1e-6)
    return fp8_block_linear(y, weight, weight_scale, (128, 128), torch.bfloat16, Engine.FLASHINFER_DEEP_GEMM), y
graph, _ = compiler.optimised(others_read, (normal(6, 512),))
answers["others read"] = count(graph)[0]
answers["result"] = plugin.results()["norm_linear_fusion"]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    environment = {"VLLM_B200_STRICT": "1", "HF_HUB_OFFLINE": "1"}
    return answer(CODE.replace("FOLDER", str(folder)), **environment)


def test_every_place_in_a_model_is_found(found):
    """Two norms and an activation a layer; the layer behind attention stays as it is."""
    assert found["result"] == "applied"
    assert found["model"] == [6, 1, 3, 2, 2]
    assert not found["same key"]


@pytest.mark.parametrize("rows, gemm", [(1, "flashinfer"), (6, "flashinfer"), (20, "deep_gemm"), (40, "deep_gemm")])
def test_the_fused_graph_computes_the_same(found, rows, gemm):
    counts, kept, errors, calls = found["rows"][str(rows)]
    assert counts == [3, 1, 1, 1, 0]
    assert kept and max(errors) < 2e-2
    assert calls == {gemm: 3}


def test_few_tokens_go_to_our_gemm(found):
    counts, calls, finite = found["few"]
    assert counts == [3, 1, 1, 1, 0] and calls == {} and finite


def test_a_norm_that_others_read_stays(found):
    assert found["others read"] == 0
