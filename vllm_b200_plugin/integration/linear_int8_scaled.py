"""Feature int8_linear: our GEMM for few tokens in INT8 layers, symmetric activations with a scale per token or tensor.

One class before vLLM's CUTLASS one, and one op for quantisation and GEMM. vLLM chooses a class before it tells the
shape of a layer, so a layer that ours never wins has this class, too, and runs what CUTLASS's own runs.
"""

from typing import Any

import torch

from vllm_b200_plugin import dispatch, vllm_compat
from vllm_b200_plugin.integration import library, report, scaled_linear

_KIND = "int8"
_Cutlass: Any = vllm_compat.CUTLASS_INT8_KERNEL.get()


class B200CutlassInt8Kernel(_Cutlass):
    """Weights as for CUTLASS; ours for few tokens and CUTLASS for more."""

    limit = 0  # tokens of the layer up to which ours is taken, known once its weight is loaded

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        if reason := scaled_linear.refusal(_Cutlass):
            return False, reason
        if not config.input_symmetric:
            return False, f"{dispatch.SMALL_M} has no term for the zero point of an activation"
        if not dispatch.small_m_measured(_KIND, library.capability()):
            return False, f"{dispatch.SMALL_M} was not measured to be faster for INT8 on this GPU"
        return super().can_implement(config)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        n, k = _shape(layer)
        self.limit = dispatch.small_m_limit(_KIND, n, k, library.capability())
        what = f"ours up to {self.limit} tokens, else CUTLASS" if self.limit else "CUTLASS, ours is never faster"
        report.chosen("INT8 linear", type(self).__name__, f"{n}x{k}: {what}")

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] @ weight.T + bias, [..., N] in x's dtype."""
        if not self.limit:
            return super().apply_weights(layer, x, bias)
        weight, weight_scale, x_scale, *_ = self._get_layer_params(layer)  # weight [K, N]
        rows = x.reshape(-1, x.shape[-1])
        out = torch.ops.vllm_b200.scaled_linear(rows, weight, weight_scale, x_scale, bias, x.dtype)
        return out.view(*x.shape[:-1], weight.shape[1])


def _shape(layer: Any) -> tuple[int, int]:
    """(N, K) of a layer's weight, which CUTLASS takes as [K, N] once it is loaded."""
    n = sum(layer.logical_widths)
    return n, layer.weight.numel() // n


def choice(layer: torch.nn.Module, num_tokens: int) -> dispatch.Choice | None:
    """What a layer of ours runs for so many tokens."""
    if not isinstance(report.linear_kernel(layer), B200CutlassInt8Kernel):
        return None
    return scaled_linear.choice(_KIND, _Cutlass, _shape(layer), num_tokens)


def apply() -> None:
    """Put our class into vLLM's list, once. Raises FeatureUnavailable where there is nothing to run it."""
    scaled_linear.put_before(_Cutlass, B200CutlassInt8Kernel, vllm_compat.INT8_KERNELS)
