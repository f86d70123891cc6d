"""Per-token-group quantisation: ours, vLLM's CUDA ops, vLLM's Triton kernels, FlashInfer's Hopper quantiser."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.quant import GroupQuantCase, benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families._common import import_peer
from vllm_b200_plugin.ops.quant import QUANT_MAX, ScaleLayout, empty_scale, per_token_group_quant

OP = "group_quant"
EPS = 1e-10
E4M3 = torch.float8_e4m3fn
cases = benchmarks

CHECKED_ROWS = 512  # of either end, bit by bit; the whole tensor is checked in float64


def record(case: GroupQuantCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": None,
        "k": case.hidden_size,
        "dtype": "int8" if case.dtype == torch.int8 else "e4m3",
        "layout": case.layout_name,
        "group_size": case.group_size,
        "bytes": case.num_bytes,
        "flops": 0,
    }


def _tensors(case: GroupQuantCase, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = case.make_input(families.device, seed)
    return (
        x,
        torch.empty(x.shape, dtype=case.dtype, device=families.device),
        empty_scale(x, case.group_size, case.layout),
    )


def ours(case: GroupQuantCase, seed: int, pdl: bool = True) -> Run:
    x, q, scale = _tensors(case, seed)
    op = torch.ops.vllm_b200.per_token_group_quant
    packed = case.layout is ScaleLayout.PACKED_UE8M0
    return Run(lambda: op(x, q, scale, case.group_size, EPS, case.ue8m0 or packed, True, pdl), (q, scale))


def ours_no_pdl(case: GroupQuantCase, seed: int) -> Run:
    return ours(case, seed, pdl=False)


def vllm(case: GroupQuantCase, seed: int) -> Run:
    import_peer("vllm._custom_ops")
    x, q, scale = _tensors(case, seed)
    ops, qmax = torch.ops._C, QUANT_MAX[case.dtype]
    if case.layout is ScaleLayout.PACKED_UE8M0:
        if case.dtype == torch.int8:
            raise Missing("vLLM packs scales for FP8 only")
        return Run(
            lambda: ops.per_token_group_fp8_quant_packed(x, q, scale, case.group_size, EPS, -qmax, qmax), (q, scale)
        )
    if case.dtype == torch.int8:
        if case.layout is not ScaleLayout.ROW or case.ue8m0:
            raise Missing("vLLM's int8 quantiser writes row-major fp32 scales only")
        return Run(lambda: ops.per_token_group_quant_int8(x, q, scale, case.group_size, EPS, -128.0, 127.0), (q, scale))
    column, tma = case.layout is not ScaleLayout.ROW, case.layout is ScaleLayout.COLUMN_TMA
    return Run(
        lambda: ops.per_token_group_fp8_quant(x, q, scale, case.group_size, EPS, -qmax, qmax, case.ue8m0, column, tma),
        (q, scale),
    )


def vllm_triton(case: GroupQuantCase, seed: int) -> Run:
    module = import_peer("vllm.model_executor.layers.quantization.utils.fp8_utils")
    if case.dtype != E4M3 or case.layout is ScaleLayout.PACKED_UE8M0:
        raise Missing("vLLM's Triton quantiser writes FP8 with fp32 scales only")
    x, q, scale = _tensors(case, seed)
    grid, qmax = (x.numel() // case.group_size,), QUANT_MAX[case.dtype]
    kwargs = {
        "fp8_min": -qmax,
        "fp8_max": qmax,
        "use_ue8m0": case.ue8m0,
        "BLOCK": case.group_size,
        "num_warps": 1,
        "num_stages": 1,
    }
    if case.layout is ScaleLayout.ROW:
        kernel, strides = module._per_token_group_quant_fp8[grid], ()
    else:
        kernel, strides = module._per_token_group_quant_fp8_colmajor[grid], (scale.stride(1),)
    return Run(
        lambda: kernel(x, q, scale, case.group_size, x.shape[1], x.stride(0), *strides, EPS, **kwargs), (q, scale)
    )


def flashinfer(case: GroupQuantCase, seed: int) -> Run:
    gemm = import_peer("flashinfer.gemm.gemm_base")
    if case.dtype != E4M3 or case.layout is not ScaleLayout.COLUMN_TMA or case.ue8m0 or case.group_size != 128:
        raise Missing("FlashInfer's Hopper quantiser writes FP8 with column-major TMA-aligned fp32 scales only")
    if torch.cuda.get_device_capability() != (9, 0):
        raise Missing("FlashInfer's fp8_quantize_1x128 is for Hopper")
    x, q, scale = _tensors(case, seed)
    runner = gemm.get_fp8_blockscale_gemm_runner_sm90()
    return Run(lambda: runner.fp8_quantize_1x128(x, q, scale, False), (q, scale))


IMPLEMENTATIONS: dict[str, Callable[[GroupQuantCase, int], Run]] = {
    "ours": ours,
    "ours_no_pdl": ours_no_pdl,
    "vllm": vllm,
    "vllm_triton": vllm_triton,
    "flashinfer": flashinfer,
}


def check(case: GroupQuantCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    """Right when q * scale is x within the format's error, in float64; also whether it is our reference bit for bit."""
    q, scale = outputs
    x = case.make_input(families.device, seed)
    if scale.dtype == torch.int32:
        exponent = torch.stack([(scale >> shift) & 0xFF for shift in (0, 8, 16, 24)], -1).flatten(-2)
        scale32 = torch.exp2(exponent[..., : case.hidden_size // case.group_size].double() - 127)
    else:
        scale32 = scale.double()
    y = (q.double().unflatten(-1, (-1, case.group_size)) * scale32.unsqueeze(-1)).flatten(-2)
    # Rows differ by powers of two in size: compare each at its own scale.
    norm = x.double().norm(dim=-1, keepdim=True).clamp(min=1e-30)
    a, b = x.double() / norm, y / norm
    error = float(1 - 2 * (a * b).sum() / (a.square().sum() + b.square().sum()))
    limit = 2e-3 if case.ue8m0 or case.layout is ScaleLayout.PACKED_UE8M0 else 1e-3
    exact = True
    for rows in (slice(0, CHECKED_ROWS), slice(-CHECKED_ROWS, None)):
        expected = per_token_group_quant(
            x[rows].cpu(), case.group_size, case.dtype, layout=case.layout, ue8m0=case.ue8m0, eps=EPS
        )
        exact &= torch.equal(q[rows].cpu().view(torch.uint8), expected[0].view(torch.uint8))
        exact &= torch.equal(scale[rows].cpu(), expected[1])
    return error == error and abs(error) < limit, {"error": error, "bit_exact": exact}
