"""A linear layer and what comes before it as one op: (residual addition and) RMSNorm, or silu_and_mul.

What comes before it quantises, in one kernel that lets the GEMM start early: ours for few tokens then reads its weights
while that kernel runs. One op, because scales and GEMM depend on the number of tokens, and a branch on it outside an op
would be frozen as traced.
"""

from typing import Any

import torch

from vllm_b200_plugin import dispatch
from vllm_b200_plugin.integration import fp8_block_op, scaled_linear
from vllm_b200_plugin.ops import gated_quant, norm_quant
from vllm_b200_plugin.ops._library import torch_library

# Of a layer with block scales; engine: one with DeepGEMM. scaled_linear.LAYER: the others.
_BLOCK_LAYER = "Tensor weight, Tensor weight_scale, ScalarType out_dtype, str engine"
_Results = tuple[torch.Tensor, torch.Tensor]


def _block_norm_linear(
    x: torch.Tensor, norm_weight: torch.Tensor, norm_eps: float, weight: torch.Tensor, weight_scale: torch.Tensor,
    out_dtype: torch.dtype, engine: str, residual: torch.Tensor | None = None, total: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    layout, ue8m0 = fp8_block_op.scales_of(engine, x.shape[0])
    q, scale = norm_quant.rms_norm_group_quant(
        x, norm_weight, norm_eps, residual=residual, total=total, layout=layout, ue8m0=ue8m0, pdl=_takes_few(x, weight)
    )
    return fp8_block_op.gemm(q, scale, weight, weight_scale, out_dtype, engine, ue8m0)


def _block_silu_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, out_dtype: torch.dtype, engine: str
) -> torch.Tensor:
    layout, ue8m0 = fp8_block_op.scales_of(engine, x.shape[0])
    q, scale = gated_quant.gated_group_quant(x, layout=layout, ue8m0=ue8m0, pdl=_takes_few(x, weight))
    return fp8_block_op.gemm(q, scale, weight, weight_scale, out_dtype, engine, ue8m0)


def _takes_few(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """As scaled_linear.takes_few, of a layer with block scales."""
    return fp8_block_op.small_m_choice(x.shape[0], *weight.shape).kernel == dispatch.SMALL_M


def _scaled_norm_linear(
    x: torch.Tensor, norm_weight: torch.Tensor, norm_eps: float, weight: torch.Tensor, weight_scale: torch.Tensor,
    x_scale: torch.Tensor | None, bias: torch.Tensor | None, out_dtype: torch.dtype,
    residual: torch.Tensor | None = None, total: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    dtype, pdl = weight.dtype, scaled_linear.takes_few(x.shape[0], weight)
    if x_scale is None:
        q, x_scale = norm_quant.rms_norm_token_quant(
            x, norm_weight, norm_eps, dtype, residual=residual, total=total, pdl=pdl
        )
    else:
        q = norm_quant.rms_norm_tensor_quant(
            x, norm_weight, x_scale, norm_eps, dtype, residual=residual, total=total, pdl=pdl
        )
    return scaled_linear.multiply(q, x_scale, weight, weight_scale, bias, out_dtype, early=True)


def _scaled_silu_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, x_scale: torch.Tensor | None,
    bias: torch.Tensor | None, out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    pdl = scaled_linear.takes_few(x.shape[0], weight)
    if x_scale is None:
        q, x_scale = gated_quant.gated_token_quant(x, weight.dtype, pdl=pdl)
    else:
        q = gated_quant.gated_tensor_quant(x, x_scale, weight.dtype, pdl=pdl)
    return scaled_linear.multiply(q, x_scale, weight, weight_scale, bias, out_dtype, early=True)


def _define(name: str, layer: str, columns: int, norm_linear: Any, silu_linear: Any) -> None:
    """norm_<name>, add_norm_<name> and silu_<name>; columns: dimension of the weight that is N."""

    def out(x: torch.Tensor, layer_arguments: tuple[Any, ...]) -> torch.Tensor:
        out_dtype = next(a for a in layer_arguments if isinstance(a, torch.dtype))
        return x.new_empty((x.shape[0], layer_arguments[0].shape[columns]), dtype=out_dtype)

    def add_norm_linear(x: torch.Tensor, residual: torch.Tensor, *arguments: Any) -> _Results:
        total = torch.empty_like(x)
        return norm_linear(x, *arguments, residual=residual, total=total), total

    norm = "Tensor norm_weight, float norm_eps, "
    for op, inputs, results, kernel, fake in (
        (f"norm_{name}", norm, "Tensor", norm_linear, lambda x, weight, eps, *rest: out(x, rest)),
        (
            f"add_norm_{name}",
            "Tensor residual, " + norm,
            "(Tensor, Tensor)",
            add_norm_linear,
            lambda x, residual, weight, eps, *rest: (out(x, rest), torch.empty_like(x)),
        ),
        (f"silu_{name}", "", "Tensor", silu_linear, lambda x, *rest: out(x, rest)),
    ):
        torch_library.define(f"{op}(Tensor x, {inputs}{layer}) -> {results}")
        torch.library.register_fake(f"vllm_b200::{op}", fake, lib=torch_library)
        for device in ("CPU", "CUDA"):
            torch.library.impl(torch_library, op, device)(kernel)


_define("fp8_block_linear", _BLOCK_LAYER, 0, _block_norm_linear, _block_silu_linear)
_define("scaled_linear", scaled_linear.LAYER, 1, _scaled_norm_linear, _scaled_silu_linear)
