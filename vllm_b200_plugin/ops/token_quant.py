"""Quantisation with one scale per token, found or, for a whole tensor or for groups of it, given.

The arithmetic is that of vLLM's `dynamic_per_token_scaled_fp8_quant`, `dynamic_scaled_int8_quant`,
`static_scaled_fp8_quant` and `static_scaled_int8_quant`, in fp32:

    per token   e4m3             scale = max(min(max|x|, scale_ub) / 448, 1 / (448 * 512))   q = x / scale
                int8             scale = max|x| / 127                                        q = x * (127 / max|x|)
                int8 with azp    scale = (max x - min x) / 255, azp = -128 - min x / scale   q = x * (1 / scale) + azp
    per tensor  e4m3 x * (1 / scale), int8 x / scale, int8 with azp x * (1 / scale) + azp
    in groups   e4m3 x * (1 / scale of its rows and columns)

All roundings are to nearest even, and everything saturates. It differs from vLLM's kernels where these lose
information: a NaN makes the scale of its token NaN, and in e4m3 every element with it (0 in int8); a token of one
value only, for which vLLM's int8 with azp divides by zero, gets scale 0, azp 0 and zeros.
"""

import itertools

import torch

from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops._library import torch_library
from vllm_b200_plugin.ops.quant import INPUT_DTYPES, QUANT_MAX

MAX_HIDDEN_SIZE = 32768
MIN_E4M3_SCALE = 1 / (448 * 512)


