"""Cases of RMSNorm, with or without the addition of a residual, followed by quantisation in groups of 128."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from vllm_b200_plugin.ops.quant import ScaleLayout

HIDDEN_SIZES = (2048, 4096, 7168)  # Qwen3-30B-A3B, Llama-3.1-8B, DeepSeek-V3
NUM_TOKENS = (1, 16, 128, 1024, 8192)


@dataclass(frozen=True)
class RmsNormQuantCase:
    num_tokens: int
    hidden_size: int
    residual: bool = True
    layout: ScaleLayout = ScaleLayout.ROW

    def __str__(self) -> str:
        return f"{self.num_tokens}x{self.hidden_size}-{self.layout_name}"

    @property
    def layout_name(self) -> str:
        return self.layout.value + ("_residual" if self.residual else "")

    @property
    def num_bytes(self) -> int:
        """bf16 in, one byte an element and the scales out, the weight, and the residual in and out."""
        elements = self.num_tokens * self.hidden_size
        return elements * (7 if self.residual else 3) + elements // 128 * 4 + 2 * self.hidden_size


def benchmarks() -> Iterator[RmsNormQuantCase]:
    for shape in product(NUM_TOKENS, HIDDEN_SIZES):
        yield RmsNormQuantCase(*shape)
        yield RmsNormQuantCase(*shape, layout=ScaleLayout.COLUMN_TMA)
        yield RmsNormQuantCase(*shape, residual=False)
