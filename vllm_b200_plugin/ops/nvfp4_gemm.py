"""Linear layers with an NVFP4 weight and a bfloat16 activation (W4A16), for 1 to 32 tokens: the weight is read once.

The kernel is that of `ops/small_m_gemm.py` with another format of the weight. A weight times its scale of 16 has six
significant bits, so that it goes through the tensor cores exactly; products and sums are fp32, and the global scale
comes last. With a global scale for each row of the weight, a layer that is fused from several, each with a scale of its
own, is exact too.
"""

import torch

from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops._library import torch_library
from vllm_b200_plugin.ops.nvfp4_quant import GROUP_SIZE, TILE_GROUPS, TILE_ROWS, e2m1_to_float, unswizzle_scales
from vllm_b200_plugin.ops.small_m_gemm import MAX_TOKENS, Config

K_MULTIPLE = 64  # scales come four at a time

_OP = "nvfp4_gemm"
_OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PLAIN = Config()


def nvfp4_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_global_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    swizzled: bool = False,
    config: Config = _PLAIN,
    pdl: bool = False,
) -> torch.Tensor:
    """x @ (weight * weight_scale * weight_global_scale).T + bias.

    Args:
        x: [num_tokens, K] bfloat16, at most 32 rows, K a multiple of 64. Rows may be strided.
        weight: [N, K / 2] uint8, two e2m1 each, the first in the lower four bits.
        weight_scale: float8_e4m3fn. [N, K / 16] or, `swizzled`, [N rounded up to 128, K / 16 rounded up to 4] in tiles
            as `ops.nvfp4_quant.swizzle_scales` makes them.
        weight_global_scale: float32, contiguous, 1 element or one for each of the N rows; what the values are
            multiplied by, not its reciprocal.
        bias: [N] in out_dtype.
        out_dtype: bfloat16, float16 or float32.
        swizzled: the layout of weight_scale.
        config: how the work is cut; row_tiles, warps and cluster mean what they do in `ops.small_m_gemm`, of weights
            that take half a byte each.
        pdl: launch with programmatic stream serialization: the weight is read while the kernel before still runs.

    Returns:
        [num_tokens, N] in out_dtype.

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    _check(x, weight, weight_scale, weight_global_scale, bias, out_dtype, swizzled)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=out_dtype, device=x.device)
    op = torch.ops.vllm_b200.nvfp4_gemm
    op(x, weight, weight_scale, weight_global_scale, bias, out, swizzled, pdl, config)
    return out


def refusal(n: int, k: int) -> str | None:
    """Why the kernel cannot do a layer with a weight of N x K, or None where it can."""
    return f"needs K % {K_MULTIPLE} == 0, got K={k}" if k % K_MULTIPLE or not k else None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_global_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    swizzled: bool,
) -> None:
    _require(
        x.dim() == 2 and x.dtype == torch.bfloat16, f"x: takes 2 dimensions of bfloat16, got {x.dim()} of {x.dtype}"
    )
    _require(x.shape[0] <= MAX_TOKENS, f"x: takes at most {MAX_TOKENS} rows, got {x.shape[0]}")
    k = x.shape[1]
    reason = refusal(weight.shape[0], k)
    _require(reason is None, f"x: {reason}")
    _require(
        weight.dtype == torch.uint8 and weight.dim() == 2 and weight.shape[1] == k // 2,
        f"weight: takes [N, {k // 2}] uint8 as x has {k} columns, got {tuple(weight.shape)} of {weight.dtype}",
    )
    n, groups = weight.shape[0], k // GROUP_SIZE
    wanted = (-(-n // TILE_ROWS) * TILE_ROWS, -(-groups // TILE_GROUPS) * TILE_GROUPS) if swizzled else (n, groups)
    _require(
        weight_scale.dtype == torch.float8_e4m3fn and tuple(weight_scale.shape) == wanted,
        f"weight_scale: takes {wanted} of float8_e4m3fn, got {tuple(weight_scale.shape)} of {weight_scale.dtype}",
    )
    _require(weight_scale.is_contiguous(), f"weight_scale: takes a contiguous one, got strides {weight_scale.stride()}")
    scale = weight_global_scale
    _require(
        scale.dtype == torch.float32 and scale.numel() in (1, n) and scale.is_contiguous(),
        f"weight_global_scale: takes 1 or {n} contiguous float32, got {tuple(scale.shape)} of {scale.dtype}",
    )
    _require(out_dtype in _OUT_DTYPES, f"out_dtype: takes bfloat16, float16 or float32, got {out_dtype}")
    if bias is not None:
        fits = bias.dtype == out_dtype and bias.numel() == n and bias.is_contiguous()
        _require(fits, f"bias: takes {n} of {out_dtype}, got {tuple(bias.shape)} of {bias.dtype}")
    for name, tensor in (("x", x), ("weight", weight)):
        aligned = tensor.stride(1) == 1 and (tensor.stride(0) * tensor.itemsize % 16 == 0 or tensor.shape[0] < 2)
        _require(
            not tensor.numel() or (aligned and tensor.data_ptr() % 16 == 0),
            f"{name}: takes rows that start at multiples of 16 bytes, got strides {tensor.stride()} "
            f"at offset {tensor.storage_offset()}",
        )
    _require(
        not weight_scale.numel() or weight_scale.data_ptr() % 4 == 0,
        f"weight_scale: takes a start at a multiple of 4 bytes, got offset {weight_scale.storage_offset()}",
    )


torch_library.define(
    f"{_OP}(Tensor x, Tensor weight, Tensor weight_scale, Tensor weight_global_scale, Tensor? bias, Tensor(a!) out, "
    "bool swizzled, bool pdl, int[] config) -> ()"
)


@torch.library.register_fake(f"vllm_b200::{_OP}", lib=torch_library)
def _fake(*args: object) -> None:
    return None


@torch.library.impl(torch_library, _OP, "CPU")
def _cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_global_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    swizzled: bool,
    pdl: bool,
    config: list[int],
) -> None:
    """The reference, in float64. `config` and `pdl` change no result."""
    n, groups = weight.shape[0], x.shape[1] // GROUP_SIZE
    scale = unswizzle_scales(weight_scale, n, groups) if swizzled else weight_scale
    values = e2m1_to_float(weight).double() * scale.double().repeat_interleave(GROUP_SIZE, 1)
    y = (x.double() @ values.t()) * weight_global_scale.double().view(1, -1)
    out.copy_(y if bias is None else y + bias.double())


_library.status()
