"""The routed experts of a layer: our kernels for few tokens, vLLM's fused Triton path, CUTLASS without block scales,
Marlin and Humming with NVFP4 weights.

With block scales engines differ in how they scale activations, by any fp32 or by a power of two; the check takes the
nearer reference.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.moe import FusedExpertsCase, fused_experts_benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families._common import (
    E4M3_MAX,
    EPS,
    FP8_LIMIT,
    GROUP,
    Returned,
    dequantise,
    e4m3_values,
    error_of,
    fp8_block_weight,
    generator,
    normal,
    peer,
    powers_of_two,
    quantise_groups,
    some_rows,
    verdict,
)
from vllm_b200_plugin.ops.gated_quant import activate_and_multiply
from vllm_b200_plugin.ops.moe_few_tokens import (
    MAX_TOKENS_OF_ONE_SCALE,
    ExpertFormat,
    few_tokens_moe,
    few_tokens_refusal,
    scratch_elements,
)
from vllm_b200_plugin.ops.nvfp4_experts import pack_w2, pack_w13, unpack_w2, unpack_w13
from vllm_b200_plugin.ops.nvfp4_quant import e2m1_to_float

OP = "fused_experts"
FUSED_MOE = "vllm.model_executor.layers.fused_moe"
QUANTIZATION = "vllm.model_executor.layers.quantization.utils.marlin_utils_fp4"
COMPRESSED = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"
BLOCK = (GROUP, GROUP)
CHECKED_TOKENS = 4
cases = fused_experts_benchmarks


GIVEN = {"x_scale": 2.0**-6, "hidden_scale": 2.0**-9}
SWIGLU = {"activation": "silu_clamped", "limit": 7.0, "alpha": 1.702, "beta": 1.0}


def record(case: FusedExpertsCase) -> dict[str, Any]:
    scales = f"-{case.format.split('_')[1]}" if "_" in case.format and case.format != "fp8_block" else ""
    return {
        "m": case.num_tokens,
        "n": case.intermediate_size,
        "k": case.hidden_size,
        "dtype": {"bf16": "bf16", "int8": "int8", "nvfp": "bf16_e2m1"}.get(case.format[:4], "e4m3"),
        "layout": case.experts_name + scales + ("" if case.activation == "silu" else f"-{case.activation}"),
        "bytes": case.num_bytes,
        "flops": case.flops,
    }


def _operands(case: FusedExpertsCase, seed: int) -> tuple[torch.Tensor | None, ...]:
    """x, w13 and its scale, w2 and its scale, and for each token the weights and ids of top_k distinct experts."""
    rng = generator(seed)
    x, w13, w2 = _loaded(case, rng)
    if case.format == "nvfp4":
        w13, w2 = ((pack(*w[:2]), w[2]) for pack, w in ((pack_w13, w13), (pack_w2, w2)))
    scores = torch.rand(case.num_tokens, case.num_experts, generator=rng, device=families.device)
    weights, ids = scores.topk(case.top_k)
    return x, *w13, *w2, weights / weights.sum(1, keepdim=True), ids.int()


def _loaded(case: FusedExpertsCase, rng: torch.Generator) -> tuple[Any, Any, Any]:
    """x, and w13 and w2 as a checkpoint has them, each with its scale or scales."""
    experts, hidden, intermediate = case.num_experts, case.hidden_size, case.intermediate_size
    x = normal((case.num_tokens, hidden), rng)
    w13 = _weight((experts, 2 * intermediate, hidden), case.format, rng)
    return x, w13, _weight((experts, hidden, intermediate), case.format, rng)


def _weight(shape: tuple[int, int, int], format: str, rng: torch.Generator) -> tuple[torch.Tensor | None, ...]:
    if format == "bf16":
        return normal(shape, rng).div_(shape[2] ** 0.5), None
    if format == "nvfp4":
        experts, rows, columns = shape
        packed = (experts, rows, columns // 2)
        bits = torch.randint(0, 256, packed, generator=rng, device=families.device, dtype=torch.uint8)
        scale = torch.rand((experts, rows, columns // 16), generator=rng, device=families.device).mul_(384).add_(64)
        global_scale = torch.full((experts,), 1e-3 / columns**0.5, device=families.device)
        return bits, scale.to(torch.float8_e4m3fn), global_scale
    if format == "fp8_block":
        return fp8_block_weight(shape, rng)
    scale = powers_of_two(shape[: 2 if "channel" in format else 1], -13, -11, rng)
    if "int8" in format:
        return normal(shape, rng).mul_(32).clamp_(-127, 127).to(torch.int8), scale
    return e4m3_values(shape, rng), scale


def _given(case: FusedExpertsCase) -> dict[str, torch.Tensor]:
    scales = GIVEN if "given" in case.format else {}
    return {name: torch.tensor([scale], device=families.device) for name, scale in scales.items()}


def _gated(case: FusedExpertsCase, seed: int) -> dict[str, Any]:
    """Arguments of few_tokens_moe for the activation and the biases."""
    if case.activation != "gpt_oss":
        return SWIGLU if case.activation == "silu_clamped" else {"activation": case.activation}
    rng = generator(seed + 1)
    w13_bias, w2_bias = (
        normal((case.num_experts, rows), rng) for rows in (2 * case.intermediate_size, case.hidden_size)
    )
    return SWIGLU | {"interleaved": True, "w13_bias": w13_bias, "w2_bias": w2_bias}


def ours(case: FusedExpertsCase, seed: int) -> Run:
    assignments = case.num_tokens * case.top_k
    format = ExpertFormat[case.format.split("-")[0].upper()]
    sizes = (case.num_experts, case.hidden_size, case.intermediate_size)
    if refusal := few_tokens_refusal(assignments, *sizes, format):
        raise Missing(refusal)
    if case.format == "fp8_tensor-expert" and case.num_tokens > MAX_TOKENS_OF_ONE_SCALE:
        raise Missing(f"one scale for all activations is for {MAX_TOKENS_OF_ONE_SCALE} tokens at most")
    operands, more = _operands(case, seed), _given(case) | _gated(case, seed)
    out = torch.empty_like(operands[0])
    scratch = out.new_empty(scratch_elements(assignments, case.intermediate_size))
    return Run(lambda: few_tokens_moe(*operands, format=format, **more, scratch=scratch, out=out), (out,))


def _quant_config(case: FusedExpertsCase, w13_scale: Any, w2_scale: Any, seed: int) -> Any:
    if case.format == "bf16":
        if case.activation != "gpt_oss":
            return None
        gated = _gated(case, seed)
        return peer(f"{FUSED_MOE}.config", "biased_moe_quant_config")(gated["w13_bias"], gated["w2_bias"])
    if case.format == "nvfp4":
        raise Missing("vLLM's Triton experts do not take NVFP4")
    make = peer(f"{FUSED_MOE}.config", "fp8_w8a8_moe_quant_config")
    if case.format == "fp8_block":
        return make(w1_scale=w13_scale, w2_scale=w2_scale, block_shape=list(BLOCK))
    if case.format == "int8_token-channel":
        make = peer(f"{FUSED_MOE}.config", "int8_w8a8_moe_quant_config")
        scales = {"w1_scale": w13_scale.unsqueeze(-1), "w2_scale": w2_scale.unsqueeze(-1)}
        return make(**scales, a1_scale=None, a2_scale=None, per_act_token_quant=True)
    if case.format == "fp8_token-channel":
        w13_scale, w2_scale = w13_scale.unsqueeze(-1), w2_scale.unsqueeze(-1)
        return make(w1_scale=w13_scale, w2_scale=w2_scale, per_act_token_quant=True, per_out_ch_quant=True)
    given = _given(case)
    scales = {"a1_scale": given.get("x_scale"), "a2_scale": given.get("hidden_scale")}
    return make(w1_scale=w13_scale, w2_scale=w2_scale, **scales)


def vllm_triton(case: FusedExpertsCase, seed: int) -> Run:
    fused_experts = peer(f"{FUSED_MOE}.fused_moe", "fused_experts")
    if case.activation == "silu_clamped":
        raise Missing("vLLM's fused_experts has no limit; its experts class for layers has")
    activation = peer(f"{FUSED_MOE}.activation", "MoEActivation")(
        "swigluoai" if case.activation == "gpt_oss" else case.activation
    )
    x, w13, w13_scale, w2, w2_scale, weights, ids = _operands(case, seed)
    config = _quant_config(case, w13_scale, w2_scale, seed)
    return Returned(lambda: fused_experts(x, w13, w2, weights, ids, activation=activation, quant_config=config))


def vllm_cutlass(case: FusedExpertsCase, seed: int) -> Run:
    """What vLLM's CutlassExpertsFp8 does, with the quantisation before it."""
    if case.format in ("bf16", "fp8_block", "int8_token-channel", "nvfp4"):
        raise Missing("vLLM's CUTLASS takes FP8 with a scale for each channel or expert")
    experts = peer(f"{FUSED_MOE}.experts.cutlass_moe", "run_cutlass_moe_fp8")
    make_scratch = peer(f"{FUSED_MOE}.moe_permute_unpermute", "get_moe_permute_scratch")
    silu = peer(f"{FUSED_MOE}.activation", "MoEActivation").SILU
    quant = peer("vllm._custom_ops", "scaled_fp8_quant")
    x, w13, w13_scale, w2, w2_scale, weights, ids = _operands(case, seed)
    config = _quant_config(case, w13_scale, w2_scale, seed)
    sizes = (case.hidden_size, case.intermediate_size, 2 * case.intermediate_size)
    by_hidden, by_intermediate, by_both = (
        torch.full((case.num_experts,), size, device=x.device, dtype=torch.int64) for size in sizes
    )
    scratch = make_scratch(num_experts=case.num_experts, num_local_experts=case.num_experts, device=x.device)
    space = [x.new_empty(case.num_tokens * case.top_k, max(sizes)) for _ in range(2)]
    out, by_token = torch.empty_like(x), config.per_act_token_quant

    def call() -> None:
        q, scale = quant(x, config.a1_scale, use_per_token_if_dynamic=by_token)
        experts(
            out, q, w13, w2, ids, silu, case.num_experts, None, config.w1_scale, config.w2_scale, scale,
            config.a2_scale, by_hidden, by_intermediate, by_both, by_hidden, *space, None, x.dtype, by_token,
            config.per_out_ch_quant, False, weights, scratch,
        )  # fmt: skip

    return Run(call, (out,))


