"""Feature fp8_linear: our GEMM for few tokens in FP8 layers with a scale per tensor, or per channel and token.

One class before vLLM's CUTLASS one, for the layers that our kernel wins for some number of tokens. Its op quantises,
too, with our kernel before our GEMM and with vLLM's before CUTLASS. In compiled graphs that is so where the feature
norm_linear_fusion gives the op what comes before; without it vLLM's quantisation stays outside, where inductor fuses
it with that.
"""

from typing import Any

import torch

from vllm_b200_plugin import dispatch, features, vllm_compat
from vllm_b200_plugin.integration import library, report, scaled_linear

_KIND = "fp8"
_Cutlass: Any = vllm_compat.CUTLASS_FP8_KERNEL.get()


class B200CutlassFp8Kernel(_Cutlass):
    """Weights as for CUTLASS; ours for few tokens and CUTLASS for more."""

    quantises_in_graphs = False  # whether the op of a compiled graph quantises
    takes_quantised = False  # whether ours is ever taken for an activation that is quantised already

    def __init__(self, config: Any, layer_param_names: Any) -> None:
        super().__init__(config, layer_param_names)
        fused = any(feature.name == "norm_linear_fusion" for feature in features.enabled())
        settings = vllm_compat.CURRENT_CONFIG.get()()
        # vLLM's fusion of attention and quantisation has to see the latter.
        apart = settings is not None and settings.compilation_config.pass_config.fuse_attn_quant
        self.quantises_in_graphs = fused and not apart
        n, k = config.weight_shape
        self.takes_quantised = scaled_linear.takes_quantised(_KIND, (n, k))
        what = f"ours up to {dispatch.small_m_limit(_KIND, n, k, library.capability())} tokens, else CUTLASS"
        if self.quantises_in_graphs:
            what = f"quantisation and GEMM in one op, {what}"
        elif not self.takes_quantised:
            what = "CUTLASS in compiled graphs: ours is faster behind our quantisation, with norm_linear_fusion"
        report.chosen("FP8 linear", type(self).__name__, f"{n}x{k}: {what}")

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        if reason := scaled_linear.refusal(_Cutlass):
            return False, reason
        n, k = config.weight_shape
        if not dispatch.small_m_limit(_KIND, n, k, library.capability()):
            return False, f"{dispatch.SMALL_M} was not measured to be faster for {n}x{k}, whatever the number of tokens"
        return super().can_implement(config)

    def apply_weights(self, layer: torch.nn.Module, x: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] @ weight + bias, [..., N] in the config's out_dtype. x may be a QuantizedActivation of vLLM's."""
        weight, weight_scale, x_scale, upper_bound = self._get_layer_params(layer)  # weight [K, N]
        if not self._quantises(x, weight, upper_bound):
            return super().apply_weights(layer, x, bias)
        rows = x.reshape(-1, x.shape[-1])
        out_dtype = self.config.out_dtype or x.dtype
        out = torch.ops.vllm_b200.scaled_linear(rows, weight, weight_scale, x_scale, bias, out_dtype)
        return out.view(*x.shape[:-1], weight.shape[1])

    def _quantises(self, x: Any, weight: torch.Tensor, upper_bound: torch.Tensor | None) -> bool:
        """Whether our op quantises x. It has neither an upper bound nor one scale for all tokens that is found."""
        scale = self.config.activation_quant_key.scale
        return (
            isinstance(x, torch.Tensor)
            and x.dtype in (torch.bfloat16, torch.float16)
            and tuple(weight.shape) == (x.shape[-1], self.logical_output_size)  # else padded for CUTLASS
            and (scale.static or scale.group_shape.is_per_token())
            and upper_bound is None
            and (self.quantises_in_graphs or not torch.compiler.is_compiling())
        )

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
        padded = B.shape[0] != A.shape[1] or B.shape[1] != self.logical_output_size
        # Where vLLM has fused silu_and_mul with the quantisation the pass looks for our op behind that.
        if padded or not (self.takes_quantised or self.quantises_in_graphs):
            return super().apply_scaled_mm(
                A=A, B=B, out_dtype=out_dtype, As=As, Bs=Bs, bias=bias, output_shape=output_shape
            )
        return torch.ops.vllm_b200.scaled_linear(A, B, Bs, As, bias, out_dtype).view(output_shape)


def choice(layer: torch.nn.Module, num_tokens: int) -> dispatch.Choice | None:
    """What a layer of ours runs for so many tokens."""
    kernel = report.linear_kernel(layer)
    if not isinstance(kernel, B200CutlassFp8Kernel):
        return None
    return scaled_linear.choice(
        _KIND, _Cutlass, kernel.config.weight_shape, num_tokens, quantises=kernel.quantises_in_graphs
    )


def apply() -> None:
    """Put our class into vLLM's list, once. Raises FeatureUnavailable where there is nothing to run it."""
    scaled_linear.put_before(_Cutlass, B200CutlassFp8Kernel, vllm_compat.FP8_KERNELS)
