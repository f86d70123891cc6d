"""(Residual addition,) RMSNorm and the quantisation of its result in one pass.

The arithmetic is that of vLLM's `rms_norm_per_block_quant` and `rms_norm_dynamic_per_token_quant`, for a row in fp32:

    sum   = x + residual, not rounded; residual becomes it in its own type
    rstd  = 1 / sqrt(mean(sum ** 2) + norm_eps)
    y     = (sum * rstd in the type of x) * weight in that type
    y     = sum * rstd * (1 + weight) in that type, with gemma

and then y as `per_token_group_quant`, `per_token_quant`, `per_tensor_quant` or `nvfp4_quant` quantise it. vLLM's op for
one given scale rounds the sum before it squares it, and is no further from float64 for that: 3.24 % of its e4m3 numbers
are not float64's and 3.29 % of ours, nearly all for the rounding of y (an H200; tests/test_rounding_beside_vllm.py,
rounding_beside_vllm.txt in benchmarks). Its ops that find scales are as far from it as ours. In groups int8 is rounded
to nearest here, which is nearer to float64.

The squares are added in a fixed order, whatever the launch: a tree of neighbours over 512 columns, and these sums in
four chains that meet in the end. So a row's result does not depend on the rows beside it, and PyTorch gets the same.
"""

from typing import Any

import torch

from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops._library import torch_library
from vllm_b200_plugin.ops.gated_quant import GROUP_SIZES, INPUT_DTYPES, quantise_groups
from vllm_b200_plugin.ops.nvfp4_quant import empty_outputs
from vllm_b200_plugin.ops.quant import MIN_EPS, ScaleLayout, empty_scale
from vllm_b200_plugin.ops.token_quant import check_dtype, check_number, check_rows

MAX_HIDDEN_SIZE = 16384
_TREE = 512  # columns whose squares are added as a tree


def rms_norm_group_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_eps: float,
    group_size: int = 128,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    residual: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    gemma: bool = False,
    layout: ScaleLayout = ScaleLayout.ROW,
    ue8m0: bool = False,
    eps: float = 1e-10,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x, or of x + residual, quantised in groups of `group_size`.

    Args:
        x: [num_tokens, hidden_size] bf16 or fp16; hidden_size is at most 16384. The last stride is 1, rows begin at
            multiples of 16 bytes.
        weight: [hidden_size] in the dtype of x, at a multiple of 16 bytes.
        norm_eps: added to the mean of the squares.
        group_size: 64 or 128; divides hidden_size.
        dtype: torch.float8_e4m3fn or torch.int8.
        residual: like x; becomes x + residual where `total` is left out.
        total: like x: where x + residual goes, with a residual.
        gemma: the weight is an offset to 1.
        layout, ue8m0, eps, pdl: as for `per_token_group_quant`; powers of two go with e4m3.

    Returns:
        q [num_tokens, hidden_size] and scale.

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    _check(x, weight, residual, total)
    check_dtype(dtype)
    if x.dim() != 2:
        raise ValueError(f"x: takes [num_tokens, hidden_size], got {tuple(x.shape)}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size: takes one of {GROUP_SIZES}, got {group_size}")
    if x.shape[-1] % group_size:
        raise ValueError(f"x: the last dimension takes multiples of group_size {group_size}, got {x.shape[-1]}")
    if not MIN_EPS <= eps <= 1.0:
        raise ValueError(f"eps: takes {MIN_EPS} to 1, got {eps}")
    ue8m0 = ue8m0 or layout is ScaleLayout.PACKED_UE8M0
    if ue8m0 and dtype == torch.int8:
        raise ValueError("ue8m0: goes with torch.float8_e4m3fn, got torch.int8")
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = empty_scale(q, group_size, layout)
    options = (norm_eps, group_size, eps, ue8m0, True, gemma, pdl)
    if total is None:
        torch.ops.vllm_b200.rms_norm_group_quant(x, residual, weight, q, scale, *options)
    else:
        torch.ops.vllm_b200.add_rms_norm_group_quant(x, residual, weight, total, q, scale, *options)
    return q, scale


