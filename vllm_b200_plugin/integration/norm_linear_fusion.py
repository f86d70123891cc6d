"""Feature norm_linear_fusion: (residual addition,) RMSNorm and the FP8 block-scaled linear layer behind it in one op.

On Hopper the layer's scales and its GEMM depend on the number of tokens, so the op, opaque to torch.compile, chooses
both. It norms and quantises in one kernel, which lets the GEMM start early: ours for few tokens then reads its weights
while that kernel runs.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import pattern_matcher

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.features import FeatureUnavailable
from vllm_b200_plugin.integration import fusion_pass, op_override
from vllm_b200_plugin.integration.fp8_block_op import Engine, gemm, machine, scales_of
from vllm_b200_plugin.integration.packed_quant_fusion import BLOCK, NORM_EPS, add_norm, norm, norm_is_ours
from vllm_b200_plugin.ops._library import torch_library
from vllm_b200_plugin.ops.norm_quant import rms_norm_group_quant

ENGINES = (Engine.FLASHINFER_DEEP_GEMM, Engine.DEEP_GEMM)
_ours: Any = torch.ops.vllm_b200

_LAYER = "Tensor norm_weight, Tensor weight, Tensor weight_scale, float norm_eps, ScalarType out_dtype, str engine"
torch_library.define(f"norm_fp8_block_linear(Tensor x, {_LAYER}) -> Tensor")
torch_library.define(f"add_norm_fp8_block_linear(Tensor x, Tensor residual, {_LAYER}) -> (Tensor, Tensor)")


@torch.library.register_fake("vllm_b200::norm_fp8_block_linear", lib=torch_library)
def _fake(
    x: torch.Tensor, norm_weight: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, norm_eps: float,
    out_dtype: torch.dtype, engine: str,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


@torch.library.register_fake("vllm_b200::add_norm_fp8_block_linear", lib=torch_library)
def _fake_add(x: torch.Tensor, residual: torch.Tensor, *layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake(x, *layer), torch.empty_like(x)


@torch.library.impl(torch_library, "norm_fp8_block_linear", "CPU")
@torch.library.impl(torch_library, "norm_fp8_block_linear", "CUDA")
def _norm_linear(
    x: torch.Tensor, norm_weight: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, norm_eps: float,
    out_dtype: torch.dtype, engine: str, residual: torch.Tensor | None = None, total: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    layout, ue8m0 = scales_of(engine, x.shape[0])
    q, scale = rms_norm_group_quant(
        x, norm_weight, norm_eps, residual=residual, total=total, layout=layout, ue8m0=ue8m0
    )
    return gemm(q, scale, weight, weight_scale, out_dtype, engine, ue8m0)


@torch.library.impl(torch_library, "add_norm_fp8_block_linear", "CPU")
@torch.library.impl(torch_library, "add_norm_fp8_block_linear", "CUDA")
def _add_norm_linear(x: torch.Tensor, residual: torch.Tensor, *layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.empty_like(x)
    return _norm_linear(x, *layer, residual=residual, total=total), total


class NormLinearFusion(fusion_pass.FusionPass):
    """The pass."""

    line = "RMSNorm and FP8 block linear", "our fused norm and quantisation", "one op for both"
    modules = (norm.__module__,)

    def __init__(self, dtype: torch.dtype) -> None:
        """dtype: of the model's activations."""
        super().__init__()
        vllm_compat.ENABLE_FAKE_MODE.get()(self._register)(dtype)

    def _register(self, dtype: torch.dtype) -> None:
        rows = [torch.empty(8, 512, dtype=dtype) for _ in range(2)]
        norm_weight = torch.empty(512, dtype=dtype)
        weight, scale = torch.empty(64, 512, dtype=torch.float8_e4m3fn), torch.empty(1, 4, dtype=torch.float32)
        for with_sum, eps, engine in itertools.product((True, False), NORM_EPS, ENGINES):
            search, replace = (_with_sum if with_sum else _without)(eps, dtype, engine.value)
            examples = [*rows[: 1 + with_sum], norm_weight, weight, scale]
            pattern_matcher.register_replacement(
                search, replace, examples, pattern_matcher.fwd_only, self.patterns, extra_check=norm_is_ours,
                skip_duplicates=True,
            )  # fmt: skip


_Pair = tuple[Callable[..., Any], Callable[..., Any]]


def _with_sum(eps: float, dtype: torch.dtype, engine: str) -> _Pair:
    compute = add_norm(eps).compute

    def search(x, residual, norm_weight, weight, weight_scale):
        normed, total = compute(x, residual, norm_weight)
        return _ours.fp8_block_linear.default(normed, weight, weight_scale, BLOCK, dtype, engine), total

    def replace(x, residual, norm_weight, weight, weight_scale):
        return _ours.add_norm_fp8_block_linear.default(
            x, residual, norm_weight, weight, weight_scale, eps, dtype, engine
        )

    return search, replace


def _without(eps: float, dtype: torch.dtype, engine: str) -> _Pair:
    compute = norm(eps).compute

    def search(x, norm_weight, weight, weight_scale):
        return _ours.fp8_block_linear.default(compute(x, norm_weight)[0], weight, weight_scale, BLOCK, dtype, engine)

    def replace(x, norm_weight, weight, weight_scale):
        return _ours.norm_fp8_block_linear.default(x, norm_weight, weight, weight_scale, eps, dtype, engine)

    return search, replace


def apply() -> None:
    """Have vLLM run the pass behind its own, once. Raises FeatureUnavailable where that cannot be done."""
    op_override.require_cuda()
    if (capability := vllm_compat.capability()) != (9, 0):
        raise FeatureUnavailable(
            f"for compute capability 9.0, where scales and GEMM go by the number of tokens; this GPU has {capability}"
        )
    fusion_pass.add(_make)


def _make(config: Any) -> NormLinearFusion | None:
    if not config.compilation_config.pass_config.fuse_norm_quant:
        return None
    machine()
    return NormLinearFusion(config.model_config.dtype)
