"""Feature fp8_linear: our GEMM for few tokens in FP8 layers with a scale per tensor, or per channel and token.

One class before vLLM's CUTLASS one, for the layers that our kernel wins for some number of tokens; vLLM quantises the
activation as it does for CUTLASS, which stays in charge of more tokens.
"""

from typing import Any

import torch

from vllm_b200_plugin import dispatch, vllm_compat
from vllm_b200_plugin.integration import library, report, scaled_linear
from vllm_b200_plugin.ops import small_m_gemm
from vllm_b200_plugin.ops._library import torch_library

_KIND = "fp8"
_Cutlass: Any = vllm_compat.CUTLASS_FP8_KERNEL.get()


class B200CutlassFp8Kernel(_Cutlass):
    """Quantisation as for CUTLASS, then ours for few tokens and CUTLASS for more."""

    def __init__(self, config: Any, layer_param_names: Any) -> None:
        super().__init__(config, layer_param_names)
        n, k = config.weight_shape
        limit = dispatch.small_m_limit(_KIND, n, k, library.capability())
        report.chosen("FP8 linear", type(self).__name__, f"{n}x{k}: ours up to {limit} tokens, else CUTLASS")

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        if reason := scaled_linear.refusal(_Cutlass):
            return False, reason
        n, k = config.weight_shape
        if not dispatch.small_m_limit(_KIND, n, k, library.capability()):
            return False, f"{dispatch.SMALL_M} was not measured to be faster for {n}x{k}, whatever the number of tokens"
        return super().can_implement(config)

    def apply_scaled_mm(
        self,
        *,
        A: torch.Tensor,
        B: torch.Tensor,
        out_dtype: torch.dtype,
        As: torch.Tensor,
        Bs: torch.Tensor,
        bias: torch.Tensor | None,
        output_shape: list[int],
    ) -> torch.Tensor:
        if B.shape[0] != A.shape[1] or B.shape[1] != self.logical_output_size:  # padded for CUTLASS
            return super().apply_scaled_mm(
                A=A, B=B, out_dtype=out_dtype, As=As, Bs=Bs, bias=bias, output_shape=output_shape
            )
        return torch.ops.vllm_b200.fp8_linear(A, B.t(), As, Bs, bias, out_dtype).view(output_shape)


torch_library.define(
    "fp8_linear(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, ScalarType out_dtype) "
    "-> Tensor"
)


@torch.library.register_fake("vllm_b200::fp8_linear", lib=torch_library)
def _fake(
    x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, weight_scale: torch.Tensor,
    bias: torch.Tensor | None, out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


@torch.library.impl(torch_library, "fp8_linear", "CPU")
@torch.library.impl(torch_library, "fp8_linear", "CUDA")
def _implementation(
    x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, weight_scale: torch.Tensor,
    bias: torch.Tensor | None, out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    if config := scaled_linear.config(_KIND, x.shape[0], weight.shape):
        return small_m_gemm.scaled_linear(
            x, x_scale, weight, weight_scale, bias=bias, out_dtype=out_dtype, config=config
        )
    gemm = vllm_compat.CUTLASS_GEMM.get()
    return gemm(x, weight.t(), out_dtype=out_dtype, scale_a=x_scale, scale_b=weight_scale, bias=bias)


def choice(layer: torch.nn.Module, num_tokens: int) -> dispatch.Choice | None:
    """What a layer of ours runs for so many tokens."""
    kernel = report.linear_kernel(layer)
    if not isinstance(kernel, B200CutlassFp8Kernel):
        return None
    return scaled_linear.choice(_KIND, _Cutlass, kernel.config.weight_shape, num_tokens)


def apply() -> None:
    """Put our class into vLLM's list, once. Raises FeatureUnavailable where there is nothing to run it."""
    scaled_linear.put_before(_Cutlass, B200CutlassFp8Kernel, vllm_compat.FP8_KERNELS)
