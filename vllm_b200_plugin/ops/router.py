"""A layer's router for few tokens: the gate, and the gate with the selection of experts, in one kernel or in two."""

from collections.abc import Callable
from typing import Any

import torch

from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops._library import torch_library
from vllm_b200_plugin.ops.topk import (
    MAX_EXPERTS,
    SELECTION_SCHEMA,
    Scoring,
    Selection,
    check_row_inputs,
    empty_outputs,
    select_reference,
)

MAX_TOKENS = 32
# One cluster has all of the gate's weight: more experts than this, or fewer, do not fit it.
FUSED_EXPERTS = range(32, 257)
OUT_DTYPES = (torch.float32, torch.bfloat16)

# The second of two kernels has a warp for every group of experts, or for 32 of them, and lists of the best of each.
SPLIT_WARPS, SPLIT_TOPK = 16, 8
SPLIT_SLICES = 16  # of hidden_size, at most

_GATE, _ROUTER, _SPLIT_ROUTER = "router_gate", "router", "split_router"


def router_gate(
    x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype = torch.float32, *, pdl: bool = False
) -> torch.Tensor:
    """x @ weight.T for few tokens and few experts, bf16 operands, added up in fp32.

    Args:
        x: [num_tokens, hidden_size] bf16, up to 32 tokens; last stride 1, rows at multiples of 16 bytes.
        weight: [num_experts, hidden_size] bf16, up to 512 experts; likewise. Both sizes are multiples of 8.
        out_dtype: fp32 or bf16.
        pdl: launch with programmatic stream serialization; the weight is then read ahead.

    Returns:
        logits [num_tokens, num_experts].

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    _check(x, weight, out_dtype)
    logits = torch.empty(x.shape[0], weight.shape[0], dtype=out_dtype, device=x.device)
    torch.ops.vllm_b200.router_gate(x, weight, logits, pdl)
    return logits


def router(
    x: torch.Tensor,
    weight: torch.Tensor,
    selection: Selection,
    bias: torch.Tensor | None = None,
    *,
    logits_dtype: torch.dtype = torch.float32,
    ids_dtype: torch.dtype = torch.int32,
    is_padding: torch.Tensor | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """router_gate() and select_experts() of its result in one kernel; the selection sees logits of logits_dtype.

    Args: as for those two; 32 to 256 experts, and SOFTMAX or SIGMOID.

    Returns:
        logits [num_tokens, num_experts], weights [num_tokens, topk] fp32 and ids [num_tokens, topk].

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    logits, weights, ids = _outputs(
        fused_refusal, x, weight, selection, bias, logits_dtype=logits_dtype, ids_dtype=ids_dtype, is_padding=is_padding
    )
    rule = selection.schema_values()
    torch.ops.vllm_b200.router(x, weight, logits, weights, ids, None, *rule, bias, is_padding, pdl)
    return logits, weights, ids


