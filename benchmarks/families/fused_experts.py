"""The routed experts of a layer with FP8 block-scaled weights: our kernels for few tokens, vLLM's fused Triton path.

Engines differ in how they scale activations, by any fp32 or by a power of two; the check takes the nearer reference.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.moe import TOP_K, FusedExpertsCase, fused_experts_benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families._common import (
    FP8_LIMIT,
    GROUP,
    Returned,
    dequantise,
    error_of,
    fp8_block_weight,
    generator,
    normal,
    peer,
    quantise_groups,
    some_rows,
    verdict,
)
from vllm_b200_plugin.ops.moe import few_tokens_moe, few_tokens_refusal

OP = "fused_experts"
FUSED_MOE = "vllm.model_executor.layers.fused_moe"
BLOCK = (GROUP, GROUP)
CHECKED_TOKENS = 4
cases = fused_experts_benchmarks


def record(case: FusedExpertsCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": case.intermediate_size,
        "k": case.hidden_size,
        "dtype": "e4m3",
        "layout": case.experts_name,
        "bytes": case.num_bytes,
        "flops": case.flops,
    }


def _operands(case: FusedExpertsCase, seed: int) -> tuple[torch.Tensor, ...]:
    """x, w13 and its scale, w2 and its scale, and for each token the weights and ids of TOP_K distinct experts."""
    rng = generator(seed)
    experts, hidden, intermediate = case.num_experts, case.hidden_size, case.intermediate_size
    x = normal((case.num_tokens, hidden), rng)
    w13 = fp8_block_weight((experts, 2 * intermediate, hidden), rng)
    w2 = fp8_block_weight((experts, hidden, intermediate), rng)
    scores = torch.rand(case.num_tokens, experts, generator=rng, device=families.device)
    weights, ids = scores.topk(TOP_K)
    return x, *w13, *w2, weights / weights.sum(1, keepdim=True), ids.int()


def ours(case: FusedExpertsCase, seed: int, ue8m0: bool = False) -> Run:
    assignments = case.num_tokens * TOP_K
    if refusal := few_tokens_refusal(assignments, case.num_experts, case.hidden_size, case.intermediate_size):
        raise Missing(refusal)
    operands = _operands(case, seed)
    out = torch.empty_like(operands[0])
    hidden = out.new_empty((case.num_tokens, TOP_K, case.intermediate_size))
    return Run(lambda: few_tokens_moe(*operands, ue8m0=ue8m0, hidden=hidden, out=out), (out,))


def vllm_triton(case: FusedExpertsCase, seed: int) -> Run:
    fused_experts = peer(f"{FUSED_MOE}.fused_moe", "fused_experts")
    make_config = peer(f"{FUSED_MOE}.config", "fp8_w8a8_moe_quant_config")
    x, w13, w13_scale, w2, w2_scale, weights, ids = _operands(case, seed)
    config = make_config(w1_scale=w13_scale, w2_scale=w2_scale, block_shape=list(BLOCK))
    return Returned(lambda: fused_experts(x, w13, w2, weights, ids, quant_config=config))


IMPLEMENTATIONS: dict[str, Callable[[FusedExpertsCase, int], Run]] = {"ours": ours, "vllm_triton": vllm_triton}


def check(case: FusedExpertsCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    """Right when a few tokens are right and all are finite."""
    operands, out = _operands(case, seed), outputs[0]
    tokens = some_rows(case.num_tokens, CHECKED_TOKENS)
    errors = [error_of(out[tokens], reference(operands, tokens, ue8m0)) for ue8m0 in (False, True)]
    return verdict(min(errors, key=abs), FP8_LIMIT, finite=bool(out.isfinite().all()))


def reference(operands: tuple[torch.Tensor, ...], tokens: torch.Tensor, ue8m0: bool) -> torch.Tensor:
    """The layer's output for `tokens` in float64, with both activations quantised and bf16 between the products."""
    x, w13, w13_scale, w2, w2_scale, weights, ids = operands
    out = torch.zeros(len(tokens), x.shape[1], dtype=torch.float64, device=x.device)
    quantised = dequantise(*quantise_groups(x[tokens], ue8m0))
    for row, token in enumerate(tokens.tolist()):
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            gate, up = (dequantise(w13[expert], w13_scale[expert], BLOCK) @ quantised[row]).bfloat16().chunk(2)
            hidden = (torch.nn.functional.silu(gate.double()) * up.double()).bfloat16()
            hidden = dequantise(*quantise_groups(hidden.unsqueeze(0), ue8m0))[0]
            out[row] += weight * (dequantise(w2[expert], w2_scale[expert], BLOCK) @ hidden)
    return out
