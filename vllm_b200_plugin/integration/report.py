"""Says in the log which kernel each kind of layer got, and why."""

import functools
import logging

_logger = logging.getLogger("vllm.b200")


@functools.cache
def chosen(layer_kind: str, kernel: str, reason: str) -> None:
    """Log one line, once in a process for each distinct triple."""
    _logger.info("[b200] %s -> %s: %s", layer_kind, kernel, reason)
