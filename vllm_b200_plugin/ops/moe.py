"""Mixture-of-experts layers on FP8 operands with block scales: the reference."""

from collections.abc import Sequence

import torch

from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops._library import torch_library
from vllm_b200_plugin.ops.gemm import fp8_block_scaled_mm
from vllm_b200_plugin.ops.quant import per_token_group_quant


def fp8_block_scaled_moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    block_shape: tuple[int, int] = (128, 128),
) -> torch.Tensor:
    """For every token the weighted sum over its experts of silu_and_mul(x @ w13.T) @ w2.T, with W8A8 products.

    Both inputs are quantised in groups of block_shape[1], as vLLM's DeepGEMM and Triton experts do; between the
    products the values have the dtype of x; the weighted sum is fp32 and takes the experts in order of their ids.

    Args:
        x: [num_tokens, hidden_size] bfloat16, float16 or float32.
        w13: [num_experts, 2 * intermediate_size, hidden_size] float8_e4m3fn, the gate's rows before the other half.
        w13_scale: [num_experts, ceil(2 * intermediate_size / block_shape[0]), hidden_size / block_shape[1]] float32.
        w2: [num_experts, hidden_size, intermediate_size] float8_e4m3fn.
        w2_scale: [num_experts, ceil(hidden_size / block_shape[0]), intermediate_size / block_shape[1]] float32.
        topk_weights: [num_tokens, topk] float.
        topk_ids: [num_tokens, topk] integers below num_experts; a negative one is an expert that is not here.
        block_shape: (rows, columns) of a weight that share a scale; columns is 32, 64 or 128.

    Returns:
        [num_tokens, hidden_size] in the dtype of x.

    Raises:
        ValueError: an argument is not as above.
    """
    check_experts(x, w13.shape, w2.shape, topk_weights, topk_ids)
    return torch.ops.vllm_b200.fp8_block_scaled_moe(
        x, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, list(block_shape)
    )


torch_library.define(
    "fp8_block_scaled_moe(Tensor x, Tensor w13, Tensor w13_scale, Tensor w2, Tensor w2_scale, Tensor topk_weights, "
    "Tensor topk_ids, int[] block_shape) -> Tensor"
)


@torch.library.register_fake("vllm_b200::fp8_block_scaled_moe", lib=torch_library)
def _fake(x: torch.Tensor, *args: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.impl(torch_library, "fp8_block_scaled_moe", "CPU")
def _reference(
    x: torch.Tensor, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor,
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, block_shape: list[int],
) -> torch.Tensor:  # fmt: skip
    return _experts(x, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, (block_shape[0], block_shape[1]))


def _experts(
    x: torch.Tensor, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor,
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, block: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert in topk_ids[topk_ids >= 0].unique().tolist():
        if expert >= w13.shape[0]:
            raise ValueError(f"topk_ids: takes ids below {w13.shape[0]}, got {expert}")
        tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
        hidden = _linear(x[tokens], w13[expert], w13_scale[expert], block, x.dtype)
        gate, up = hidden.float().chunk(2, dim=-1)
        hidden = (torch.nn.functional.silu(gate) * up).to(x.dtype)
        hidden = _linear(hidden, w2[expert], w2_scale[expert], block, torch.float32)
        out.index_add_(0, tokens, hidden * topk_weights[tokens, slots].float().unsqueeze(-1))
    return out.to(x.dtype)


def _linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block_shape: tuple[int, int], out_dtype: torch.dtype
) -> torch.Tensor:
    q, q_scale = per_token_group_quant(x, block_shape[1])
    return fp8_block_scaled_mm(q, q_scale, weight, scale, block_shape, out_dtype)


def local_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor) -> torch.Tensor:
    """topk_ids as indices of the experts here, -1 for those that are not; expert_map as for few_tokens_moe."""
    return torch.where(topk_ids < 0, topk_ids, expert_map[topk_ids.clamp(min=0)].to(topk_ids.dtype))


def check_experts(
    x: torch.Tensor, w13: Sequence[int], w2: Sequence[int], topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> None:
    """Whether shapes go together, w13 and w2 those of the weights; raises ValueError where they do not."""
    if x.dim() != 2:
        raise ValueError(f"x: takes [num_tokens, hidden_size], got {tuple(x.shape)}")
    num_tokens, hidden_size = x.shape
    if len(w13) != 3 or w13[2] != hidden_size or w13[1] % 2:
        raise ValueError(f"w13: takes [num_experts, 2 * intermediate_size, {hidden_size}], got {tuple(w13)}")
    expected = (w13[0], hidden_size, w13[1] // 2)
    if tuple(w2) != expected:
        raise ValueError(f"w2: takes {expected}, got {tuple(w2)}")
    if topk_ids.dim() != 2 or topk_ids.shape[0] != num_tokens or topk_ids.is_floating_point():
        raise ValueError(f"topk_ids: takes integers [{num_tokens}, topk], got {topk_ids.dtype} {tuple(topk_ids.shape)}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(f"topk_weights: takes {tuple(topk_ids.shape)}, got {tuple(topk_weights.shape)}")


_library.status()
