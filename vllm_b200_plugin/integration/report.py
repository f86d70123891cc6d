"""Says in the log which kernel each kind of layer got, and why; knows who can say so for explain."""

import functools
import logging
from collections.abc import Callable
from typing import Any

from vllm_b200_plugin.dispatch import Choice

_logger = logging.getLogger("vllm.b200")
_LINEAR_KERNELS = "vllm.model_executor.kernels.linear"

# Feature -> function of (layer, number of tokens): what the feature runs for them, and why, or None where the layer is
# not its. It is the function `choice` of the feature's integration module, and asks the rule of dispatch.py that the
# feature's op asks. The plugin registers it once the feature is applied.
choices: dict[str, Callable[[Any, int], Choice | None]] = {}


@functools.cache
def chosen(layer_kind: str, kernel: str, reason: str) -> None:
    """Log one line, once in a process for each distinct triple."""
    _logger.info("[b200] %s -> %s: %s", layer_kind, kernel, reason)


def linear_kernel(layer: Any) -> Any:
    """The object of vLLM's kernels.linear that a quantised linear layer runs, or None."""
    for owner in (getattr(layer, "quant_method", None), getattr(layer, "scheme", None)):
        for value in vars(owner).values() if hasattr(owner, "__dict__") else ():
            if any(base.__module__.startswith(_LINEAR_KERNELS) for base in type(value).__mro__):
                return value
    return None