def split_router(
    x: torch.Tensor,
    weight: torch.Tensor,
    selection: Selection,
    bias: torch.Tensor | None = None,
    *,
    logits_dtype: torch.dtype = torch.float32,
    ids_dtype: torch.dtype = torch.int32,
    is_padding: torch.Tensor | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As router(), in two kernels that share the gate's sum: the gate's blocks each have a slice of hidden_size, the
    selection's blocks, one a token, add up the slices.

    Args: as for router_gate() and select_experts(); no SOFTMAX, topk up to 8, up to 16 groups.
    Returns and raises: as router().
    """
    logits, weights, ids = _outputs(
        split_refusal, x, weight, selection, bias, logits_dtype=logits_dtype, ids_dtype=ids_dtype, is_padding=is_padding
    )
    sums = torch.empty(SPLIT_SLICES, *logits.shape, dtype=torch.float32, device=x.device)
    rule = selection.schema_values()
    torch.ops.vllm_b200.split_router(x, weight, logits, weights, ids, sums, *rule, bias, is_padding, pdl)
    return logits, weights, ids


def _outputs(
    refusal_of: Callable[[int, Selection], str | None],
    x: torch.Tensor,
    weight: torch.Tensor,
    selection: Selection,
    bias: torch.Tensor | None,
    *,
    logits_dtype: torch.dtype,
    ids_dtype: torch.dtype,
    is_padding: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unwritten logits, weights and ids, once the arguments are found right."""
    _check(x, weight, logits_dtype)
    num_experts = weight.shape[0]
    if problem := refusal_of(num_experts, selection):
        raise ValueError(problem)
    check_row_inputs(bias, is_padding, x.shape[0], num_experts, x.device)
    logits = torch.empty(x.shape[0], num_experts, dtype=logits_dtype, device=x.device)
    return logits, *empty_outputs(x, selection.topk, ids_dtype)


def refusal(num_tokens: int, weight: torch.Tensor, out_dtype: torch.dtype) -> str | None:
    """Why router_gate does not take a layer, or that many tokens of it; None where it does."""
    if num_tokens > MAX_TOKENS:
        return f"x: takes up to {MAX_TOKENS} tokens, got {num_tokens}"
    if weight.dim() != 2 or weight.dtype != torch.bfloat16:
        return f"weight: takes bfloat16 [num_experts, hidden_size], got {weight.dtype} {tuple(weight.shape)}"
    num_experts, hidden_size = weight.shape
    if not 8 <= num_experts <= MAX_EXPERTS or num_experts % 8:
        return f"weight: takes 8 to {MAX_EXPERTS} experts, a multiple of 8, got {num_experts}"
    if hidden_size % 8 or hidden_size == 0:
        return f"weight: takes a hidden_size that is a multiple of 8, got {hidden_size}"
    if weight.stride(1) != 1 or weight.stride(0) % 8 or weight.data_ptr() % 16:
        return f"weight: takes a last stride of 1 and rows at multiples of 16 bytes, got strides {weight.stride()}"
    if out_dtype not in OUT_DTYPES:
        return f"out_dtype: takes float32 or bfloat16, got {out_dtype}"
    return None


def fused_refusal(num_experts: int, selection: Selection) -> str | None:
    """Why router() does not take a selection from that many experts; None where it does."""
    if num_experts not in FUSED_EXPERTS:
        return f"weight: takes {FUSED_EXPERTS[0]} to {FUSED_EXPERTS[-1]} experts, got {num_experts}"
    if selection.scoring > Scoring.SIGMOID:
        return f"selection: takes SOFTMAX or SIGMOID, got {selection.scoring.name}"
    return selection.refusal(num_experts)


def split_refusal(num_experts: int, selection: Selection) -> str | None:
    """Why split_router() does not take a selection from that many experts; None where it does."""
    if selection.scoring is Scoring.SOFTMAX:
        return "selection: takes SIGMOID, TANH_SIGMOID or NONE, got SOFTMAX"
    if selection.topk > SPLIT_TOPK:
        return f"topk: takes up to {SPLIT_TOPK}, got {selection.topk}"
    if selection.num_groups > SPLIT_WARPS:
        return f"num_groups: takes up to {SPLIT_WARPS}, got {selection.num_groups}"
    return selection.refusal(num_experts)


def _check(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> None:
    if x.dim() != 2 or x.dtype != torch.bfloat16:
        raise ValueError(f"x: takes bfloat16 [num_tokens, hidden_size], got {x.dtype} {tuple(x.shape)}")
    if problem := refusal(x.shape[0], weight, out_dtype):
        raise ValueError(problem)
    if x.shape[1] != weight.shape[1] or x.device != weight.device:
        raise ValueError(
            f"x: takes the weight's hidden_size {weight.shape[1]} on {weight.device}, got {x.shape[1]} on {x.device}"
        )
    if x.numel() and (x.stride(1) != 1 or (x.shape[0] > 1 and x.stride(0) % 8) or x.data_ptr() % 16):
        raise ValueError(f"x: takes a last stride of 1 and rows at multiples of 16 bytes, got strides {x.stride()}")


torch_library.define(f"{_GATE}(Tensor x, Tensor weight, Tensor(a!) logits, bool pdl=False) -> ()")
torch_library.define(
    f"{_ROUTER}(Tensor x, Tensor weight, Tensor(a!) logits, Tensor(b!) weights, Tensor(c!) ids, "
    f"Tensor(d!)? source_rows, {SELECTION_SCHEMA}, bool pdl=False) -> ()"
)
torch_library.define(
    f"{_SPLIT_ROUTER}(Tensor x, Tensor weight, Tensor(a!) logits, Tensor(b!) weights, Tensor(c!) ids, "
    f"Tensor(d!) sums, {SELECTION_SCHEMA}, bool pdl=False) -> ()"
)


@torch.library.register_fake(f"vllm_b200::{_GATE}", lib=torch_library)
@torch.library.register_fake(f"vllm_b200::{_ROUTER}", lib=torch_library)
@torch.library.register_fake(f"vllm_b200::{_SPLIT_ROUTER}", lib=torch_library)
def _fake(*args: object, **kwargs: object) -> None:
    return None


@torch.library.impl(torch_library, _GATE, "CPU")
def _router_gate_cpu(x: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor, pdl: bool = False) -> None:
    logits.copy_(x.float() @ weight.float().t())


@torch.library.impl(torch_library, _ROUTER, "CPU")
def _router_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    logits: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    source_rows: torch.Tensor | None,
    *rule: Any,
) -> None:
    """rule: what select_reference takes after these, and maybe pdl."""
    _router_gate_cpu(x, weight, logits)
    select_reference(logits, weights, ids, source_rows, *rule[:8])


@torch.library.impl(torch_library, _SPLIT_ROUTER, "CPU")
def _split_router_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    logits: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    sums: torch.Tensor,
    *rule: Any,
) -> None:
    _router_cpu(x, weight, logits, weights, ids, None, *rule)


_library.status()
