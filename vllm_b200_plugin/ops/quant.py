"""Quantisation with one scale per group of consecutive elements of a row.

The arithmetic is that of vLLM's `per_token_group_fp8_quant`, `per_token_group_fp8_quant_packed` and
`per_token_group_quant_int8`, for every group of `group_size` elements in fp32:

    scale = max(max|x|, eps) / qmax                       qmax = 448 (e4m3) or 127 (int8)
    scale = 2 ** ceil(log2(max(scale, 1e-10)))            with ue8m0
    q     = x / scale                                     to nearest even (e4m3), toward zero (int8)

It differs from vLLM's kernels where these lose information:

- A NaN makes the scale of its group NaN, and every element with it (0 in int8), as in PyTorch; an Inf makes the scale
  Inf, itself NaN and the finite rest 0. vLLM ignores the NaN in the maximum and stores it as -448 or -128.
- Powers of two are found from the bits. vLLM's unpacked kernel takes exp2(ceil(log2())) in fp32, which rounds a scale
  down when it lies within rounding of a power of two; then the largest elements saturate. This needs fp32 input:
  no bf16 or fp16 maximum divided by 448 comes that close.
- The padding rows of TMA-aligned scales are 0 wherever the tensor's storage holds them.
"""

import enum

import torch

from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops._library import torch_library

GROUP_SIZES = (32, 64, 128)
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUANT_MAX = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
MIN_EPS = 1e-20

_OP = "per_token_group_quant"
_MIN_UE8M0_SCALE = 1e-10


class ScaleLayout(enum.Enum):
    """Where the scale of row m and group g lies, for num_tokens rows (of each batch) and G groups in a row."""

    ROW = "row"  # fp32 [num_tokens, G], strides (G, 1)
    COLUMN = "column"  # fp32 [num_tokens, G], strides (1, num_tokens)
    COLUMN_TMA = "column_tma"  # fp32 [num_tokens, G], strides (1, num_tokens rounded up to 4)
    PACKED_UE8M0 = "packed_ue8m0"  # int32 [num_tokens, ceil(G / 4)], strides (1, num_tokens rounded up to 4);
    # byte g % 4 of word g // 4 is the biased exponent of group g, 0 beyond G. DeepGEMM's MN-major layout.


