"""A gated activation and the quantisation of its result in one pass: silu_and_mul, gelu_and_mul, clamped SwiGLU.

With gate and up the halves of a row, in fp32 and without a rounding before the quantisation, as vLLM's
`silu_and_mul_per_block_quant` does it:

    silu          gate * sigmoid(gate) * up
    silu_clamped  gate' * sigmoid(alpha * gate') * (up' + beta),  gate' = min(gate, limit), up' = up within +-limit
    gelu          gate * (1 + erf(gate / sqrt(2))) / 2 * up
    gelu_tanh     the same with tanh's approximation of erf

vLLM's separate ops, its `silu_and_mul_quant` and its `persistent_masked_m_silu_mul_quant` round to the input's type on
the way. This is nearer to float64: 3.3 and 4.9 % of the e4m3 numbers of those two are not float64's, and less than one
in a million of ours (an H200; tests/test_rounding_beside_vllm.py, rounding_beside_vllm.txt in benchmarks). The CUDA
kernels take exp2 and the reciprocal from the hardware, some 1e-6 from the true value, so a result is the reference's up
to a neighbouring e4m3 or int8 number now and then. int8 is rounded to nearest. NaN and Inf do what PyTorch does.
"""

import torch

from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops._library import torch_library
from vllm_b200_plugin.ops.quant import (
    MIN_EPS,
    QUANT_MAX,
    ScaleLayout,
    empty_scale,
    group_scales,
    store_group_scales,
)
from vllm_b200_plugin.ops.token_quant import (
    MAX_HIDDEN_SIZE,
    check_dtype,
    check_number,
    check_rows,
    to_e4m3,
    to_int8,
)

ACTIVATIONS = ("silu", "silu_clamped", "gelu", "gelu_tanh")
GROUP_SIZES = (64, 128)
INPUT_DTYPES = (torch.bfloat16, torch.float16)


