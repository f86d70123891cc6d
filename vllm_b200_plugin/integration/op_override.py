"""Standing in for a compiled op of vLLM's: the op keeps its name, its kernel stays callable under another."""

import re
from typing import Any

import torch

from vllm_b200_plugin.features import FeatureUnavailable
from vllm_b200_plugin.integration import report
from vllm_b200_plugin.ops import _library


def original(namespace: str, name: str, dispatch_key: str, known: tuple[str, ...]) -> tuple[Any, str]:
    """vLLM's kernel of an op, and the op's signature as a schema has it.

    known: the argument names that our stand-in takes. Raises FeatureUnavailable where the op is missing, has other
    arguments or no kernel for dispatch_key.
    """
    if not hasattr(torch.library, "get_kernel"):
        raise FeatureUnavailable(f"torch {torch.__version__} lacks torch.library.get_kernel, to keep vLLM's kernel by")
    try:
        schema = getattr(getattr(torch.ops, namespace), name).default._schema
    except AttributeError as error:
        raise FeatureUnavailable(f"this vLLM has no op {namespace}::{name}") from error
    arguments = tuple(argument.name for argument in schema.arguments)
    if arguments != known:
        raise FeatureUnavailable(f"{namespace}::{name} takes ({', '.join(arguments)}) in this vLLM, which is new to us")
    try:
        kernel = torch.library.get_kernel(f"{namespace}::{name}", dispatch_key)
    except RuntimeError as error:
        raise FeatureUnavailable(f"{namespace}::{name} has no kernel for {dispatch_key}: {error}") from error
    # `Tensor!`, a written argument without a name for its alias, is printed in a form that no schema takes.
    signature = re.sub(r"\(\$(\d+)! -> \)", r"(written\1!)", str(schema).removeprefix(f"{namespace}::{name}"))
    return kernel, signature


def keep(name: str, kernel: Any, signature: str, dispatch_key: str) -> None:
    """Make vLLM's kernel callable as vllm_b200::vllm_<name>: ours calls that for arguments it does not take."""
    kept = f"vllm_{name}"
    if not hasattr(torch.ops.vllm_b200, kept):
        _library.torch_library.define(kept + signature)

    def call(keyset: Any, *args: Any) -> Any:
        report.chosen(name, "vLLM's kernel", "called with arguments that ours does not take")
        return kernel.call_boxed(keyset, *args)

    _library.torch_library.impl(kept, call, dispatch_key, with_keyset=True)
