"""Feature cpu_fp8_moe: FP8 block-scaled experts on CPU with the arithmetic of the GPU kernels.

vLLM's own on CPU keep the activation in bf16 and need AMX. vLLM has no registry of experts, so ours take the oracle's
backend value EMULATION, which leaves the weights as the checkpoint has them and has no experts for these layers.
"""

from typing import Any

import torch

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.features import NotForThisPlatform
from vllm_b200_plugin.integration import report
from vllm_b200_plugin.ops.moe import fp8_block_scaled_moe, local_ids

_Base: Any = vllm_compat.CPU_FP8_EXPERTS.get()
_BLOCK_SHAPE = (128, 128)


class B200CpuFp8BlockExperts(_Base):
    """The reference in vLLM's form; gets activations unquantised and the routing done, adds up over the experts."""

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        super().__init__(moe_config, quant_config)
        report.chosen("FP8 block experts", type(self).__name__, "reference with W8A8 arithmetic; on any processor")

    @staticmethod
    def _supports_current_device() -> bool:
        return vllm_compat.CURRENT_PLATFORM.get().is_cpu()

    @staticmethod
    def _supports_routing_method(routing_method: Any, weight_key: Any, activation_key: Any) -> bool:
        return True

    @staticmethod
    def is_supported_config(
        cls: Any, moe_config: Any, weight_key: Any, activation_key: Any, activation_format: Any
    ) -> tuple[bool, str | None]:
        sizes = moe_config.hidden_dim, moe_config.intermediate_size_per_partition
        if any(size % block for size, block in zip(sizes, _BLOCK_SHAPE, strict=True)):
            return False, f"kernel needs hidden and intermediate sizes in multiples of 128, got {sizes}"
        if moe_config.has_bias:
            return False, "kernel does not support bias"
        return _Base.is_supported_config(cls, moe_config, weight_key, activation_key, activation_format)

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
        if apply_router_weight_on_input:
            topk_weights = torch.ones_like(topk_weights)
        output.copy_(
            fp8_block_scaled_moe(
                hidden_states,
                w1,
                self.w1_scale.float(),
                w2,
                self.w2_scale.float(),
                topk_weights,
                topk_ids,
                _BLOCK_SHAPE,
            )
        )


def apply() -> None:
    """Offer our experts first for FP8 block-scaled layers, once. Raises NotForThisPlatform where there is a GPU."""
    if not vllm_compat.CURRENT_PLATFORM.get().is_cpu():
        raise NotForThisPlatform("for CPU")
    ours = vllm_compat.MOE_BACKENDS.get().EMULATION
    priority, experts = vllm_compat.MOE_PRIORITY.get(), vllm_compat.MOE_EXPERTS.get()
    if getattr(experts, "_vllm_b200", False):
        return

    def backends(*args: Any, **kwargs: Any) -> list[Any]:
        return [ours, *(backend for backend in priority(*args, **kwargs) if backend != ours)]

    def classes(backend: Any) -> list[type]:
        return [B200CpuFp8BlockExperts] if backend == ours else experts(backend)

    classes._vllm_b200 = True  # type: ignore[attr-defined]
    vllm_compat.MOE_PRIORITY.replace(backends)
    vllm_compat.MOE_EXPERTS.replace(classes)
