"""Which experts vLLM's oracle makes for NVFP4 layers of both checkpoint families on a Hopper that is pretended, what a
layer keeps of its weights, and what it does with few and with many tokens."""

import pytest
from child import answer
from test_moe_few_tokens import CODE

pytest.importorskip("vllm")

BODY = """
import sys, types
from vllm.model_executor.layers.fused_moe.oracle import nvfp4
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_nvfp4 as compressed)
from vllm_b200_plugin.integration import moe_few_tokens as ours
from vllm_b200_plugin.ops.moe_few_tokens import ExpertFormat
from vllm_b200_plugin.ops.nvfp4_experts import pack_w13, pack_w2

def q(*shape):
    return torch.randint(0, 256, (*shape[:2], shape[2] // 2), generator=rng, dtype=torch.uint8)
def s(*shape):
    return (torch.rand(*shape[:2], shape[2] // 16, generator=rng) * 60 + 2).to(torch.float8_e4m3fn)
loaded = dict(w13=(q(E, 2 * I, H), s(E, 2 * I, H)), w2=(q(E, H, I), s(E, H, I)))
factors = dict(w13=torch.rand(E, generator=rng) / 5000, w2=torch.rand(E, generator=rng) / 5000)

def prepared(**arguments):  # in place of Marlin's, which needs a GPU
    return [torch.zeros(E, 8, 8), torch.zeros(1), torch.ones(E)] * 2
nvfp4.prepare_nvfp4_moe_layer_for_marlin = prepared
from vllm.model_executor.layers.fused_moe.experts import marlin_moe
marlin_moe.MarlinExpertsBase.moe_problem_size = lambda self, a1, w1, w2, ids: (E, len(a1), I, H, ids.shape[1])

def made(fmt="compressed", **changes):
    moe = layer(**changes)
    module = torch.nn.Module()
    with config():
        if fmt == "compressed":
            method = compressed.CompressedTensorsW4A4Nvfp4MoEMethod(moe, "experts")
            method.create_weights(module, E, H, moe.intermediate_size_per_partition, torch.bfloat16)
            names, stored = ("weight_packed", "weight_scale", "weight_global_scale"), lambda f: 1 / f
        else:
            from vllm.model_executor.layers.quantization import modelopt
            method = object.__new__(modelopt.ModelOptNvFp4FusedMoE)
            torch.nn.Module.__init__(method) if isinstance(method, torch.nn.Module) else None
            method.moe, method.use_a16 = moe, False
            method.per_token_activation = False
            method.nvfp4_backend, method.experts_cls = nvfp4.select_nvfp4_moe_backend(
                moe, modelopt.kNvfp4Static, modelopt.kNvfp4Dynamic)
            for part in ("w13", "w2"):
                for name in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
                    module.register_parameter(f"{part}_{name}", torch.nn.Parameter(torch.ones(E), False))
            names, stored = ("weight", "weight_scale", "weight_scale_2"), lambda f: f
    for part in ("w13", "w2"):
        factor = factors[part].unsqueeze(1).expand(E, 2).contiguous() if part == "w13" else factors[part]
        for name, value in zip(names, (*loaded[part], stored(factor))):
            getattr(module, f"{part}_{name}").data = value
    module.quant_method, module.moe_config, module._expert_routing_tables = method, moe, lambda: None
    return module, method

def process(module, method):
    with config():
        method.process_weights_after_loading(module)
    return method.moe_kernel

def check(fmt):
    module, method = made(fmt)
    kernel = process(module, method)
    seen = []
    def theirs(**arguments):
        seen.append([str(arguments["hidden_states"].dtype), arguments["w1"] is module.w13_weight])
        arguments["output"].zero_()
    kernel.fused_experts._theirs.apply = theirs
    tiles = (pack_w13(*loaded["w13"]), factors["w13"], pack_w2(*loaded["w2"]), factors["w2"])
    same = []
    for num_tokens in (1, 16, 17):
        x = torch.randn(num_tokens, H, generator=rng).bfloat16()
        weights, ids = torch.rand(num_tokens, E, generator=rng).topk(K)
        ids = ids.int()
        out = kernel.apply(x, module.w13_weight, module.w2_weight, weights, ids, MoEActivation.SILU, E, None, False)
        expected = few_tokens_moe(x, *tiles, weights, ids, format=ExpertFormat.NVFP4)
        same.append(bool(torch.allclose(out, expected, rtol=1e-2)) and bool(out.any()))
    choices = [ours.choice(module, num_tokens).kernel for num_tokens in (1, 17)]
    return same, seen, type(kernel.fused_experts).__name__, *choices

results = {}
def keeps(**changes):
    module, method = made(**changes)
    name = type(process(module, method).fused_experts).__name__
    return module.b200_w13 is not None, [key for key in module.state_dict() if key.startswith("b200")], name

dispatch.FEW_TOKENS_MOE["nvfp4"] = 0
results["not measured"] = keeps()
dispatch.FEW_TOKENS_MOE["nvfp4"] = 16
results["plain"] = keeps()
results["gelu"] = keeps(activation=MoEActivation.GELU)
results["LoRA"] = keeps(is_lora_enabled=True)
results["eplb"] = keeps(parallel=dict(enable_eplb=True))
results["checks"] = {fmt: check(fmt) for fmt in ("compressed", "modelopt")}
for backend in ("HUMMING", "VLLM_CUTLASS"):
    results[backend] = [cls.__name__ for cls in nvfp4.backend_to_kernel_cls(nvfp4.NvFp4MoeBackend[backend])]
print(json.dumps([results, lines, plugin.results()["nvfp4_moe_few_tokens"], torch.cuda.is_initialized()]))
"""
OURS = "B200FewTokensMarlinExperts"


def test_ours_take_few_tokens_from_a_layout_of_their_own():
    settings = {"VLLM_B200_STRICT": "1", "VLLM_B200_ENABLE": "nvfp4_moe_few_tokens"}
    results, lines, state, cuda = answer(CODE.format(capability=(9, 0), body=BODY), **settings)
    assert state == "applied" and not cuda
    assert results["plain"] == [True, [], OURS]
    for refused in ("not measured", "gelu", "LoRA", "eplb"):
        assert results[refused] == [False, [], "MarlinExperts"], refused
    for fmt, (same, seen, name, few, many) in results["checks"].items():
        assert same == [True, True, False] and name == OURS, fmt
        assert seen == [["torch.bfloat16", True]], fmt
        assert few == "few_tokens" and many == "MarlinExperts", fmt
    assert results["HUMMING"] == [
        "BatchedHummingGroupedExperts",
        "HummingGroupedExperts",
        "HummingIndexedExperts",
    ]
    assert results["VLLM_CUTLASS"] == ["CutlassExpertsFp4"]
    assert any("our two kernels up to 16 tokens" in line and "MarlinExperts" in line for line in lines)
