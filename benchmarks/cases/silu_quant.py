"""Cases of silu_and_mul followed by quantisation in groups of 128."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from vllm_b200_plugin.ops.quant import ScaleLayout

# Experts of Qwen3-30B-A3B, experts of DeepSeek-V3, Llama-3.1-8B.
INTERMEDIATE_SIZES = (768, 2048, 14336)
NUM_TOKENS = (1, 8, 16, 128, 1024, 8192)
LAYOUTS = (ScaleLayout.ROW, ScaleLayout.COLUMN, ScaleLayout.PACKED_UE8M0)


@dataclass(frozen=True)
class SiluQuantCase:
    num_tokens: int
    intermediate_size: int
    layout: ScaleLayout = ScaleLayout.ROW

    def __str__(self) -> str:
        return f"{self.num_tokens}x{self.intermediate_size}-{self.layout.value}"

    @property
    def num_bytes(self) -> int:
        """Both bf16 halves in, one byte an element out, and the scales."""
        elements = self.num_tokens * self.intermediate_size
        return 5 * elements + elements // 128 * (1 if self.layout is ScaleLayout.PACKED_UE8M0 else 4)


def benchmarks() -> Iterator[SiluQuantCase]:
    for num_tokens, intermediate_size, layout in product(NUM_TOKENS, INTERMEDIATE_SIZES, LAYOUTS):
        yield SiluQuantCase(num_tokens, intermediate_size, layout)
