"""NVFP4 quantisation of rows sorted by expert, as they are or of silu_and_mul: ours and vLLM's."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.nvfp4_quant import Nvfp4ExpertsQuantCase, experts_benchmarks
from benchmarks.families import Run
from benchmarks.families._common import error_of, generator, normal, verdict, vllm_op
from benchmarks.families.nvfp4_quant import FP4_LIMIT, needs_blackwell
from vllm_b200_plugin.ops.gated_quant import activate_and_multiply
from vllm_b200_plugin.ops.nvfp4_quant import (
    GROUP_SIZE,
    TILE_ROWS,
    empty_outputs,
    most_expert_tiles,
    nvfp4_dequant,
    unswizzle_scales,
)

OP = "nvfp4_experts_quant"
cases = experts_benchmarks


def record(case: Nvfp4ExpertsQuantCase) -> dict[str, Any]:
    return {
        "m": case.num_rows,
        "n": case.num_experts,
        "k": case.hidden_size * (2 if case.silu_and_mul else 1),
        "dtype": "nvfp4",
        "layout": "swizzled",
        "bytes": case.num_bytes,
        "flops": 0,
    }


def _tensors(case: Nvfp4ExpertsQuantCase, seed: int) -> tuple[torch.Tensor, ...]:
    """x, the routing, q and scale."""
    x = normal((case.num_rows, case.hidden_size * (2 if case.silu_and_mul else 1)), generator(seed), case.input_dtype)
    q, _ = empty_outputs(x, case.hidden_size, None, False)
    rows = most_expert_tiles(case.num_rows, case.num_experts) * TILE_ROWS
    scale = torch.empty(rows, -(-case.hidden_size // GROUP_SIZE // 4) * 4, dtype=torch.uint8, device=families.device)
    return x, *case.make_routing(families.device, seed), q, scale.view(torch.float8_e4m3fn)


def ours(case: Nvfp4ExpertsQuantCase, seed: int, pdl: bool = True) -> Run:
    x, global_scale, expert_offsets, scale_offsets, q, scale = _tensors(case, seed)
    op = torch.ops.vllm_b200.nvfp4_experts_quant
    return Run(lambda: op(x, global_scale, expert_offsets, scale_offsets, q, scale, case.silu_and_mul, pdl), (q, scale))


def ours_no_pdl(case: Nvfp4ExpertsQuantCase, seed: int) -> Run:
    return ours(case, seed, pdl=False)


def vllm(case: Nvfp4ExpertsQuantCase, seed: int) -> Run:
    """Leaves the padding of the scales unwritten."""
    needs_blackwell()
    op = vllm_op("silu_and_mul_scaled_fp4_experts_quant" if case.silu_and_mul else "scaled_fp4_experts_quant")
    x, global_scale, expert_offsets, scale_offsets, q, scale = _tensors(case, seed)
    words = scale.view(torch.int32)
    return Run(lambda: op(q, words, x, global_scale, expert_offsets, scale_offsets), (q, scale))


IMPLEMENTATIONS: dict[str, Callable[[Nvfp4ExpertsQuantCase, int], Run]] = {
    "ours": ours,
    "ours_no_pdl": ours_no_pdl,
    "vllm": vllm,
}


def check(case: Nvfp4ExpertsQuantCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    """Right when the dequantised numbers are the input's within the format's error."""
    q, scale = outputs
    x, global_scale, expert_offsets, scale_offsets, *_ = _tensors(case, seed)
    rows = torch.arange(case.num_rows, device=families.device)
    experts = torch.searchsorted(expert_offsets[1:].contiguous(), rows.int(), right=True)
    linear = unswizzle_scales(scale, *scale.shape)[rows - expert_offsets[experts] + scale_offsets[experts]]
    linear = linear[:, : case.hidden_size // GROUP_SIZE].contiguous()
    values = nvfp4_dequant(q, linear, global_scale[experts].unsqueeze(-1))
    exact = activate_and_multiply(x.double(), "silu") if case.silu_and_mul else x.double()
    return verdict(error_of(values, exact), FP4_LIMIT)