def per_token_group_quant(
    x: torch.Tensor,
    group_size: int = 128,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    layout: ScaleLayout = ScaleLayout.ROW,
    ue8m0: bool = False,
    eps: float = 1e-10,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise every group of `group_size` consecutive elements of a row to e4m3 or int8.

    Args:
        x: [num_tokens, hidden_size] or [num_batches, num_tokens, hidden_size], bf16, fp16 or fp32. The last stride is
            1, the others are free: a slice of a wider tensor is read in place.
        group_size: 32, 64 or 128; divides hidden_size.
        dtype: torch.float8_e4m3fn or torch.int8.
        layout: how the scales lie in memory; with three dimensions, per batch.
        ue8m0: round the scales up to powers of two. PACKED_UE8M0 does so always.
        eps: lower bound of a group's maximum, from 1e-20 to 1.
        out: where to write q: shape of x, `dtype`, last stride 1, rows at multiples of 16 bytes.
        pdl: launch with programmatic stream serialization. Pays behind a kernel that lets its successor start early,
            as ours do; behind one that does not, such as Triton's, it costs some 0.2 us.

    Returns:
        q, shaped like x (contiguous unless `out` says otherwise), and scale, [..., num_tokens, hidden_size /
        group_size] fp32, or [..., num_tokens, ceil(hidden_size / group_size / 4)] int32 for PACKED_UE8M0.
        x is about q * scale.

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    _check(x, group_size, dtype, eps)
    if out is None:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
    else:
        _check_out(out, x, dtype)
    scale = empty_scale(x, group_size, layout)
    ue8m0 = ue8m0 or layout is ScaleLayout.PACKED_UE8M0
    torch.ops.vllm_b200.per_token_group_quant(x, out, scale, group_size, eps, ue8m0, True, pdl)
    return out, scale


def empty_scale(x: torch.Tensor, group_size: int, layout: ScaleLayout) -> torch.Tensor:
    """An unwritten scale tensor for x in `layout`, with storage for the padding rows."""
    *batches, num_tokens, hidden_size = x.shape
    groups = hidden_size // group_size
    if layout is ScaleLayout.ROW:
        return torch.empty(*batches, num_tokens, groups, dtype=torch.float32, device=x.device)
    packed = layout is ScaleLayout.PACKED_UE8M0
    columns = -(-groups // 4) if packed else groups
    rows = num_tokens if layout is ScaleLayout.COLUMN else -(-num_tokens // 4) * 4
    dtype = torch.int32 if packed else torch.float32
    whole = torch.empty(*batches, columns, rows, dtype=dtype, device=x.device)
    batch_strides = whole.stride()[:-2]
    return whole.as_strided((*batches, num_tokens, columns), (*batch_strides, 1, rows))


def _check(x: torch.Tensor, group_size: int, dtype: torch.dtype, eps: float) -> None:
    if x.dim() not in (2, 3):
        raise ValueError(f"x: takes 2 or 3 dimensions, got shape {tuple(x.shape)}")
    if x.dtype not in INPUT_DTYPES:
        raise ValueError(f"x: takes bfloat16, float16 or float32, got {x.dtype}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size: takes one of {GROUP_SIZES}, got {group_size}")
    if x.shape[-1] % group_size:
        raise ValueError(f"x: the last dimension takes multiples of group_size {group_size}, got {x.shape[-1]}")
    if x.numel() and x.stride(-1) != 1:
        raise ValueError(f"x: takes a last stride of 1, got strides {x.stride()}")
    if dtype not in QUANT_MAX:
        raise ValueError(f"dtype: takes torch.float8_e4m3fn or torch.int8, got {dtype}")
    if not MIN_EPS <= eps <= 1.0:
        raise ValueError(f"eps: takes {MIN_EPS} to 1, got {eps}")


def _check_out(out: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> None:
    if out.shape != x.shape or out.dtype != dtype or out.device != x.device:
        raise ValueError(
            f"out: takes {dtype} {tuple(x.shape)} on {x.device}, got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    if out.numel() and (out.stride(-1) != 1 or out.data_ptr() % 16 or any(s % 16 for s in out.stride()[:-1])):
        raise ValueError(
            f"out: takes a last stride of 1 and rows at multiples of 16 bytes, got strides {out.stride()} "
            f"at offset {out.storage_offset()}"
        )


# pad: the rows between num_tokens and a TMA-aligned leading dimension of `scale` are padding, to be zeroed.
torch_library.define(
    f"{_OP}(Tensor x, Tensor(a!) q, Tensor(b!) scale, int group_size, float eps, bool ue8m0, bool pad, "
    "bool pdl=False) -> ()"
)


@torch.library.register_fake(f"vllm_b200::{_OP}", lib=torch_library)
def _per_token_group_quant_fake(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    eps: float,
    ue8m0: bool,
    pad: bool,
    pdl: bool = False,
) -> None:
    return None


@torch.library.impl(torch_library, _OP, "CPU")
def _per_token_group_quant_cpu(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    eps: float,
    ue8m0: bool,
    pad: bool,
    pdl: bool = False,
) -> None:
    """The reference: the same fp32 operations as the CUDA kernel, in PyTorch."""
    qmax = QUANT_MAX[q.dtype]
    groups = x.float().unflatten(-1, (-1, group_size)) if x.shape[-1] else x.float().unsqueeze(-1)
    group_scale = group_scales(groups, qmax, eps, ue8m0)
    quotient = (groups / group_scale.unsqueeze(-1)).flatten(-2)
    quotient = quotient.clamp(-qmax - (q.dtype == torch.int8), qmax)
    if q.dtype == torch.int8:
        q.copy_(quotient.nan_to_num(nan=0.0).trunc())
    else:
        e4m3 = quotient.to(torch.float8_e4m3fn).view(torch.uint8)
        q.view(torch.uint8).copy_(e4m3.masked_fill(quotient.isnan(), 0x7F))
    store_group_scales(scale, group_scale, pad)


def group_scales(groups: torch.Tensor, qmax: float, eps: float, ue8m0: bool) -> torch.Tensor:
    """[..., G, group_size] fp32 -> [..., G] fp32 scales."""
    scale = groups.abs().amax(-1).clamp(min=eps) / qmax
    return _round_up_to_power_of_two(scale.clamp(min=_MIN_UE8M0_SCALE)) if ue8m0 else scale


def store_group_scales(scale: torch.Tensor, found: torch.Tensor, pad: bool) -> None:
    """Write fp32 scales into a tensor of any layout; with pad, zeros into its padding rows."""
    if pad:
        _zero_padding_rows(scale)
    scale.copy_(_pack_ue8m0(found) if scale.dtype == torch.int32 else found)


def _round_up_to_power_of_two(y: torch.Tensor) -> torch.Tensor:
    bits = y.view(torch.int32)
    return torch.where(bits >= 0x7F800000, bits, (bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def _pack_ue8m0(scale: torch.Tensor) -> torch.Tensor:
    """[..., num_tokens, G] powers of two -> [..., num_tokens, ceil(G / 4)] int32; Inf and NaN become 255."""
    exponent = (scale.view(torch.int32) & 0x7FFFFFFF) >> 23
    exponent = torch.nn.functional.pad(exponent, (0, -exponent.shape[-1] % 4)).unflatten(-1, (-1, 4))
    return exponent.to(torch.uint8).contiguous().view(torch.int32).squeeze(-1)


def _zero_padding_rows(scale: torch.Tensor) -> None:
    """Zero the rows between num_tokens and a TMA-aligned leading dimension, as far as the storage goes."""
    num_tokens = scale.shape[-2]
    padded = -(-num_tokens // 4) * 4
    if scale.numel() == 0 or scale.stride()[-2:] != (1, padded):
        return
    offset = torch.arange(num_tokens, padded)
    for dim in range(scale.dim()):
        if dim != scale.dim() - 2:
            offset = (offset.unsqueeze(-1) + torch.arange(scale.shape[dim]) * scale.stride(dim)).flatten()
    room = scale.untyped_storage().nbytes() // scale.element_size() - scale.storage_offset()
    scale.as_strided((room,), (1,))[offset[offset < room]] = 0


_library.status()
