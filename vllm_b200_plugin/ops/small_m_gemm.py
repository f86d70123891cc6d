"""Linear layers for 1 to 32 tokens, at the speed of their weights: y = x @ weight.T, scaled, plus a bias.

One op for every format of the weight. The arithmetic is the checkpoint's: the quantised operands as they are, products
and sums in fp32 (int32 for int8), one rounding to the output. A bfloat16 x under block scales is quantised on the way,
by the arithmetic of `ops/quant.py`.
"""

from typing import NamedTuple

import torch

from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops._library import torch_library
from vllm_b200_plugin.ops.quant import per_token_group_quant

MAX_TOKENS = 32
MAX_QUANTISED_TOKENS = 8  # of a bfloat16 x under block scales
MAX_STREAM_TOKENS = 16  # of a config with stages
STREAM_BYTES = 128  # a config with stages needs rows of a multiple of it
GROUP = 128

_OP = "small_m_gemm"
_OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FP8, _INT8 = torch.float8_e4m3fn, torch.int8


class Config(NamedTuple):
    """How the work is cut; every combination gives the right result, the shape decides which is fast.

    There are two kernels. A block of one asks for its part of the weight at once, which is for weights of a few
    megabytes. A block of the other, with `stages`, has a multiprocessor to itself and streams its part through buffers.

    row_tiles: rows of the weight that a block of threads takes at a time, in sixteens: 1, 2 or 4.
    warps: of a block, 1 to 16 (8 where row_tiles * num_tokens is more than 32); they split K. With stages 8, or 16
        with fewer than 4 row_tiles.
    cluster: blocks that split K, 1, 2, 4 or 8. Without meaning with stages, as is chunks.
    chunks: copies that a row of the weight comes in, through the bulk copy engine, a divisor of warps; 0 for cp.async.
    stages: buffers, from 2 on, 0 for the first kernel. At most 16 tokens, weight rows a multiple of 128 bytes long, not
        in float16.
    """

    row_tiles: int = 1
    warps: int = 8
    cluster: int = 1
    chunks: int = 0
    stages: int = 0


_PLAIN = Config()


def fp8_block_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    ue8m0: bool = False,
    config: Config = _PLAIN,
    pdl: bool = False,
) -> torch.Tensor:
    """A linear layer with weight scales for blocks of 128x128 and activation scales for groups of 128.

    Args:
        x: [num_tokens, K] bfloat16 (up to 8 tokens), or float8_e4m3fn with `x_scale` (up to 32). Rows may be strided.
        weight: [N, K] float8_e4m3fn, K a multiple of 128.
        weight_scale: [ceil(N / 128), K / 128] float32, or DeepGEMM's packed UE8M0, [N, ceil(K / 512)] int32; any
            strides.
        x_scale: [num_tokens, K / 128] float32, or packed UE8M0 [num_tokens, ceil(K / 512)] int32. Any strides.
        bias: [N] in out_dtype.
        out_dtype: bfloat16, float16 or float32.
        ue8m0: round the scales of a bfloat16 x up to powers of two.
        config: how the work is cut.
        pdl: launch with programmatic stream serialization: the weights are read while the kernel before still runs.

    Returns:
        [num_tokens, N] in out_dtype.

    Raises:
        ValueError: an argument is not as above.
    """
    _check(x, weight, out_dtype)
    _require(weight.dtype == _FP8, f"weight: takes {_FP8}, got {weight.dtype}")
    _require(x.shape[1] % GROUP == 0, f"x: takes a multiple of {GROUP} columns, got {x.shape[1]}")
    wanted = torch.bfloat16 if x_scale is None else _FP8
    _require(x.dtype == wanted, f"x: takes {wanted} {'without' if x_scale is None else 'with'} x_scale, got {x.dtype}")
    limit = MAX_QUANTISED_TOKENS if x_scale is None else MAX_TOKENS
    _require(x.shape[0] <= limit, f"x: takes at most {limit} rows of {wanted}, got {x.shape[0]}")
    groups = x.shape[1] // GROUP
    _check_group_scale("weight_scale", weight_scale, weight.shape[0], groups, GROUP)
    if x_scale is not None:
        _check_group_scale("x_scale", x_scale, x.shape[0], groups, 1)
    return _run(x, x_scale, weight, weight_scale, bias, out_dtype, True, ue8m0, config, pdl)


