"""Feature bf16_moe_few_tokens: the same for unquantised experts in bfloat16."""

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.integration.moe_few_tokens import choice, install
from vllm_b200_plugin.ops.moe_few_tokens import ExpertFormat

__all__ = ["apply", "choice"]


def apply() -> None:
    install(vllm_compat.BF16_MOE_BACKENDS, vllm_compat.BF16_MOE_EXPERTS, (ExpertFormat.BF16,))
