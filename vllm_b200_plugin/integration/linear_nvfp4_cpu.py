"""Feature cpu_nvfp4_linear: NVFP4 linear layers on CPU, by vLLM's emulation.

vLLM has an emulation, which it lists for GPUs alone. For W4A16 it asks for Marlin by name, whatever the platform, so
that on a CPU our class takes that name too.
"""

from typing import Any

import torch

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.features import NotForThisPlatform
from vllm_b200_plugin.integration import report
from vllm_b200_plugin.ops._library import torch_library

_Base: Any = vllm_compat.NVFP4_EMULATION_KERNEL.get()
GROUP_SIZE = 16


class B200CpuNvFp4Kernel(_Base):
    """vLLM's emulation in one op, opaque to torch.compile; W4A16 layers keep their activation as it comes."""

    quantiser = "in PyTorch"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        report.chosen("NVFP4 linear", type(self).__name__, "vLLM's emulation; on any processor")

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        if not vllm_compat.CURRENT_PLATFORM.get().is_cpu():
            return False, "is for CPU"
        return True, None

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] @ weight.T + bias, [..., N] in x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        # The reciprocal that quantises; W4A16 layers have none.
        input_scale = getattr(layer, "input_global_scale_inv", None)
        out = torch.ops.vllm_b200.cpu_nvfp4_linear(
            rows, layer.weight, layer.weight_scale, layer.weight_global_scale, input_scale
        )
        return (out if bias is None else out + bias).view(*x.shape[:-1], layer.weight.shape[0])


torch_library.define(
    "cpu_nvfp4_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor weight_global_scale, "
    "Tensor? input_global_scale) -> Tensor"
)


@torch.library.register_fake("vllm_b200::cpu_nvfp4_linear", lib=torch_library)
def _fake(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, weight_global_scale: torch.Tensor,
    input_global_scale: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.impl(torch_library, "cpu_nvfp4_linear", "CPU")
def _implementation(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, weight_global_scale: torch.Tensor,
    input_global_scale: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    if input_global_scale is not None:
        x = vllm_compat.NVFP4_QUANT_DEQUANT.get()(x, input_global_scale, GROUP_SIZE)
    dequantise = vllm_compat.NVFP4_DEQUANTISE.get()
    return x @ dequantise(weight, weight_scale, weight_global_scale, x.dtype, GROUP_SIZE, swizzle=False).t()


def apply() -> None:
    """Put our class into vLLM's list for CPUs, and in Marlin's place, once. Raises NotForThisPlatform on a GPU."""
    if not vllm_compat.CURRENT_PLATFORM.get().is_cpu():
        raise NotForThisPlatform("for CPU")
    kernels = vllm_compat.NVFP4_KERNELS.get().setdefault(vllm_compat.PLATFORM_ENUM.get().CPU, [])
    if B200CpuNvFp4Kernel not in kernels:
        kernels.append(B200CpuNvFp4Kernel)
    vllm_compat.LINEAR_BACKENDS.get().setdefault("emulation", set()).add(B200CpuNvFp4Kernel)
    vllm_compat.NVFP4_MARLIN_KERNEL.replace(B200CpuNvFp4Kernel)
