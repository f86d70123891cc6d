"""Choosing experts from router logits: ours, vLLM's CUDA ops, FlashInfer's, and PyTorch's."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.moe import TOP_K, TopKCase, top_k_benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families._common import Returned, error_of, generator, peer, verdict
from vllm_b200_plugin.ops.topk import Scoring, Selection

OP = "topk"
ROUTED_SCALE = 2.5
CLEAR = 1e-5  # closer scores than this may fall either way in fp32
cases = top_k_benchmarks


def record(case: TopKCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": TOP_K,
        "k": case.num_experts,
        "dtype": "fp32",
        "layout": case.layout_name,
        "bytes": case.num_bytes,
        "flops": 0,
    }


def _inputs(case: TopKCase, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [num_tokens, num_experts] and bias [num_experts]."""
    rng = generator(seed)
    logits = torch.randn(case.num_tokens, case.num_experts, generator=rng, device=families.device)
    return logits, torch.randn(case.num_experts, generator=rng, device=families.device) / 8


def _outputs(case: TopKCase) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (case.num_tokens, TOP_K)
    weights = torch.empty(shape, device=families.device)
    return weights, torch.empty(shape, dtype=torch.int32, device=families.device)


def selection(case: TopKCase) -> Selection:
    """What the case asks for, in the arithmetic of vLLM's ops."""
    if not case.grouped:
        return Selection(TOP_K)
    groups = case.num_groups, case.num_groups_kept
    return Selection(TOP_K, Scoring.TANH_SIGMOID, True, ROUTED_SCALE, *groups)


def ours(case: TopKCase, seed: int, pdl: bool = True) -> Run:
    (logits, bias), (weights, ids) = _inputs(case, seed), _outputs(case)
    op, rule = torch.ops.vllm_b200.topk, selection(case).schema_values()
    inputs = (bias if case.grouped else None), None
    return Run(lambda: op(logits, weights, ids, None, *rule, *inputs, pdl), (weights, ids))


def ours_no_pdl(case: TopKCase, seed: int) -> Run:
    """As vLLM's ops run it, which know nothing of the kernel before."""
    return ours(case, seed, pdl=False)


def vllm(case: TopKCase, seed: int) -> Run:
    ops = "vllm._custom_ops"
    if case.grouped:
        grouped = peer(ops, "grouped_topk")
        logits, bias = _inputs(case, seed)
        groups = case.num_groups, case.num_groups_kept
        return Returned(lambda: grouped(logits, *groups, TOP_K, True, ROUTED_SCALE, bias, 1))
    softmax = peer(ops, "topk_softmax")
    (logits, _), (weights, ids) = _inputs(case, seed), _outputs(case)
    rows = torch.empty_like(ids)
    return Run(lambda: softmax(weights, ids, rows, logits, True), (weights, ids))


def flashinfer(case: TopKCase, seed: int) -> Run:
    op = peer("flashinfer.fused_moe", "fused_topk_deepseek")
    if not case.grouped:
        raise Missing("FlashInfer's op is for sigmoid scores with a bias")
    (logits, bias), (weights, ids) = _inputs(case, seed), _outputs(case)
    groups = case.num_groups, case.num_groups_kept
    return Run(lambda: op(logits, bias, *groups, TOP_K, ROUTED_SCALE, weights, ids), (weights, ids))


def torch_topk(case: TopKCase, seed: int) -> Run:
    (logits, bias), (weights, ids) = _inputs(case, seed), _outputs(case)

    def call() -> None:
        scores, choice, _ = _scores(case, logits, bias)
        chosen = choice.topk(TOP_K).indices
        picked = scores.gather(1, chosen)
        weights.copy_(picked / picked.sum(1, keepdim=True) * (ROUTED_SCALE if case.grouped else 1.0))
        ids.copy_(chosen)

    return Run(call, (weights, ids))


def _scores(
    case: TopKCase, logits: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Scores, what the choice goes by (-inf in groups left out), and the groups' scores; dtype of the logits."""
    if not case.grouped:
        return logits.softmax(1), logits, None
    scores = logits.sigmoid()
    if case.num_groups == 1:
        return scores, scores + bias, None
    choice = (scores + bias).unflatten(1, (case.num_groups, -1))
    group_scores = choice.topk(2).values.sum(2)
    kept = torch.zeros_like(group_scores).scatter_(1, group_scores.topk(case.num_groups_kept).indices, 1.0)
    return scores, choice.masked_fill(kept.unsqueeze(2) == 0, -torch.inf).flatten(1), group_scores


IMPLEMENTATIONS: dict[str, Callable[[TopKCase, int], Run]] = {
    "ours": ours,
    "ours_no_pdl": ours_no_pdl,
    "vllm": vllm,
    "flashinfer": flashinfer,
    "torch": torch_topk,
}


def check(case: TopKCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    """Right when the experts are those of float64 wherever the scores are not a tie in fp32, and their weights too."""
    scores, choice, group_scores = _scores(case, *(tensor.double() for tensor in _inputs(case, seed)))
    clear = _gap(choice, TOP_K) > CLEAR
    if group_scores is not None:
        clear &= _gap(group_scores, case.num_groups_kept) > CLEAR
    expected = choice.topk(TOP_K).indices.sort(1).values
    weights = scores.gather(1, expected)
    weights *= (ROUTED_SCALE if case.grouped else 1.0) / weights.sum(1, keepdim=True)
    ids, order = outputs[1].long().sort(1)
    error = error_of(outputs[0].gather(1, order)[clear], weights[clear])
    finite = bool(outputs[0].isfinite().all() & (ids >= 0).all() & (ids < case.num_experts).all())
    return verdict(error, 1e-8, bit_exact=torch.equal(ids[clear], expected[clear]), finite=finite)


def _gap(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """How far the last one kept is above the first left out, for every token."""
    best = scores.topk(kept + 1).values
    return best[:, -2] - best[:, -1]
