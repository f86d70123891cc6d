"""Cases of writing keys and values, or MLA's latents, into a paged KV cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

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


def benchmarks() -> Iterator[KvCacheCase]:
    for num_tokens, num_heads, fp8 in product(NUM_TOKENS, (*NUM_HEADS, None), (False, True)):
        yield KvCacheCase(num_tokens, num_heads, fp8)
