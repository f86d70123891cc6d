"""Feature few_token_graphs: a compiled graph of its own for steps of few tokens, in models for norm_linear_fusion.

That works in this graph alone then, and steps of more tokens keep torch.compile's kernels and vLLM's GEMM. vLLM
compiles two graphs in place of one when a model starts for the first time.
"""

from typing import Any

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.features import NotForThisPlatform

MOST_TOKENS = 16  # that a GEMM of ours was measured to win (small_m_table.py)
METHODS = ("fp8", "fbgemm_fp8", "modelopt", "quark", "compressed-tensors")  # that have FP8 or INT8 linear layers


def apply() -> None:
    """Have vLLM's configuration end a compile range there, once. Raises FeatureUnavailable where it cannot."""
    platform = vllm_compat.CURRENT_PLATFORM.get()
    if not platform.is_cuda():
        raise NotForThisPlatform(f"for CUDA, vLLM runs on {platform.device_name}")
    if (capability := vllm_compat.capability()) != (9, 0):
        raise NotForThisPlatform(f"for compute capability 9.0, as norm_linear_fusion; this GPU has {capability}")
    config = vllm_compat.ENGINE_CONFIG.get()
    find = config._set_compile_ranges
    if hasattr(find, "_b200"):
        return

    def ranges(self: Any) -> None:
        find(self)
        ends = self.compilation_config.compile_ranges_endpoints
        if _may_have_layers(self.quant_config) and ends and ends[-1] > MOST_TOKENS:
            self.compilation_config.compile_ranges_endpoints = sorted({*ends, MOST_TOKENS})

    ranges._b200 = True  # type: ignore[attr-defined]
    config._set_compile_ranges = ranges


def _may_have_layers(quant_config: Any) -> bool:
    """Whether a model quantised so may have FP8 or INT8 linear layers; one whose weights are packed has others."""
    return (
        quant_config is not None
        and quant_config.get_name() in METHODS
        and "pack" not in str(getattr(quant_config, "quant_format", ""))
    )