def rms_norm_token_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_eps: float,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    residual: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    gemma: bool = False,
    scale_ub: torch.Tensor | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x, or of x + residual, with one scale a token, as `per_token_quant` quantises.

    Arguments as for `rms_norm_group_quant` and `per_token_quant`; x may have more dimensions. Returns q and scale
    [rows, 1]. Raises ValueError like these.
    """
    _check(x, weight, residual, total)
    check_dtype(dtype)
    if scale_ub is not None and dtype == torch.int8:
        raise ValueError("scale_ub: goes with torch.float8_e4m3fn, got torch.int8")
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    options = (q, scale, scale_ub, norm_eps, gemma, pdl)
    if total is None:
        torch.ops.vllm_b200.rms_norm_token_quant(x, residual, weight, *options)
    else:
        torch.ops.vllm_b200.add_rms_norm_token_quant(x, residual, weight, total, *options)
    return q, scale


def rms_norm_tensor_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    norm_eps: float,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    residual: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    gemma: bool = False,
    pdl: bool = False,
) -> torch.Tensor:
    """RMSNorm of x, or of x + residual, with one given scale, as `per_tensor_quant` quantises. Arguments as above."""
    _check(x, weight, residual, total)
    check_dtype(dtype)
    check_number("scale", scale, torch.float32)
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    options = (q, scale, norm_eps, gemma, pdl)
    if total is None:
        torch.ops.vllm_b200.rms_norm_tensor_quant(x, residual, weight, *options)
    else:
        torch.ops.vllm_b200.add_rms_norm_tensor_quant(x, residual, weight, total, *options)
    return q


def rms_norm_nvfp4_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    global_scale: torch.Tensor,
    norm_eps: float,
    swizzled: bool = False,
    *,
    residual: torch.Tensor | None = None,
    gemma: bool = False,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x, or of x + residual, to NVFP4, as `nvfp4_quant` quantises y and lays out its results.

    Arguments as for `rms_norm_group_quant` and `nvfp4_quant`. Returns q and scale. Raises ValueError like these.
    """
    _check(x, weight, residual)
    if x.dim() != 2:
        raise ValueError(f"x: takes [num_tokens, hidden_size], got {tuple(x.shape)}")
    check_number("global_scale", global_scale, torch.float32)
    q, scale = empty_outputs(x, x.shape[1], None, swizzled)
    torch.ops.vllm_b200.rms_norm_nvfp4_quant(
        x, residual, weight, global_scale, q, scale, norm_eps, swizzled, gemma, pdl
    )
    return q, scale


def _check(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, total: torch.Tensor | None = None
) -> None:
    check_rows("x", x, INPUT_DTYPES)
    if x.shape[-1] > MAX_HIDDEN_SIZE:
        raise ValueError(f"x: the last dimension takes up to {MAX_HIDDEN_SIZE}, got {x.shape[-1]}")
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(f"weight: takes {x.dtype} ({x.shape[-1]},), got {weight.dtype} {tuple(weight.shape)}")
    check_rows("weight", weight, INPUT_DTYPES)
    if residual is not None:
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError(
                f"residual: takes {x.dtype} {tuple(x.shape)}, got {residual.dtype} {tuple(residual.shape)}"
            )
        check_rows("residual", residual, INPUT_DTYPES)
    if total is not None and (residual is None or total.shape != x.shape or total.dtype != x.dtype):
        raise ValueError(f"total: takes {x.dtype} {tuple(x.shape)}, and a residual")


def normalise(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, norm_eps: float, gemma: bool
) -> torch.Tensor:
    """The reference of the norm: y in the dtype of x; updates residual."""
    total = x.float()
    if residual is not None:
        total = total + residual.float()
        residual.copy_(total)
    mean = _sum_of_squares(total) / x.shape[-1]
    rstd = 1 / (mean + torch.tensor(norm_eps, dtype=torch.float32)).sqrt()
    y = total * rstd
    if gemma:
        return (y * (1 + weight.float())).to(x.dtype)
    return (y.to(x.dtype).float() * weight.float()).to(x.dtype)


def _sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """[..., H] fp32 -> [..., 1], in the kernel's order."""
    squares = x * x
    squares = torch.nn.functional.pad(squares, (0, -x.shape[-1] % (4 * _TREE))).unflatten(-1, (-1, _TREE))
    while squares.shape[-1] > 1:
        squares = squares[..., 0::2] + squares[..., 1::2]
    chains = squares.squeeze(-1).unflatten(-1, (-1, 4))
    total = chains[..., 0, :]
    for i in range(1, chains.shape[-2]):
        total = total + chains[..., i, :]
    return (total[..., 0:1] + total[..., 1:2]) + (total[..., 2:3] + total[..., 3:4])


