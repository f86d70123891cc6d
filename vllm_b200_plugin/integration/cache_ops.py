"""Feature cache_ops: writing to vLLM's paged KV cache runs our kernel."""

import vllm_b200_plugin.ops.cache  # noqa: F401 - defines the ops
from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.integration import op_override


def apply() -> None:
    """Override the ops for CUDA, once. Raises FeatureUnavailable where that cannot be done."""
    op_override.require_cuda()
    override("_C_cache_ops", "CUDA")


def override(namespace: str, dispatch_key: str) -> None:
    """Put ours before the kernels that the ops in `namespace` have for `dispatch_key`."""
    op_override.override(vllm_compat.CACHE_OPS, namespace, dispatch_key, "KV-cache write ops")
