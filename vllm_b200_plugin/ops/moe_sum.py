"""The sum of the outputs of a token's experts, as vLLM's `moe_sum`."""

import torch

from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops._library import torch_library

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ID_DTYPES = (torch.int32, torch.int64)

_OP = "moe_sum"


def moe_sum(
    x: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """The sum over topk in fp32, in the order of topk, rounded once.

    Args:
        x: [num_tokens, topk, hidden_size] fp32, fp16 or bf16; last stride 1, rows at multiples of 16 bytes, a
            hidden_size of whole 16 bytes.
        topk_ids: [num_tokens, topk] int32 or int64: outputs of negative experts are left out, unread.
        expert_map: [num_experts] int32; those of experts that it makes negative are left out as well.
        pdl: launch with programmatic stream serialization.

    Returns:
        [num_tokens, hidden_size] in the dtype of x.

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    if x.dim() != 3 or x.dtype not in DTYPES:
        raise ValueError(
            f"x: takes float32, float16 or bfloat16 [num_tokens, topk, hidden_size], got {x.dtype} {tuple(x.shape)}"
        )
    vector = 16 // x.element_size()
    rows = [stride for stride, size in zip(x.stride()[:2], x.shape[:2], strict=True) if size > 1]
    if x.shape[2] % vector or (
        x.numel() and (x.stride(2) != 1 or x.data_ptr() % 16 or any(stride % vector for stride in rows))
    ):
        raise ValueError(
            f"x: takes rows of whole 16 bytes at multiples of 16 bytes and a last stride of 1, got shape "
            f"{tuple(x.shape)}, strides {x.stride()}"
        )
    if topk_ids is not None and (topk_ids.shape != x.shape[:2] or topk_ids.dtype not in ID_DTYPES):
        raise ValueError(
            f"topk_ids: takes int32 or int64 {tuple(x.shape[:2])}, got {topk_ids.dtype} {tuple(topk_ids.shape)}"
        )
    if expert_map is not None and (topk_ids is None or expert_map.dtype != torch.int32 or expert_map.dim() != 1):
        raise ValueError(f"expert_map: takes int32 [num_experts], with topk_ids, got {expert_map.dtype}")
    out = torch.empty(x.shape[0], x.shape[2], dtype=x.dtype, device=x.device)
    torch.ops.vllm_b200.moe_sum(x, out, topk_ids, expert_map, pdl)
    return out


torch_library.define(f"{_OP}(Tensor x, Tensor(a!) out, Tensor? topk_ids, Tensor? expert_map, bool pdl=False) -> ()")


@torch.library.register_fake(f"vllm_b200::{_OP}", lib=torch_library)
def _moe_sum_fake(*args: object, **kwargs: object) -> None:
    return None


@torch.library.impl(torch_library, _OP, "CPU")
def _moe_sum_cpu(
    x: torch.Tensor,
    out: torch.Tensor,
    topk_ids: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    pdl: bool = False,
) -> None:
    left_out = torch.zeros(x.shape[:2], dtype=torch.bool)
    if topk_ids is not None:
        left_out = topk_ids < 0
        if expert_map is not None:
            left_out = left_out | (expert_map.long()[topk_ids.long().clamp(min=0)] < 0)
    total = torch.zeros(x.shape[0], x.shape[2])
    for k in range(x.shape[1]):
        total += x[:, k].float().masked_fill(left_out[:, k : k + 1], 0.0)
    out.copy_(total)


_library.status()
