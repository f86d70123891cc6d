"""Feature nvfp4_linear: our GEMM for few tokens in NVFP4 linear layers whose activation stays bf16, beside Marlin.

On Hopper vLLM runs W4A16 for every NVFP4 layer. Marlin wants the weight in a layout of its own, ours takes it as the
checkpoint has it; a layer that ours wins for some number of tokens keeps both, 0.56 bytes more for each of its weights.
Where humming-kernels is installed, vLLM prefers those to Marlin there. They were not timed beside ours, which stays
behind them: VLLM_DISABLED_KERNELS=HummingNvFp4LinearKernel makes room.
"""

from typing import Any

import torch

from vllm_b200_plugin import dispatch, vllm_compat
from vllm_b200_plugin.features import FeatureUnavailable, NotForThisPlatform
from vllm_b200_plugin.integration import library, report
from vllm_b200_plugin.ops import nvfp4_gemm
from vllm_b200_plugin.ops._library import torch_library
from vllm_b200_plugin.ops.small_m_gemm import Config

_KIND = "nvfp4"
_Marlin: Any = vllm_compat.NVFP4_MARLIN_KERNEL.get()


class B200MarlinNvFp4Kernel(_Marlin):
    """Ours for few tokens and Marlin for more."""

    quantiser = "none, 16-bit activation"

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        n, k = layer.weight.shape[0], 2 * layer.weight.shape[1]
        limit = dispatch.small_m_limit(_KIND, n, k, library.capability())
        reason = nvfp4_gemm.refusal(n, k)
        if layer.params_dtype != torch.bfloat16:
            reason = f"needs bfloat16, got {layer.params_dtype}"
        kept = None
        if limit and reason is None:
            bias = getattr(layer, "bias", None)
            kept = layer.weight, layer.weight_scale, layer.weight_global_scale.float().reshape(1), bias
        super().process_weights_after_loading(layer)
        for name, tensor in zip(("weight", "weight_scale", "global_scale", "bias"), kept or (None,) * 4, strict=True):
            layer.register_buffer(f"b200_{name}", None if tensor is None else tensor.detach(), persistent=False)
        what = f"ours up to {limit} tokens, else Marlin" if kept else f"Marlin: {reason or 'ours is never faster'}"
        report.chosen("NVFP4 linear", type(self).__name__, f"{n}x{k}: {what}")

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] @ weight.T + bias, [..., N] in x's dtype."""
        if layer.b200_weight is None:
            return super().apply_weights(layer, x, bias)
        marlin = layer.weight, layer.weight_scale, layer.weight_global_scale, bias
        own_bias = None if bias is None else layer.b200_bias  # Marlin's is permuted
        own = layer.b200_weight, layer.b200_weight_scale, layer.b200_global_scale, own_bias
        return torch.ops.vllm_b200.nvfp4_linear(x, *own, *marlin)


torch_library.define(
    "nvfp4_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor global_scale, Tensor? bias, "
    "Tensor marlin_weight, Tensor marlin_scale, Tensor marlin_global_scale, Tensor? marlin_bias) -> Tensor"
)


@torch.library.register_fake("vllm_b200::nvfp4_linear", lib=torch_library)
def _fake(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, global_scale: torch.Tensor,
    bias: torch.Tensor | None, marlin_weight: torch.Tensor, marlin_scale: torch.Tensor,
    marlin_global_scale: torch.Tensor, marlin_bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.impl(torch_library, "nvfp4_linear", "CPU")
@torch.library.impl(torch_library, "nvfp4_linear", "CUDA")
def _implementation(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, global_scale: torch.Tensor,
    bias: torch.Tensor | None, marlin_weight: torch.Tensor, marlin_scale: torch.Tensor,
    marlin_global_scale: torch.Tensor, marlin_bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    n, k = weight.shape[0], x.shape[-1]
    num_tokens = x.numel() // k
    if 0 < num_tokens < dispatch.SMALL_M_BELOW and x.dtype == torch.bfloat16:
        choice = dispatch.small_m_gemm(_KIND, num_tokens, n, k, library.capability())
        if choice.kernel == dispatch.SMALL_M:
            rows = x.reshape(num_tokens, k)
            if rows.stride(1) != 1 or rows.stride(0) % 8 or rows.data_ptr() % 16:
                rows = rows.clone(memory_format=torch.contiguous_format)
            config = Config(*choice.config)
            out = nvfp4_gemm.nvfp4_linear(rows, weight, weight_scale, global_scale, bias=bias, config=config)
            return out.view(*x.shape[:-1], n)
    marlin = vllm_compat.NVFP4_MARLIN_GEMM.get()
    return marlin(
        input=x,
        weight=marlin_weight,
        weight_scale=marlin_scale,
        weight_global_scale=marlin_global_scale,
        workspace=None,
        size_n=n,
        size_k=k,
        bias=marlin_bias,
    )


def choice(layer: torch.nn.Module, num_tokens: int) -> dispatch.Choice | None:
    """What a layer of ours runs for so many tokens."""
    kept = getattr(layer, "b200_weight", None)
    if not isinstance(report.linear_kernel(layer), B200MarlinNvFp4Kernel) or kept is None:
        return None
    chosen = dispatch.small_m_gemm(_KIND, num_tokens, kept.shape[0], 2 * kept.shape[1], library.capability())
    return dispatch.Choice(chosen.kernel, chosen.reason)


def apply() -> None:
    """Put our class in Marlin's place, once. Raises FeatureUnavailable where there is nothing to run it, or no use."""
    platform = vllm_compat.CURRENT_PLATFORM.get()
    if not platform.is_cuda():
        raise NotForThisPlatform(f"for CUDA, vLLM runs on {platform.device_name}")
    library.require()
    if vllm_compat.is_disabled(_Marlin):
        raise FeatureUnavailable(f"VLLM_DISABLED_KERNELS names {_Marlin.__name__}, which this is in place of")
    if vllm_compat.ENVS.get().VLLM_BATCH_INVARIANT:
        raise FeatureUnavailable("VLLM_BATCH_INVARIANT rules out a choice by the number of tokens")
    if not dispatch.small_m_measured(_KIND, library.capability()):
        raise FeatureUnavailable("our NVFP4 GEMM for few tokens was not measured on this GPU")
    kernels = vllm_compat.NVFP4_KERNELS.get()[vllm_compat.PLATFORM_ENUM.get().CUDA]
    if B200MarlinNvFp4Kernel not in kernels:
        kernels.insert(kernels.index(_Marlin) if _Marlin in kernels else len(kernels), B200MarlinNvFp4Kernel)
    vllm_compat.LINEAR_BACKENDS.get().setdefault("marlin", set()).add(B200MarlinNvFp4Kernel)
    vllm_compat.NVFP4_MARLIN_KERNEL.replace(B200MarlinNvFp4Kernel)
