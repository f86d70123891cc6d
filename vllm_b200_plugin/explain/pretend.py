"""Makes vLLM's CUDA build believe that it runs on a GPU of some compute capability.

For a process of its own that imports nothing of vLLM before. The real extension modules are loaded, so vLLM's questions
to them are answered by them; no device is ever asked for anything.
"""

import os
import sys
from types import SimpleNamespace
from typing import Any

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.explain.gpus import Gpu

_COMMUNICATOR = "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"


def load_lazily() -> None:
    """Bind the functions of extension modules when they are called: what a stand-in lacks is then no error."""
    sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_LOCAL)


def pretend(gpu: Gpu, ranks: int) -> None:
    """`ranks` GPUs of this kind, for torch.cuda and for vLLM's platform."""
    import torch

    base: Any = vllm_compat.CUDA_PLATFORM.get()
    capability = vllm_compat.DEVICE_CAPABILITY.get()(*gpu.capability)

    class Pretended(base):
        get_device_capability = classmethod(lambda cls, device_id=0: capability)
        get_device_name = classmethod(lambda cls, device_id=0: gpu.name)
        get_device_total_memory = classmethod(lambda cls, device_id=0: gpu.memory)
        num_compute_units = classmethod(lambda cls, device_id=0: gpu.sms)
        is_fully_connected = classmethod(lambda cls, device_ids: True)
        device_count = classmethod(lambda cls: ranks)
        is_arch_support_pdl = classmethod(lambda cls: True)
        get_device_communicator_cls = classmethod(lambda cls: _COMMUNICATOR)

    vllm_compat.PLATFORMS.get()._current_platform = Pretended()
    properties = SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        multi_processor_count=gpu.sms,
        total_memory=gpu.memory,
        shared_memory_per_block_optin=101376 if gpu.capability[0] == 12 else 232448,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        L2_cache_size=gpu.l2,
        is_integrated=False,
    )
    answers: dict[str, Any] = {
        "get_device_properties": properties,
        "get_device_capability": gpu.capability,
        "get_device_name": gpu.name,
        "current_device": 0,
        "device_count": ranks,
        "is_available": True,
        "is_initialized": False,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.accelerator.empty_cache = lambda: None
    torch.cuda.Stream = torch.cuda.Event = _Placeholder
    if torch.version.cuda is None:  # a CPU build of torch; vLLM and FlashInfer ask which CUDA it is for
        torch.version.cuda = "13.0"


def assume_deep_gemm() -> None:
    """Let vLLM have the DeepGEMM that it brings, whose compiled part may not load without a driver."""
    import vllm.utils.deep_gemm as deep_gemm
    import vllm.utils.import_utils as import_utils

    if vllm_compat.HAS_MODULE.get()("vllm.third_party.deep_gemm"):
        import_utils.has_deep_gemm = deep_gemm.has_deep_gemm = lambda: True
    # It would start its compiler for the device at hand. What selection asks of it is whether it is there.
    deep_gemm._lazy_init = lambda: None
    deep_gemm._fp8_gemm_nt_impl = deep_gemm._fp8_gemm_nt_impl or _no_kernel


def assume_library(gpu: Gpu) -> str:
    """Let our features find a CUDA library with code for this GPU; in words what was assumed, empty where it is so."""
    import dataclasses

    from vllm_b200_plugin.ops import _library

    status = _library.status()
    if status.covers(gpu.capability):
        return ""
    arch = f"{gpu.capability[0]}{gpu.capability[1]}a"
    built = f"is built for {', '.join(status.archs)}" if status.loaded else "was not built"
    pretended = dataclasses.replace(status, loaded=True, reason="", archs=(*status.archs, arch))
    _library.status = lambda: pretended  # type: ignore[assignment]
    if not status.loaded:
        _library.override_op = lambda namespace, op, dispatch_key: None
    return f"the plugin's CUDA library {built}; the table is for one with {arch}"


class _Placeholder:
    """For streams and events, which layers make and only a step uses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


def _no_kernel(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("explain runs no kernel")


def to_meta() -> Any:
    """A torch mode in which what asks for a CUDA device gets tensors without data."""
    import torch
    from torch.overrides import TorchFunctionMode

    class CudaToMeta(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                kwargs["device"] = "meta"
            return function(*args, **kwargs)

    return CudaToMeta()
