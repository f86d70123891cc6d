"""FP8 block-scaled linear layers from a bf16 activation, its quantisation included: ours, and what vLLM may pick.

Engines differ in how they scale the activation, by any fp32 or by a power of two; both are the format's, and the check
takes the nearer reference. The weight's scales are powers of two for all.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.gemm import GemmCase, fp8_block_benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families._common import (
    E4M3,
    FP8_LIMIT,
    GROUP,
    Returned,
    dequantise,
    error_of,
    fp8_block_weight,
    generator,
    normal,
    peer,
    quantise_groups,
    some_rows,
    verdict,
    vllm_group_quant,
    vllm_op,
)
from benchmarks.families.fp8_block_gemm import BLOCK, deep_gemm_weight, output, require_hopper
from vllm_b200_plugin.integration.fp8_block_op import Engine, fp8_block_linear, machine
from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops.quant import ScaleLayout, empty_scale

OP = "fp8_block_linear"
cases = fp8_block_benchmarks


def record(case: GemmCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": case.n,
        "k": case.k,
        "dtype": "bf16_e4m3",
        "layout": "block128",
        "bytes": case.num_bytes(16, 8, case.block_scale_bytes(activation=False)),
        "flops": case.flops,
    }


def _operands(case: GemmCase, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K] bf16, weight [N, K], its scale [ceil(N / 128), K / 128]."""
    rng = generator(seed)
    return normal((case.num_tokens, case.k), rng), *fp8_block_weight((case.n, case.k), rng)


def ours(case: GemmCase, seed: int) -> Run:
    """The op that the plugin puts into the layer, with the engine that it takes on this GPU."""
    x, weight, scale = _operands(case, seed)
    if families.device.type != "cuda":
        return Returned(lambda: fp8_block_linear(x, weight, scale, BLOCK, torch.bfloat16, Engine.REFERENCE))
    if not (status := _library.status()).loaded:
        raise Missing(status.reason)
    flashinfer_serves = peer("vllm.utils.flashinfer", "is_flashinfer_fp8_blockscale_gemm_supported")()
    engine = Engine.FLASHINFER_DEEP_GEMM if flashinfer_serves else Engine.DEEP_GEMM
    machine()
    weight, scale = deep_gemm_weight(weight, scale)
    return Returned(lambda: fp8_block_linear(x, weight, scale, BLOCK, torch.bfloat16, engine))


def vllm(case: GemmCase, seed: int) -> Run:
    """vLLM's first choice on Hopper: FlashInfer below 32 tokens, DeepGEMM from there on."""
    peer("vllm.model_executor.kernels.linear", "FlashInferFp8DeepGEMMDynamicBlockScaledKernel")
    if not peer("vllm.utils.flashinfer", "is_flashinfer_fp8_blockscale_gemm_supported")():
        raise Missing("vLLM finds no fp8_blockscale_gemm_sm90 in FlashInfer, or none for this GPU")
    ue8m0 = peer("vllm.utils.deep_gemm", "is_deep_gemm_e8m0_used")()
    x, weight, scale = _operands(case, seed)
    weight, scale = deep_gemm_weight(weight, scale)
    op = torch.ops.vllm.dynamic_flashinfer_deepgemm_blockscale_gemm
    return Returned(lambda: op(x, weight, scale, GROUP, ue8m0))


def vllm_deep_gemm(case: GemmCase, seed: int) -> Run:
    gemm = peer("vllm.utils.deep_gemm", "fp8_gemm_nt")
    formats = peer("vllm.utils.deep_gemm", "DeepGemmQuantScaleFMT")
    scale_format = formats.from_oracle()
    layout = ScaleLayout.PACKED_UE8M0 if scale_format == formats.UE8M0 else ScaleLayout.COLUMN_TMA
    x, weight, scale = _operands(case, seed)
    converted, out = deep_gemm_weight(weight, scale), output(case)
    q, x_scale = torch.empty(x.shape, dtype=E4M3, device=x.device), empty_scale(x, GROUP, layout)
    quantise = vllm_group_quant(x, q, x_scale, layout, ue8m0=scale_format != formats.FLOAT32)
    return Run(lambda: (quantise(), gemm((q, x_scale), converted, out)), (out,))


def vllm_cutlass(case: GemmCase, seed: int) -> Run:
    gemm = vllm_op("cutlass_scaled_mm")
    (x, weight, scale), out = _operands(case, seed), output(case)
    q, x_scale = torch.empty(x.shape, dtype=E4M3, device=x.device), empty_scale(x, GROUP, ScaleLayout.COLUMN)
    quantise = vllm_group_quant(x, q, x_scale, ScaleLayout.COLUMN)
    return Run(lambda: (quantise(), gemm(out, q, weight.t(), x_scale, scale.t(), None)), (out,))


def flashinfer(case: GemmCase, seed: int) -> Run:
    """At all sizes, to show the crossover. vLLM leaves it at 32 tokens, for the accuracy that a model lost there."""
    gemm = peer("flashinfer.gemm", "fp8_blockscale_gemm_sm90")
    require_hopper("fp8_blockscale_gemm_sm90")
    (x, weight, scale), out = _operands(case, seed), output(case)
    return Run(lambda: gemm(x, weight, None, scale, out=out), (out,))


IMPLEMENTATIONS: dict[str, Callable[[GemmCase, int], Run]] = {
    "ours": ours,
    "vllm": vllm,
    "vllm_deep_gemm": vllm_deep_gemm,
    "vllm_cutlass": vllm_cutlass,
    "flashinfer": flashinfer,
}


def check(case: GemmCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    (x, weight, scale), out = _operands(case, seed), outputs[0]
    wide, rows = dequantise(weight, scale, BLOCK), some_rows(out.shape[0])
    quantised = [quantise_groups(x[rows], ue8m0) for ue8m0 in (False, True)]
    errors = [error_of(out[rows], dequantise(q, x_scale) @ wide.t()) for q, x_scale in quantised]
    return verdict(min(errors, key=abs), FP8_LIMIT, finite=bool(out.isfinite().all()))
