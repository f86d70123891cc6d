"""FP8 matrix products with block scales, from an activation already quantised: DeepGEMM, CUTLASS, FlashInfer, Triton.

All scales are powers of two, so that engines with fp32 and with UE8M0 scales get the same operands.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.gemm import GemmCase, fp8_block_benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families._common import (
    FP8_LIMIT,
    GROUP,
    Returned,
    check_product,
    dequantise,
    fp8_activation,
    fp8_block_weight,
    generator,
    in_layout,
    peer,
    vllm_op,
)
from vllm_b200_plugin.ops.quant import ScaleLayout

OP = "fp8_block_gemm"
BLOCK = (GROUP, GROUP)
FP8_UTILS = "vllm.model_executor.layers.quantization.utils.fp8_utils"
cases = fp8_block_benchmarks


def record(case: GemmCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": case.n,
        "k": case.k,
        "dtype": "e4m3",
        "layout": "block128",
        "bytes": case.num_bytes(8, 8, case.block_scale_bytes(activation=True)),
        "flops": case.flops,
    }


def _operands(case: GemmCase, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K], its scale [M, K / 128], weight [N, K], its scale [ceil(N / 128), K / 128]."""
    rng = generator(seed)
    return *fp8_activation(case.num_tokens, case.k, rng), *fp8_block_weight((case.n, case.k), rng)


def output(case: GemmCase) -> torch.Tensor:
    return torch.empty(case.num_tokens, case.n, dtype=torch.bfloat16, device=families.device)


def deep_gemm_weight(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and its scale as vLLM converts them for DeepGEMM. The scales are powers of two already."""
    if not peer("vllm.utils.deep_gemm", "is_deep_gemm_supported")():
        raise Missing("vLLM finds no DeepGEMM, or none for this GPU")
    convert = peer(FP8_UTILS, "deepgemm_post_process_fp8_weight_block")
    return convert(wq=weight, ws=scale, quant_block_shape=BLOCK, use_e8m0=False)


def require_hopper(what: str) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        raise Missing(f"{what} is for Hopper")


def deep_gemm(case: GemmCase, seed: int) -> Run:
    gemm = peer("vllm.utils.deep_gemm", "fp8_gemm_nt")
    require_hopper("this call, with fp32 scales of the activation,")
    (x, x_scale, weight, weight_scale), out = _operands(case, seed), output(case)
    activation = x, in_layout(x_scale, x, ScaleLayout.COLUMN_TMA)
    converted = deep_gemm_weight(weight, weight_scale)
    return Run(lambda: gemm(activation, converted, out), (out,))


def vllm_cutlass(case: GemmCase, seed: int) -> Run:
    gemm = vllm_op("cutlass_scaled_mm")
    (x, x_scale, weight, weight_scale), out = _operands(case, seed), output(case)
    column = in_layout(x_scale, x, ScaleLayout.COLUMN)
    return Run(lambda: gemm(out, x, weight.t(), column, weight_scale.t(), None), (out,))


def flashinfer(case: GemmCase, seed: int) -> Run:
    gemm = peer("flashinfer.gemm", "fp8_blockscale_gemm_sm90")
    require_hopper("fp8_blockscale_gemm_sm90")
    (x, x_scale, weight, weight_scale), out = _operands(case, seed), output(case)
    column = in_layout(x_scale, x, ScaleLayout.COLUMN_TMA)
    return Run(lambda: gemm(x, weight, column, weight_scale, out=out), (out,))


def vllm_triton(case: GemmCase, seed: int) -> Run:
    gemm = peer(FP8_UTILS, "w8a8_triton_block_scaled_mm")
    x, x_scale, weight, weight_scale = _operands(case, seed)
    return Returned(lambda: gemm(x, weight, x_scale, weight_scale, list(BLOCK), torch.bfloat16))


IMPLEMENTATIONS: dict[str, Callable[[GemmCase, int], Run]] = {
    "deep_gemm": deep_gemm,
    "vllm_cutlass": vllm_cutlass,
    "flashinfer": flashinfer,
    "vllm_triton": vllm_triton,
}


def check(case: GemmCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    x, x_scale, weight, weight_scale = _operands(case, seed)
    wide = dequantise(weight, weight_scale, BLOCK)
    return check_product(outputs[0], lambda rows: dequantise(x[rows], x_scale[rows]) @ wide.t(), FP8_LIMIT)
