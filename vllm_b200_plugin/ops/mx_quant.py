"""MXFP4 and MXFP8 quantisation: e2m1 or e4m3 elements with a power of two, UE8M0, for every 32 of a row.

For every group of 32 elements in fp32, with e the stored byte and 2^(e - 127) the scale:

    MXFP4   e = exponent of max|x|, or of the next power of two from 1.75 times one on, less 2; q = e2m1(x / scale)
    MXFP8   e = that of the smallest power of two not below max(max|x|) / 448;                  q = e4m3(x / scale)

MXFP4 is the arithmetic of vLLM's `mxfp4_experts_quant` and of compressed-tensors, its smallest scale and the elements
under it 0. MXFP8 is that of vLLM's `mxfp8_e4m3_quantize`, with the power of two found from the bits: a logarithm in
fp32 rounds a scale down that lies within rounding of a power of two. A NaN makes the scale of its group NaN (255), and
its elements NaN or, in e2m1, 6; an Inf saturates. vLLM leaves a NaN out of the maximum.
"""

import torch

from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops._library import torch_library
from vllm_b200_plugin.ops.nvfp4_quant import (
    INPUT_DTYPES,
    TILE_GROUPS,
    TILE_ROWS,
    check_matrix,
    float_to_e2m1,
    round_up,
    swizzle_scales,
)
from vllm_b200_plugin.ops.token_quant import to_e4m3

GROUP_SIZE = 32


def mxfp4_quant(x: torch.Tensor, swizzled: bool = False, *, pdl: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise x to MXFP4.

    Args:
        x: [num_tokens, hidden_size] as for `nvfp4_quant`; hidden_size is a multiple of 32.
        swizzled, pdl: as for `nvfp4_quant`.

    Returns:
        q: [num_tokens, hidden_size / 2] uint8, the first of two elements in the lower four bits.
        scale: uint8. [num_tokens, hidden_size / 32] or, swizzled, [num_tokens rounded up to 128, hidden_size / 32
            rounded up to 4], the padding 0.

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    _check(x)
    return _quantise(x, torch.empty(x.shape[0], x.shape[1] // 2, dtype=torch.uint8, device=x.device), swizzled, pdl)


def mxfp8_quant(x: torch.Tensor, swizzled: bool = False, *, pdl: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise x to MXFP8: as `mxfp4_quant`, but with q [num_tokens, hidden_size] float8_e4m3fn."""
    _check(x)
    return _quantise(x, torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device), swizzled, pdl)


def _check(x: torch.Tensor) -> None:
    check_matrix(x, INPUT_DTYPES)
    if x.shape[1] % GROUP_SIZE:
        raise ValueError(f"x: the last dimension takes multiples of {GROUP_SIZE}, got {x.shape[1]}")


def _quantise(x: torch.Tensor, q: torch.Tensor, swizzled: bool, pdl: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows, groups = x.shape[0], x.shape[1] // GROUP_SIZE
    if swizzled:
        rows, groups = round_up(rows, TILE_ROWS), round_up(groups, TILE_GROUPS)
    scale = torch.empty(rows, groups, dtype=torch.uint8, device=x.device)
    torch.ops.vllm_b200.mx_quant(x, q, scale, swizzled, pdl)
    return q, scale


# MXFP4 where q is uint8, MXFP8 where it is float8_e4m3fn.
torch_library.define("mx_quant(Tensor x, Tensor(a!) q, Tensor(b!) scale, bool swizzled, bool pdl=False) -> ()")


@torch.library.register_fake("vllm_b200::mx_quant", lib=torch_library)
def _mx_quant_fake(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, swizzled: bool, pdl: bool = False) -> None:
    return None


@torch.library.impl(torch_library, "mx_quant", "CPU")
def _mx_quant_cpu(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, swizzled: bool, pdl: bool = False) -> None:
    """The reference: the same fp32 operations as the CUDA kernel, in PyTorch."""
    if x.numel() == 0:
        return
    fp4 = q.dtype == torch.uint8
    groups = x.float().unflatten(-1, (-1, GROUP_SIZE))
    amax = groups.abs().amax(-1)
    exponent = _mxfp4_exponent(amax) if fp4 else _mxfp8_exponent(amax)
    factor = torch.exp2(127.0 - exponent.double()).float()
    if fp4:
        factor = factor.masked_fill(exponent == 0, 0.0)
    values = (groups * factor.masked_fill(amax.isnan(), torch.nan).unsqueeze(-1)).flatten(-2)
    if fp4:
        q.copy_(float_to_e2m1(values))
    else:
        to_e4m3(values, q)
    found = exponent.masked_fill(amax.isnan(), 255).to(torch.uint8)
    scale.copy_(swizzle_scales(found) if swizzled else found)


def _mxfp4_exponent(amax: torch.Tensor) -> torch.Tensor:
    return ((amax.view(torch.int32) >> 21) + 1 >> 2).sub(2).clamp(min=0)


def _mxfp8_exponent(amax: torch.Tensor) -> torch.Tensor:
    least = (amax / 448.0).view(torch.int32)
    up = (least.long() + 0x7FFFFF >> 23).clamp(max=254)
    return torch.where(least <= 0x400000, 0, up).int()


_library.status()
