"""Feature int8_moe_few_tokens: the same for INT8 experts with scales of channels and tokens."""

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.integration.moe_few_tokens import choice, install
from vllm_b200_plugin.ops.moe_few_tokens import ExpertFormat

__all__ = ["apply", "choice"]


def apply() -> None:
    install(vllm_compat.INT8_MOE_BACKENDS, vllm_compat.INT8_MOE_EXPERTS, (ExpertFormat.INT8_TOKEN,))