def scaled_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    config: Config = _PLAIN,
    pdl: bool = False,
) -> torch.Tensor:
    """A linear layer with a scale per token, or one, for x and a scale per output channel, or one, for the weight.

    Args:
        x: [num_tokens, K] float8_e4m3fn or int8, at most 32 rows, rows may be strided.
        x_scale: float32, contiguous, num_tokens elements or 1.
        weight: [N, K] of x's dtype, K a multiple of 16.
        weight_scale: float32, contiguous, N elements or 1.
        bias, out_dtype, config, pdl: as for fp8_block_linear.

    Returns:
        [num_tokens, N] in out_dtype.

    Raises:
        ValueError: an argument is not as above.
    """
    _check(x, weight, out_dtype)
    _require(weight.dtype in (_FP8, _INT8), f"weight: takes {_FP8} or {_INT8}, got {weight.dtype}")
    _require(x.dtype == weight.dtype, f"x: takes {weight.dtype} as weight, got {x.dtype}")
    for name, scale, rows in (("x_scale", x_scale, x.shape[0]), ("weight_scale", weight_scale, weight.shape[0])):
        fits = scale.dtype == torch.float32 and scale.numel() in (1, rows) and scale.is_contiguous()
        _require(fits, f"{name}: takes 1 or {rows} contiguous float32, got {tuple(scale.shape)} of {scale.dtype}")
    return _run(x, x_scale, weight, weight_scale, bias, out_dtype, False, False, config, pdl)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: Config = _PLAIN,
    pdl: bool = False,
) -> torch.Tensor:
    """A linear layer with a 16-bit weight.

    Args:
        x: [num_tokens, K] bfloat16 or float16, at most 32 rows, rows may be strided.
        weight: [N, K] of x's dtype, K a multiple of 8.
        out_dtype: x's dtype when left out.
        bias, config, pdl: as for fp8_block_linear.

    Returns:
        [num_tokens, N] in out_dtype.

    Raises:
        ValueError: an argument is not as above.
    """
    out_dtype = out_dtype or x.dtype
    _check(x, weight, out_dtype)
    _require(weight.dtype in (torch.bfloat16, torch.float16), f"weight: takes 16-bit floats, got {weight.dtype}")
    _require(x.dtype == weight.dtype, f"x: takes {weight.dtype} as weight, got {x.dtype}")
    return _run(x, None, weight, None, bias, out_dtype, False, False, config, pdl)


def refusal(x_columns: int, weight_dtype: torch.dtype, block_scaled: bool) -> str | None:
    """Why the kernel cannot do a layer with K = x_columns, or None where it can."""
    if block_scaled and x_columns % GROUP:
        return f"needs K % {GROUP} == 0, got K={x_columns}"
    multiple = 16 // weight_dtype.itemsize
    return f"needs K % {multiple} == 0, got K={x_columns}" if x_columns % multiple or not x_columns else None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> None:
    _require(x.dim() == 2 and weight.dim() == 2, f"x, weight: take 2 dimensions, got {x.dim()} and {weight.dim()}")
    _require(x.shape[0] <= MAX_TOKENS, f"x: takes at most {MAX_TOKENS} rows, got {x.shape[0]}")
    _require(
        weight.shape[1] == x.shape[1],
        f"weight: takes [N, {x.shape[1]}] as x has {x.shape[1]} columns, got {tuple(weight.shape)}",
    )
    _require(out_dtype in _OUT_DTYPES, f"out_dtype: takes bfloat16, float16 or float32, got {out_dtype}")
    reason = refusal(x.shape[1], weight.dtype, False)
    _require(reason is None, f"x: {reason}")
    for name, tensor in (("x", x), ("weight", weight)):
        aligned = tensor.stride(1) == 1 and (tensor.stride(0) * tensor.itemsize % 16 == 0 or tensor.shape[0] < 2)
        _require(
            not tensor.numel() or (aligned and tensor.data_ptr() % 16 == 0),
            f"{name}: takes rows that start at multiples of 16 bytes, got strides {tensor.stride()} "
            f"at offset {tensor.storage_offset()}",
        )


