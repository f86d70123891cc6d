"""Writing keys and values, or MLA's latents, into a paged KV cache.

The arithmetic and the arguments are those of vLLM's `reshape_and_cache_flash` and `concat_and_cache_mla`: a 16-bit
cache takes the bits as they are, an FP8 cache e4m3(x / scale), to nearest even, saturating, NaN to 0x7f.
"""

import torch

from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops._library import torch_library
from vllm_b200_plugin.ops.token_quant import to_e4m3

INPUT_DTYPES = (torch.bfloat16, torch.float16)
FP8_DTYPES = (torch.uint8, torch.float8_e4m3fn)


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Put the keys and values of the first len(slot_mapping) tokens into their slots.

    Args:
        key, value: [num_tokens, num_heads, head_size] bf16 or fp16; head sizes are multiples of 16, and may differ.
        key_cache, value_cache: [num_blocks, block_size, num_heads, head_size] of any strides (NHD, HND, halves of one
            tensor) with a last stride of 1, in the dtype of key, or uint8 or float8_e4m3fn for e4m3. Every head of
            these four begins at a multiple of 16 bytes.
        slot_mapping: [num_slots <= num_tokens] int64, block * block_size + place; a negative one is skipped. Which
            slots exist is not checked.
        k_scale, v_scale: for e4m3 one float32, or one a head.
        pdl: launch with programmatic stream serialization, see `per_token_group_quant`.

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    for name, source, cache, scale in (("key", key, key_cache, k_scale), ("value", value, value_cache, v_scale)):
        if source.dim() != 3:
            raise ValueError(f"{name}: takes [num_tokens, num_heads, head_size], got {tuple(source.shape)}")
        if cache.dim() != 4 or cache.shape[:2] != key_cache.shape[:2] or cache.shape[2:] != source.shape[1:]:
            raise ValueError(
                f"{name}_cache: takes [num_blocks, block_size, {source.shape[1]}, {source.shape[2]}], got "
                f"{tuple(cache.shape)}"
            )
        _check(name, source, cache, scale, slot_mapping, source.shape[1])
    torch.ops.vllm_b200.reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale, pdl)


def concat_and_cache_mla(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    scale: torch.Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Put the latent and the rotary part of the first len(slot_mapping) tokens side by side into their slots.

    Args:
        kv_c, k_pe: [num_tokens, kv_lora_rank] and [num_tokens, pe_dim] bf16 or fp16, both sizes multiples of 16.
        kv_cache: [num_blocks, block_size, kv_lora_rank + pe_dim], last stride 1, in the dtype of kv_c, or uint8 or
            float8_e4m3fn for e4m3. Rows of these begin at multiples of 16 bytes.
        slot_mapping, pdl: as for `reshape_and_cache_flash`.
        scale: for e4m3 one float32.

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    for name, source in (("kv_c", kv_c), ("k_pe", k_pe)):
        if source.dim() != 2:
            raise ValueError(f"{name}: takes 2 dimensions, got {tuple(source.shape)}")
        _check(name, source, kv_cache, scale, slot_mapping, 1)
    width = kv_c.shape[1] + k_pe.shape[1]
    if kv_cache.dim() != 3 or kv_cache.shape[2] != width:
        raise ValueError(f"kv_cache: takes [num_blocks, block_size, {width}], got {tuple(kv_cache.shape)}")
    torch.ops.vllm_b200.concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping, scale, pdl)


def _check(
    name: str, source: torch.Tensor, cache: torch.Tensor, scale: torch.Tensor, slots: torch.Tensor, num_heads: int
) -> None:
    if source.dtype not in INPUT_DTYPES:
        raise ValueError(f"{name}: takes bfloat16 or float16, got {source.dtype}")
    if source.shape[-1] % 16:
        raise ValueError(f"{name}: takes head sizes that are multiples of 16, got {source.shape[-1]}")
    if cache.dtype != source.dtype and cache.dtype not in FP8_DTYPES:
        raise ValueError(f"cache of {name}: takes {source.dtype}, uint8 or float8_e4m3fn, got {cache.dtype}")
    if slots.dim() != 1 or slots.dtype != torch.int64 or slots.shape[0] > source.shape[0]:
        raise ValueError(
            f"slot_mapping: takes int64 of up to {source.shape[0]} tokens, got {slots.dtype} {tuple(slots.shape)}"
        )
    if cache.dtype != source.dtype and (scale.dtype != torch.float32 or scale.numel() not in (1, num_heads)):
        raise ValueError(f"scale of {name}: takes 1 or {num_heads} float32, got {scale.dtype} {tuple(scale.shape)}")
    for what, tensor in ((name, source), (f"cache of {name}", cache)):
        strides = [
            s * tensor.element_size() for n, s in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if n > 1
        ]
        if tensor.numel() and (tensor.stride(-1) != 1 or tensor.data_ptr() % 16 or any(s % 16 for s in strides)):
            raise ValueError(
                f"{what}: takes a last stride of 1 and heads at multiples of 16 bytes, got strides {tensor.stride()} "
                f"at offset {tensor.storage_offset()}"
            )


torch_library.define(
    "reshape_and_cache_flash(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor slot_mapping, Tensor k_scale, Tensor v_scale, bool pdl=False) -> ()"
)
torch_library.define(
    "concat_and_cache_mla(Tensor kv_c, Tensor k_pe, Tensor(a!) kv_cache, Tensor slot_mapping, Tensor scale, "
    "bool pdl=False) -> ()"
)


def _fake(*args: object) -> None:
    return None


for _name in ("reshape_and_cache_flash", "concat_and_cache_mla"):
    torch.library.register_fake(f"vllm_b200::{_name}", _fake, lib=torch_library)


@torch.library.impl(torch_library, "reshape_and_cache_flash", "CPU")
def _reshape_and_cache_flash_cpu(
    key: torch.Tensor, value: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor,
    slot_mapping: torch.Tensor, k_scale: torch.Tensor, v_scale: torch.Tensor, pdl: bool = False,
) -> None:  # fmt: skip
    for source, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        _write(source, cache, slot_mapping, scale.view(-1, 1))


@torch.library.impl(torch_library, "concat_and_cache_mla", "CPU")
def _concat_and_cache_mla_cpu(
    kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor, scale: torch.Tensor,
    pdl: bool = False,
) -> None:  # fmt: skip
    latents, rotary = kv_cache.split((kv_c.shape[1], k_pe.shape[1]), dim=-1)
    for source, cache in ((kv_c, latents), (k_pe, rotary)):
        _write(source, cache, slot_mapping, scale.view(-1))


def _write(source: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor) -> None:
    kept = (slots >= 0).nonzero().squeeze(-1)
    blocks, places = slots[kept] // cache.shape[1], slots[kept] % cache.shape[1]
    rows = source[kept]
    if cache.dtype != source.dtype:
        stored = torch.empty(rows.shape, dtype=torch.float8_e4m3fn)
        to_e4m3(rows.float() / scale, stored)
        rows, cache = stored.view(torch.uint8), cache.view(torch.uint8)
    cache[blocks, places] = rows


_library.status()
