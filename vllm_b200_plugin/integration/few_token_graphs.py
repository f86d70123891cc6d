"""Feature few_token_graphs: a compiled graph of its own for steps of few tokens, where a model's layers are quantised.

norm_linear_fusion then works in that graph alone, and steps of more tokens keep torch.compile's kernels and vLLM's
GEMM. vLLM compiles two graphs in place of one when a model starts for the first time.
"""

from typing import Any

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.features import NotForThisPlatform

MOST_TOKENS = 16  # that a GEMM of ours was measured to win (small_m_table.py)


def apply() -> None:
    """Have vLLM's configuration end a compile range there, once. Raises FeatureUnavailable where it cannot."""
    platform = vllm_compat.CURRENT_PLATFORM.get()
    if not platform.is_cuda():
        raise NotForThisPlatform(f"for CUDA, vLLM runs on {platform.device_name}")
    config = vllm_compat.ENGINE_CONFIG.get()
    find = config._set_compile_ranges
    if hasattr(find, "_b200"):
        return

    def ranges(self: Any) -> None:
        find(self)
        ends = self.compilation_config.compile_ranges_endpoints
        if self.quant_config is not None and ends and ends[-1] > MOST_TOKENS:
            self.compilation_config.compile_ranges_endpoints = sorted({*ends, MOST_TOKENS})

    ranges._b200 = True  # type: ignore[attr-defined]
    config._set_compile_ranges = ranges