def vllm_marlin(case: FusedExpertsCase, seed: int) -> Run:
    """What vLLM runs for NVFP4 on Hopper, on weights that it has prepared."""
    if case.format != "nvfp4":
        raise Missing("Marlin is what vLLM takes for NVFP4 alone")
    prepare = peer(QUANTIZATION, "prepare_nvfp4_moe_layer_for_marlin")
    experts = peer(f"{FUSED_MOE}.experts.marlin_moe", "fused_marlin_moe")
    moe_sum = peer("vllm._custom_ops", "moe_sum")
    type_id = peer("vllm.scalar_type", "scalar_types").float4_e2m1f.id
    *_, weights, ids = _operands(case, seed)
    x, (w13, w13_scale, w13_factor), (w2, w2_scale, w2_factor) = _loaded(case, generator(seed))
    layer = SimpleNamespace(
        num_experts=case.num_experts, hidden_size=case.hidden_size, params_dtype=torch.bfloat16,
        intermediate_size_per_partition=case.intermediate_size,
    )  # fmt: skip
    w13, w13_scale, w13_factor, w2, w2_scale, w2_factor = prepare(
        layer, w13, w13_scale, w13_factor, w2, w2_scale, w2_factor, is_act_and_mul=True
    )
    out = torch.empty_like(x)
    widest = max(2 * case.intermediate_size, case.hidden_size)
    space = [x.new_empty(case.num_tokens * case.top_k, size) for size in (widest, case.intermediate_size)]

    def call() -> None:
        experts(
            x, w13, w2, None, None, w13_scale, w2_scale, weights, ids, type_id, global_num_experts=case.num_experts,
            moe_sum=lambda parts, total, *_: moe_sum(parts, total), global_scale1=w13_factor, global_scale2=w2_factor,
            intermediate_cache13=space[0], intermediate_cache2=space[1], output=out,
        )  # fmt: skip

    return Run(call, (out,))