def gated_group_quant(
    x: torch.Tensor,
    group_size: int = 128,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    activation: str = "silu",
    limit: float = 0.0,
    alpha: float = 1.0,
    beta: float = 0.0,
    layout: ScaleLayout = ScaleLayout.ROW,
    ue8m0: bool = False,
    eps: float = 1e-10,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation of x in groups of `group_size`, as `per_token_group_quant` quantises and lays out its scales.

    Args:
        x: [num_tokens, 2 * hidden_size] bf16 or fp16, the activated half first; the last stride is 1, rows begin at
            multiples of 16 bytes.
        group_size: 64 or 128; divides hidden_size.
        dtype: torch.float8_e4m3fn or torch.int8.
        activation: one of ACTIVATIONS. limit, alpha, beta: of silu_clamped.
        layout, ue8m0, eps, pdl: as for `per_token_group_quant`; powers of two go with e4m3.

    Returns:
        q [num_tokens, hidden_size] and scale.

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    _check(x, dtype, activation, 2 * group_size)
    if x.dim() != 2:
        raise ValueError(f"x: takes [num_tokens, 2 * hidden_size], got {tuple(x.shape)}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size: takes one of {GROUP_SIZES}, got {group_size}")
    if not MIN_EPS <= eps <= 1.0:
        raise ValueError(f"eps: takes {MIN_EPS} to 1, got {eps}")
    ue8m0 = ue8m0 or layout is ScaleLayout.PACKED_UE8M0
    if ue8m0 and dtype == torch.int8:
        raise ValueError("ue8m0: goes with torch.float8_e4m3fn, got torch.int8")
    q = torch.empty(x.shape[0], x.shape[1] // 2, dtype=dtype, device=x.device)
    scale = empty_scale(q, group_size, layout)
    torch.ops.vllm_b200.gated_group_quant(
        x, q, scale, group_size, eps, ue8m0, True, ACTIVATIONS.index(activation), limit, alpha, beta, pdl
    )
    return q, scale


def gated_token_quant(
    x: torch.Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    activation: str = "silu",
    limit: float = 0.0,
    alpha: float = 1.0,
    beta: float = 0.0,
    scale_ub: torch.Tensor | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation of x with one scale a token, as `per_token_quant` quantises.

    Arguments as for `gated_group_quant` and `per_token_quant`; x may have more dimensions. Returns q [..., hidden_size]
    and scale [rows, 1]. Raises ValueError like these.
    """
    _check(x, dtype, activation, 32)
    if x.shape[-1] > 2 * MAX_HIDDEN_SIZE:
        raise ValueError(f"x: the last dimension takes up to {2 * MAX_HIDDEN_SIZE}, got {x.shape[-1]}")
    if scale_ub is not None and dtype == torch.int8:
        raise ValueError("scale_ub: goes with torch.float8_e4m3fn, got torch.int8")
    q = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=dtype, device=x.device)
    rows = q.numel() // q.shape[-1] if q.shape[-1] else 0
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    torch.ops.vllm_b200.gated_token_quant(x, q, scale, scale_ub, ACTIVATIONS.index(activation), limit, alpha, beta, pdl)
    return q, scale


def gated_tensor_quant(
    x: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    activation: str = "silu",
    limit: float = 0.0,
    alpha: float = 1.0,
    beta: float = 0.0,
    pdl: bool = False,
) -> torch.Tensor:
    """The activation of x with one given scale, as `per_tensor_quant` quantises. Arguments and errors as there."""
    _check(x, dtype, activation, 32)
    check_number("scale", scale, torch.float32)
    q = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=dtype, device=x.device)
    torch.ops.vllm_b200.gated_tensor_quant(x, q, scale, ACTIVATIONS.index(activation), limit, alpha, beta, pdl)
    return q


def masked_silu_group_quant(
    x: torch.Tensor,
    counts: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    *,
    ue8m0: bool = False,
    eps: float = 1e-10,
    pdl: bool = False,
) -> None:
    """silu_and_mul and e4m3 in groups of 128 for the first rows of every expert; the others are left alone.

    DeepGEMM's masked layout, in which vLLM's batched experts compute (`persistent_masked_m_silu_mul_quant`).

    Args:
        x: [num_experts, max_tokens, 2 * hidden_size] bf16 or fp16; at most 1024 experts.
        counts: [num_experts] int32, valid rows of each expert; read on the device, within 0 and max_tokens.
        q: [num_experts, max_tokens, hidden_size] float8_e4m3fn, written.
        scale: [num_experts, max_tokens, hidden_size / 128] float32, or [..., ceil(hidden_size / 512)] int32 for packed
            UE8M0, of any strides, written.
        ue8m0: scales are powers of two; has to be True for packed ones.
        eps, pdl: as for `per_token_group_quant`.
    """
    torch.ops.vllm_b200.masked_silu_group_quant(x, counts, q, scale, eps, ue8m0, pdl)


def _check(x: torch.Tensor, dtype: torch.dtype, activation: str, multiple: int) -> None:
    check_rows("x", x, INPUT_DTYPES)
    if x.shape[-1] % multiple:
        raise ValueError(f"x: the last dimension takes multiples of {multiple}, got {x.shape[-1]}")
    check_dtype(dtype)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: takes one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def activate_and_multiply(
    x: torch.Tensor, activation: str, limit: float = 0.0, alpha: float = 1.0, beta: float = 0.0
) -> torch.Tensor:
    """[..., 2 * hidden_size] -> [..., hidden_size], in the dtype of x: the activation's definition."""
    gate, up = x.chunk(2, dim=-1)
    if activation == "silu_clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + beta
        return gate * torch.sigmoid(alpha * gate) * up
    if activation == "silu":
        return gate * torch.sigmoid(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


_ACTIVATION = "int activation, float limit, float alpha, float beta, bool pdl=False) -> ()"
torch_library.define(
    "gated_group_quant(Tensor x, Tensor(a!) q, Tensor(b!) scale, int group_size, float eps, bool ue8m0, bool pad, "
    + _ACTIVATION
)
torch_library.define("gated_token_quant(Tensor x, Tensor(a!) q, Tensor(b!) scale, Tensor? scale_ub, " + _ACTIVATION)
torch_library.define("gated_tensor_quant(Tensor x, Tensor(a!) q, Tensor scale, " + _ACTIVATION)
torch_library.define(
    "masked_silu_group_quant(Tensor x, Tensor counts, Tensor(a!) q, Tensor(b!) scale, float eps, bool ue8m0, "
    "bool pdl=False) -> ()"
)


def _fake(*args: object) -> None:
    return None


for _name in ("gated_group_quant", "gated_token_quant", "gated_tensor_quant", "masked_silu_group_quant"):
    torch.library.register_fake(f"vllm_b200::{_name}", _fake, lib=torch_library)


@torch.library.impl(torch_library, "gated_group_quant", "CPU")
def _gated_group_quant_cpu(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, group_size: int, eps: float, ue8m0: bool, pad: bool,
    activation: int, limit: float, alpha: float, beta: float, pdl: bool = False,
) -> None:  # fmt: skip
    values = activate_and_multiply(x.float(), ACTIVATIONS[activation], limit, alpha, beta)
    quantise_groups(values, q, scale, group_size, eps, ue8m0, pad)


def quantise_groups(
    values: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, group_size: int, eps: float, ue8m0: bool, pad: bool
) -> None:
    """As per_token_group_quant, of fp32 values, with int8 rounded to nearest."""
    if q.numel() == 0:
        return
    groups = values.unflatten(-1, (-1, group_size))
    found = group_scales(groups, QUANT_MAX[q.dtype], eps, ue8m0)
    quotient = (groups / found.unsqueeze(-1)).flatten(-2)
    if q.dtype == torch.int8:
        q.copy_(to_int8(quotient.round()))
    else:
        to_e4m3(quotient, q)
    store_group_scales(scale, found, pad)


@torch.library.impl(torch_library, "gated_token_quant", "CPU")
def _gated_token_quant_cpu(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, scale_ub: torch.Tensor | None,
    activation: int, limit: float, alpha: float, beta: float, pdl: bool = False,
) -> None:  # fmt: skip
    values = activate_and_multiply(x.float(), ACTIVATIONS[activation], limit, alpha, beta)
    torch.ops.vllm_b200.per_token_quant(values, q, scale, None, scale_ub)


@torch.library.impl(torch_library, "gated_tensor_quant", "CPU")
def _gated_tensor_quant_cpu(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor,
    activation: int, limit: float, alpha: float, beta: float, pdl: bool = False,
) -> None:  # fmt: skip
    values = activate_and_multiply(x.float(), ACTIVATIONS[activation], limit, alpha, beta)
    torch.ops.vllm_b200.per_tensor_quant(values, q, scale, None)


@torch.library.impl(torch_library, "masked_silu_group_quant", "CPU")
def _masked_silu_group_quant_cpu(
    x: torch.Tensor, counts: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, eps: float, ue8m0: bool,
    pdl: bool = False,
) -> None:  # fmt: skip
    for expert, count in enumerate(counts.clamp(0, x.shape[1]).tolist()):
        values = activate_and_multiply(x[expert, :count].float(), "silu")
        quantise_groups(values, q[expert, :count], scale[expert, :count], 128, eps, ue8m0, False)


_library.status()
