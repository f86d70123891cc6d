"""(Residual addition,) RMSNorm and quantisation: ours, vLLM's fused op, its separate ops, FlashInfer, torch.compile.

A replay adds to the residual that the one before has left. It grows until the addition no longer changes a bf16 of
its size, at some hundred times its first values, and so stays finite however often the graph is replayed.
"""

from collections.abc import Callable
from typing import Any

import torch

import vllm_b200_plugin.ops.norm_quant  # noqa: F401 - defines the ops
from benchmarks import families
from benchmarks.cases.rms_norm_quant import RmsNormQuantCase, benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families._common import (
    E4M3,
    EPS,
    FP8_LIMIT,
    GROUP,
    Updating,
    compiled,
    dequantise,
    error_of,
    generator,
    normal,
    peer,
    quantise_groups,
    unpack_scale,
    verdict,
    vllm_group_quant,
    vllm_op,
)
from benchmarks.families.nvfp4_quant import FP4_LIMIT
from vllm_b200_plugin.ops.nvfp4_quant import empty_outputs, nvfp4_dequant
from vllm_b200_plugin.ops.quant import ScaleLayout, empty_scale

OP = "rms_norm_quant"
NORM_EPS = 1e-6
GLOBAL_SCALE = 448 * 6 / 6.0
STATIC_SCALE = 1 / 64  # normalised values reach some 6: within the format
cases = benchmarks


def record(case: RmsNormQuantCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": None,
        "k": case.hidden_size,
        "dtype": "nvfp4" if case.kind == "nvfp4_swizzled" else "e4m3",
        "layout": case.layout_name,
        "bytes": case.num_bytes,
        "flops": 0,
    }


