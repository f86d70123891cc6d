"""Which experts vLLM's oracle makes for FP8 block-scaled layers on GPUs that are pretended, and what they do with few
and with many tokens. The kernels' CPU reference answers for them."""

import functools

import pytest
from child import answer

pytest.importorskip("vllm")

CODE = """
import json, logging, os
from dataclasses import replace
import torch
from fake_cuda import config, pretend
pretend({capability})
from vllm import plugins
plugins.load_general_plugins()
lines = []
logging.getLogger("vllm.b200").addHandler(logging.Handler())
logging.getLogger("vllm.b200").handlers[-1].emit = lambda record: lines.append(record.getMessage())
logging.getLogger("vllm.b200").setLevel("INFO")

from vllm.model_executor.layers.fused_moe import modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.oracle import fp8 as oracle
from vllm.model_executor.layers.fused_moe.prepare_finalize import no_dp_ep
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape, create_fp8_quant_key, kFp8Dynamic128Sym, kFp8Static128BlockSym)
from vllm.v1.worker.workspace import init_workspace_manager
from vllm_b200_plugin import dispatch, plugin
from vllm_b200_plugin.ops.moe_few_tokens import few_tokens_moe

torch.accelerator.empty_cache = lambda: None
init_workspace_manager(torch.device("cpu"))
E, K, H, I = 8, 4, 256, 128
one = dict(tp_size=1, pcp_size=1, dp_size=1, ep_size=1, tp_rank=0, pcp_rank=0, dp_rank=0, ep_rank=0, sp_size=1,
           use_ep=False, all2all_backend="allgather_reducescatter", enable_eplb=False)

def layer(parallel={{}}, **changes):
    settings = dict(num_experts=E, experts_per_token=K, hidden_dim=H, intermediate_size=I, num_local_experts=E,
        num_logical_experts=E, activation=MoEActivation.SILU, device="cpu", in_dtype=torch.bfloat16,
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig(**(one | parallel)))
    return FusedMoEConfig(**(settings | changes))

rng = torch.Generator().manual_seed(0)
def weight(*shape):
    q = (torch.randn(shape, generator=rng) * 100).to(torch.float8_e4m3fn)
    return q, torch.rand(shape[0], shape[1] // 128, shape[2] // 128, generator=rng) / 2000
w13, s13 = weight(E, 2 * I, H)
w2, s2 = weight(E, H, I)

def kernel(moe=None, scales=(s13, s2), block=128, environment={{}}, biases=(None, None)):
    key = create_fp8_quant_key(static=True, group_shape=GroupShape(block, block))
    os.environ.update(environment)
    try:
        with config():
            moe = moe or layer()
            backend, cls = oracle.select_fp8_moe_backend(moe, key, kFp8Dynamic128Sym)
            quant = oracle.make_fp8_moe_quant_config(
                backend, *scales, None, None, w1_bias=biases[0], w2_bias=biases[1], block_shape=[block, block])
            return oracle.make_fp8_moe_kernel(quant, moe, cls, backend)
    finally:
        for name in environment:
            del os.environ[name]

def name(*args, **kwargs):
    try:
        return type(kernel(*args, **kwargs).fused_experts).__name__
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"

def offered(backend):
    return [cls.__name__ for cls in oracle.backend_to_kernel_cls(oracle.Fp8MoeBackend[backend])]

{body}
"""

SELECTION = """
from vllm.model_executor.layers.fused_moe.oracle import unquantized
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym, kFp8StaticChannelSym

def name_of_others():
    with config():
        backend, cls = oracle.select_fp8_moe_backend(layer(), kFp8StaticChannelSym, kFp8DynamicTokenSym)
        scales = torch.ones(E, 2 * I, 1), torch.ones(E, H, 1)
        quant = oracle.make_fp8_moe_quant_config(backend, *scales, None, None, per_act_token_quant=True)
        made = oracle.make_fp8_moe_kernel(quant, layer(), cls, backend)
        return [type(made.fused_experts).__name__, unquantized.select_unquantized_moe_backend(layer())[1].__name__]

picks = {
    "plain": name(), "block 64": name(block=64, scales=(torch.ones(E, 4, 4), torch.ones(E, 4, 2))),
    "float16": name(layer(in_dtype=torch.float16)),
    "gelu": name(layer(activation=MoEActivation.GELU_TANH, moe_backend="triton")),
    "swiglu limit": name(layer(swiglu_limit=7.0)),
    "swiglustep": name(layer(activation=MoEActivation.SWIGLUSTEP)),
    "gpt-oss": name(layer(activation=MoEActivation.SWIGLUOAI, moe_backend="triton")),
    "biases elsewhere": name(layer(has_bias=True, moe_backend="triton")),
    "biases in float32": name(layer(has_bias=True, moe_backend="triton"), biases=(torch.ones(E, 2 * I), None)),
    "LoRA": name(layer(is_lora_enabled=True)),
    "two experts": name(layer(experts_per_token=2)),
    "odd size": name(layer(intermediate_size=192)),
    "packed scales": name(scales=(s13.int(), s2.int())),
    "batch invariant": name(environment={"VLLM_BATCH_INVARIANT": "1"}),
    "disabled": name(environment={"VLLM_DISABLED_KERNELS": "B200FewTokensExperts"}),
    "features that are off": name_of_others(),
    "--moe-backend triton": name(layer(moe_backend="triton")),
    "--moe-backend deep_gemm": offered("DEEPGEMM"), "--moe-backend marlin": offered("MARLIN"),
}
print(json.dumps([picks, lines, plugin.results(), torch.cuda.is_initialized()]))
"""