def vllm_humming(case: FusedExpertsCase, seed: int) -> Run:
    """What vLLM prefers to Marlin on Hopper where humming-kernels is installed: its method for such a layer."""
    if case.format != "nvfp4":
        raise Missing("Humming is what vLLM takes for NVFP4 alone")
    peer("humming", "__version__")
    scheme = f"{COMPRESSED}.compressed_tensors_moe_w4a4_nvfp4"
    method_class = peer(scheme, "CompressedTensorsW4A4Nvfp4MoEMethod")
    silu = peer(f"{FUSED_MOE}.activation", "MoEActivation").SILU
    *_, weights, ids = _operands(case, seed)
    x, *loaded = _loaded(case, generator(seed))
    config = _moe_config(case, silu)
    kind = peer(f"{FUSED_MOE}.routed_experts", "RoutedExperts")
    layer = object.__new__(kind)
    torch.nn.Module.__init__(layer)
    layer.moe_config, layer.layer_name, layer.activation = config, "experts", silu
    layer._expert_routing_tables = lambda: None
    vllm_config = peer("vllm.config", "VllmConfig")()
    with peer("vllm.config", "set_current_vllm_config")(vllm_config):
        method = method_class(config, "experts", use_a16=True)
        sizes = (case.num_experts, case.hidden_size, case.intermediate_size)
        with families.device:
            method.create_weights(layer, *sizes, torch.bfloat16)
        for part, (weight, scale, factor) in zip(("w13", "w2"), loaded, strict=True):
            getattr(layer, f"{part}_weight_packed").data = weight
            getattr(layer, f"{part}_weight_scale").data = scale
            stored = getattr(layer, f"{part}_weight_global_scale")
            stored.data = (1 / factor).view(-1, 1).expand(-1, stored.numel() // len(factor)).reshape(stored.shape)
            getattr(layer, f"{part}_input_global_scale").data.fill_(1.0)
        method.process_weights_after_loading(layer)
    manager = peer("vllm.v1.worker.workspace", "init_workspace_manager")
    manager(families.device)
    context = peer("vllm.forward_context", "set_forward_context")

    def call() -> torch.Tensor:
        with context(None, vllm_config):
            return method.moe_kernel.apply(
                x, layer.w13_weight, layer.w2_weight, weights, ids, silu, case.num_experts, None, False
            )

    return Returned(call)


def _moe_config(case: FusedExpertsCase, activation: Any) -> Any:
    """vLLM's description of such a layer on one GPU, with Humming asked for."""
    parallel = peer(f"{FUSED_MOE}.config", "FusedMoEParallelConfig")
    one = {f"{kind}_size": 1 for kind in ("tp", "pcp", "dp", "ep", "sp")}
    ranks = {f"{kind}_rank": 0 for kind in ("tp", "pcp", "dp", "ep")}
    return peer(f"{FUSED_MOE}.config", "FusedMoEConfig")(
        num_experts=case.num_experts,
        experts_per_token=case.top_k,
        hidden_dim=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_local_experts=case.num_experts,
        num_logical_experts=case.num_experts,
        activation=activation,
        device=families.device.type,
        in_dtype=torch.bfloat16,
        routing_method=peer(f"{FUSED_MOE}.config", "RoutingMethodType").Renormalize,
        moe_parallel_config=parallel(
            **one, **ranks, use_ep=False, all2all_backend="allgather_reducescatter", enable_eplb=False
        ),
        moe_backend="humming",
    )


IMPLEMENTATIONS: dict[str, Callable[[FusedExpertsCase, int], Run]] = {
    "ours": ours,
    "vllm_triton": vllm_triton,
    "vllm_cutlass": vllm_cutlass,
    "vllm_marlin": vllm_marlin,
    "vllm_humming": vllm_humming,
}


def check(case: FusedExpertsCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    """Right when a few tokens are right and all are finite."""
    operands, out = _operands(case, seed), outputs[0]
    tokens = some_rows(case.num_tokens, CHECKED_TOKENS)
    if case.format == "fp8_tensor-expert":  # the scale is that of all tokens
        tokens = some_rows(case.num_tokens, case.num_tokens)
    ways = (False, True) if case.format == "fp8_block" else (False,)
    gated = _gated(case, seed)
    errors = [error_of(out[tokens], reference(case, operands, gated, tokens, ue8m0)) for ue8m0 in ways]
    return verdict(min(errors, key=abs), FP8_LIMIT, finite=bool(out.isfinite().all()))


def reference(
    case: FusedExpertsCase, operands: tuple[torch.Tensor | None, ...], gated: dict[str, Any], tokens: torch.Tensor,
    ue8m0: bool,
) -> torch.Tensor:  # fmt: skip
    """The layer's output for `tokens` in float64, with both activations quantised and bf16 between the products."""
    x, w13, w13_scale, w2, w2_scale, weights, ids = operands
    given, biases = _given(case), [gated.get(name) for name in ("w13_bias", "w2_bias")]
    numbers = [gated.get(name, 0.0) for name in ("limit", "alpha", "beta")]
    values = _quantised(x[tokens], case.format, given.get("x_scale"), ue8m0)
    hidden = x.new_empty(len(tokens), case.top_k, case.intermediate_size)
    for row, token in enumerate(tokens.tolist()):
        for slot, expert in enumerate(ids[token].tolist()):
            product = _biased(_dequantised(w13, w13_scale, expert, unpack_w13) @ values[row], biases[0], expert)
            product = product.bfloat16().double()
            if "interleaved" in gated:
                product = torch.cat((product[::2], product[1::2]))
            hidden[row, slot] = activate_and_multiply(product, gated["activation"], *numbers).bfloat16()
    values = _quantised(hidden.flatten(0, 1), case.format, given.get("hidden_scale"), ue8m0).view(hidden.shape)
    out = torch.zeros(len(tokens), x.shape[1], dtype=torch.float64, device=x.device)
    for row, token in enumerate(tokens.tolist()):
        for slot, (weight, expert) in enumerate(zip(weights[token].double(), ids[token].tolist(), strict=True)):
            product = _dequantised(w2, w2_scale, expert, unpack_w2) @ values[row, slot]
            out[row] += weight * _biased(product, biases[1], expert)
    return out


def _biased(product: torch.Tensor, bias: torch.Tensor | None, expert: int) -> torch.Tensor:
    return product if bias is None else product + bias[expert].double()


def _dequantised(
    weight: torch.Tensor, scale: torch.Tensor | None, expert: int,
    unpack: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:  # fmt: skip
    """One expert's weight in float64. unpack: that of NVFP4."""
    if scale is None:
        return weight[expert].double()
    if weight.dtype == torch.uint8:
        (q,), (group_scale,) = unpack(weight[expert : expert + 1])
        return e2m1_to_float(q).double() * group_scale.double().repeat_interleave(16, 1) * scale[expert].double()
    if scale.dim() == 3:
        return dequantise(weight[expert], scale[expert], BLOCK)
    return weight[expert].double() * scale[expert].double().view(-1, 1)


def _quantised(x: torch.Tensor, format: str, given: torch.Tensor | None, ue8m0: bool) -> torch.Tensor:
    """What the rows stand for after quantisation, in float64; fp32 arithmetic, on any device."""
    if format in ("bf16", "nvfp4"):
        return x.double()
    if format == "fp8_block":
        return dequantise(*quantise_groups(x, ue8m0))
    rows = x.float()
    if "int8" in format:
        largest = rows.abs().amax(-1, keepdim=True).clamp(min=EPS)
        return (rows * (127 / largest)).round().double() * (largest.double() / 127)
    if "token" in format:
        scale = (rows.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=1 / (E4M3_MAX * 512))
        scaled = rows / scale
    else:
        scale = rows.abs().max() / E4M3_MAX if given is None else given
        scaled = rows * (1 / scale)
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).double() * scale.double()
