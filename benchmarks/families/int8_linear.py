"""INT8 linear layers from a bf16 activation (a scale per token and per output channel), its quantisation included."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.gemm import GemmCase, int8_benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families._common import Returned, check_product, generator, normal, vllm_op
from vllm_b200_plugin import dispatch
from vllm_b200_plugin.ops.small_m_gemm import Config, scaled_linear
from vllm_b200_plugin.ops.token_quant import per_token_quant

OP = "int8_linear"
LIMIT = 1e-5  # of error_of: sums are exact, the result is rounded to bf16
cases = int8_benchmarks


def record(case: GemmCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": case.n,
        "k": case.k,
        "dtype": "bf16_int8",
        "layout": "per_token_per_channel",
        "bytes": case.num_bytes(16, 8, scale_bytes=4 * case.n),
        "flops": case.flops,
    }


def _operands(case: GemmCase, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K], weight [N, K] and its scale [N, 1]; results of about 1."""
    rng = generator(seed)
    weight = torch.randint(-127, 128, (case.n, case.k), generator=rng, device=families.device, dtype=torch.int8)
    scale = torch.rand((case.n, 1), generator=rng, device=families.device).add_(0.5).mul_(2.0**-6 / case.k**0.5)
    return normal((case.num_tokens, case.k), rng), weight, scale


def linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, config: Config) -> torch.Tensor:
    """As the plugin's layers run it."""
    q, x_scale, _ = per_token_quant(x, torch.int8)
    return scaled_linear(q, x_scale, weight, scale, config=config, pdl=True)


def ours(case: GemmCase, seed: int) -> Run:
    """With the cut that dispatch takes."""
    operands = _operands(case, seed)
    if families.device.type != "cuda":
        return Returned(lambda: linear(*operands, Config()))
    choice = dispatch.small_m_gemm("int8", case.num_tokens, case.n, case.k, torch.cuda.get_device_capability())
    if choice.kernel != dispatch.SMALL_M:
        raise Missing(choice.reason)
    return Returned(lambda: linear(*operands, Config(*choice.config)))


def vllm(case: GemmCase, seed: int) -> Run:
    """vLLM's quantisation and CUTLASS."""
    gemm, quantise = vllm_op("cutlass_scaled_mm"), vllm_op("dynamic_scaled_int8_quant")
    (x, weight, scale), out = _operands(case, seed), _output(case)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    x_scale = torch.empty(case.num_tokens, 1, device=x.device)
    return Run(lambda: (quantise(q, x, x_scale, None), gemm(out, q, weight.t(), x_scale, scale, None)), (out,))


def vllm_cutlass(case: GemmCase, seed: int) -> Run:
    """Our quantisation, which the plugin puts into vLLM's op, and CUTLASS."""
    gemm = vllm_op("cutlass_scaled_mm")
    (x, weight, scale), out = _operands(case, seed), _output(case)

    def call() -> None:
        q, x_scale, _ = per_token_quant(x, torch.int8)
        gemm(out, q, weight.t(), x_scale, scale, None)

    return Run(call, (out,))


def _output(case: GemmCase) -> torch.Tensor:
    return torch.empty(case.num_tokens, case.n, dtype=torch.bfloat16, device=families.device)


IMPLEMENTATIONS: dict[str, Callable[[GemmCase, int], Run]] = {
    "ours": ours,
    "vllm": vllm,
    "vllm_cutlass": vllm_cutlass,
}


def check(case: GemmCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    x, weight, scale = _operands(case, seed)

    def reference(rows: torch.Tensor) -> torch.Tensor:
        amax = x[rows].float().abs().amax(-1, keepdim=True)
        q = (x[rows].float() * (127 / amax)).round()
        return (amax / 127).double() * (q.double() @ weight.double().t()) * scale.double().t()

    return check_product(outputs[0], reference, LIMIT)
