"""Feature gated_quant_ops: vLLM's fused ops of silu_and_mul and quantisation run our kernels.

Of `silu_and_mul_per_block_quant`, from 16 tokens of 14336 numbers on: below, vLLM's kernel is the faster one.
"""

import vllm_b200_plugin.ops.gated_quant  # noqa: F401 - defines the ops
from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.integration import op_override


def apply() -> None:
    """Override the ops for CUDA, once. Raises FeatureUnavailable where that cannot be done."""
    op_override.require_cuda()
    override("_C", "CUDA", batch_invariant=bool(vllm_compat.ENVS.get().VLLM_BATCH_INVARIANT))


def override(namespace: str, dispatch_key: str, *, batch_invariant: bool = False) -> None:
    """Put ours before the kernels that the ops in `namespace` have for `dispatch_key`.

    batch_invariant: leave out the op that passes from vLLM's kernel to ours with the number of tokens, since the two
    differ in the last bits.
    """
    ops = dict(vllm_compat.GATED_QUANT_OPS)
    if batch_invariant:
        del ops["silu_and_mul_per_block_quant"]
    op_override.override(ops, namespace, dispatch_key, "fused activation and quantisation ops")
