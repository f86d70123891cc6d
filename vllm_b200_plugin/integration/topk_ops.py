"""Feature topk_ops: vLLM's selection of experts runs our kernel, wherever vLLM calls it."""

import vllm_b200_plugin.ops.topk  # noqa: F401 - defines the op
from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.integration import op_override


def apply() -> None:
    """Override the ops for CUDA, once. Raises FeatureUnavailable where that cannot be done."""
    op_override.require_cuda()
    override("_moe_C", "CUDA")


def override(namespace: str, dispatch_key: str) -> None:
    """Put ours before the kernels that the ops in `namespace` have for `dispatch_key`."""
    op_override.override(vllm_compat.TOPK_OPS, namespace, dispatch_key, "expert selection ops")
