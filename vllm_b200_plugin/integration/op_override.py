"""Standing in for compiled ops of vLLM's: ours before theirs, theirs kept for the arguments that ours do not take.

The ops keep their names, so that vLLM's layers and fused passes, which call or match them, profit without knowing.
csrc/torch/vllm_*_ops.cpp has ours.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.features import FeatureUnavailable, NotForThisPlatform
from vllm_b200_plugin.integration import library, report
from vllm_b200_plugin.ops import _library

# (op, dispatch key) -> namespace whose op is ours for that key
_overridden: dict[tuple[str, str], str] = {}


@dataclass(frozen=True)
class Original:
    """vLLM's kernel of an op, and the op's arguments as a schema has them."""

    kernel: Any
    schema: str


def require_cuda() -> None:
    """Raises FeatureUnavailable where vLLM does not run on CUDA, or our library does not."""
    platform = vllm_compat.CURRENT_PLATFORM.get()
    if not platform.is_cuda():
        raise NotForThisPlatform(f"for CUDA, vLLM runs on {platform.device_name}")
    library.require()


def override(ops: Mapping[str, tuple[str, ...]], namespace: str, dispatch_key: str, what: str) -> None:
    """Put ours before the kernels that the ops in `namespace` have for `dispatch_key`, once.

    Args:
        ops: op -> its arguments as we know them.
        what: the ops in words, for the report.

    An op that this vLLM lacks, or that takes other arguments, keeps its kernel. Raises FeatureUnavailable where that is
    so for all of them.
    """
    refusals, taken = [], []
    for name, arguments in ops.items():
        if _overridden.get((name, dispatch_key)) == namespace:
            taken.append(name)
            continue
        try:
            theirs = original(namespace, name, arguments, dispatch_key)
            if elsewhere := _overridden.get((name, dispatch_key)):
                raise FeatureUnavailable(f"{elsewhere}::{name} is ours for {dispatch_key} already")
            keep(name, theirs, dispatch_key)
        except FeatureUnavailable as error:
            refusals.append(str(error))
            continue
        _library.override_op(namespace, name, dispatch_key)
        _overridden[name, dispatch_key] = namespace
        taken.append(name)
    if not taken:
        raise FeatureUnavailable("; ".join(refusals))
    reason = "; ".join(["vLLM's for arguments that ours does not take", *refusals])
    report.chosen(what, "our kernels", reason)


def original(namespace: str, name: str, arguments: tuple[str, ...], dispatch_key: str) -> Original:
    """vLLM's kernel of an op. Raises FeatureUnavailable where it is missing or takes other arguments than these."""
    if not hasattr(torch.library, "get_kernel"):
        raise FeatureUnavailable(f"torch {torch.__version__} lacks torch.library.get_kernel, to keep vLLM's kernel by")
    try:
        schema = getattr(getattr(torch.ops, namespace), name).default._schema
    except AttributeError as error:
        raise FeatureUnavailable(f"this vLLM has no op {namespace}::{name}") from error
    found = tuple(argument.name for argument in schema.arguments)
    if found != arguments:
        raise FeatureUnavailable(f"{namespace}::{name} takes ({', '.join(found)}) in this vLLM, which is new to us")
    try:
        kernel = torch.library.get_kernel(f"{namespace}::{name}", dispatch_key)
    except RuntimeError as error:
        raise FeatureUnavailable(f"{namespace}::{name} has no kernel for {dispatch_key}: {error}") from error
    # `Tensor! x` is written as `Tensor($0! -> ) x`, which torch does not read back.
    signature = re.sub(r"\(\$(\d+)! -> \)", lambda m: f"(a{m[1]}!)", str(schema).removeprefix(f"{namespace}::{name}"))
    return Original(kernel, signature)


def keep(name: str, original: Original, dispatch_key: str) -> None:
    """Make vLLM's kernel callable as vllm_b200::vllm_<name>: ours calls that for arguments it does not take."""
    kept = f"vllm_{name}"
    if not hasattr(torch.ops.vllm_b200, kept):
        _library.torch_library.define(kept + original.schema)

    def call(keyset: Any, *args: Any) -> Any:
        report.chosen(name, "vLLM's kernel", "called with arguments or sizes that ours does not take")
        return original.kernel.call_boxed(keyset, *args)

    _library.torch_library.impl(kept, call, dispatch_key, with_keyset=True)