def per_token_quant(
    x: torch.Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    asymmetric: bool = False,
    scale_ub: torch.Tensor | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantise every row of x with a scale of its own.

    Args:
        x: [..., hidden_size] bf16, fp16 or fp32; hidden_size is a multiple of 16 up to 32768. The last stride is 1, the
            leading dimensions fold into rows that begin at multiples of 16 bytes: a slice of a wider tensor is read in
            place.
        dtype: torch.float8_e4m3fn or torch.int8.
        asymmetric: int8 with a zero point.
        scale_ub: e4m3: upper bound of a row's maximum, one float32.
        pdl: launch with programmatic stream serialization, see `per_token_group_quant`.

    Returns:
        q, contiguous in the shape of x; scale [rows, 1] float32; azp [rows, 1] int32 or None.
        x is about q * scale, or (q - azp) * scale.

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    check_rows("x", x, INPUT_DTYPES)
    if x.shape[-1] > MAX_HIDDEN_SIZE:
        raise ValueError(f"x: the last dimension takes up to {MAX_HIDDEN_SIZE}, got {x.shape[-1]}")
    check_dtype(dtype)
    if asymmetric and dtype != torch.int8:
        raise ValueError(f"asymmetric: goes with torch.int8, got {dtype}")
    if scale_ub is not None and dtype == torch.int8:
        raise ValueError("scale_ub: goes with torch.float8_e4m3fn, got torch.int8")
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    azp = torch.empty(rows, 1, dtype=torch.int32, device=x.device) if asymmetric else None
    torch.ops.vllm_b200.per_token_quant(x, q, scale, azp, scale_ub, pdl)
    return q, scale, azp


def per_tensor_quant(
    x: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    azp: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Quantise x with one given scale.

    Args:
        x: as for `per_token_quant`, of any width that is a multiple of 16.
        scale: one float32.
        dtype: torch.float8_e4m3fn or torch.int8.
        azp: int8: zero point, one int32.
        pdl: launch with programmatic stream serialization, see `per_token_group_quant`.

    Returns:
        q, contiguous in the shape of x.

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    check_rows("x", x, INPUT_DTYPES)
    check_dtype(dtype)
    check_number("scale", scale, torch.float32)
    if azp is not None:
        check_number("azp", azp, torch.int32)
        if dtype != torch.int8:
            raise ValueError(f"azp: goes with torch.int8, got {dtype}")
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    torch.ops.vllm_b200.per_tensor_quant(x, q, scale, azp, pdl)
    return q


def static_group_quant(
    x: torch.Tensor, scale: torch.Tensor, group_shape: tuple[int, int] = (-1, 1), *, pdl: bool = False
) -> torch.Tensor:
    """Quantise x to e4m3 with one given scale per channel, per token or per rectangle.

    Args:
        x: as for `per_tensor_quant`, folded into rows [num_tokens, hidden_size].
        scale: [num_tokens / rows, hidden_size / columns] float32 of any strides, or one dimension where the other is 1.
        group_shape: rows and columns that share a scale, -1 for all: (-1, 1) per channel, (1, -1) per token. They
            divide x; columns are 1 or a multiple of 16.
        pdl: launch with programmatic stream serialization, see `per_token_group_quant`.

    Returns:
        q e4m3, contiguous in the shape of x.

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    check_rows("x", x, INPUT_DTYPES)
    width = x.shape[-1]
    num_tokens = x.numel() // width if width else 0
    rows, columns = (
        size if group == -1 else group for group, size in zip(group_shape, (num_tokens, width), strict=True)
    )
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    if x.numel() == 0:
        return q
    if rows < 1 or columns < 1 or num_tokens % rows or width % columns or (columns > 1 and columns % 16):
        raise ValueError(
            f"group_shape: takes rows that divide {num_tokens} and columns that divide {width}, 1 or a multiple of 16, "
            f"got {group_shape}"
        )
    groups = (num_tokens // rows, width // columns)
    flat = tuple(size for size in groups if size > 1) or (1,)
    if scale.dtype != torch.float32 or tuple(scale.shape) not in (groups, flat if len(flat) == 1 else groups):
        raise ValueError(f"scale: takes torch.float32 {groups}, got {scale.dtype} {tuple(scale.shape)}")
    torch.ops.vllm_b200.static_group_quant(x, q, scale, rows, columns, pdl)
    return q


def check_rows(name: str, x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Whether x is rows that our kernels read in place; raises ValueError where it is not."""
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] % 16:
        raise ValueError(f"{name}: the last dimension takes multiples of 16, got shape {tuple(x.shape)}")
    if x.numel() == 0 or (
        x.is_contiguous() and not torch.compiler.is_compiling() and x.data_ptr() % 16 == 0  # as nearly always
    ):
        return
    strides = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    folds = all(a[1] == b[0] * b[1] for a, b in itertools.pairwise(strides))
    row_bytes = strides[-1][1] * x.element_size() if strides else 0
    # torch.compile cannot trace the address; the CUDA library checks it again.
    misplaced = not torch.compiler.is_compiling() and x.data_ptr() % 16
    if x.stride(-1) != 1 or not folds or row_bytes % 16 or misplaced:
        raise ValueError(
            f"{name}: takes a last stride of 1 and rows at multiples of 16 bytes, got strides {x.stride()} "
            f"at offset {x.storage_offset()}"
        )


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in QUANT_MAX:
        raise ValueError(f"dtype: takes torch.float8_e4m3fn or torch.int8, got {dtype}")


def check_number(name: str, number: torch.Tensor, dtype: torch.dtype) -> None:
    if number.dtype != dtype or number.numel() != 1:
        raise ValueError(f"{name}: takes one {dtype}, got {number.dtype} {tuple(number.shape)}")


torch_library.define(
    "per_token_quant(Tensor x, Tensor(a!) q, Tensor(b!) scale, Tensor(c!)? azp, Tensor? scale_ub, bool pdl=False) -> ()"
)
torch_library.define("per_tensor_quant(Tensor x, Tensor(a!) q, Tensor scale, Tensor? azp, bool pdl=False) -> ()")
torch_library.define(
    "static_group_quant(Tensor x, Tensor(a!) q, Tensor scale, int group_rows, int group_columns, bool pdl=False) -> ()"
)


def _fake(*args: object) -> None:
    return None


for _name in ("per_token_quant", "per_tensor_quant", "static_group_quant"):
    torch.library.register_fake(f"vllm_b200::{_name}", _fake, lib=torch_library)


@torch.library.impl(torch_library, "per_token_quant", "CPU")
def _per_token_quant_cpu(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    azp: torch.Tensor | None,
    scale_ub: torch.Tensor | None,
    pdl: bool = False,
) -> None:
    """The reference: the same fp32 operations as the CUDA kernel, in PyTorch."""
    values = x.float()
    if x.numel() == 0:
        return
    if azp is not None:
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        row_scale = (high - low) / 255
        flat = row_scale == 0
        point = (-128 - low / row_scale).masked_fill(flat, 0).round()
        point = to_int32(point)
        steps = to_int32((values * (1 / row_scale).masked_fill(flat, 0)).round())
        q.copy_((steps + point).clamp(-128, 127))
        azp.copy_(point.view(azp.shape))
    elif q.dtype == torch.int8:
        amax = values.abs().amax(-1, keepdim=True)
        row_scale = amax / 127
        q.copy_(to_int8((values * (torch.tensor(127.0) / amax).masked_fill(amax == 0, 0)).round()))
    else:
        row_scale = token_scale_e4m3(values, scale_ub)
        to_e4m3(values / row_scale, q)
    scale.copy_(row_scale.view(scale.shape))


@torch.library.impl(torch_library, "per_tensor_quant", "CPU")
def _per_tensor_quant_cpu(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, azp: torch.Tensor | None, pdl: bool = False
) -> None:
    values = x.float()
    if q.dtype != torch.int8:
        to_e4m3(values * (1 / scale), q)
    elif azp is None:
        q.copy_(to_int8((values / scale).round()))
    else:
        q.copy_((to_int32((values * (1 / scale)).round()) + azp).clamp(-128, 127))


@torch.library.impl(torch_library, "static_group_quant", "CPU")
def _static_group_quant_cpu(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, group_rows: int, group_columns: int, pdl: bool = False
) -> None:
    values = x.float().reshape(-1, group_rows, x.shape[-1] // group_columns, group_columns)
    scale = scale.reshape(values.shape[0], 1, values.shape[2], 1)
    to_e4m3((values * (1 / scale)).view(x.shape), q)


def token_scale_e4m3(values: torch.Tensor, scale_ub: torch.Tensor | None = None) -> torch.Tensor:
    """[..., 1] scales of rows of fp32 values."""
    amax = values.abs().amax(-1, keepdim=True)
    if scale_ub is not None:
        amax = amax.clamp(max=scale_ub.item())
    return (amax / QUANT_MAX[torch.float8_e4m3fn]).clamp(min=MIN_E4M3_SCALE)


def to_e4m3(quotient: torch.Tensor, q: torch.Tensor) -> None:
    """Write fp32 numbers to e4m3: to nearest even, saturating, NaN to 0x7f."""
    e4m3 = quotient.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    q.view(torch.uint8).copy_(e4m3.masked_fill(quotient.isnan(), 0x7F))


def to_int8(rounded: torch.Tensor) -> torch.Tensor:
    return rounded.clamp(-128, 127).nan_to_num(nan=0.0).to(torch.int8)


def to_int32(rounded: torch.Tensor) -> torch.Tensor:
    """Saturating, NaN to 0, as the GPU converts; in int64, where sums do not overflow."""
    return rounded.double().clamp(-(2**31), 2**31 - 1).nan_to_num(nan=0.0).long()


_library.status()
