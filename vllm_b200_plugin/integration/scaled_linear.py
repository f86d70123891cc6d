"""What the features fp8_linear and int8_linear share: a class of ours before vLLM's CUTLASS one, for few tokens."""

from vllm_b200_plugin import dispatch, vllm_compat
from vllm_b200_plugin.features import NotForThisPlatform
from vllm_b200_plugin.integration import library
from vllm_b200_plugin.ops.small_m_gemm import Config


def refusal(cutlass: type) -> str | None:
    """Why a class of ours, in place of vLLM's class `cutlass`, takes no layer at all; None where it may."""
    if vllm_compat.is_disabled(cutlass):
        return f"VLLM_DISABLED_KERNELS names {cutlass.__name__}, which this is in place of"
    if vllm_compat.ENVS.get().VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT rules out a choice by the number of tokens"
    return None


def config(kind: str, num_tokens: int, shape: tuple[int, ...]) -> Config | None:
    """How our GEMM cuts a weight of `shape`, (N, K), for so many tokens; None where CUTLASS takes them."""
    if not 0 < num_tokens < dispatch.SMALL_M_BELOW:
        return None
    few = dispatch.small_m_gemm(kind, num_tokens, shape[0], shape[1], library.capability())
    return Config(*few.config) if few.kernel == dispatch.SMALL_M else None


def choice(kind: str, cutlass: type, shape: tuple[int, int], num_tokens: int) -> dispatch.Choice:
    """What a layer with a weight of `shape`, (N, K), runs for so many tokens."""
    few = dispatch.small_m_gemm(kind, num_tokens, *shape, library.capability())
    return dispatch.Choice(few.kernel if few.kernel == dispatch.SMALL_M else cutlass.__name__, few.reason)


def put_before(cutlass: type, ours: type, kernels: vllm_compat.Private) -> None:
    """Put our class before `cutlass` in vLLM's list for CUDA and beside it for --linear-backend, once.

    Raises FeatureUnavailable where there is nothing to run it.
    """
    platform = vllm_compat.CURRENT_PLATFORM.get()
    if not platform.is_cuda():
        raise NotForThisPlatform(f"for CUDA, vLLM runs on {platform.device_name}")
    library.require()
    found = kernels.get()[vllm_compat.PLATFORM_ENUM.get().CUDA]
    if ours not in found:
        found.insert(found.index(cutlass) if cutlass in found else 0, ours)
    vllm_compat.LINEAR_BACKENDS.get().setdefault("cutlass", set()).add(ours)
