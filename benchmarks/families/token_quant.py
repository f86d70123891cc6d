"""Quantisation with one scale per token or per tensor: ours, vLLM's CUDA ops, and what torch.compile makes of it."""

from collections.abc import Callable
from typing import Any

import torch

import vllm_b200_plugin.ops.token_quant  # noqa: F401 - defines the ops
from benchmarks import families
from benchmarks.cases.token_quant import TokenQuantCase, benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families._common import (
    E4M3,
    E4M3_MAX,
    FP8_LIMIT,
    compiled,
    error_of,
    generator,
    normal,
    verdict,
    vllm_op,
)

OP = "token_quant"
INT8_MAX = 127.0
STATIC_SCALE = 1 / 16  # normal values reach 5 to 6: within both formats
cases = benchmarks


def record(case: TokenQuantCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": None,
        "k": case.hidden_size,
        "dtype": case.dtype_name,
        "layout": _layout(case),
        "bytes": case.num_bytes,
        "flops": 0,
    }


def _layout(case: TokenQuantCase) -> str:
    if case.group_shape:
        return "per_channel" if case.group_shape == (-1, 1) else "static_groups"
    return ("per_tensor" if case.static else "per_token") + ("_azp" if case.asymmetric else "")


def _input(case: TokenQuantCase, seed: int) -> torch.Tensor:
    return normal((case.num_tokens, case.hidden_size), generator(seed))


def _tensors(case: TokenQuantCase, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = _input(case, seed)
    q = torch.empty(x.shape, dtype=case.dtype, device=x.device)
    if case.group_shape:
        return (
            x,
            q,
            torch.empty(case.num_scales, device=x.device).uniform_(
                STATIC_SCALE, 2 * STATIC_SCALE, generator=generator(seed)
            ),
        )
    if case.static:
        return x, q, torch.full((1,), STATIC_SCALE, device=x.device)
    return x, q, torch.empty(case.num_tokens, 1, device=x.device)


def _azp(case: TokenQuantCase) -> torch.Tensor | None:
    return torch.empty(case.num_tokens, 1, dtype=torch.int32, device=families.device) if case.asymmetric else None


def _run(call: Callable[[], object], *outputs: torch.Tensor | None) -> Run:
    return Run(call, tuple(output for output in outputs if output is not None))


def ours(case: TokenQuantCase, seed: int, pdl: bool = True) -> Run:
    x, q, scale = _tensors(case, seed)
    if case.group_shape:
        group = (case.num_tokens // case.num_scales[0], case.hidden_size // case.num_scales[1])
        grouped = torch.ops.vllm_b200.static_group_quant
        return Run(lambda: grouped(x, q, scale, *group, pdl), (q,))
    if case.static:
        static = torch.ops.vllm_b200.per_tensor_quant
        return Run(lambda: static(x, q, scale, None, pdl), (q,))
    dynamic, azp = torch.ops.vllm_b200.per_token_quant, _azp(case)
    return _run(lambda: dynamic(x, q, scale, azp, None, pdl), q, scale, azp)


def ours_no_pdl(case: TokenQuantCase, seed: int) -> Run:
    return ours(case, seed, pdl=False)


def vllm(case: TokenQuantCase, seed: int) -> Run:
    if case.static or case.group_shape:
        static = vllm_op("static_scaled_int8_quant" if case.dtype == torch.int8 else "static_scaled_fp8_quant")
        x, q, scale = _tensors(case, seed)
        group_shape = list(case.group_shape) if case.group_shape else None
        return Run(lambda: static(q, x, scale, group_shape), (q,))
    dynamic = vllm_op("dynamic_scaled_int8_quant" if case.dtype == torch.int8 else "dynamic_per_token_scaled_fp8_quant")
    x, q, scale = _tensors(case, seed)
    azp = _azp(case)
    return _run(lambda: dynamic(q, x, scale, azp), q, scale, azp)


def inductor(case: TokenQuantCase, seed: int) -> Run:
    if case.asymmetric or case.group_shape or (case.static and case.dtype == torch.int8):
        raise Missing("the compiled twin has no zero point, no given groups and no static int8")
    x, q, scale = _tensors(case, seed)
    if case.static:
        static = compiled(_static_fp8)
        return Run(lambda: static(x, q, scale), (q,))
    dynamic = compiled(_dynamic_int8 if case.dtype == torch.int8 else _dynamic_fp8)
    return Run(lambda: dynamic(x, q, scale), (q, scale))


def _static_fp8(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> None:
    q.copy_((x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3))


def _dynamic_fp8(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> None:
    scale.copy_(x.abs().amax(-1, keepdim=True).float() / E4M3_MAX)
    q.copy_((x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3))


def _dynamic_int8(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> None:
    scale.copy_(x.abs().amax(-1, keepdim=True).float() / INT8_MAX)
    q.copy_((x.float() / scale).round().clamp(-128, 127).to(torch.int8))


IMPLEMENTATIONS: dict[str, Callable[[TokenQuantCase, int], Run]] = {
    "ours": ours,
    "ours_no_pdl": ours_no_pdl,
    "vllm": vllm,
    "inductor": inductor,
}


def check(case: TokenQuantCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    """Right when q * scale is x within the format's error, and every scale fits its row's largest value."""
    x = _input(case, seed).double()
    if case.group_shape:
        scale = _tensors(case, seed)[2].double()
        for dim, size in enumerate(x.shape):
            scale = scale.repeat_interleave(size // scale.shape[dim], dim)
        return verdict(error_of(outputs[0].double() * scale, x), FP8_LIMIT)
    if case.static:
        return verdict(error_of(outputs[0].double() * STATIC_SCALE, x), FP8_LIMIT)
    if case.asymmetric:
        q, scale, azp = outputs
        return verdict(error_of((q.double() - azp.double()) * scale.double(), x), FP8_LIMIT)
    q, scale = outputs
    qmax = INT8_MAX if case.dtype == torch.int8 else E4M3_MAX
    expected = x.abs().amax(-1, keepdim=True) / qmax
    scales_right = torch.allclose(scale.double().view_as(expected), expected, rtol=1e-5, atol=0)
    return verdict(error_of(q.double() * scale.double(), x), FP8_LIMIT, scales_right=scales_right)
