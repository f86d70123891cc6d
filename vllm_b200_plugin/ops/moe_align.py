"""Sorting routed tokens by expert into padded blocks, so that a grouped product gives every block one expert.

The outputs are those of vLLM's `moe_align_block_size` and `batched_moe_align_block_size`. The ids of an expert come in
ascending order; vLLM's kernel leaves that order open from 1024 ids or 65 experts on.
"""

import torch

from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops._library import torch_library

MAX_EXPERTS = 512
MAX_BATCHES = 1024
ID_DTYPES = (torch.int32, torch.int64)

_ALIGN, _BATCHED = "moe_align_block_size", "batched_moe_align_block_size"


def moe_align_block_size(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    expert_map: torch.Tensor | None = None,
    *,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The positions of the ids, sorted by expert, with those of each expert padded to whole blocks.

    Args:
        topk_ids: [num_tokens, topk] int32 or int64, contiguous. Ids outside of 0 to num_experts - 1 are left out.
        num_experts: up to 512.
        block_size: positions in a block.
        expert_map: [num_experts] int32: the expert to count an id as; negative ones are left out.
        pdl: launch with programmatic stream serialization.

    Returns:
        sorted_ids: int32 with room for the worst case: flat positions in topk_ids, and topk_ids.numel() as padding.
        block_experts: int32 with room for the worst case: the expert of each block; -1 behind the last.
        num_sorted: int32 [1], how many of sorted_ids the blocks take.

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    if topk_ids.dtype not in ID_DTYPES or not topk_ids.is_contiguous():
        raise ValueError(f"topk_ids: takes contiguous int32 or int64, got {topk_ids.dtype} {topk_ids.stride()}")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts: takes 1 to {MAX_EXPERTS}, got {num_experts}")
    if block_size < 1:
        raise ValueError(f"block_size: takes at least 1, got {block_size}")
    if expert_map is not None and (expert_map.dtype != torch.int32 or expert_map.shape != (num_experts,)):
        raise ValueError(f"expert_map: takes int32 [{num_experts}], got {expert_map.dtype} {tuple(expert_map.shape)}")
    room = worst_case(topk_ids.numel(), num_experts, block_size)
    outputs = [
        torch.empty(size, dtype=torch.int32, device=topk_ids.device) for size in (room, -(-room // block_size), 1)
    ]
    torch.ops.vllm_b200.moe_align_block_size(topk_ids, num_experts, block_size, *outputs, expert_map, None, pdl)
    return outputs[0], outputs[1], outputs[2]


def worst_case(num_ids: int, num_experts: int, block_size: int) -> int:
    """Positions that num_ids ids take at most when each expert's are padded to whole blocks."""
    return num_ids + min(num_ids, num_experts) * (block_size - 1)


def batched_moe_align_block_size(
    max_tokens: int, block_size: int, num_tokens: torch.Tensor, *, pdl: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for tokens that lie in a batch per expert, of which the first num_tokens[expert] are valid.

    Args:
        max_tokens: tokens in a batch, valid or not.
        block_size: positions in a block.
        num_tokens: [num_batches] int32, up to 1024 of them.

    Returns:
        sorted_ids [num_batches * max_tokens rounded up to blocks], block_experts and num_sorted as above; the padding
        is num_batches * max_tokens.

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    if num_tokens.dim() != 1 or num_tokens.dtype != torch.int32 or not 1 <= num_tokens.numel() <= MAX_BATCHES:
        raise ValueError(
            f"num_tokens: takes int32 [1 to {MAX_BATCHES}], got {num_tokens.dtype} {tuple(num_tokens.shape)}"
        )
    if block_size < 1 or max_tokens < 0:
        raise ValueError(f"block_size, max_tokens: take at least 1 and 0, got {block_size} and {max_tokens}")
    blocks = num_tokens.numel() * -(-max_tokens // block_size)
    outputs = [
        torch.empty(size, dtype=torch.int32, device=num_tokens.device) for size in (blocks * block_size, blocks, 1)
    ]
    torch.ops.vllm_b200.batched_moe_align_block_size(max_tokens, block_size, num_tokens, *outputs, pdl)
    return outputs[0], outputs[1], outputs[2]


torch_library.define(
    f"{_ALIGN}(Tensor topk_ids, int num_experts, int block_size, Tensor(a!) sorted_ids, Tensor(b!) block_experts, "
    "Tensor(c!) num_sorted, Tensor? expert_map, Tensor(d!)? scatter_ids, bool pdl=False) -> ()"
)
torch_library.define(
    f"{_BATCHED}(int max_tokens, int block_size, Tensor num_tokens, Tensor(a!) sorted_ids, Tensor(b!) block_experts, "
    "Tensor(c!) num_sorted, bool pdl=False) -> ()"
)


@torch.library.register_fake(f"vllm_b200::{_ALIGN}", lib=torch_library)
@torch.library.register_fake(f"vllm_b200::{_BATCHED}", lib=torch_library)
def _fake(*args: object, **kwargs: object) -> None:
    return None


@torch.library.impl(torch_library, _ALIGN, "CPU")
def _moe_align_cpu(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_ids: torch.Tensor,
    block_experts: torch.Tensor,
    num_sorted: torch.Tensor,
    expert_map: torch.Tensor | None,
    scatter_ids: torch.Tensor | None,
    pdl: bool = False,
) -> None:
    ids = topk_ids.flatten().long()
    experts = ids.masked_fill((ids < 0) | (ids >= num_experts), -1)
    if expert_map is not None:
        experts = torch.where(experts >= 0, expert_map.long()[experts.clamp(min=0)], -1)
    if scatter_ids is not None:
        scatter_ids.view(-1).copy_(torch.arange(len(ids)).masked_fill(experts < 0, -1))
    sorted_ids.fill_(len(ids))
    block_experts.fill_(-1)
    start = 0
    for expert in range(num_experts):
        positions = (experts == expert).nonzero().flatten()
        sorted_ids[start : start + len(positions)] = positions.int()
        end = start + -(-len(positions) // block_size) * block_size
        block_experts[start // block_size : end // block_size] = expert
        start = end
    num_sorted.fill_(start)


@torch.library.impl(torch_library, _BATCHED, "CPU")
def _batched_moe_align_cpu(
    max_tokens: int,
    block_size: int,
    num_tokens: torch.Tensor,
    sorted_ids: torch.Tensor,
    block_experts: torch.Tensor,
    num_sorted: torch.Tensor,
    pdl: bool = False,
) -> None:
    sorted_ids.fill_(num_tokens.numel() * max_tokens)
    block_experts.fill_(-1)
    start = 0
    for batch, valid in enumerate(num_tokens.tolist()):
        sorted_ids[start : start + valid] = batch * max_tokens + torch.arange(valid, dtype=torch.int32)
        end = start + -(-valid // block_size) * block_size
        block_experts[start // block_size : end // block_size] = batch
        start = end
    num_sorted.fill_(start)


_library.status()
