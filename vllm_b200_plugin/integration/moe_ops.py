"""Standing in for the compiled ops by which vLLM routes tokens to experts: each keeps its name and, for the arguments
that ours does not take, its kernel. So every model and every experts class profits."""

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.features import FeatureUnavailable, NotForThisPlatform
from vllm_b200_plugin.integration import library, op_override, report
from vllm_b200_plugin.ops import _library

# (name, dispatch key) -> namespace whose op is ours for that key
_overridden: dict[tuple[str, str], str] = {}


def apply(names: tuple[str, ...]) -> None:
    """Override these ops for CUDA, once. Raises FeatureUnavailable where that cannot be done."""
    platform = vllm_compat.CURRENT_PLATFORM.get()
    if not platform.is_cuda():
        raise NotForThisPlatform(f"for CUDA, vLLM runs on {platform.device_name}")
    library.require()
    override(names, "_moe_C", "CUDA")


def override(names: tuple[str, ...], namespace: str, dispatch_key: str) -> None:
    """Put ours before the kernels that these ops in `namespace` have for `dispatch_key`.

    Raises FeatureUnavailable, with nothing changed, where an op is missing or has other arguments than we know.
    """
    names = tuple(name for name in names if _overridden.get((name, dispatch_key)) != namespace)
    for name in names:
        if (name, dispatch_key) in _overridden:
            raise FeatureUnavailable(f"{name} of {_overridden[name, dispatch_key]} is ours for {dispatch_key} already")
    originals = {name: op_override.original(namespace, name, dispatch_key, vllm_compat.MOE_OPS[name]) for name in names}
    for name, (kernel, signature) in originals.items():
        op_override.keep(name, kernel, signature, dispatch_key)
        _library.override_moe_op(namespace, name, dispatch_key)
        _overridden[name, dispatch_key] = namespace
        report.chosen(name, "our kernel", "vLLM's for arguments that ours does not take")
