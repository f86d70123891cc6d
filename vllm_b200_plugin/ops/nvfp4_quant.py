"""NVFP4 quantisation: e2m1 elements, an e4m3 scale for every 16 of a row, one fp32 scale for all.

The arithmetic is that of vLLM's `scaled_fp4_quant` as its emulation (`nvfp4_emulation_utils.ref_nvfp4_quant`) states
it, for every group of 16 elements in fp32:

    scale = e4m3(global_scale * (max|x| * (1 / 6)))         to nearest even, at most 448
    q     = e2m1(x * (1 / (scale * (1 / global_scale))))    to nearest even, at most 6; 0 where scale is 0

so that x is about q * scale / global_scale. `global_scale` is the factor that checkpoints of compressed-tensors call
`input_global_scale` and `weight_global_scale`: 448 * 6 / max|x| of the whole tensor puts the largest scale at 448.

Where others differ:

- vLLM's CUDA kernel takes its reciprocals from the hardware, which may be off in the last bit. A quotient within two
  bits of a rounding boundary can then become a neighbour of ours. It also leaves a NaN out of the maximum; here, as in
  the emulation, a NaN makes the scale of its group NaN, and its elements 6. An Inf makes the scale 448 and itself 6.
- The emulation loses the sign of -0, which the kernels keep; both keep that of a number which is rounded to 0.
- compressed-tensors divides by `scale / global_scale` where vLLM multiplies, and divides the maximum by 6: results
  differ where that decides a rounding. Of a group of zeros it stores scale 0.125, vLLM 0.
"""

import torch

from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops._library import torch_library
from vllm_b200_plugin.ops.gated_quant import activate_and_multiply
from vllm_b200_plugin.ops.token_quant import check_number, check_rows

GROUP_SIZE = 16
TILE_ROWS, TILE_GROUPS = 128, 4  # of the swizzled layout
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_E4M3 = torch.float8_e4m3fn
# Code n is what lies above n of these: half-way between two values, and just below where the tie goes up.
_BELOW = [torch.nextafter(torch.tensor(tie), torch.tensor(0.0)).item() for tie in (0.75, 1.75, 3.5)]
_E2M1_STEPS = torch.tensor([0.25, _BELOW[0], 1.25, _BELOW[1], 2.5, _BELOW[2], 5.0])


