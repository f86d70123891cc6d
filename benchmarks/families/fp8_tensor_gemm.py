"""FP8 matrix products with one scale per operand: vLLM's CUTLASS, cuBLAS through torch, FlashInfer."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.gemm import GemmCase, fp8_tensor_benchmarks
from benchmarks.families import Run
from benchmarks.families._common import FP8_LIMIT, check_product, e4m3_values, generator, peer, vllm_op

OP = "fp8_tensor_gemm"
X_SCALE, WEIGHT_SCALE = 2.0**-6, 2.0**-12
cases = fp8_tensor_benchmarks


def record(case: GemmCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": case.n,
        "k": case.k,
        "dtype": "e4m3",
        "layout": "per_tensor",
        "bytes": case.num_bytes(8, 8, scale_bytes=8),
        "flops": case.flops,
    }


def _operands(case: GemmCase, seed: int) -> tuple[torch.Tensor, ...]:
    """x [M, K], weight [N, K] and their scales [1]."""
    rng = generator(seed)
    x, weight = e4m3_values((case.num_tokens, case.k), rng), e4m3_values((case.n, case.k), rng)
    return x, weight, *(torch.full((1,), scale, device=families.device) for scale in (X_SCALE, WEIGHT_SCALE))


def _output(case: GemmCase) -> torch.Tensor:
    return torch.empty(case.num_tokens, case.n, dtype=torch.bfloat16, device=families.device)


def vllm_cutlass(case: GemmCase, seed: int) -> Run:
    gemm = vllm_op("cutlass_scaled_mm")
    (x, weight, x_scale, weight_scale), out = _operands(case, seed), _output(case)
    return Run(lambda: gemm(out, x, weight.t(), x_scale, weight_scale, None), (out,))


def torch_scaled_mm(case: GemmCase, seed: int) -> Run:
    (x, weight, x_scale, weight_scale), out = _operands(case, seed), _output(case)
    return Run(
        lambda: torch._scaled_mm(x, weight.t(), x_scale, weight_scale, out_dtype=torch.bfloat16, out=out), (out,)
    )


def flashinfer(case: GemmCase, seed: int) -> Run:
    gemm = peer("flashinfer", "bmm_fp8")
    # On Hopper FlashInfer has cuBLAS only; from Blackwell on vLLM lets it choose.
    backend = "auto" if torch.cuda.get_device_capability()[0] >= 10 else "cublas"
    (x, weight, x_scale, weight_scale), out = _operands(case, seed), _output(case)
    x, weight_t, batch = x.unsqueeze(0), weight.t().unsqueeze(0), out.unsqueeze(0)
    return Run(lambda: gemm(x, weight_t, x_scale, weight_scale, torch.bfloat16, batch, backend), (out,))


IMPLEMENTATIONS: dict[str, Callable[[GemmCase, int], Run]] = {
    "vllm_cutlass": vllm_cutlass,
    "torch": torch_scaled_mm,
    "flashinfer": flashinfer,
}


def check(case: GemmCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    x, weight, _, _ = _operands(case, seed)
    scale = X_SCALE * WEIGHT_SCALE
    return check_product(outputs[0], lambda rows: scale * (x[rows].double() @ weight.double().t()), FP8_LIMIT)
