"""What every feature with a CUDA kernel needs."""

import functools

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.features import FeatureUnavailable
from vllm_b200_plugin.ops import _library


def require() -> None:
    """Raises FeatureUnavailable, with what to do, where our CUDA library is missing or not for this GPU."""
    status = _library.status()
    if not status.loaded:
        raise FeatureUnavailable(status.reason)
    capability = vllm_compat.capability()
    if capability is not None and not status.covers(capability):
        raise FeatureUnavailable(
            f"the CUDA library has code for {', '.join(status.archs)}, this GPU is {capability[0]}.{capability[1]}"
        )


@functools.cache
def capability() -> tuple[int, int]:
    """vllm_compat.capability(), asked once in a process; (0, 0) on other platforms."""
    return vllm_compat.capability() or (0, 0)
