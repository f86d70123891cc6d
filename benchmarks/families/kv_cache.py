"""Writing to a paged KV cache: ours, vLLM's CUDA ops, its Triton kernel, and indexed assignment in PyTorch.

The cache lies as vLLM 0.32 lays it out for FlashAttention, [block, token, head, key and value], or for MLA
[block, token, latent and rotary part].
"""

from collections.abc import Callable
from typing import Any

import torch

import vllm_b200_plugin.ops.cache  # noqa: F401 - defines the ops
from benchmarks import families
from benchmarks.cases.kv_cache import BLOCK_SIZE, HEAD_SIZE, LATENT_SIZE, KvCacheCase, benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families._common import E4M3, E4M3_MAX, generator, normal, peer, verdict

OP = "kv_cache"
FP8_SCALE = 0.5  # a power of two: the division is exact, whoever does it
cases = benchmarks


def record(case: KvCacheCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": None,
        "k": case.width,
        "dtype": case.dtype_name,
        "layout": case.layout_name,
        "bytes": case.num_bytes,
        "flops": 0,
    }


def _inputs(case: KvCacheCase, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values [num_tokens, num_heads, head_size], or latents and rotary parts; distinct slots [num_tokens]."""
    rng = generator(seed)
    if case.num_heads is None:
        shapes: tuple[tuple[int, ...], ...] = (
            (case.num_tokens, LATENT_SIZE),
            (case.num_tokens, case.width - LATENT_SIZE),
        )
    else:
        shapes = ((case.num_tokens, case.num_heads, HEAD_SIZE),) * 2
    first, second = (normal(shape, rng) for shape in shapes)
    slots = torch.randperm(case.num_blocks * BLOCK_SIZE, generator=rng, device=families.device)[: case.num_tokens]
    return first, second, slots.contiguous()


def _cache(case: KvCacheCase) -> torch.Tensor:
    inner = (case.width,) if case.num_heads is None else (case.num_heads, 2 * HEAD_SIZE)
    dtype = torch.uint8 if case.fp8 else torch.bfloat16
    return torch.empty(case.num_blocks, BLOCK_SIZE, *inner, dtype=dtype, device=families.device)


def _scale(case: KvCacheCase) -> torch.Tensor:
    return torch.full((1,), FP8_SCALE if case.fp8 else 1.0, device=families.device)


def ours(case: KvCacheCase, seed: int, pdl: bool = True) -> Run:
    first, second, slots = _inputs(case, seed)
    cache, scale, ops = _cache(case), _scale(case), torch.ops.vllm_b200
    if case.num_heads is None:
        return Run(lambda: ops.concat_and_cache_mla(first, second, cache, slots, scale, pdl), (cache,))
    keys, values = cache.split(HEAD_SIZE, dim=-1)
    return Run(lambda: ops.reshape_and_cache_flash(first, second, keys, values, slots, scale, scale, pdl), (cache,))


def ours_no_pdl(case: KvCacheCase, seed: int) -> Run:
    return ours(case, seed, pdl=False)


def vllm(case: KvCacheCase, seed: int) -> Run:
    name = "concat_and_cache_mla" if case.num_heads is None else "reshape_and_cache_flash"
    return _vllm_call(case, seed, peer("vllm._custom_ops", name))


def vllm_triton(case: KvCacheCase, seed: int) -> Run:
    if case.num_heads is None:
        raise Missing("vLLM's Triton kernel writes keys and values, no MLA latents")
    module = "vllm.v1.attention.ops.triton_reshape_and_cache_flash"
    return _vllm_call(case, seed, peer(module, "triton_reshape_and_cache_flash"))


def _vllm_call(case: KvCacheCase, seed: int, op: Callable[..., object]) -> Run:
    first, second, slots = _inputs(case, seed)
    cache, scale, kind = _cache(case), _scale(case), "fp8" if case.fp8 else "auto"
    if case.num_heads is None:
        return Run(lambda: op(first, second, cache, slots, kind, scale), (cache,))
    keys, values = cache.split(HEAD_SIZE, dim=-1)
    return Run(lambda: op(first, second, keys, values, slots, kind, scale, scale), (cache,))


def torch_index(case: KvCacheCase, seed: int) -> Run:
    first, second, slots = _inputs(case, seed)
    cache, scale = _cache(case), _scale(case)
    left, right = cache.flatten(0, 1).split((first.shape[-1], second.shape[-1]), dim=-1)

    def call() -> None:
        left[slots] = _stored(first, case, scale)
        right[slots] = _stored(second, case, scale)

    return Run(call, (cache,))


def _stored(x: torch.Tensor, case: KvCacheCase, scale: torch.Tensor) -> torch.Tensor:
    if not case.fp8:
        return x
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).view(torch.uint8)


IMPLEMENTATIONS: dict[str, Callable[[KvCacheCase, int], Run]] = {
    "ours": ours,
    "ours_no_pdl": ours_no_pdl,
    "vllm": vllm,
    "vllm_triton": vllm_triton,
    "torch": torch_index,
}


def check(case: KvCacheCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    """Right when the slots hold the values bit by bit, and all others what the cache was poisoned with."""
    first, second, slots = _inputs(case, seed)
    expected = torch.full_like(outputs[0].view(torch.uint8), 0xFF).view(outputs[0].dtype)
    stored = [_stored(x, case, _scale(case)) for x in (first, second)]
    expected.flatten(0, 1)[slots] = torch.cat(stored, dim=-1)
    wrong = int((outputs[0].view(torch.uint8) != expected.view(torch.uint8)).sum())
    return verdict(wrong / expected.nbytes, 1e-30, bit_exact=wrong == 0)
