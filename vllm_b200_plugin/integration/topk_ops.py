"""Feature topk_ops: vLLM's selection of experts runs our kernel, wherever vLLM calls it."""

from vllm_b200_plugin.integration import moe_ops

NAMES = ("topk_softmax", "topk_sigmoid", "grouped_topk")


def apply() -> None:
    """Raises FeatureUnavailable where the ops cannot be overridden."""
    moe_ops.apply(NAMES)