CALLS = """
moe = layer(moe_backend="triton")
k = kernel(moe)
theirs = k.fused_experts._theirs
seen = []
def apply(**arguments):
    seen.append({"dtype": str(arguments["hidden_states"].dtype), "scale": arguments["a1q_scale"].shape[-1]})
    arguments["output"].zero_()
theirs.apply = apply
no_dp_ep.moe_kernel_quantize_input = lambda a, *args, **kwargs: (
    a.to(torch.float8_e4m3fn), torch.ones(len(a), H // 128))

def run(num_tokens, experts=slice(0, E), expert_map=None, on_input=False, topk=K, k=k, **more):
    rng = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, H, generator=rng).bfloat16()
    weights, ids = torch.rand(num_tokens, E, generator=rng).topk(topk)
    ids = ids.int()
    out = k.apply(x, w13[experts], w2[experts], weights, ids, MoEActivation.SILU, E, expert_map, on_input)
    format = k.fused_experts._format
    if on_input:
        x, weights = x * weights.bfloat16(), None
    expected = few_tokens_moe(x, w13[experts], s13[experts], w2[experts], s2[experts], weights, ids,
        expert_map=expert_map, format=format, **more) if num_tokens <= 64 else None
    return out, expected

limit = dispatch.few_tokens_limit(K, E, H, I, (9, 0))
same = {}
for num_tokens in (1, 2, limit):
    out, expected = run(num_tokens)
    same[num_tokens] = bool(torch.equal(out, expected)) and bool(out.any())
out, expected = run(3, on_input=True, topk=1)
same["weight on input"] = bool(torch.equal(out, expected))
small = len(seen)
run(limit + 1)
limited = layer(moe_backend="triton", swiglu_limit=0.5, has_bias=True)
biases = torch.randn(E, 2 * I, generator=rng).bfloat16(), torch.randn(E, H, generator=rng).bfloat16()
more = dict(k=kernel(limited, biases=biases), activation="silu_clamped", limit=0.5,
    w13_bias=biases[0], w2_bias=biases[1])
for on_input in (False, True):
    out, expected = run(3, on_input=on_input, topk=1 if on_input else K, **more)
    same[f"limit and biases {on_input}"] = bool(torch.equal(out, expected)) and not torch.equal(out, run(3)[0])
half = layer(dict(ep_size=2, use_ep=True), moe_backend="triton", num_local_experts=E // 2)
k = kernel(half, scales=(s13[:4], s2[:4]))
expert_map = torch.tensor([0, 1, 2, 3, -1, -1, -1, -1], dtype=torch.int32)
out, expected = run(3, slice(0, 4), expert_map, k=k)
same["expert parallel"] = bool(torch.equal(out, expected)) and type(k.fused_experts).__name__.startswith("B200")
k.fused_experts.post_gemm2_hook = print
same["a hook in place of the sum"] = k.fused_experts._theirs.post_gemm2_hook is print
k.fused_experts._theirs.apply = apply
run(3, slice(0, 4), expert_map, k=k)
print(json.dumps([same, small, seen]))
"""


@functools.cache
def child(capability: tuple[int, int], body: str):
    return answer(CODE.format(capability=capability, body=body), VLLM_B200_STRICT="1")


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_selection(capability):
    picks, lines, results, cuda = child(capability, SELECTION)
    assert results["moe_few_tokens"] == "applied" and not cuda
    triton = "B200FewTokensTritonExperts"
    assert picks["--moe-backend triton"] == (triton if capability == (9, 0) else "TritonExperts")
    assert picks["--moe-backend deep_gemm"] == ["B200FewTokensTritonOrDeepGemmExperts"]
    assert picks["--moe-backend marlin"] == ["MarlinExperts"]
    if capability == (9, 0):
        assert picks["plain"] == triton
        assert any("our two kernels up to" in line and "TritonExperts" in line for line in lines)
        for refused in (
            "block 64",
            "float16",
            "swiglustep",
            "gpt-oss",
            "biases elsewhere",
            "biases in float32",
            "LoRA",
            "two experts",
            "odd size",
            "batch invariant",
            "disabled",
        ):
            assert picks[refused] == "TritonExperts", refused
        assert picks["features that are off"] == ["TritonExperts"] * 2
        assert any("the feature for FP8_TOKEN is off" in line for line in lines)
        assert picks["gelu"] == picks["swiglu limit"] == triton
        assert picks["packed scales"] == "TritonExperts"
        reasons = ("blocks of 128x128", "bfloat16", "LoRA", "float32 scales", "BATCH_INVARIANT", "got swiglustep")
        reasons += ("gate and up in turns", "biases are not where", "biases in bfloat16 of the shape (8, 256)")
        for reason in reasons:
            assert any(reason in line for line in lines), reason


def test_few_tokens_are_ours_and_many_are_theirs():
    same, small, seen = child((9, 0), CALLS)
    assert all(same.values()), same
    assert small == 0
    assert seen == [{"dtype": "torch.float8_e4m3fn", "scale": 2}] * 2, "many tokens, and those of a layer with a hook"
