"""Feature cpu_nvfp4_moe: NVFP4 experts on CPU with the arithmetic of vLLM's emulation, whose kernel is in Triton."""

from typing import Any

import torch

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.features import NotForThisPlatform
from vllm_b200_plugin.integration import report
from vllm_b200_plugin.ops.moe import local_ids

_Base: Any = vllm_compat.NVFP4_EMULATION_EXPERTS.get()
GROUP_SIZE = 16


class B200CpuNvFp4Experts(_Base):
    """vLLM's emulated experts, one expert after the other; rounds to the layer's dtype where they do."""

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        super().__init__(moe_config, quant_config)
        report.chosen("NVFP4 experts", type(self).__name__, "vLLM's emulation without Triton; on any processor")

    @staticmethod
    def _supports_current_device() -> bool:
        return vllm_compat.CURRENT_PLATFORM.get().is_cpu()

    def _quantise(self, x: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
        """What NVFP4 leaves of x."""
        return vllm_compat.NVFP4_QUANT_DEQUANT.get()(x, global_scale, GROUP_SIZE)

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Write the layer's result, [num_tokens, hidden_size], to `output`."""
        if expert_map is not None:
            topk_ids = local_ids(topk_ids, expert_map)
        quant, dequantise = self.quant_config, vllm_compat.NVFP4_DEQUANTISE.get()
        x = self._quantise(hidden_states, quant.a1_gscale)
        parts = torch.zeros(*topk_ids.shape, hidden_states.shape[1], dtype=x.dtype)
        for expert in topk_ids[topk_ids >= 0].unique().tolist():
            rows, slots = torch.where(topk_ids == expert)
            scales = quant.g1_alphas[expert], quant.g2_alphas[expert]
            up = dequantise(w1[expert], self.w1_scale_val[expert], scales[0], x.dtype, GROUP_SIZE, swizzle=False)
            gated = x[rows] @ up.t()
            inner = gated.new_empty(len(rows), self.adjust_N_for_activation(gated.shape[1], activation))
            self.activation(activation, inner, gated)
            inner = self._quantise(inner, quant.a2_gscale)
            down = dequantise(w2[expert], self.w2_scale_val[expert], scales[1], x.dtype, GROUP_SIZE, swizzle=False)
            part = inner.float() @ down.float().t()
            if not apply_router_weight_on_input:
                part *= topk_weights[rows, slots, None]
            parts[rows, slots] = part.to(x.dtype)
        output.copy_(parts.float().sum(1))


class B200CpuNvFp4A16Experts(B200CpuNvFp4Experts):
    """The same for W4A16 checkpoints, whose activation stays as it comes."""

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return activation_key is None and _Base._supports_quant_scheme(weight_key, vllm_compat.NVFP4_DYNAMIC.get())

    def _quantise(self, x: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
        return x


def apply() -> None:
    """Make ours those of the emulation's backend, once. Raises NotForThisPlatform where there is a GPU."""
    if not vllm_compat.CURRENT_PLATFORM.get().is_cpu():
        raise NotForThisPlatform("for CPU")
    emulation = vllm_compat.NVFP4_MOE_BACKENDS.get().EMULATION
    experts = vllm_compat.NVFP4_MOE_EXPERTS.get()
    if getattr(experts, "_vllm_b200", False):
        return

    def classes(backend: Any) -> list[type]:
        return [B200CpuNvFp4Experts, B200CpuNvFp4A16Experts] if backend == emulation else experts(backend)

    classes._vllm_b200 = True  # type: ignore[attr-defined]
    vllm_compat.NVFP4_MOE_EXPERTS.replace(classes)
