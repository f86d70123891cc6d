"""What the features fp8_linear and int8_linear share: a class before vLLM's CUTLASS one, and the op that it runs.

vLLM quantises the activation of such a layer as it does for CUTLASS. The GEMM is ours while a step has few tokens and
CUTLASS's for more.
"""

import functools
from typing import Any

import torch

from vllm_b200_plugin import dispatch, vllm_compat
from vllm_b200_plugin.features import NotForThisPlatform
from vllm_b200_plugin.integration import library
from vllm_b200_plugin.ops import small_m_gemm
from vllm_b200_plugin.ops._library import torch_library


def refusal(cutlass: type) -> str | None:
    """Why a class of ours, in place of vLLM's class `cutlass`, takes no layer at all; None where it may."""
    if vllm_compat.is_disabled(cutlass):
        return f"VLLM_DISABLED_KERNELS names {cutlass.__name__}, which this is in place of"
    if vllm_compat.ENVS.get().VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT rules out a choice by the number of tokens"
    return None


def choice(kind: str, cutlass: type, shape: tuple[int, int], num_tokens: int) -> dispatch.Choice:
    """What a layer with a weight of `shape`, (N, K), runs for so many tokens."""
    few = dispatch.small_m_gemm(kind, num_tokens, *shape, library.capability())
    return dispatch.Choice(few.kernel if few.kernel == dispatch.SMALL_M else cutlass.__name__, few.reason)


def put_before(cutlass: type, ours: type, kernels: vllm_compat.Private) -> None:
    """Put our class before `cutlass` in vLLM's list for CUDA and beside it for --linear-backend, once.

    Raises FeatureUnavailable where there is nothing to run it.
    """
    platform = vllm_compat.CURRENT_PLATFORM.get()
    if not platform.is_cuda():
        raise NotForThisPlatform(f"for CUDA, vLLM runs on {platform.device_name}")
    library.require()
    found = kernels.get()[vllm_compat.PLATFORM_ENUM.get().CUDA]
    if ours not in found:
        found.insert(found.index(cutlass) if cutlass in found else 0, ours)
    vllm_compat.LINEAR_BACKENDS.get().setdefault("cutlass", set()).add(ours)


def define_op(kind: str) -> None:
    """Define vllm_b200::<kind>_linear, opaque to torch.compile, as the branch on the number of tokens has to be.

    x [num_tokens, K] and weight [N, K] of the kind's 8-bit dtype, scales as for ops.small_m_gemm.scaled_linear, bias
    [N] of out_dtype, bfloat16 or float16; returns [num_tokens, N].
    """
    name = f"{kind}_linear"
    torch_library.define(
        f"{name}(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, ScalarType out_dtype) "
        "-> Tensor"
    )
    torch.library.register_fake(f"vllm_b200::{name}", _fake, lib=torch_library)
    for key in ("CPU", "CUDA"):
        torch_library.impl(name, functools.partial(_run, kind), key)


def _fake(
    x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, weight_scale: torch.Tensor,
    bias: torch.Tensor | None, out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


def _run(
    kind: str, x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, weight_scale: torch.Tensor,
    bias: torch.Tensor | None, out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    if 0 < x.shape[0] < dispatch.SMALL_M_BELOW:
        few = dispatch.small_m_gemm(kind, x.shape[0], *weight.shape, library.capability())
        if few.kernel == dispatch.SMALL_M:
            config = small_m_gemm.Config(*few.config)
            return small_m_gemm.scaled_linear(
                x, x_scale, weight, weight_scale, bias=bias, out_dtype=out_dtype, config=config
            )
    gemm: Any = vllm_compat.CUTLASS_GEMM.get()
    return gemm(x, weight.t(), out_dtype=out_dtype, scale_a=x_scale, scale_b=weight_scale, bias=bias)
