"""An FP8 linear layer with what comes before it, as a decode step runs it: residual addition and RMSNorm, silu_and_mul,
or nothing; then quantisation, with a given scale or one per token, and the GEMM.

One set of tensors after another: what comes before a layer runs behind the GEMM of the set before.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.gemm import FusedLinearCase, fused_linear_benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families._common import (
    E4M3,
    FP8_LIMIT,
    Returned,
    check_product,
    e4m3_values,
    generator,
    normal,
    vllm_op,
)
from vllm_b200_plugin import dispatch
from vllm_b200_plugin.ops.gated_quant import gated_tensor_quant, gated_token_quant
from vllm_b200_plugin.ops.norm_quant import normalise, rms_norm_tensor_quant, rms_norm_token_quant
from vllm_b200_plugin.ops.small_m_gemm import Config, scaled_linear
from vllm_b200_plugin.ops.token_quant import per_tensor_quant, per_token_quant

OP = "fused_linear"
NORM_EPS = 1e-5
X_SCALE = 1 / 16  # what is quantised reaches some 25: within the format
cases = fused_linear_benchmarks


def record(case: FusedLinearCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": case.n,
        "k": case.k,
        "dtype": "bf16_e4m3",
        "layout": case.layout_name,
        "bytes": case.num_bytes,
        "flops": 2 * case.num_tokens * case.n * case.k,
    }


def _operands(case: FusedLinearCase, seed: int) -> tuple[torch.Tensor, ...]:
    """x [M, K], of silu_and_mul [M, 2K]; residual [M, K]; norm_weight [K]; weight [N, K], its scale; x's scale [1]."""
    rng = generator(seed)
    x = normal((case.num_tokens, case.k * (2 if case.before == "silu" else 1)), rng)
    residual = normal((case.num_tokens, case.k), rng)
    norm_weight = (1 + 0.1 * normal((case.k,), rng, torch.float32)).to(x.dtype)
    weight_scale = torch.full((1,), 2.0**-6 / case.k**0.5, device=families.device)
    if case.per_token:
        weight_scale = weight_scale.expand(case.n).clone()
    x_scale = torch.full((1,), X_SCALE, device=families.device)
    return x, residual, norm_weight, e4m3_values((case.n, case.k), rng), weight_scale, x_scale


