"""FP8 linear layers with one scale for the weight and one, given, for the activation, its quantisation included."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.gemm import GemmCase, fp8_tensor_benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families._common import (
    E4M3_MAX,
    FP8_LIMIT,
    Returned,
    check_product,
    e4m3_values,
    generator,
    normal,
    vllm_op,
)
from benchmarks.families.fp8_tensor_gemm import WEIGHT_SCALE, X_SCALE, _output
from vllm_b200_plugin import dispatch
from vllm_b200_plugin.ops.small_m_gemm import Config, scaled_linear
from vllm_b200_plugin.ops.token_quant import per_tensor_quant

OP = "fp8_linear"
cases = fp8_tensor_benchmarks


def record(case: GemmCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": case.n,
        "k": case.k,
        "dtype": "bf16_e4m3",
        "layout": "per_tensor",
        "bytes": case.num_bytes(16, 8, scale_bytes=8),
        "flops": case.flops,
    }


def _operands(case: GemmCase, seed: int) -> tuple[torch.Tensor, ...]:
    """x [M, K], weight [N, K] and their scales [1]."""
    rng = generator(seed)
    weight = e4m3_values((case.n, case.k), rng)
    scales = (torch.full((1,), scale, device=families.device) for scale in (X_SCALE, WEIGHT_SCALE))
    return normal((case.num_tokens, case.k), rng), weight, *scales


def linear(
    x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, scale: torch.Tensor, config: Config
) -> torch.Tensor:
    """As the plugin's layers run it."""
    return scaled_linear(per_tensor_quant(x, x_scale), x_scale, weight, scale, config=config, pdl=True)


def ours(case: GemmCase, seed: int) -> Run:
    """With the cut that dispatch takes."""
    operands = _operands(case, seed)
    if families.device.type != "cuda":
        return Returned(lambda: linear(*operands, Config()))
    choice = dispatch.small_m_gemm("fp8", case.num_tokens, case.n, case.k, torch.cuda.get_device_capability())
    if choice.kernel != dispatch.SMALL_M:
        raise Missing(choice.reason)
    return Returned(lambda: linear(*operands, Config(*choice.config)))


def vllm(case: GemmCase, seed: int) -> Run:
    """vLLM's quantisation and CUTLASS."""
    gemm, quantise = vllm_op("cutlass_scaled_mm"), vllm_op("static_scaled_fp8_quant")
    (x, weight, x_scale, scale), out = _operands(case, seed), _output(case)
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return Run(lambda: (quantise(q, x, x_scale), gemm(out, q, weight.t(), x_scale, scale, None)), (out,))


def vllm_cutlass(case: GemmCase, seed: int) -> Run:
    """Our quantisation, which the plugin puts into vLLM's op, and CUTLASS."""
    gemm = vllm_op("cutlass_scaled_mm")
    (x, weight, x_scale, scale), out = _operands(case, seed), _output(case)
    return Run(lambda: gemm(out, per_tensor_quant(x, x_scale), weight.t(), x_scale, scale, None), (out,))


def torch_scaled_mm(case: GemmCase, seed: int) -> Run:
    """Our quantisation and cuBLAS."""
    (x, weight, x_scale, scale), out = _operands(case, seed), _output(case)

    def call() -> None:
        torch._scaled_mm(per_tensor_quant(x, x_scale), weight.t(), x_scale, scale, out_dtype=torch.bfloat16, out=out)

    return Run(call, (out,))


IMPLEMENTATIONS: dict[str, Callable[[GemmCase, int], Run]] = {
    "ours": ours,
    "vllm": vllm,
    "vllm_cutlass": vllm_cutlass,
    "torch": torch_scaled_mm,
}


def check(case: GemmCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    x, weight, x_scale, scale = _operands(case, seed)

    def reference(rows: torch.Tensor) -> torch.Tensor:
        q = (x[rows].float() / x_scale).clamp(-E4M3_MAX, E4M3_MAX).to(weight.dtype)
        return q.double() @ weight.double().t() * (x_scale * scale).double()

    return check_product(outputs[0], reference, FP8_LIMIT)
