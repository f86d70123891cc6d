"""silu_and_mul and quantisation: ours, vLLM's fused op, its two ops, its Triton kernels, and torch.compile."""

from collections.abc import Callable
from typing import Any

import torch

import vllm_b200_plugin.ops.gated_quant  # noqa: F401 - defines the ops
from benchmarks import families
from benchmarks.cases.silu_quant import SiluQuantCase, benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families._common import (
    E4M3,
    EPS,
    FP8_LIMIT,
    GROUP,
    Returned,
    compiled,
    dequantise,
    error_of,
    generator,
    normal,
    peer,
    quantise_groups,
    unpack_scale,
    verdict,
    vllm_group_quant,
    vllm_op,
)
from vllm_b200_plugin.ops.quant import ScaleLayout, empty_scale

OP = "silu_quant"
STATIC_SCALE = 1 / 16  # products of normal values reach some 25: within the format
FP8_UTILS = "vllm.model_executor.layers.quantization.utils.fp8_utils"
cases = benchmarks


def record(case: SiluQuantCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": case.intermediate_size,
        "k": 2 * case.intermediate_size,
        "dtype": "e4m3",
        "layout": case.layout_name,
        "bytes": case.num_bytes,
        "flops": 0,
    }


def _input(case: SiluQuantCase, seed: int) -> torch.Tensor:
    return normal((case.num_tokens, 2 * case.intermediate_size), generator(seed))


def _tensors(case: SiluQuantCase, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = _input(case, seed)
    q = torch.empty(case.num_tokens, case.intermediate_size, dtype=E4M3, device=families.device)
    if case.kind == "token":
        return x, q, torch.empty(case.num_tokens, 1, device=families.device)
    if case.kind == "tensor":
        return x, q, torch.full((1,), STATIC_SCALE, device=families.device)
    return x, q, empty_scale(q, GROUP, case.layout)


def ours(case: SiluQuantCase, seed: int, pdl: bool = True) -> Run:
    x, q, scale = _tensors(case, seed)
    ops = torch.ops.vllm_b200
    silu = (0, 0.0, 1.0, 0.0, pdl)
    if case.kind == "token":
        return Run(lambda: ops.gated_token_quant(x, q, scale, None, *silu), (q, scale))
    if case.kind == "tensor":
        return Run(lambda: ops.gated_tensor_quant(x, q, scale, *silu), (q,))
    packed = case.layout is ScaleLayout.PACKED_UE8M0
    return Run(lambda: ops.gated_group_quant(x, q, scale, GROUP, EPS, packed, True, *silu), (q, scale))


def ours_no_pdl(case: SiluQuantCase, seed: int) -> Run:
    return ours(case, seed, pdl=False)


def vllm(case: SiluQuantCase, seed: int) -> Run:
    if case.kind == "token":
        raise Missing("vLLM has no fused op with one scale per token")
    if case.kind == "tensor":
        static = vllm_op("silu_and_mul_quant")
        x, q, scale = _tensors(case, seed)
        return Run(lambda: static(q, x, scale), (q,))
    op = vllm_op("silu_and_mul_per_block_quant")
    if case.layout is ScaleLayout.PACKED_UE8M0:
        raise Missing("vLLM's fused op writes fp32 scales only")
    x, q, scale = _tensors(case, seed)
    return Run(lambda: op(q, x, scale, GROUP, None, case.layout is ScaleLayout.COLUMN), (q, scale))


def vllm_separate(case: SiluQuantCase, seed: int) -> Run:
    silu_and_mul = vllm_op("silu_and_mul")
    x, q, scale = _tensors(case, seed)
    hidden = torch.empty(q.shape, dtype=x.dtype, device=x.device)
    if case.kind == "token":
        token = vllm_op("dynamic_per_token_scaled_fp8_quant")
        return Run(lambda: (silu_and_mul(hidden, x), token(q, hidden, scale, None)), (q, scale))
    if case.kind == "tensor":
        static = vllm_op("static_scaled_fp8_quant")
        return Run(lambda: (silu_and_mul(hidden, x), static(q, hidden, scale, None)), (q,))
    quantise = vllm_group_quant(hidden, q, scale, case.layout)
    return Run(lambda: (silu_and_mul(hidden, x), quantise()), (q, scale))


def vllm_triton(case: SiluQuantCase, seed: int) -> Run:
    if case.kind != "group" or case.layout is ScaleLayout.ROW:
        raise Missing("vLLM's Triton kernels write column-major group scales only")
    if case.layout is ScaleLayout.PACKED_UE8M0:
        packed = peer(FP8_UTILS, "silu_mul_quant_fp8_packed_triton")
        x = _input(case, seed)
        return Returned(lambda: packed(x, group_size=GROUP))
    column = peer(FP8_UTILS, "silu_mul_per_token_group_quant_fp8_colmajor")
    if case.num_tokens % GROUP:
        raise Missing(f"vLLM's column-major Triton kernel takes multiples of {GROUP} tokens")
    x = _input(case, seed)
    return Returned(lambda: column(x, use_ue8m0=False))


def inductor(case: SiluQuantCase, seed: int) -> Run:
    if case.kind != "group" or case.layout is ScaleLayout.PACKED_UE8M0:
        raise Missing("the compiled twin writes fp32 group scales only")
    function = compiled(_silu_quant)
    x, q, scale = _tensors(case, seed)
    return Run(lambda: function(x, q, scale), (q, scale))


def _silu_quant(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> None:
    gate, up = x.chunk(2, dim=-1)
    values, scales = quantise_groups((torch.nn.functional.silu(gate.float()) * up.float()).to(x.dtype))
    q.copy_(values)
    scale.copy_(scales)


IMPLEMENTATIONS: dict[str, Callable[[SiluQuantCase, int], Run]] = {
    "ours": ours,
    "ours_no_pdl": ours_no_pdl,
    "vllm": vllm,
    "vllm_separate": vllm_separate,
    "vllm_triton": vllm_triton,
    "inductor": inductor,
}


def check(case: SiluQuantCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    """Right when q * scale is silu(gate) * up within the format's error."""
    q, *scales = outputs
    gate, up = _input(case, seed).double().chunk(2, dim=-1)
    if case.kind == "group":
        values = dequantise(q, unpack_scale(scales[0], case.intermediate_size // GROUP))
    else:
        values = q.double() * (scales[0].double() if scales else STATIC_SCALE)
    limit = FP8_LIMIT * (2 if case.layout is ScaleLayout.PACKED_UE8M0 else 1)
    return verdict(error_of(values, torch.nn.functional.silu(gate) * up), limit)