def _inputs(case: RmsNormQuantCase, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x and residual [num_tokens, hidden_size], weight [hidden_size]."""
    rng = generator(seed)
    shape = (case.num_tokens, case.hidden_size)
    x, residual = normal(shape, rng), normal(shape, rng)
    return x, residual, (1 + 0.1 * normal((case.hidden_size,), rng, torch.float32)).to(x.dtype)


def _outputs(case: RmsNormQuantCase) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.empty(case.num_tokens, case.hidden_size, dtype=E4M3, device=families.device)
    if case.kind == "token":
        return q, torch.empty(case.num_tokens, 1, device=families.device)
    if case.kind == "tensor":
        return q, torch.full((1,), STATIC_SCALE, device=families.device)
    if case.kind == "nvfp4_swizzled":
        return empty_outputs(q, case.hidden_size, None, True)
    return q, empty_scale(q, GROUP, case.layout)


def _global_scale() -> torch.Tensor:
    return torch.full((1,), GLOBAL_SCALE, device=families.device)


def _run(case: RmsNormQuantCase, call: Callable[[], object], *outputs: torch.Tensor) -> Run:
    """`outputs` are q, scale and the residual, which is an input too, as is a scale per tensor."""
    given = case.kind == "tensor"
    return Updating(call, outputs if case.residual else outputs[:2], num_poisoned=1 if given else 2)


def ours(case: RmsNormQuantCase, seed: int, pdl: bool = True) -> Run:
    (x, residual, weight), (q, scale) = _inputs(case, seed), _outputs(case)
    ops, added = torch.ops.vllm_b200, residual if case.residual else None
    if case.kind == "token":
        token = ops.rms_norm_token_quant
        return _run(case, lambda: token(x, added, weight, q, scale, None, NORM_EPS, False, pdl), q, scale, residual)
    if case.kind == "tensor":
        static = ops.rms_norm_tensor_quant
        return _run(case, lambda: static(x, added, weight, q, scale, NORM_EPS, False, pdl), q, scale, residual)
    if case.kind == "nvfp4_swizzled":
        global_scale, nvfp4 = _global_scale(), ops.rms_norm_nvfp4_quant
        return _run(
            case,
            lambda: nvfp4(x, added, weight, global_scale, q, scale, NORM_EPS, True, False, pdl),
            q,
            scale,
            residual,
        )
    packed, group = case.layout is ScaleLayout.PACKED_UE8M0, ops.rms_norm_group_quant
    return _run(
        case,
        lambda: group(x, added, weight, q, scale, NORM_EPS, GROUP, EPS, packed, True, False, pdl),
        q,
        scale,
        residual,
    )


def ours_no_pdl(case: RmsNormQuantCase, seed: int) -> Run:
    return ours(case, seed, pdl=False)


def vllm(case: RmsNormQuantCase, seed: int) -> Run:
    if case.kind == "nvfp4_swizzled":
        raise Missing("vLLM has no op that ends in NVFP4: it takes FlashInfer's")
    (x, residual, weight), (q, scale) = _inputs(case, seed), _outputs(case)
    if case.kind == "token":
        token = vllm_op("rms_norm_dynamic_per_token_quant")
        given = residual if case.residual else None
        return _run(case, lambda: token(q, x, weight, scale, NORM_EPS, None, given), q, scale, residual)
    if case.kind == "tensor":
        if not case.residual:
            static = vllm_op("rms_norm_static_fp8_quant")
            return _run(case, lambda: static(q, x, weight, scale, NORM_EPS), q, scale)
        added_static = vllm_op("fused_add_rms_norm_static_fp8_quant")
        return _run(case, lambda: added_static(q, x, residual, weight, scale, NORM_EPS), q, scale, residual)
    if case.layout is ScaleLayout.PACKED_UE8M0:
        raise Missing("vLLM's fused op writes fp32 scales only")
    op = vllm_op("rms_norm_per_block_quant")
    added, transposed = residual if case.residual else None, case.layout is not ScaleLayout.ROW
    return _run(case, lambda: op(q, x, weight, scale, NORM_EPS, None, added, GROUP, transposed), q, scale, residual)


def vllm_separate(case: RmsNormQuantCase, seed: int) -> Run:
    if case.kind != "group":
        raise Missing("timed with group scales")
    norm = vllm_op("fused_add_rms_norm" if case.residual else "rms_norm")
    (x, residual, weight), (q, scale) = _inputs(case, seed), _outputs(case)
    if case.residual:  # the norm overwrites x
        quantise = vllm_group_quant(x, q, scale, case.layout)
        return _run(case, lambda: (norm(x, residual, weight, NORM_EPS), quantise()), q, scale, residual)
    normed = torch.empty_like(x)
    quantise = vllm_group_quant(normed, q, scale, case.layout)
    return _run(case, lambda: (norm(normed, x, weight, NORM_EPS), quantise()), q, scale)


def flashinfer(case: RmsNormQuantCase, seed: int) -> Run:
    """Writes the normalised bf16 besides: 2 bytes an element more than the op needs."""
    op = peer("flashinfer", "fused_add_rmsnorm_fp8_block_quant")
    if case.kind != "group" or not case.residual or case.layout is not ScaleLayout.COLUMN_TMA:
        raise Missing("FlashInfer's op adds a residual and writes column-major TMA-aligned scales")
    (x, residual, weight), (q, scale) = _inputs(case, seed), _outputs(case)
    normed = torch.empty_like(x)
    padded = -(-case.num_tokens // 4) * 4
    # The op takes the buffer behind the scales: [groups, tokens and padding].
    buffer = scale.as_strided((scale.shape[1], padded), (padded, 1))
    return _run(case, lambda: op(q, buffer, normed, x, residual, weight, NORM_EPS), q, scale, residual)


def inductor(case: RmsNormQuantCase, seed: int) -> Run:
    if case.kind != "group" or case.layout is ScaleLayout.PACKED_UE8M0:
        raise Missing("the compiled twin writes fp32 group scales only")
    (x, residual, weight), (q, scale) = _inputs(case, seed), _outputs(case)
    if case.residual:
        add_norm = compiled(_add_norm_quant)
        return _run(case, lambda: add_norm(x, residual, weight, q, scale), q, scale, residual)
    norm = compiled(_norm_quant)
    return _run(case, lambda: norm(x, weight, q, scale), q, scale)


def _add_norm_quant(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, q: torch.Tensor, scale: torch.Tensor
) -> None:
    residual.copy_(x.float() + residual.float())
    _norm_quant(residual, weight, q, scale)


def _norm_quant(x: torch.Tensor, weight: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> None:
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + NORM_EPS) * weight.float()
    values, scales = quantise_groups(normed.to(x.dtype))
    q.copy_(values)
    scale.copy_(scales)


IMPLEMENTATIONS: dict[str, Callable[[RmsNormQuantCase, int], Run]] = {
    "ours": ours,
    "ours_no_pdl": ours_no_pdl,
    "vllm": vllm,
    "vllm_separate": vllm_separate,
    "flashinfer": flashinfer,
    "inductor": inductor,
}


def check(case: RmsNormQuantCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    """Right when q * scale is the norm within the format's error, and the residual the sum within bf16's."""
    x, residual, weight = (tensor.double() for tensor in _inputs(case, seed))
    total = x + residual if case.residual else x
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + NORM_EPS) * weight
    details = {"residual_right": abs(error_of(outputs[2], total)) < 1e-5} if case.residual else {}
    limit = FP8_LIMIT * (2 if case.layout is ScaleLayout.PACKED_UE8M0 else 1)
    if case.kind == "nvfp4_swizzled":
        values, limit = nvfp4_dequant(*outputs[:2], _global_scale(), True).double(), FP4_LIMIT
    elif case.kind == "group":
        values = dequantise(outputs[0], unpack_scale(outputs[1], case.hidden_size // GROUP))
    else:
        values = outputs[0].double() * outputs[1].double()
    return verdict(error_of(values, normed), limit, **details)
