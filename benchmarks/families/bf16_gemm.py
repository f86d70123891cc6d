"""Small-M bf16 linear layers: cuBLAS, vLLM's cuteDSL kernels, and its fused_qkv_a kernel."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.gemm import GemmCase, bf16_benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families._common import Returned, check_product, generator, normal, peer, vllm_op

OP = "bf16_gemm"
CUTE_DSL = "vllm.model_executor.kernels.linear.cute_dsl"
MAX_TOKENS = 16  # of the cuteDSL kernels
FUSED_A_SHAPES = ((2112, 7168),)  # N x K that vLLM's fused-A kernel is compiled for
cases = bf16_benchmarks


def record(case: GemmCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": case.n,
        "k": case.k,
        "dtype": "bf16",
        "layout": "nt",
        "bytes": case.num_bytes(16, 16),
        "flops": case.flops,
    }


def _operands(case: GemmCase, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = generator(seed)
    return normal((case.num_tokens, case.k), rng), normal((case.n, case.k), rng)


def _output(case: GemmCase) -> torch.Tensor:
    return torch.empty(case.num_tokens, case.n, dtype=torch.bfloat16, device=families.device)


def cublas(case: GemmCase, seed: int) -> Run:
    (x, weight), out = _operands(case, seed), _output(case)
    return Run(lambda: torch.mm(x, weight.t(), out=out), (out,))


def vllm_ll_bf16(case: GemmCase, seed: int) -> Run:
    """Writes fp32."""
    gemm = peer(f"{CUTE_DSL}.ll_bf16", "ll_bf16_gemm")
    return _cute_dsl(case, seed, gemm)


def vllm_skinny(case: GemmCase, seed: int) -> Run:
    gemm = peer(f"{CUTE_DSL}.skinny_gemm", "shape_dynamic_skinny_gemm")
    return _cute_dsl(case, seed, gemm)


def _cute_dsl(case: GemmCase, seed: int, gemm: Callable[..., torch.Tensor]) -> Run:
    if case.num_tokens > MAX_TOKENS:
        raise Missing(f"takes at most {MAX_TOKENS} tokens")
    peer("cutlass.cute", "compile")
    x, weight = _operands(case, seed)
    return Returned(lambda: gemm(x, weight))


def vllm_fused_a(case: GemmCase, seed: int) -> Run:
    vllm_op("dsv3_fused_a_gemm")
    if (case.n, case.k) not in FUSED_A_SHAPES or case.num_tokens > MAX_TOKENS:
        raise Missing(f"is compiled for N x K in {FUSED_A_SHAPES} and at most {MAX_TOKENS} tokens")
    gemm = peer("vllm._custom_ops", "dsv3_fused_a_gemm")
    (x, weight), out = _operands(case, seed), _output(case)
    return Run(lambda: gemm(out, x, weight.t()), (out,))


IMPLEMENTATIONS: dict[str, Callable[[GemmCase, int], Run]] = {
    "cublas": cublas,
    "vllm_ll_bf16": vllm_ll_bf16,
    "vllm_skinny": vllm_skinny,
    "vllm_fused_a": vllm_fused_a,
}


def check(case: GemmCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    x, weight = _operands(case, seed)
    return check_product(outputs[0], lambda rows: x[rows].double() @ weight.double().t(), 1e-5)
