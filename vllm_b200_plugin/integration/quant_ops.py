"""Feature group_quant_ops: vLLM's per-token-group quantisation ops run our kernel.

The ops keep their names, so that vLLM's MoE layers and fused passes, which call or match them, profit too. vLLM's own
kernel stays behind for the arguments that ours does not take.
"""

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.features import FeatureUnavailable, NotForThisPlatform
from vllm_b200_plugin.integration import library, op_override, report
from vllm_b200_plugin.ops import _library

# dispatch key -> namespace whose ops are ours for that key
_overridden: dict[str, str] = {}


def apply() -> None:
    """Override the ops for CUDA, once. Raises FeatureUnavailable where that cannot be done."""
    platform = vllm_compat.CURRENT_PLATFORM.get()
    if not platform.is_cuda():
        raise NotForThisPlatform(f"for CUDA, vLLM runs on {platform.device_name}")
    library.require()
    override("_C", "CUDA")


def override(namespace: str, dispatch_key: str) -> None:
    """Put ours before the kernels that the three ops in `namespace` have for `dispatch_key`.

    Raises FeatureUnavailable, with nothing changed, where an op is missing or has other arguments than we know.
    """
    if _overridden.get(dispatch_key) == namespace:
        return
    originals = {
        name: op_override.original(namespace, name, dispatch_key, arguments)
        for name, arguments in vllm_compat.QUANT_OPS.items()
    }
    if dispatch_key in _overridden:
        raise FeatureUnavailable(f"the ops of {_overridden[dispatch_key]} are ours for {dispatch_key} already")
    for name, (kernel, signature) in originals.items():
        op_override.keep(name, kernel, signature, dispatch_key)
    _library.override_quant_ops(namespace, dispatch_key)
    _overridden[dispatch_key] = namespace
    report.chosen("per-token-group quantisation ops", "our kernel", "vLLM's for arguments that ours does not take")
