"""What the features fp8_linear and int8_linear share: one op for quantisation and GEMM, and a class of ours before
vLLM's CUTLASS one.

One op, because behind our quantisation, which lets its successor start early, our GEMM for few tokens reads the weight
while the activation is quantised, and because a branch on the number of tokens outside it would be frozen as traced.
"""

import torch

from vllm_b200_plugin import dispatch, vllm_compat
from vllm_b200_plugin.features import NotForThisPlatform
from vllm_b200_plugin.integration import library
from vllm_b200_plugin.ops import small_m_gemm, token_quant
from vllm_b200_plugin.ops._library import torch_library
from vllm_b200_plugin.ops.small_m_gemm import Config

KINDS = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}  # of dispatch.small_m_gemm

# x [num_tokens, K] in bfloat16 or float16, or quantised already, with its scale. weight [K, N] as CUTLASS takes it, its
# scale N elements or 1. x_scale: one number, or None for a scale per token that is found.
LAYER = "Tensor weight, Tensor weight_scale, Tensor? x_scale, Tensor? bias, ScalarType out_dtype"
torch_library.define(f"scaled_linear(Tensor x, {LAYER}) -> Tensor")


@torch.library.register_fake("vllm_b200::scaled_linear", lib=torch_library)
def _fake(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, x_scale: torch.Tensor | None,
    bias: torch.Tensor | None, out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], weight.shape[1]), dtype=out_dtype)


@torch.library.impl(torch_library, "scaled_linear", "CPU")
@torch.library.impl(torch_library, "scaled_linear", "CUDA")
def _implementation(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, x_scale: torch.Tensor | None,
    bias: torch.Tensor | None, out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    if x.dtype == weight.dtype:
        assert x_scale is not None
        return multiply(x, x_scale, weight, weight_scale, bias, out_dtype, early=False)
    if x.shape[0] == 0:
        return x.new_empty((0, weight.shape[1]), dtype=out_dtype)
    if takes_few(x.shape[0], weight):
        if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
            x = x.clone(memory_format=torch.contiguous_format)
        if x_scale is None:
            q, x_scale, _ = token_quant.per_token_quant(x, weight.dtype, pdl=True)
        else:
            q = token_quant.per_tensor_quant(x, x_scale, weight.dtype, pdl=True)
    elif weight.dtype == torch.int8:
        q, x_scale, _ = vllm_compat.INT8_QUANT.get()(x.contiguous(), x_scale, symmetric=True)
    else:
        q, x_scale = vllm_compat.FP8_QUANT.get()(x, x_scale, use_per_token_if_dynamic=True)
    return multiply(q, x_scale, weight, weight_scale, bias, out_dtype, early=True)


def multiply(
    q: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor,
    bias: torch.Tensor | None, out_dtype: torch.dtype, *, early: bool,
) -> torch.Tensor:  # fmt: skip
    """The GEMM of scaled_linear: q [num_tokens, K] in the weight's dtype, x_scale num_tokens elements or 1.

    early: whether what quantised lets ours start before it ends. Behind what does not, that costs 0.2 us.
    """
    if q.shape[0] == 0:  # CUTLASS does not take them
        return q.new_empty((0, weight.shape[1]), dtype=out_dtype)
    if cut := _cut(q.shape[0], weight, early):
        return small_m_gemm.scaled_linear(
            q, x_scale, weight.t(), weight_scale, bias=bias, out_dtype=out_dtype, config=cut, pdl=early
        )
    gemm = vllm_compat.CUTLASS_GEMM.get()
    return gemm(q, weight, out_dtype=out_dtype, scale_a=x_scale, scale_b=weight_scale, bias=bias)


def takes_few(num_tokens: int, weight: torch.Tensor) -> bool:
    """Whether our GEMM takes so many tokens of a layer, behind our quantisation.

    The kernel that quantises starts early, too, then. On an H200 that saves 0.6 to 2.3 us behind a GEMM of ours, the
    layer before, and costs up to 0.3 behind what does not let it (benchmarks/results/h200/fused_linear.jsonl).
    """
    return _cut(num_tokens, weight, early=True) is not None


def _cut(num_tokens: int, weight: torch.Tensor, early: bool) -> Config | None:
    """How our GEMM cuts a weight [K, N] for so many tokens; None where CUTLASS takes them.

    What was measured behind our quantisation (quantise_first) says nothing of a GEMM that cannot start early.
    """
    if not 0 < num_tokens < dispatch.SMALL_M_BELOW:
        return None
    k, n = weight.shape
    few = dispatch.small_m_gemm(KINDS[weight.dtype], num_tokens, n, k, library.capability())
    if few.kernel != dispatch.SMALL_M or (few.quantise_first and not early):
        return None
    return Config(*few.config)


def refusal(cutlass: type) -> str | None:
    """Why a class of ours, in place of vLLM's class `cutlass`, takes no layer at all; None where it may."""
    if vllm_compat.is_disabled(cutlass):
        return f"VLLM_DISABLED_KERNELS names {cutlass.__name__}, which this is in place of"
    if vllm_compat.ENVS.get().VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT rules out a choice by the number of tokens"
    return None


def choice(
    kind: str, cutlass: type, shape: tuple[int, int], num_tokens: int, quantises: bool = True
) -> dispatch.Choice:
    """What a layer with a weight of `shape`, (N, K), runs for so many tokens; quantises: whether our op does."""
    few = dispatch.small_m_gemm(kind, num_tokens, *shape, library.capability())
    if few.kernel == dispatch.SMALL_M and few.quantise_first and not quantises:
        return dispatch.Choice(cutlass.__name__, "ours is faster behind our quantisation: norm_linear_fusion is off")
    return dispatch.Choice(few.kernel if few.kernel == dispatch.SMALL_M else cutlass.__name__, few.reason)


def takes_quantised(kind: str, shape: tuple[int, int]) -> bool:
    """Whether our GEMM was measured to win with a weight of `shape`, (N, K), behind a quantisation that is not ours."""
    few = [dispatch.small_m_gemm(kind, m, *shape, library.capability()) for m in range(1, dispatch.SMALL_M_BELOW)]
    return any(choice.kernel == dispatch.SMALL_M and not choice.quantise_first for choice in few)


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
