"""silu_and_mul and group quantisation of the valid rows of every expert, in DeepGEMM's masked layout: ours, vLLM's."""

from collections.abc import Callable
from typing import Any

import torch

import vllm_b200_plugin.ops.gated_quant  # noqa: F401 - defines the ops
from benchmarks import families
from benchmarks.cases.silu_quant import MaskedSiluQuantCase, masked_benchmarks
from benchmarks.families import Run
from benchmarks.families._common import (
    E4M3,
    EPS,
    FP8_LIMIT,
    GROUP,
    dequantise,
    error_of,
    generator,
    normal,
    unpack_scale,
    verdict,
    vllm_op,
)
from vllm_b200_plugin.ops.quant import ScaleLayout, empty_scale

OP = "masked_silu_quant"
cases = masked_benchmarks


def record(case: MaskedSiluQuantCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": case.num_experts,
        "k": case.intermediate_size,
        "dtype": "e4m3",
        "layout": ("packed_ue8m0" if case.packed else "column") + f"_{case.counts}",
        "bytes": case.num_bytes,
        "flops": 0,
    }


def _tensors(case: MaskedSiluQuantCase, seed: int) -> tuple[torch.Tensor, ...]:
    """x, counts, q and scale; the rows beyond the counts hold NaN, whose pages nobody should touch."""
    shape = (case.num_experts, case.max_tokens, 2 * case.intermediate_size)
    x = torch.full(shape, float("nan"), dtype=torch.bfloat16, device=families.device)
    counts = case.make_counts(seed)
    valid = (torch.arange(case.max_tokens) < counts.unsqueeze(-1)).to(families.device)
    x[valid] = normal((case.num_tokens, shape[-1]), generator(seed))
    q = torch.empty(*shape[:2], case.intermediate_size, dtype=E4M3, device=families.device)
    layout = ScaleLayout.PACKED_UE8M0 if case.packed else ScaleLayout.COLUMN
    return x, counts.to(families.device), q, empty_scale(q, GROUP, layout)


def ours(case: MaskedSiluQuantCase, seed: int, pdl: bool = True) -> Run:
    x, counts, q, scale = _tensors(case, seed)
    op = torch.ops.vllm_b200.masked_silu_group_quant
    return Run(lambda: op(x, counts, q, scale, EPS, case.packed, pdl), (q, scale))


def ours_no_pdl(case: MaskedSiluQuantCase, seed: int) -> Run:
    return ours(case, seed, pdl=False)


def vllm(case: MaskedSiluQuantCase, seed: int) -> Run:
    """The op alone: vLLM zeroes the scales before each call besides."""
    op = vllm_op("persistent_masked_m_silu_mul_quant")
    x, counts, q, scale = _tensors(case, seed)
    return Run(lambda: op(x, counts, q, scale, case.packed), (q, scale))


IMPLEMENTATIONS: dict[str, Callable[[MaskedSiluQuantCase, int], Run]] = {
    "ours": ours,
    "ours_no_pdl": ours_no_pdl,
    "vllm": vllm,
}


def check(case: MaskedSiluQuantCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    """Right when q * scale of the valid rows is silu(gate) * up within the format's error."""
    q, scale = outputs
    x, counts, *_ = _tensors(case, seed)
    valid = torch.arange(case.max_tokens, device=families.device) < counts.unsqueeze(-1)
    gate, up = x[valid].double().chunk(2, dim=-1)
    values = dequantise(q[valid], unpack_scale(scale[valid], case.intermediate_size // GROUP))
    limit = FP8_LIMIT * (2 if case.packed else 1)
    return verdict(error_of(values, torch.nn.functional.silu(gate) * up), limit)
