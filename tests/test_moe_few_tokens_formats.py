"""Which experts vLLM's oracles make for bf16 and INT8 layers and for FP8 layers without block scales, and what they do
with few and with many tokens. The kernels' CPU reference answers for them."""

import pytest
from child import answer
from test_moe_few_tokens import CODE

pytest.importorskip("vllm")

BODY = """
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig, biased_moe_quant_config
from vllm.model_executor.layers.fused_moe.oracle import int8, unquantized
from vllm.model_executor.layers.quantization.utils import quant_utils as keys
from vllm_b200_plugin.ops.moe_few_tokens import ExpertFormat
b13, b2 = (torch.randn(E, n, k, generator=rng).bfloat16() for n, k in ((2 * I, H), (H, I)))
by_expert = torch.rand(E, generator=rng) / 2000
i13, i2 = (torch.randint(-127, 128, shape, generator=rng).to(torch.int8) for shape in (w13.shape, w2.shape))
WEIGHTS = dict(bf16=(b13, b2), int8=(i13, i2))
given = (torch.tensor(0.01), torch.tensor([0.002]))
SCALES = dict(token=(torch.rand(E, 2 * I, 1) / 2000, torch.rand(E, H, 1) / 2000), tensor=(by_expert,) * 2,
    given=(by_expert,) * 2)
SCALES["int8"] = SCALES["token"]
FORMATS = dict(bf16="BF16", token="FP8_TOKEN", int8="INT8_TOKEN", tensor="FP8_TENSOR", given="FP8_TENSOR")
KEYS = dict(token=(keys.kFp8StaticChannelSym, keys.kFp8DynamicTokenSym),
    tensor=(keys.kFp8StaticTensorSym, keys.kFp8DynamicTensorSym),
    given=(keys.kFp8StaticTensorSym, keys.kFp8StaticTensorSym))

dispatch.FEW_TOKENS_MOE["int8_token"] = 16  # until it is measured

def kernel(kind, moe=None, scales=None):
    moe = moe or layer()
    with config():
        if kind == "bf16":
            backend, cls = unquantized.select_unquantized_moe_backend(moe)
            return unquantized.make_unquantized_moe_kernel(FusedMoEQuantConfig.make(), moe, backend, cls)
        if kind == "int8":
            backend, cls = int8.select_int8_moe_backend(moe)
            quant = int8.make_int8_moe_quant_config(backend, *SCALES[kind], per_act_token_quant=True)
            return int8.make_int8_moe_kernel(backend, quant, moe, cls)
        backend, cls = oracle.select_fp8_moe_backend(moe, *KEYS[kind], allow_vllm_cutlass=kind == "token")
        quant = oracle.make_fp8_moe_quant_config(backend, *(scales or SCALES[kind]),
            *(given if kind == "given" else (None, None)), per_act_token_quant=kind == "token",
            per_out_ch_quant=kind == "token")
        return oracle.make_fp8_moe_kernel(quant, moe, cls, backend)

def name(*args, **kwargs):
    return type(kernel(*args, **kwargs).fused_experts).__name__

def check(kind):
    k = kernel(kind)
    seen = []
    def theirs(**arguments):
        seen.append([str(arguments["hidden_states"].dtype), arguments["a1q_scale"] is None])
        arguments["output"].zero_()
    k.fused_experts._theirs.apply = theirs
    no_dp_ep.moe_kernel_quantize_input = lambda a, *args, quant_dtype, **kwargs: (
        (a, None) if quant_dtype is None else (a.to(quant_dtype), torch.ones(1)))
    weights13, weights2 = WEIGHTS.get(kind, (w13, w2))
    def run(num_tokens):
        x = torch.randn(num_tokens, H, generator=rng).bfloat16()
        weights, ids = torch.rand(num_tokens, E, generator=rng).topk(K)
        ids = ids.int()
        out = k.apply(x, weights13, weights2, weights, ids, MoEActivation.SILU, E, None, False)
        return out, x, weights, ids
    limit = dispatch.few_tokens_limit(K, E, H, I, (9, 0), "bf16" if kind == "bf16" else "fp8_token")
    same = []
    for num_tokens in (1, limit):
        out, x, weights, ids = run(num_tokens)
        s13, s2 = (None, None) if kind == "bf16" else (s.squeeze(-1) for s in SCALES[kind])
        format = ExpertFormat[FORMATS[kind]]
        more = dict(x_scale=given[0], hidden_scale=given[1]) if kind == "given" else {}
        expected = few_tokens_moe(x, weights13, s13, weights2, s2, weights, ids, format=format, **more)
        same.append(bool(torch.equal(out, expected)) and bool(out.any()))
    small = len(seen)
    run(limit + 1)
    return same, small, seen

picks = {kind: name(kind) for kind in FORMATS}
picks["odd scales"] = name("token", scales=(torch.ones(E, 4), torch.ones(E, 4)))
picks["LoRA"] = name("bf16", layer(is_lora_enabled=True))
picks["swiglustep"] = name("bf16", layer(activation=MoEActivation.SWIGLUSTEP))
picks["gelu"] = name("bf16", layer(activation=MoEActivation.GELU))
picks["odd size"] = name("bf16", layer(intermediate_size=96))
from vllm_b200_plugin.integration import moe_few_tokens as ours
beside_flashinfer = ours.refusal(layer(), FusedMoEQuantConfig.make(), up_first=True)
offered = [cls.__name__ for cls in unquantized.backend_to_kernel_cls(unquantized.UnquantizedMoeBackend.BATCHED_TRITON)]
checks = {kind: check(kind) for kind in FORMATS}

def check_gpt_oss():
    moe = layer(activation=MoEActivation.SWIGLUOAI, has_bias=True)
    biases = torch.randn(E, 2 * I, generator=rng).bfloat16(), torch.randn(E, H, generator=rng).bfloat16()
    with config():
        backend, cls = unquantized.select_unquantized_moe_backend(moe)
        k = unquantized.make_unquantized_moe_kernel(biased_moe_quant_config(*biases), moe, backend, cls)
    x = torch.randn(3, H, generator=rng).bfloat16()
    weights, ids = torch.rand(3, E, generator=rng).topk(K)
    out = k.apply(x, b13, b2, weights, ids.int(), moe.activation, E, None, False)
    more = dict(activation="silu_clamped", limit=7.0, alpha=1.702, beta=1.0, interleaved=True)
    expected = few_tokens_moe(x, b13, None, b2, None, weights, ids.int(), format=ExpertFormat.BF16,
        w13_bias=biases[0], w2_bias=biases[1], **more)
    return dict(ours=type(k.fused_experts).__name__.startswith("B200"), same=bool(torch.equal(out, expected)))

gpt_oss = check_gpt_oss()
print(json.dumps(
    [picks, lines, plugin.results(), offered, checks, gpt_oss, beside_flashinfer, torch.cuda.is_initialized()]))
"""
FEATURES = "fp8_moe_few_tokens,int8_moe_few_tokens,bf16_moe_few_tokens"
# What vLLM chooses for each.
THEIRS = dict.fromkeys(("bf16", "int8", "tensor", "given"), "TritonExperts") | {"token": "TritonOrCutlassExperts"}
QUANTISED = {"bf16": ["torch.bfloat16", True], "int8": ["torch.int8", False]}


