"""Feature group_quant_ops: vLLM's per-token-group quantisation ops run our kernel.

The ops keep their names, so that vLLM's MoE layers and fused passes, which call or match them, profit too. vLLM's own
kernel stays behind for the arguments that ours does not take.
"""

import re
from typing import Any

import torch

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.features import FeatureUnavailable, NotForThisPlatform
from vllm_b200_plugin.integration import library, report
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
    if not hasattr(torch.library, "get_kernel"):
        raise FeatureUnavailable(f"torch {torch.__version__} lacks torch.library.get_kernel, to keep vLLM's kernel by")
    originals = {name: _original(namespace, name, dispatch_key) for name in vllm_compat.QUANT_OPS}
    if dispatch_key in _overridden:
        raise FeatureUnavailable(f"the ops of {_overridden[dispatch_key]} are ours for {dispatch_key} already")
    for name, (original, arguments) in originals.items():
        _keep(name, original, arguments, dispatch_key)
    _library.override_quant_ops(namespace, dispatch_key)
    _overridden[dispatch_key] = namespace
    report.chosen("per-token-group quantisation ops", "our kernel", "vLLM's for arguments that ours does not take")


def _original(namespace: str, name: str, dispatch_key: str) -> tuple[Any, str]:
    """vLLM's kernel of an op, and the op's arguments as a schema has them."""
    try:
        schema = getattr(getattr(torch.ops, namespace), name).default._schema
    except AttributeError as error:
        raise FeatureUnavailable(f"this vLLM has no op {namespace}::{name}") from error
    arguments = tuple(argument.name for argument in schema.arguments)
    if arguments != vllm_compat.QUANT_OPS[name]:
        raise FeatureUnavailable(f"{namespace}::{name} takes ({', '.join(arguments)}) in this vLLM, which is new to us")
    try:
        kernel = torch.library.get_kernel(f"{namespace}::{name}", dispatch_key)
    except RuntimeError as error:
        raise FeatureUnavailable(f"{namespace}::{name} has no kernel for {dispatch_key}: {error}") from error
    # torch prints the "Tensor!" of vLLM's schemas as "Tensor($0! -> )", which it cannot read.
    text = re.sub(r"\(\$(\d+)! -> \)", r"(a\1!)", str(schema))
    return kernel, text.removeprefix(f"{namespace}::{name}")


def _keep(name: str, original: Any, arguments: str, dispatch_key: str) -> None:
    """Make vLLM's kernel callable as vllm_b200::vllm_<name>: ours calls that for arguments it does not take."""
    kept = f"vllm_{name}"
    if not hasattr(torch.ops.vllm_b200, kept):
        _library.torch_library.define(kept + arguments)

    def call(keyset: Any, *args: Any) -> None:
        report.chosen(name, "vLLM's kernel", "called with arguments that ours does not take")
        original.call_boxed(keyset, *args)

    _library.torch_library.impl(kept, call, dispatch_key, with_keyset=True)
