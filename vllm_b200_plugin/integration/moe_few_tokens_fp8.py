"""Feature fp8_moe_few_tokens: the same for FP8 experts with scales of channels and tokens, or of whole tensors."""

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.integration.moe_few_tokens import choice, install
from vllm_b200_plugin.ops.moe_few_tokens import ExpertFormat

__all__ = ["apply", "choice"]


def apply() -> None:
    formats = (ExpertFormat.FP8_TOKEN, ExpertFormat.FP8_TENSOR)
    install(vllm_compat.MOE_BACKENDS, vllm_compat.MOE_EXPERTS, formats)