_INPUTS = "Tensor x, Tensor(a!)? residual, Tensor weight, Tensor(b!) q"
_ADD_INPUTS = "Tensor x, Tensor residual, Tensor weight, Tensor(a!) total, Tensor(b!) q"
torch_library.define(
    f"rms_norm_group_quant({_INPUTS}, Tensor(c!) scale, float norm_eps, int group_size, float eps, bool ue8m0, "
    "bool pad, bool gemma, bool pdl=False) -> ()"
)
torch_library.define(
    f"add_rms_norm_group_quant({_ADD_INPUTS}, Tensor(c!) scale, float norm_eps, int group_size, float eps, bool ue8m0, "
    "bool pad, bool gemma, bool pdl=False) -> ()"
)
torch_library.define(
    f"rms_norm_token_quant({_INPUTS}, Tensor(c!) scale, Tensor? scale_ub, float norm_eps, bool gemma, bool pdl=False)"
    " -> ()"
)
torch_library.define(
    f"rms_norm_tensor_quant({_INPUTS}, Tensor scale, float norm_eps, bool gemma, bool pdl=False) -> ()"
)
torch_library.define(
    f"add_rms_norm_token_quant({_ADD_INPUTS}, Tensor(c!) scale, Tensor? scale_ub, float norm_eps, bool gemma, "
    "bool pdl=False) -> ()"
)
torch_library.define(
    f"add_rms_norm_tensor_quant({_ADD_INPUTS}, Tensor scale, float norm_eps, bool gemma, bool pdl=False) -> ()"
)
torch_library.define(
    "rms_norm_nvfp4_quant(Tensor x, Tensor(a!)? residual, Tensor weight, Tensor global_scale, Tensor(b!) q, "
    "Tensor(c!) scale, float norm_eps, bool swizzled, bool gemma, bool pdl=False) -> ()"
)


def _fake(*args: object) -> None:
    return None


for _name in (
    "rms_norm_group_quant",
    "add_rms_norm_group_quant",
    "rms_norm_token_quant",
    "add_rms_norm_token_quant",
    "rms_norm_tensor_quant",
    "add_rms_norm_tensor_quant",
    "rms_norm_nvfp4_quant",
):
    torch.library.register_fake(f"vllm_b200::{_name}", _fake, lib=torch_library)


@torch.library.impl(torch_library, "rms_norm_group_quant", "CPU")
def _rms_norm_group_quant_cpu(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, q: torch.Tensor, scale: torch.Tensor,
    norm_eps: float, group_size: int, eps: float, ue8m0: bool, pad: bool, gemma: bool, pdl: bool = False,
) -> None:  # fmt: skip
    y = normalise(x, residual, weight, norm_eps, gemma)
    quantise_groups(y.float(), q, scale, group_size, eps, ue8m0, pad)


@torch.library.impl(torch_library, "add_rms_norm_group_quant", "CPU")
def _add_rms_norm_group_quant_cpu(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, total: torch.Tensor, q: torch.Tensor,
    scale: torch.Tensor, norm_eps: float, group_size: int, eps: float, ue8m0: bool, pad: bool, gemma: bool,
    pdl: bool = False,
) -> None:  # fmt: skip
    total.copy_(residual)
    torch.ops.vllm_b200.rms_norm_group_quant(
        x, total, weight, q, scale, norm_eps, group_size, eps, ue8m0, pad, gemma, pdl
    )


@torch.library.impl(torch_library, "rms_norm_token_quant", "CPU")
def _rms_norm_token_quant_cpu(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, q: torch.Tensor, scale: torch.Tensor,
    scale_ub: torch.Tensor | None, norm_eps: float, gemma: bool, pdl: bool = False,
) -> None:  # fmt: skip
    torch.ops.vllm_b200.per_token_quant(normalise(x, residual, weight, norm_eps, gemma), q, scale, None, scale_ub)


@torch.library.impl(torch_library, "add_rms_norm_token_quant", "CPU")
def _add_rms_norm_token_quant_cpu(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, total: torch.Tensor, *arguments: Any
) -> None:
    total.copy_(residual)
    torch.ops.vllm_b200.rms_norm_token_quant(x, total, weight, *arguments)


@torch.library.impl(torch_library, "rms_norm_tensor_quant", "CPU")
def _rms_norm_tensor_quant_cpu(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, q: torch.Tensor, scale: torch.Tensor,
    norm_eps: float, gemma: bool, pdl: bool = False,
) -> None:  # fmt: skip
    torch.ops.vllm_b200.per_tensor_quant(normalise(x, residual, weight, norm_eps, gemma), q, scale, None)


@torch.library.impl(torch_library, "add_rms_norm_tensor_quant", "CPU")
def _add_rms_norm_tensor_quant_cpu(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, total: torch.Tensor, *arguments: Any
) -> None:
    total.copy_(residual)
    torch.ops.vllm_b200.rms_norm_tensor_quant(x, total, weight, *arguments)


@torch.library.impl(torch_library, "rms_norm_nvfp4_quant", "CPU")
def _rms_norm_nvfp4_quant_cpu(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, global_scale: torch.Tensor, q: torch.Tensor,
    scale: torch.Tensor, norm_eps: float, swizzled: bool, gemma: bool, pdl: bool = False,
) -> None:  # fmt: skip
    y = normalise(x, residual, weight, norm_eps, gemma)
    torch.ops.vllm_b200.nvfp4_quant(y, global_scale, q, scale, swizzled, False)


_library.status()
