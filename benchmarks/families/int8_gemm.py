"""INT8 matrix products with a scale per token and per output channel: ours, vLLM's CUTLASS and Triton."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.gemm import GemmCase, int8_benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families._common import Returned, check_product, generator, peer, vllm_op
from vllm_b200_plugin import dispatch
from vllm_b200_plugin.ops.small_m_gemm import Config, scaled_linear

OP = "int8_gemm"
LIMIT = 1e-5  # of error_of: sums are exact, the result is rounded to bf16
TRITON = "vllm.model_executor.layers.quantization.compressed_tensors.triton_scaled_mm"
cases = int8_benchmarks


def record(case: GemmCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": case.n,
        "k": case.k,
        "dtype": "int8",
        "layout": "per_token_per_channel",
        "bytes": case.num_bytes(8, 8, scale_bytes=4 * (case.num_tokens + case.n)),
        "flops": case.flops,
    }


def _operands(case: GemmCase, seed: int) -> tuple[torch.Tensor, ...]:
    """x [M, K], weight [N, K] and their scales [M, 1] and [N, 1]; results of about 1."""
    rng = generator(seed)

    def int8(rows: int) -> torch.Tensor:
        return torch.randint(-127, 128, (rows, case.k), generator=rng, device=families.device, dtype=torch.int8)

    def scale(rows: int, factor: float) -> torch.Tensor:
        return torch.rand((rows, 1), generator=rng, device=families.device).add_(0.5).mul_(factor)

    rows = case.num_tokens, case.n
    return int8(rows[0]), int8(rows[1]), scale(rows[0], 2.0**-6), scale(rows[1], 2.0**-6 / case.k**0.5)


def ours(case: GemmCase, seed: int) -> Run:
    """With the cut that dispatch takes."""
    x, weight, x_scale, weight_scale = _operands(case, seed)
    if families.device.type != "cuda":
        return Returned(lambda: scaled_linear(x, x_scale, weight, weight_scale))
    choice = dispatch.small_m_gemm("int8", case.num_tokens, case.n, case.k, torch.cuda.get_device_capability())
    if choice.kernel != dispatch.SMALL_M:
        raise Missing(choice.reason)
    config = Config(*choice.config)
    return Returned(lambda: scaled_linear(x, x_scale, weight, weight_scale, config=config, pdl=True))


def vllm_cutlass(case: GemmCase, seed: int) -> Run:
    gemm = vllm_op("cutlass_scaled_mm")
    x, weight, x_scale, weight_scale = _operands(case, seed)
    out = torch.empty(case.num_tokens, case.n, dtype=torch.bfloat16, device=families.device)
    return Run(lambda: gemm(out, x, weight.t(), x_scale, weight_scale, None), (out,))


def vllm_triton(case: GemmCase, seed: int) -> Run:
    gemm = peer(TRITON, "triton_scaled_mm")
    x, weight, x_scale, weight_scale = _operands(case, seed)
    return Returned(lambda: gemm(x, weight.t(), x_scale, weight_scale, torch.bfloat16))


IMPLEMENTATIONS: dict[str, Callable[[GemmCase, int], Run]] = {
    "ours": ours,
    "vllm_cutlass": vllm_cutlass,
    "vllm_triton": vllm_triton,
}


def check(case: GemmCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    x, weight, x_scale, weight_scale = _operands(case, seed)

    def reference(rows: torch.Tensor) -> torch.Tensor:
        product = x[rows].double() @ weight.double().t()
        return x_scale[rows].double() * product * weight_scale.double().t()

    return check_product(outputs[0], reference, LIMIT)
