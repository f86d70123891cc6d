"""Feature moe_align_ops: vLLM's sorting of tokens by expert, and its sum over a token's experts, run our kernels."""

from vllm_b200_plugin.integration import moe_ops

NAMES = ("moe_align_block_size", "batched_moe_align_block_size", "moe_sum")


def apply() -> None:
    """Raises FeatureUnavailable where the ops cannot be overridden."""
    moe_ops.apply(NAMES)
