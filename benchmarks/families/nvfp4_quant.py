"""NVFP4 quantisation, of rows or of silu_and_mul: ours, vLLM's CUDA ops, its Triton emulation, FlashInfer's, and
torch.compile.

vLLM's emulation, which is what it has for GPUs before Blackwell, writes the dequantised numbers, two bytes each.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.nvfp4_quant import Nvfp4QuantCase, benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families._common import (
    Returned,
    compiled,
    error_of,
    generator,
    normal,
    peer,
    some_rows,
    verdict,
    vllm_op,
)
from vllm_b200_plugin.ops.gated_quant import activate_and_multiply
from vllm_b200_plugin.ops.nvfp4_quant import (
    E2M1_MAX,
    E4M3_MAX,
    GROUP_SIZE,
    empty_outputs,
    nvfp4_dequant,
    quantise_groups,
    swizzle_scales,
    unswizzle_scales,
)

OP = "nvfp4_quant"
FP4_LIMIT = 1e-2
LARGEST = {False: 6.0, True: 30.0}  # what normal values reach, and silu_and_mul of them
EMULATION = "vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils"
cases = benchmarks


def record(case: Nvfp4QuantCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": case.hidden_size if case.silu_and_mul else None,
        "k": case.hidden_size * (2 if case.silu_and_mul else 1),
        "dtype": "nvfp4",
        "layout": case.layout_name,
        "bytes": case.num_bytes,
        "flops": 0,
    }


def _inputs(case: Nvfp4QuantCase, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = normal((case.num_tokens, case.hidden_size * (2 if case.silu_and_mul else 1)), generator(seed), case.input_dtype)
    return x, torch.full((1,), 448 * 6 / LARGEST[case.silu_and_mul], device=families.device)


def _tensors(case: Nvfp4QuantCase, seed: int) -> tuple[torch.Tensor, ...]:
    x, global_scale = _inputs(case, seed)
    return x, global_scale, *empty_outputs(x, case.hidden_size, None, case.swizzled)


def needs_blackwell() -> None:
    if families.device.type == "cuda" and torch.cuda.get_device_capability()[0] < 10:
        raise Missing("vLLM builds its NVFP4 quantisers for Blackwell alone")


def ours(case: Nvfp4QuantCase, seed: int, pdl: bool = True) -> Run:
    x, global_scale, q, scale = _tensors(case, seed)
    op = torch.ops.vllm_b200.nvfp4_quant
    return Run(lambda: op(x, global_scale, q, scale, case.swizzled, case.silu_and_mul, pdl), (q, scale))


def ours_no_pdl(case: Nvfp4QuantCase, seed: int) -> Run:
    return ours(case, seed, pdl=False)


def vllm(case: Nvfp4QuantCase, seed: int) -> Run:
    needs_blackwell()
    x, global_scale, q, scale = _tensors(case, seed)
    words = scale.view(torch.int32) if case.swizzled else scale.view(torch.uint8)
    if case.silu_and_mul:
        if not case.swizzled:
            raise Missing("vLLM's fused op writes swizzled scales only")
        fused = vllm_op("silu_and_mul_nvfp4_quant")
        return Run(lambda: fused(q, words, x, global_scale), (q, scale))
    op = vllm_op("scaled_fp4_quant").out
    return Run(lambda: op(x, global_scale, case.swizzled, output=q, output_scale=words), (q, scale))


def vllm_emulation(case: Nvfp4QuantCase, seed: int) -> Run:
    emulate = peer(EMULATION, "ref_nvfp4_quant_dequant")
    if case.swizzled:
        raise Missing("the emulation writes no scales: see linear")
    x, global_scale = _inputs(case, seed)
    return Returned(lambda: emulate(x, global_scale, GROUP_SIZE))


def flashinfer(case: Nvfp4QuantCase, seed: int) -> Run:
    quantise = peer("flashinfer", "fp4_quantize")
    if case.silu_and_mul:
        raise Missing("FlashInfer fuses silu_and_mul for experts only")
    x, global_scale = _inputs(case, seed)
    return Returned(lambda: quantise(x, global_scale, is_sf_swizzled_layout=case.swizzled))


def inductor(case: Nvfp4QuantCase, seed: int) -> Run:
    x, global_scale, q, scale = _tensors(case, seed)
    twin = compiled(_twin)
    return Run(lambda: twin(x, global_scale, q, scale, case.swizzled, case.silu_and_mul), (q, scale))


def _twin(
    x: torch.Tensor, global_scale: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, swizzled: bool, gated: bool
) -> None:
    values = activate_and_multiply(x.float(), "silu").to(x.dtype) if gated else x
    groups = values.float().unflatten(-1, (-1, GROUP_SIZE))
    e4m3 = (global_scale * (groups.abs().amax(-1) * (1 / E2M1_MAX))).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    factor = torch.where(e4m3.float() == 0, 0.0, 1 / (e4m3.float() * (1 / global_scale)))
    y = (groups * factor.unsqueeze(-1)).flatten(-2)
    m = y.abs()
    low = (m > 0.25).to(torch.uint8) + (m >= 0.75) + (m > 1.25) + (m >= 1.75)
    code = low + (m > 2.5) + (m >= 3.5) + (m > 5) + (y < 0).to(torch.uint8) * 8
    q.copy_(code[:, 0::2] + code[:, 1::2] * 16)
    scale.copy_(swizzle_scales(e4m3) if swizzled else e4m3)


IMPLEMENTATIONS: dict[str, Callable[[Nvfp4QuantCase, int], Run]] = {
    "ours": ours,
    "ours_no_pdl": ours_no_pdl,
    "vllm": vllm,
    "vllm_emulation": vllm_emulation,
    "flashinfer": flashinfer,
    "inductor": inductor,
}


def check(case: Nvfp4QuantCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    """Right when the dequantised numbers are the input's within the format's error; also how many bytes are ours."""
    x, global_scale = _inputs(case, seed)
    rows = some_rows(case.num_tokens)
    x = x[rows]
    exact = activate_and_multiply(x.double(), "silu") if case.silu_and_mul else x.double()
    if len(outputs) == 1:
        return verdict(error_of(outputs[0][rows], exact), FP4_LIMIT)
    q, scale = outputs
    groups = case.hidden_size // GROUP_SIZE
    if case.swizzled:
        scale = scale.view(torch.uint8).view(-1, -(-groups // 4) * 4)
        linear = unswizzle_scales(scale, *scale.shape)
        padding = bool(linear[case.num_tokens :].any()) or bool(linear[:, groups:].any())
    else:
        linear, padding = scale.view(torch.uint8).view(-1, groups), False
    q, linear = q[rows], linear[rows][:, :groups].contiguous()
    expected_q, expected_scale = quantise_groups(exact.to(x.dtype), global_scale)
    same = (q == expected_q).double().mean().item(), (linear == expected_scale.view(torch.uint8)).double().mean().item()
    values = nvfp4_dequant(q, linear, global_scale)
    return verdict(error_of(values, exact), FP4_LIMIT, padding_zero=not padding, same_bytes=min(same))