def nvfp4_quant(
    x: torch.Tensor,
    global_scale: torch.Tensor,
    swizzled: bool = False,
    *,
    padded_size: int | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise x to NVFP4.

    Args:
        x: [num_tokens, hidden_size] bf16, fp16 or fp32; hidden_size is a multiple of 16. The last stride is 1, rows
            begin at multiples of 16 bytes: a slice of a wider tensor is read in place.
        global_scale: one float32, positive, on the device of x; `nvfp4_global_scale` finds one.
        swizzled: the scales in tiles of 128 rows by 4 groups, as block-scaled tensor-core instructions read them, see
            `swizzle_scales`. The padding is 0.
        padded_size: hidden_size of the results, a multiple of 16; the columns beyond that of x are 0.
        pdl: launch with programmatic stream serialization, see `per_token_group_quant`.

    Returns:
        q: [num_tokens, hidden_size / 2] uint8, contiguous; the first of two elements in the lower four bits.
        scale: float8_e4m3fn, contiguous. [num_tokens, hidden_size / 16] or, swizzled, [num_tokens rounded up to 128,
            hidden_size / 16 rounded up to 4].

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    check_matrix(x, INPUT_DTYPES)
    check_number("global_scale", global_scale, torch.float32)
    q, scale = empty_outputs(x, x.shape[1], padded_size, swizzled)
    torch.ops.vllm_b200.nvfp4_quant(x, global_scale, q, scale, swizzled, False, pdl)
    return q, scale


def silu_and_mul_nvfp4_quant(
    x: torch.Tensor,
    global_scale: torch.Tensor,
    swizzled: bool = False,
    *,
    padded_size: int | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up of the halves of x, rounded to the dtype of x, to NVFP4: vLLM's `silu_and_mul_nvfp4_quant`.

    The activation is fp32 until that rounding. The CUDA kernel takes exp2 and the reciprocal from the hardware, some
    1e-6 from the true value, so a result is now and then a neighbour of the reference's.

    Args:
        x: [num_tokens, 2 * hidden_size] bf16 or fp16, the activated half first; hidden_size is a multiple of 16.
        global_scale, swizzled, padded_size, pdl: as for `nvfp4_quant`.

    Returns, raises: as `nvfp4_quant`.
    """
    _check_gated(x)
    check_number("global_scale", global_scale, torch.float32)
    q, scale = empty_outputs(x, x.shape[1] // 2, padded_size, swizzled)
    torch.ops.vllm_b200.nvfp4_quant(x, global_scale, q, scale, swizzled, True, pdl)
    return q, scale


def nvfp4_experts_quant(
    x: torch.Tensor,
    global_scale: torch.Tensor,
    expert_offsets: torch.Tensor,
    scale_offsets: torch.Tensor,
    *,
    silu_and_mul: bool = False,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows that are sorted by expert, each expert with a global scale and swizzled tiles of its own.

    vLLM's `scaled_fp4_experts_quant` and `silu_and_mul_scaled_fp4_experts_quant`, with the padding of every expert's
    tiles written.

    Args:
        x: [num_rows, hidden_size], with silu_and_mul [num_rows, 2 * hidden_size]; bf16 or fp16, else as for
            `nvfp4_quant`.
        global_scale: [num_experts] float32.
        expert_offsets: [num_experts + 1] int32: the first row of each expert, and num_rows. Read on the device.
        scale_offsets: [num_experts + 1] int32: the first row of the scales of each expert, a multiple of 128; expert e
            has its number of rows rounded up to 128. Read on the device.
        pdl: as for `nvfp4_quant`.

    Returns:
        q: [num_rows, hidden_size / 2] uint8.
        scale: [rows, hidden_size / 16 rounded up to 4] float8_e4m3fn, as many rows as any routing can need. Those from
            scale_offsets[-1] on are left alone.

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    if silu_and_mul:
        _check_gated(x)
    else:
        check_matrix(x, INPUT_DTYPES[:2])
    num_experts = global_scale.numel()
    if global_scale.dtype != torch.float32 or global_scale.dim() != 1 or not num_experts:
        raise ValueError(
            f"global_scale: takes [num_experts] torch.float32, got {global_scale.dtype} {tuple(global_scale.shape)}"
        )
    for name, offsets in (("expert_offsets", expert_offsets), ("scale_offsets", scale_offsets)):
        if offsets.dtype != torch.int32 or offsets.shape != (num_experts + 1,) or not offsets.is_contiguous():
            raise ValueError(
                f"{name}: takes [{num_experts + 1}] torch.int32, contiguous, got {offsets.dtype} {tuple(offsets.shape)}"
            )
    hidden_size = x.shape[1] // 2 if silu_and_mul else x.shape[1]
    q = torch.empty(x.shape[0], hidden_size // 2, dtype=torch.uint8, device=x.device)
    scale_rows = most_expert_tiles(x.shape[0], num_experts) * TILE_ROWS
    scale = torch.empty(scale_rows, round_up(hidden_size // GROUP_SIZE, TILE_GROUPS), dtype=_E4M3, device=x.device)
    torch.ops.vllm_b200.nvfp4_experts_quant(x, global_scale, expert_offsets, scale_offsets, q, scale, silu_and_mul, pdl)
    return q, scale


def most_expert_tiles(num_rows: int, num_experts: int) -> int:
    """The most tiles of 128 rows that num_rows can take when every expert begins a new one."""
    return (num_rows + (TILE_ROWS - 1) * min(num_rows, num_experts)) // TILE_ROWS


def nvfp4_global_scale(x: torch.Tensor) -> torch.Tensor:
    """448 * 6 / max|x| as [1] float32, as compressed-tensors' `generate_gparam` finds it: 1 where that is Inf or NaN.

    One pass of PyTorch's over x, and three operations on one number. Serving takes the scale from the checkpoint.
    """
    if x.numel() == 0:
        return torch.ones(1, dtype=torch.float32, device=x.device)
    amax = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)
    scale = E4M3_MAX * E2M1_MAX / amax.clamp(min=torch.finfo(x.dtype).tiny)
    return scale.nan_to_num(nan=1.0, posinf=1.0, neginf=1.0).reshape(1)


def nvfp4_dequant(
    q: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor,
    swizzled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[num_tokens, hidden_size / 2] uint8 and its scales -> [num_tokens, hidden_size], q * (scale / global_scale).

    In fp32, then rounded to `dtype`, as vLLM's `ref_nvfp4_quant_dequant`. PyTorch, for references.
    """
    rows, groups = q.shape[0], q.shape[1] * 2 // GROUP_SIZE
    linear = unswizzle_scales(scale, rows, groups) if swizzled else scale
    group_scale = linear.view(_E4M3).float() / global_scale
    values = e2m1_to_float(q).unflatten(-1, (groups, GROUP_SIZE)) * group_scale.unsqueeze(-1)
    return values.flatten(-2).to(dtype)


def swizzle_scales(scale: torch.Tensor) -> torch.Tensor:
    """[rows, groups], one byte each -> [rows rounded up to 128, groups rounded up to 4] in tiles, padded with 0.

    The bytes of a tile of 128 rows by 4 groups lie together, tiles in row-major order; row m and group g of a tile at
    m % 32 * 16 + m // 32 * 4 + g. That is the layout of cuBLAS' and CUTLASS' 1x16 block scales.
    """
    rows, groups = scale.shape
    padding = (0, -groups % TILE_GROUPS, 0, -rows % TILE_ROWS)
    tiles = torch.nn.functional.pad(scale.view(torch.uint8), padding).unflatten(1, (-1, TILE_GROUPS))
    tiles = tiles.unflatten(0, (-1, 4, 32)).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows + padding[3], groups + padding[1]).view(scale.dtype)


def unswizzle_scales(scale: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The reverse of `swizzle_scales`: -> [rows, groups]."""
    padded_rows, padded_groups = scale.shape
    tiles = scale.view(torch.uint8).reshape(padded_rows // TILE_ROWS, padded_groups // TILE_GROUPS, 32, 4, TILE_GROUPS)
    linear = tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_groups)
    return linear[:rows, :groups].contiguous().view(scale.dtype)


def float_to_e2m1(y: torch.Tensor) -> torch.Tensor:
    """[..., n] fp32 -> [..., n / 2] uint8: to nearest even, saturating, NaN to 6; two elements to a byte."""
    code = torch.bucketize(y.abs(), _E2M1_STEPS.to(y.device), out_int32=True).to(torch.uint8)
    code |= (y.signbit() & ~y.isnan()).to(torch.uint8) << 3
    return code[..., 0::2] | code[..., 1::2] << 4


def e2m1_to_float(q: torch.Tensor) -> torch.Tensor:
    """[..., n / 2] uint8 -> [..., n] fp32."""
    code = torch.stack((q & 0xF, q >> 4), -1).flatten(-2).int()
    values = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], device=q.device)
    return values[code]


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def check_matrix(x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Whether x is a matrix that our kernels read in place; raises ValueError where it is not."""
    check_rows("x", x, dtypes)
    if x.dim() != 2:
        raise ValueError(f"x: takes 2 dimensions, got shape {tuple(x.shape)}")


def _check_gated(x: torch.Tensor) -> None:
    check_matrix(x, INPUT_DTYPES[:2])
    if x.shape[1] % (2 * GROUP_SIZE):
        raise ValueError(f"x: the last dimension takes multiples of {2 * GROUP_SIZE}, got {x.shape[1]}")


def empty_outputs(
    x: torch.Tensor, hidden_size: int, padded_size: int | None, swizzled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unwritten q and scale of `nvfp4_quant` for the rows of x."""
    size = hidden_size if padded_size is None else padded_size
    if size < hidden_size or size % GROUP_SIZE:
        raise ValueError(f"padded_size: takes multiples of {GROUP_SIZE} from {hidden_size} on, got {padded_size}")
    q = torch.empty(x.shape[0], size // 2, dtype=torch.uint8, device=x.device)
    rows, groups = x.shape[0], size // GROUP_SIZE
    if swizzled:
        rows, groups = round_up(rows, TILE_ROWS), round_up(groups, TILE_GROUPS)
    return q, torch.empty(rows, groups, dtype=_E4M3, device=x.device)


torch_library.define(
    "nvfp4_quant(Tensor x, Tensor global_scale, Tensor(a!) q, Tensor(b!) scale, bool swizzled, bool silu_and_mul, "
    "bool pdl=False) -> ()"
)
torch_library.define(
    "nvfp4_experts_quant(Tensor x, Tensor global_scale, Tensor expert_offsets, Tensor scale_offsets, Tensor(a!) q, "
    "Tensor(b!) scale, bool silu_and_mul, bool pdl=False) -> ()"
)


def _fake(*args: object) -> None:
    return None


for _name in ("nvfp4_quant", "nvfp4_experts_quant"):
    torch.library.register_fake(f"vllm_b200::{_name}", _fake, lib=torch_library)


@torch.library.impl(torch_library, "nvfp4_quant", "CPU")
def _nvfp4_quant_cpu(
    x: torch.Tensor, global_scale: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, swizzled: bool,
    silu_and_mul: bool, pdl: bool = False,
) -> None:  # fmt: skip
    """The reference: the same fp32 operations as the CUDA kernel, in PyTorch."""
    if x.numel() == 0:
        q.zero_()
        scale.view(torch.uint8).zero_()
        return
    values = activate_and_multiply(x.float(), "silu").to(x.dtype) if silu_and_mul else x
    values = torch.nn.functional.pad(values, (0, 2 * q.shape[1] - values.shape[1]))
    packed, found = quantise_groups(values, global_scale.reshape(()))
    q.copy_(packed)
    scale.copy_(swizzle_scales(found) if swizzled else found)


def quantise_groups(values: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, n] -> [rows, n / 2] uint8 and [rows, n / 16] e4m3."""
    groups = values.float().unflatten(-1, (-1, GROUP_SIZE))
    found = global_scale * (groups.abs().amax(-1) * (1 / E2M1_MAX))
    scale = found.clamp(-E4M3_MAX, E4M3_MAX).to(_E4M3)
    scale = scale.view(torch.uint8).masked_fill(found.isnan(), 0x7F).view(_E4M3)
    factor = 1 / (scale.float() * (1 / global_scale))
    factor = factor.masked_fill(scale.float() == 0, 0.0)
    return float_to_e2m1((groups * factor.unsqueeze(-1)).flatten(-2)), scale


@torch.library.impl(torch_library, "nvfp4_experts_quant", "CPU")
def _nvfp4_experts_quant_cpu(
    x: torch.Tensor, global_scale: torch.Tensor, expert_offsets: torch.Tensor, scale_offsets: torch.Tensor,
    q: torch.Tensor, scale: torch.Tensor, silu_and_mul: bool, pdl: bool = False,
) -> None:  # fmt: skip
    rows, tiles = expert_offsets.tolist(), scale_offsets.tolist()
    for expert in range(global_scale.numel()):
        part = slice(rows[expert], rows[expert + 1])
        end = tiles[expert] + round_up(part.stop - part.start, TILE_ROWS)
        torch.ops.vllm_b200.nvfp4_quant(
            x[part], global_scale[expert], q[part], scale[tiles[expert] : end], True, silu_and_mul
        )


_library.status()
