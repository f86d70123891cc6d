"""Cases of quantisation with one scale per token or per tensor."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

HIDDEN_SIZES = (2048, 7168)  # Qwen3-30B-A3B, DeepSeek-V3
NUM_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)


@dataclass(frozen=True)
class TokenQuantCase:
    num_tokens: int
    hidden_size: int
    dtype: torch.dtype = torch.float8_e4m3fn
    static: bool = False  # one given scale for the tensor, instead of one per token that the op finds

    def __str__(self) -> str:
        return f"{self.num_tokens}x{self.hidden_size}-{self.dtype_name}-{'static' if self.static else 'dynamic'}"

    @property
    def dtype_name(self) -> str:
        return "int8" if self.dtype == torch.int8 else "e4m3"

    @property
    def num_bytes(self) -> int:
        """bf16 in, one byte an element out, and the scales, read or written."""
        return 3 * self.num_tokens * self.hidden_size + 4 * (1 if self.static else self.num_tokens)


def benchmarks() -> Iterator[TokenQuantCase]:
    for shape in [*product(NUM_TOKENS, HIDDEN_SIZES), (3, 640), (1001, 768)]:
        yield TokenQuantCase(*shape)
        yield TokenQuantCase(*shape, dtype=torch.int8)
        yield TokenQuantCase(*shape, static=True)
