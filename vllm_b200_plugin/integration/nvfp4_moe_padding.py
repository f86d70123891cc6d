"""Feature nvfp4_moe_padding: NVFP4 experts whose share of a tensor-parallel rank is no multiple of 64 wide.

vLLM's CUTLASS back ends and FlashInfer's take w13's scales in tiles of 128 rows. Where gate and up together are no
multiple of that, vLLM pads for TRT-LLM alone and refuses the model for the others. Here gate and up are padded each by
itself, as vLLM does for TRT-LLM, before it prepares the weights: zero rows, and zero columns of the down projection.
"""

import functools
from typing import Any

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.integration import report

_ROWS = 64  # of gate, and of up: half a tile


def apply() -> None:
    """Put our step before vLLM's preparation of the weights, once."""
    prepare = vllm_compat.NVFP4_MOE_PREPARE.get()
    trtllm = vllm_compat.NVFP4_MOE_BACKENDS.get().FLASHINFER_TRTLLM
    align = vllm_compat.NVFP4_MOE_ALIGN.get()
    if getattr(prepare, "_vllm_b200", False):
        return

    @functools.wraps(prepare)
    def padded(*, backend: Any, layer: Any, is_act_and_mul: bool, **tensors: Any) -> Any:
        if is_act_and_mul and backend != trtllm and tensors["w13"].shape[1] % (2 * _ROWS):
            names = ("w13", "w13_scale", "w2", "w2_scale")
            *found, size = align(*(tensors[name] for name in names), is_act_and_mul, _ROWS)
            before, layer.moe_config.intermediate_size_per_partition = tensors["w2"].shape[2] * 2, size
            report.chosen("NVFP4 experts", backend.value, f"gate and up padded from {before} to {size} rows each")
            tensors |= zip(names, found, strict=True)
        return prepare(backend=backend, layer=layer, is_act_and_mul=is_act_and_mul, **tensors)

    padded._vllm_b200 = True  # type: ignore[attr-defined]
    vllm_compat.NVFP4_MOE_PREPARE.replace(padded)
