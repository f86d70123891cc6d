"""(Residual addition,) RMSNorm and group quantisation: vLLM's fused op, its separate ops, FlashInfer, torch.compile.

A replay adds to the residual that the one before has left. It grows until the addition no longer changes a bf16 of
its size, at some hundred times its first values, and so stays finite however often the graph is replayed.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.rms_norm_quant import RmsNormQuantCase, benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families._common import (
    E4M3,
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
    verdict,
    vllm_group_quant,
    vllm_op,
)
from vllm_b200_plugin.ops.quant import ScaleLayout, empty_scale

OP = "rms_norm_quant"
NORM_EPS = 1e-6
cases = benchmarks


def record(case: RmsNormQuantCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": None,
        "k": case.hidden_size,
        "dtype": "e4m3",
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
    return q, empty_scale(q, GROUP, case.layout)


def _run(case: RmsNormQuantCase, call: Callable[[], object], *outputs: torch.Tensor) -> Run:
    """`outputs` are q, scale and the residual, which is an input too."""
    return Updating(call, outputs if case.residual else outputs[:2], num_poisoned=2)


def vllm(case: RmsNormQuantCase, seed: int) -> Run:
    op = vllm_op("rms_norm_per_block_quant")
    (x, residual, weight), (q, scale) = _inputs(case, seed), _outputs(case)
    added, transposed = residual if case.residual else None, case.layout is not ScaleLayout.ROW
    return _run(case, lambda: op(q, x, weight, scale, NORM_EPS, None, added, GROUP, transposed), q, scale, residual)


def vllm_separate(case: RmsNormQuantCase, seed: int) -> Run:
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
    if not case.residual or case.layout is not ScaleLayout.COLUMN_TMA:
        raise Missing("FlashInfer's op adds a residual and writes column-major TMA-aligned scales")
    (x, residual, weight), (q, scale) = _inputs(case, seed), _outputs(case)
    normed = torch.empty_like(x)
    padded = -(-case.num_tokens // 4) * 4
    # The op takes the buffer behind the scales: [groups, tokens and padding].
    buffer = scale.as_strided((scale.shape[1], padded), (padded, 1))
    return _run(case, lambda: op(q, buffer, normed, x, residual, weight, NORM_EPS), q, scale, residual)


def inductor(case: RmsNormQuantCase, seed: int) -> Run:
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
    return verdict(error_of(dequantise(outputs[0], outputs[1]), normed), FP8_LIMIT, **details)
