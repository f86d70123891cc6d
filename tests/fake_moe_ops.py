"""vLLM's routing ops of MoE layers, by their schemas, without its library."""

import functools
from collections.abc import Callable
from typing import Any

import torch

_OUTPUTS = "Tensor! topk_weights, Tensor! topk_indices, Tensor! token_expert_indices, Tensor gating_output"
_ALIGNED = "Tensor! sorted_token_ids, Tensor! experts_ids, Tensor! num_tokens_post_pad"
SCHEMAS = {
    "topk_softmax": f"({_OUTPUTS}, bool renormalize, Tensor? bias, Tensor? is_padding) -> ()",
    "topk_sigmoid": f"({_OUTPUTS}, bool renormalize, Tensor? bias, float routed_scaling_factor, "
    "Tensor? is_padding) -> ()",
    "grouped_topk": "(Tensor scores, int n_group, int topk_group, int topk, bool renormalize, "
    "float routed_scaling_factor, Tensor bias, int scoring_func) -> (Tensor, Tensor)",
    "moe_align_block_size": f"(Tensor topk_ids, int num_experts, int block_size, {_ALIGNED}, "
    "Tensor? maybe_expert_map, Tensor(a!)? scatter_idx=None) -> ()",
    "batched_moe_align_block_size": "(int max_tokens_per_batch, int block_size, Tensor expert_num_tokens, "
    f"{_ALIGNED}) -> ()",
}


def define_moe_ops(
    library: torch.library.Library, dispatch_key: str, kernel: Callable[..., Any], changed: dict[str, str] | None = None
) -> None:
    """The ops, each of which calls kernel(its name, *arguments); `changed` has other schemas for some."""
    for name, schema in {**SCHEMAS, **(changed or {})}.items():
        library.define(name + schema)
        library.impl(name, functools.partial(kernel, name), dispatch_key)