def quantise(
    case: FusedLinearCase, x: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, x_scale: torch.Tensor,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Ours, of what comes before the layer, as the plugin's ops run it: q and its scale."""
    if case.before == "norm":
        sums: dict[str, Any] = {"residual": residual, "total": torch.empty_like(x), "pdl": pdl}
        if case.per_token:
            return rms_norm_token_quant(x, norm_weight, NORM_EPS, **sums)
        return rms_norm_tensor_quant(x, norm_weight, x_scale, NORM_EPS, **sums), x_scale
    if case.before == "silu":
        return gated_token_quant(x, pdl=pdl) if case.per_token else (gated_tensor_quant(x, x_scale, pdl=pdl), x_scale)
    if case.per_token:
        return per_token_quant(x, pdl=pdl)[:2]
    return per_tensor_quant(x, x_scale, pdl=pdl), x_scale


def ours_cut(case: FusedLinearCase, seed: int, config: Config, pdl: bool = True) -> Run:
    """With our GEMM cut like this; pdl: the kernel before it starts early, too."""
    x, residual, norm_weight, weight, weight_scale, x_scale = _operands(case, seed)

    def call() -> torch.Tensor:
        q, scale = quantise(case, x, residual, norm_weight, x_scale, pdl)
        return scaled_linear(q, scale, weight, weight_scale, config=config, pdl=True)

    return Returned(call)


def ours(case: FusedLinearCase, seed: int) -> Run:
    """With the cut that dispatch takes."""
    if families.device.type != "cuda":
        return ours_cut(case, seed, Config())
    choice = dispatch.small_m_gemm("fp8", case.num_tokens, case.n, case.k, torch.cuda.get_device_capability())
    if choice.kernel != dispatch.SMALL_M:
        raise Missing(choice.reason)
    return ours_cut(case, seed, Config(*choice.config))


def ours_cutlass(case: FusedLinearCase, seed: int) -> Run:
    """Where dispatch takes CUTLASS: our kernel before it."""
    gemm = vllm_op("cutlass_scaled_mm")
    (x, residual, norm_weight, weight, weight_scale, x_scale), out = _operands(case, seed), _output(case)

    def call() -> None:
        q, scale = quantise(case, x, residual, norm_weight, x_scale)
        gemm(out, q, weight.t(), scale, weight_scale, None)

    return Run(call, (out,))


def vllm(case: FusedLinearCase, seed: int) -> Run:
    """vLLM's fused CUDA op, or its two where there is none, and CUTLASS."""
    gemm = vllm_op("cutlass_scaled_mm")
    (x, residual, norm_weight, weight, weight_scale, x_scale), out = _operands(case, seed), _output(case)
    residual = residual.clone()  # becomes the sum
    q = torch.empty(case.num_tokens, case.k, dtype=E4M3, device=x.device)
    scale = torch.empty(case.num_tokens, 1, device=x.device) if case.per_token else x_scale
    y = torch.empty(case.num_tokens, case.k, dtype=x.dtype, device=x.device)
    before: dict[tuple[str, bool], Callable[[], object]] = {
        ("norm", True): lambda: norm_token(q, x, norm_weight, scale, NORM_EPS, None, residual),
        ("norm", False): lambda: norm_static(q, x, residual, norm_weight, scale, NORM_EPS),
        ("silu", True): lambda: (silu(y, x), token(q, y, scale, None)),
        ("silu", False): lambda: silu_static(q, x, scale),
        ("none", True): lambda: token(q, x, scale, None),
        ("none", False): lambda: static(q, x, scale, None),
    }
    norm_token, norm_static = (
        vllm_op("rms_norm_dynamic_per_token_quant"),
        vllm_op("fused_add_rms_norm_static_fp8_quant"),
    )
    silu, silu_static = vllm_op("silu_and_mul"), vllm_op("silu_and_mul_quant")
    token, static = vllm_op("dynamic_per_token_scaled_fp8_quant"), vllm_op("static_scaled_fp8_quant")
    first = before[case.before, case.per_token]

    def call() -> None:
        first()
        gemm(out, q, weight.t(), scale, weight_scale, None)

    return Run(call, (out,))


def inductor(case: FusedLinearCase, seed: int) -> Run:
    """What vLLM's compiled graphs run by default: what comes before in a kernel of inductor's, and CUTLASS."""
    gemm = vllm_op("cutlass_scaled_mm")
    (x, residual, norm_weight, weight, weight_scale, x_scale), out = _operands(case, seed), _output(case)
    before = _compiled(case.before, case.per_token)

    def call() -> None:
        q, scale, *_ = before(x, residual, norm_weight, x_scale)
        gemm(out, q, weight.t(), scale, weight_scale, None)

    return Run(call, (out,))


@functools.cache
def _compiled(before: str, per_token: bool) -> Callable[..., Any]:
    """For a number of columns, which a model knows; one token and more are compiled apart."""
    torch._dynamo.config.recompile_limit = 64  # past it dynamo would run eagerly, unsaid
    return torch.compile(functools.partial(compose, before, per_token), fullgraph=True)


def compose(
    before: str, per_token: bool, x: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor,
    x_scale: torch.Tensor,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """What comes before the GEMM as vLLM writes it for inductor: q, its scale and the sum."""
    y = x
    rest: tuple[torch.Tensor, ...] = ()
    if before == "norm":
        total = x.float() + residual.float()
        normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + NORM_EPS)
        y, rest = normed.to(x.dtype) * norm_weight, (total.to(x.dtype),)
    elif before == "silu":
        gate, up = x.chunk(2, -1)
        y = torch.nn.functional.silu(gate) * up
    scale = (y.abs().amax(-1, keepdim=True).float() / 448).clamp(min=1 / (448 * 512)) if per_token else x_scale
    return (y.float() * scale.reciprocal()).clamp(-448, 448).to(E4M3), scale, *rest


def _output(case: FusedLinearCase) -> torch.Tensor:
    return torch.empty(case.num_tokens, case.n, dtype=torch.bfloat16, device=families.device)


IMPLEMENTATIONS: dict[str, Callable[[FusedLinearCase, int], Run]] = {
    "ours": ours,
    "ours_cutlass": ours_cutlass,
    "vllm": vllm,
    "inductor": inductor,
}


def check(case: FusedLinearCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    x, residual, norm_weight, weight, weight_scale, x_scale = _operands(case, seed)
    if case.before == "norm":
        x = normalise(x, residual.clone(), norm_weight, NORM_EPS, False)
    elif case.before == "silu":
        gate, up = x.float().chunk(2, -1)
        x = gate * torch.sigmoid(gate) * up
    scale = x_scale
    if case.per_token:
        scale = x.float().abs().amax(-1, keepdim=True) / 448
    q = (x.float() / scale).clamp(-448, 448).to(E4M3).double() * scale.double()

    def reference(rows: torch.Tensor) -> torch.Tensor:
        return q[rows] @ (weight.double() * weight_scale.double().view(-1, 1)).t()

    return check_product(outputs[0], reference, FP8_LIMIT)
