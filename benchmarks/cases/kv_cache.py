"""Cases of writing keys and values, or MLA's latents, into a paged KV cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

BLOCK_SIZE = 16
NUM_TOKENS = (1, 16, 256, 4096, 16384)
NUM_HEADS = (4, 8)  # Qwen3-30B-A3B, Llama-3.1-8B
HEAD_SIZE = 128
LATENT_SIZE, ROPE_SIZE = 512, 64  # DeepSeek-V3


@dataclass(frozen=True)
class KvCacheCase:
    num_tokens: int
    num_heads: int | None = None  # None for MLA: one latent and one rotary part a token
    fp8: bool = False

    def __str__(self) -> str:
        return f"{self.num_tokens}-{self.layout_name}-{self.dtype_name}"

    @property
    def layout_name(self) -> str:
        return "mla" if self.num_heads is None else f"{self.num_heads}x{HEAD_SIZE}"

    @property
    def dtype_name(self) -> str:
        return "e4m3" if self.fp8 else "bf16"

    @property
    def width(self) -> int:
        """Elements that one token puts into the cache."""
        return LATENT_SIZE + ROPE_SIZE if self.num_heads is None else 2 * self.num_heads * HEAD_SIZE

    @property
    def num_blocks(self) -> int:
        return self.num_tokens // BLOCK_SIZE + 64

    @property
    def num_bytes(self) -> int:
        """bf16 in, the cache's elements out, and a 64-bit slot for every token."""
        return self.num_tokens * (self.width * (3 if self.fp8 else 4) + 8)


@dataclass(frozen=True)
class CacheLayoutCase:
    """A cache in one of vLLM's layouts, for the tests. num_heads 0: MLA, with head_size latents and ROPE_SIZE more."""

    num_tokens: int
    num_heads: int = 8
    head_size: int = 128
    value_size: int | None = None  # head size of the values where it differs
    block_size: int = 16
    layout: str = "combined"  # [B, H, N, 2 * D]; or "nhd", "hnd": two tensors
    dtype: torch.dtype = torch.uint8
    input_dtype: torch.dtype = torch.bfloat16
    per_head: bool = False
    extra_tokens: int = 0  # rows of key and value beyond the slots

    def __str__(self) -> str:
        values = f"+{self.value_size}" if self.value_size else ""
        dtypes = f"{str(self.input_dtype)[6:]}-{str(self.dtype)[6:]}"
        return (
            f"{self.num_tokens}+{self.extra_tokens}-{self.num_heads}x{self.head_size}{values}-b{self.block_size}-"
            f"{self.layout}-{dtypes}" + ("-per_head" if self.per_head else "")
        )


def tests() -> Iterator[CacheLayoutCase]:
    half = torch.float16
    for input_dtype, layout, fp8 in product((torch.bfloat16, half), ("combined", "nhd", "hnd"), (False, True)):
        dtype = torch.uint8 if fp8 else input_dtype
        yield CacheLayoutCase(9, 4, layout=layout, dtype=dtype, input_dtype=input_dtype, per_head=fp8)
        yield CacheLayoutCase(300, 2, layout=layout, dtype=dtype, input_dtype=input_dtype)
    for head_size, dtype in product((64, 80, 96, 192, 256, 576), (torch.uint8, torch.bfloat16)):
        yield CacheLayoutCase(5, 3, head_size, dtype=dtype, extra_tokens=3)
    for dtype in (torch.float8_e4m3fn, torch.bfloat16):
        yield CacheLayoutCase(7, 1, block_size=784, dtype=dtype)
        yield CacheLayoutCase(7, 5, 192, 128, layout="nhd", dtype=dtype)
        yield CacheLayoutCase(1, 0, LATENT_SIZE, dtype=dtype)
        yield CacheLayoutCase(400, 0, LATENT_SIZE, block_size=64, dtype=dtype)
        yield CacheLayoutCase(3000, 8, 128, dtype=dtype)


def benchmarks() -> Iterator[KvCacheCase]:
    for num_tokens, num_heads, fp8 in product(NUM_TOKENS, (*NUM_HEADS, None), (False, True)):
        yield KvCacheCase(num_tokens, num_heads, fp8)
