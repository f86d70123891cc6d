"""Sorting routed tokens by expert into padded blocks: ours, vLLM's CUDA op, and sorting in PyTorch."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.moe import TOP_K, MoeAlignCase, align_benchmarks
from benchmarks.families import Run
from benchmarks.families._common import generator, peer, verdict
from vllm_b200_plugin.ops import moe_align as _  # noqa: F401  registers our op

OP = "moe_align"
cases = align_benchmarks


def record(case: MoeAlignCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": case.num_experts,
        "k": TOP_K,
        "dtype": "int32",
        "layout": f"block{case.block_size}",
        "bytes": case.num_bytes,
        "flops": 0,
    }


def _ids(case: MoeAlignCase, seed: int) -> torch.Tensor:
    """[num_tokens, TOP_K] distinct experts of each token."""
    scores = torch.rand(case.num_tokens, case.num_experts, generator=generator(seed), device=families.device)
    return scores.topk(TOP_K).indices.int()


def _outputs(case: MoeAlignCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sorted ids, the expert of each block, and the number of sorted ids, with room for the worst routing."""
    routed, block = case.num_tokens * TOP_K, case.block_size
    room = routed + case.num_experts * (block - 1)
    if routed < case.num_experts:
        room = min(room, routed * block)
    return tuple(torch.empty(size, dtype=torch.int32, device=families.device) for size in (room, -(-room // block), 1))


def ours(case: MoeAlignCase, seed: int, pdl: bool = True) -> Run:
    op, ids, outputs = torch.ops.vllm_b200.moe_align_block_size, _ids(case, seed), _outputs(case)
    return Run(lambda: op(ids, case.num_experts, case.block_size, *outputs, None, None, pdl), outputs)


def ours_no_pdl(case: MoeAlignCase, seed: int) -> Run:
    """As vLLM's op runs it, which knows nothing of the kernel before."""
    return ours(case, seed, pdl=False)


def vllm(case: MoeAlignCase, seed: int) -> Run:
    op = peer("vllm._custom_ops", "moe_align_block_size")
    ids, outputs = _ids(case, seed), _outputs(case)
    return Run(lambda: op(ids, case.num_experts, case.block_size, *outputs), outputs)


def torch_sort(case: MoeAlignCase, seed: int) -> Run:
    ids, outputs = _ids(case, seed), _outputs(case)
    return Run(lambda: _align(ids, case, *outputs), outputs)


def _align(
    ids: torch.Tensor,
    case: MoeAlignCase,
    sorted_ids: torch.Tensor,
    block_experts: torch.Tensor,
    num_sorted: torch.Tensor,
) -> None:
    flat, block = ids.flatten().long(), case.block_size
    counts = torch.zeros(case.num_experts, dtype=torch.long, device=ids.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    padded = (counts + block - 1) // block * block
    ends = padded.cumsum(0)
    of_expert, order = flat.sort(stable=True)
    # A token's place: its expert's start, and its rank among the expert's tokens.
    rank = torch.arange(len(flat), device=ids.device) - (counts.cumsum(0) - counts)[of_expert]
    sorted_ids.fill_(len(flat))
    sorted_ids[(ends - padded)[of_expert] + rank] = order.int()
    starts = torch.arange(len(block_experts), device=ids.device) * block
    block_experts.copy_(torch.searchsorted(ends, starts, right=True).clamp(max=case.num_experts - 1))
    num_sorted.copy_(ends[-1:])


IMPLEMENTATIONS: dict[str, Callable[[MoeAlignCase, int], Run]] = {
    "ours": ours,
    "ours_no_pdl": ours_no_pdl,
    "vllm": vllm,
    "torch": torch_sort,
}


def check(case: MoeAlignCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    """Right when every block holds ids of its expert alone, and each expert's blocks all of its ids and the padding.

    In which order an expert's ids come is left open, as is what stands behind the last block.
    """
    ids, block = _ids(case, seed).flatten().long(), case.block_size
    padding = len(ids)
    counts = torch.bincount(ids, minlength=case.num_experts)
    num_blocks = -(-counts // block)
    experts = torch.arange(case.num_experts, device=ids.device).repeat_interleave(num_blocks)
    of_place = experts.repeat_interleave(block)
    # (expert, id) as one number; the padding's id is the largest.
    expected = torch.cat([ids * (padding + 1) + torch.arange(padding, device=ids.device), _padding_keys(counts, block)])
    sorted_ids, block_experts, num_sorted = (output.long() for output in outputs)
    right = int(num_sorted) == len(of_place) and torch.equal(block_experts[: len(experts)], experts)
    found = of_place * (padding + 1) + sorted_ids[: len(of_place)]
    right = right and torch.equal(found.sort().values, expected.sort().values)
    return verdict(0.0, 1.0, bit_exact=right)


def _padding_keys(counts: torch.Tensor, block_size: int) -> torch.Tensor:
    padding = int(counts.sum())
    experts = torch.arange(len(counts), device=counts.device).repeat_interleave(-counts % block_size)
    return experts * (padding + 1) + padding
