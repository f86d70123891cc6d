"""A layer's router for few tokens, from hidden states to experts: ours in one kernel or in two, vLLM's."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.moe import TOP_K, RouterCase, TopKCase, router_benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families import topk as topk_family
from benchmarks.families._common import Returned, error_of, generator, normal, peer, verdict
from vllm_b200_plugin.ops.router import SPLIT_SLICES, fused_refusal, split_refusal
from vllm_b200_plugin.ops.topk import select_reference

OP = "router"
cases = router_benchmarks


def record(case: RouterCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": case.num_experts,
        "k": case.hidden_size,
        "dtype": "bf16",
        "layout": case.layout_name,
        "bytes": case.num_bytes,
        "flops": 2 * case.num_tokens * case.num_experts * case.hidden_size,
    }


def _top_k_case(case: RouterCase) -> TopKCase:
    return TopKCase(case.num_tokens, case.num_experts, case.num_groups, case.num_groups_kept)


def _inputs(case: RouterCase, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x, the gate's weight, for logits of about 1, and the bias of grouped selection."""
    rng = generator(seed)
    x = normal((case.num_tokens, case.hidden_size), rng)
    weight = (normal((case.num_experts, case.hidden_size), rng, torch.float32) * case.hidden_size**-0.5).bfloat16()
    bias = torch.randn(case.num_experts, generator=rng, device=families.device) / 8 if case.num_groups else None
    return x, weight, bias


def _outputs(case: RouterCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = torch.empty(case.num_tokens, case.num_experts, device=families.device)
    weights = torch.empty(case.num_tokens, TOP_K, device=families.device)
    return logits, weights, torch.empty(case.num_tokens, TOP_K, dtype=torch.int32, device=families.device)


def ours(case: RouterCase, seed: int) -> Run:
    if problem := fused_refusal(case.num_experts, topk_family.selection(_top_k_case(case))):
        raise Missing(problem)
    (x, weight, bias), outputs = _inputs(case, seed), _outputs(case)
    op, rule = torch.ops.vllm_b200.router, topk_family.selection(_top_k_case(case)).schema_values()
    return Run(lambda: op(x, weight, *outputs, None, *rule, bias, None, True), outputs)


def ours_split(case: RouterCase, seed: int) -> Run:
    """Two kernels that share the gate's sum."""
    selection = topk_family.selection(_top_k_case(case))
    if problem := split_refusal(case.num_experts, selection):
        raise Missing(problem)
    (x, weight, bias), outputs = _inputs(case, seed), _outputs(case)
    sums = torch.empty(SPLIT_SLICES, *outputs[0].shape, device=families.device)
    op, rule = torch.ops.vllm_b200.split_router, selection.schema_values()
    return Run(lambda: op(x, weight, *outputs, sums, *rule, bias, None, True), outputs)


def ours_two(case: RouterCase, seed: int) -> Run:
    """Gate and selection, each waiting for the kernel before only where it needs its result."""
    (x, weight, bias), outputs = _inputs(case, seed), _outputs(case)
    gate, select = torch.ops.vllm_b200.router_gate, torch.ops.vllm_b200.topk
    rule = topk_family.selection(_top_k_case(case)).schema_values()

    def call() -> None:
        gate(x, weight, outputs[0], True)
        select(*outputs, None, *rule, bias, None, True)

    return Run(call, outputs)


def vllm(case: RouterCase, seed: int) -> Run:
    """cuBLAS and vLLM's selection."""
    ops = "vllm._custom_ops"
    (x, weight, bias), (_, weights, ids) = _inputs(case, seed), _outputs(case)
    rows = torch.empty_like(ids)
    if bias is None:
        softmax = peer(ops, "topk_softmax")

        def call() -> tuple[torch.Tensor, ...]:
            logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
            softmax(weights, ids, rows, logits, True)
            return logits, weights, ids

        return Returned(call)
    grouped = peer(ops, "grouped_topk")
    groups = case.num_groups, case.num_groups_kept

    def call_grouped() -> tuple[torch.Tensor, ...]:
        logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
        return logits, *grouped(logits, *groups, TOP_K, True, topk_family.ROUTED_SCALE, bias, 1)

    return Returned(call_grouped)


def vllm_low_latency(case: RouterCase, seed: int) -> Run:
    """vLLM's gate for fp32 logits and up to 16 tokens, and its grouped selection."""
    if not case.num_groups:
        raise Missing("for the grouped selection")
    gate, grouped = (
        peer("vllm.model_executor.kernels.linear.cute_dsl.ll_bf16", "ll_bf16_gemm"),
        peer("vllm._custom_ops", "grouped_topk"),
    )
    x, weight, bias = _inputs(case, seed)
    groups = case.num_groups, case.num_groups_kept

    def call() -> tuple[torch.Tensor, ...]:
        logits = gate(x, weight)
        return logits, *grouped(logits, *groups, TOP_K, True, topk_family.ROUTED_SCALE, bias, 1)

    return Returned(call)


IMPLEMENTATIONS: dict[str, Callable[[RouterCase, int], Run]] = {
    "ours": ours,
    "ours_split": ours_split,
    "ours_two": ours_two,
    "vllm": vllm,
    "vllm_low_latency": vllm_low_latency,
}


def check(case: RouterCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    """Right when the logits are those of float64, and the experts those of the logits as they were stored."""
    x, weight, bias = _inputs(case, seed)
    logits, weights, ids = outputs
    error = error_of(logits, x.double() @ weight.double().t())
    rule = topk_family.selection(_top_k_case(case)).schema_values()
    expected = torch.empty_like(weights), torch.empty_like(ids)
    select_reference(logits, *expected, None, *rule, bias, None)
    close = bool(torch.allclose(weights, expected[0], rtol=1e-5, atol=0))
    return verdict(error, 1e-8, bit_exact=torch.equal(ids, expected[1]), close=close)