def test_with_the_features_ours_take_few_tokens():
    picks, lines, results, offered, checks, gpt_oss, beside_flashinfer, cuda = answer(
        CODE.format(capability=(9, 0), body=BODY), VLLM_B200_STRICT="1", VLLM_B200_ENABLE=FEATURES
    )
    assert all(results[name] == "applied" for name in FEATURES.split(",")) and not cuda
    assert {kind: picks[kind] for kind in THEIRS} == {kind: f"B200FewTokens{name}" for kind, name in THEIRS.items()}
    assert picks["odd scales"] == THEIRS["token"]
    for refused in ("LoRA", "swiglustep", "odd size"):
        assert picks[refused] == "TritonExperts", refused
    assert picks["gelu"] == "B200FewTokensTritonExperts" and all(gpt_oss.values()), gpt_oss
    assert "FlashInfer" in beside_flashinfer
    assert offered == ["BatchedTritonExperts"]
    for reason in ("scales of the shapes", "LoRA", "got swiglustep", "multiples of 64"):
        assert any(reason in line for line in lines), reason
    for kind in THEIRS:
        same, small, seen = checks[kind]
        assert same == [True, True] and small == 0, kind
        assert seen == [QUANTISED.get(kind, ["torch.float8_e4m3fn", False])], kind
