"""Feature group_quant_ops: vLLM's per-token-group quantisation ops run our kernel."""

import vllm_b200_plugin.ops.quant  # noqa: F401 - defines the op
from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.integration import op_override


def apply() -> None:
    """Override the ops for CUDA, once. Raises FeatureUnavailable where that cannot be done."""
    op_override.require_cuda()
    override("_C", "CUDA")


def override(namespace: str, dispatch_key: str) -> None:
    """Put ours before the kernels that the ops in `namespace` have for `dispatch_key`."""
    op_override.override(vllm_compat.QUANT_OPS, namespace, dispatch_key, "per-token-group quantisation ops")
