"""Feature nvfp4_moe_few_tokens: the same for NVFP4 experts whose activations stay bf16, as on Hopper.

Marlin wants the weights in a layout of its own, ours in another: a layer that ours take for some number of tokens keeps
both, 0.5625 bytes more for each of its weights. Ours is made just before vLLM converts what was loaded. Where
humming-kernels is installed, vLLM prefers those to Marlin on Hopper. They were not timed beside ours, which stay behind
them: --moe-backend marlin makes room.
"""

import functools
import inspect
import sys
from typing import Any

import torch

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.integration.moe_few_tokens import (
    KEPT,
    B200FewTokensExperts,
    allow,
    choice,
    refusal_before_loading,
    require,
    subclass_of,
)
from vllm_b200_plugin.ops.moe_few_tokens import ExpertFormat
from vllm_b200_plugin.ops.nvfp4_experts import pack_w2, pack_w13

__all__ = ["apply", "choice", "keep"]


def apply() -> None:
    """Put our class in place of Marlin's, once, and let layers keep their weights for it."""
    require()
    backends, experts = vllm_compat.NVFP4_MOE_BACKENDS.get(), vllm_compat.NVFP4_MOE_EXPERTS.get()
    convert = vllm_compat.NVFP4_MOE_CONVERT.get()
    vllm_compat.MOE_QUANTIZE_INPUT.get()
    allow(ExpertFormat.NVFP4)
    if getattr(experts, "_vllm_b200", False):
        return
    signature = inspect.signature(convert)

    def classes(backend: Any) -> list[type]:
        found = experts(backend)
        return [subclass_of(cls, False, True) for cls in found] if backend == backends.MARLIN else found

    @functools.wraps(convert)
    def keep_and_convert(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        names = (f"{part}{suffix}" for part in ("w13", "w2") for suffix in ("", "_scale", "_scale_2"))
        keep(given["layer"], *(given[name].detach() for name in names))
        return convert(*args, **kwargs)

    classes._vllm_b200 = True  # type: ignore[attr-defined]
    vllm_compat.NVFP4_MOE_EXPERTS.replace(classes)
    vllm_compat.NVFP4_MOE_CONVERT.replace(keep_and_convert)
    name = vllm_compat.NVFP4_MOE_CONVERT.attribute
    for module in list(sys.modules.values()):  # those that have imported it already
        if getattr(module, "__dict__", {}).get(name) is convert:
            setattr(module, name, keep_and_convert)


def keep(
    layer: Any, w13: torch.Tensor, w13_scale: torch.Tensor, w13_factor: torch.Tensor, w2: torch.Tensor,
    w2_scale: torch.Tensor, w2_factor: torch.Tensor,
) -> None:  # fmt: skip
    """Give a layer of ours, as it was loaded, our copy of its weights, where ours take it. Others stay as they are.

    w13_factor, w2_factor: [num_experts], what the values are multiplied by.
    """
    method: Any = getattr(layer, "quant_method", None)
    experts = getattr(method, "experts_cls", None)
    if not (isinstance(experts, type) and issubclass(experts, B200FewTokensExperts)):
        return
    own: tuple[torch.Tensor | None, ...] = (None,) * len(KEPT)
    if w13.device.type == torch.device(method.moe.device).type and refusal_before_loading(method) is None:
        factors = [factor.float().clone() for factor in (w13_factor, w2_factor)]
        own = pack_w13(w13, w13_scale), factors[0], pack_w2(w2, w2_scale), factors[1]
    for name, tensor in zip(KEPT, own, strict=True):
        layer.register_buffer(name, tensor, persistent=False)