def _check_group_scale(name: str, scale: torch.Tensor, rows: int, groups: int, rows_per_scale: int) -> None:
    wanted = (rows, -(-groups // 4)) if scale.dtype == torch.int32 else (-(-rows // rows_per_scale), groups)
    _require(
        scale.dtype in (torch.float32, torch.int32) and tuple(scale.shape) == wanted,
        f"{name}: takes float32 or packed int32, here {wanted}, got {tuple(scale.shape)} of {scale.dtype}",
    )


def _run(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    block_scaled: bool,
    ue8m0: bool,
    config: Config,
    pdl: bool,
) -> torch.Tensor:
    if bias is not None:
        fits = bias.dtype == out_dtype and bias.numel() == weight.shape[0] and bias.is_contiguous()
        _require(fits, f"bias: takes {weight.shape[0]} of {out_dtype}, got {tuple(bias.shape)} of {bias.dtype}")
    out = torch.empty(x.shape[0], weight.shape[0], dtype=out_dtype, device=x.device)
    op = torch.ops.vllm_b200.small_m_gemm
    op(x, x_scale, weight, weight_scale, bias, out, block_scaled, ue8m0, pdl, config)
    return out


torch_library.define(
    f"{_OP}(Tensor x, Tensor? x_scale, Tensor weight, Tensor? weight_scale, Tensor? bias, Tensor(a!) out, "
    "bool block_scaled, bool ue8m0, bool pdl, int[] config) -> ()"
)


@torch.library.register_fake(f"vllm_b200::{_OP}", lib=torch_library)
def _fake(*args: object) -> None:
    return None


@torch.library.impl(torch_library, _OP, "CPU")
def _cpu(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    block_scaled: bool,
    ue8m0: bool,
    pdl: bool,
    config: list[int],
) -> None:
    """The reference, in float64 but for the quantisation of x. `config` and `pdl` change no result."""
    if block_scaled:
        assert weight_scale is not None
        groups = x.shape[1] // GROUP
        if x_scale is None:
            x, x_scale = per_token_group_quant(x, GROUP, ue8m0=ue8m0)
        rows_per_scale = 1 if weight_scale.dtype == torch.int32 else GROUP
        wide_x = x.double() * _spread(x_scale, groups, 1, x.shape[0])
        wide_weight = weight.double() * _spread(weight_scale, groups, rows_per_scale, weight.shape[0])
        y = wide_x @ wide_weight.t()
    else:
        y = x.double() @ weight.double().t()
        if x_scale is not None and weight_scale is not None:
            y = y * weight_scale.view(1, -1) * x_scale.view(-1, 1)
    out.copy_(y if bias is None else y + bias.double())


def _spread(scale: torch.Tensor, groups: int, rows_per_scale: int, rows: int) -> torch.Tensor:
    """Scales in float64 with an element for each one that they scale."""
    wide = unpack_scale(scale, groups).double().repeat_interleave(GROUP, 1)
    return wide.repeat_interleave(rows_per_scale, 0)[:rows]


def unpack_scale(scale: torch.Tensor, groups: int) -> torch.Tensor:
    """float32 as it is; packed UE8M0 [rows, ceil(groups / 4)] int32 -> [rows, groups] float32."""
    if scale.dtype == torch.float32:
        return scale
    exponent = torch.stack([scale >> shift & 0xFF for shift in (0, 8, 16, 24)], -1).flatten(-2)[:, :groups]
    value = torch.exp2(exponent.float() - 127)
    return torch.where(exponent == 255, torch.nan, value)


_library.status()
