"""Cases of a gated activation followed by quantisation: in groups, per token or per tensor."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from vllm_b200_plugin.ops.gated_quant import ACTIVATIONS
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
    kind: str = "group"  # or "token", "tensor": one scale for each
    dtype: torch.dtype = torch.float8_e4m3fn
    group_size: int = 128
    ue8m0: bool = False
    activation: str = "silu"
    input_dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        name = f"{self.num_tokens}x{self.intermediate_size}-{self.layout_name}"
        name += "" if self.group_size == 128 else f"-g{self.group_size}"
        name += "" if self.activation == "silu" else f"-{self.activation}"
        name += "" if self.dtype == torch.float8_e4m3fn else "-int8"
        return name + ("" if self.input_dtype == torch.bfloat16 else "-fp16")

    @property
    def layout_name(self) -> str:
        if self.kind != "group":
            return f"per_{self.kind}"
        return self.layout.value + ("_ue8m0" if self.ue8m0 else "")

    @property
    def num_bytes(self) -> int:
        """Both bf16 halves in, one byte an element out, and the scales."""
        elements = self.num_tokens * self.intermediate_size
        scale = 1 if self.layout is ScaleLayout.PACKED_UE8M0 else 4
        scales = {"group": elements // self.group_size, "token": self.num_tokens, "tensor": 1}[self.kind]
        return 5 * elements + scales * scale

    def make_input(self, device: torch.device | str, seed: int = 0) -> torch.Tensor:
        """Normal values of both halves, each row at a scale of its own between 1/4 and 4."""
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(self.num_tokens, 2 * self.intermediate_size, generator=generator, device=device)
        x *= torch.exp2(torch.empty(self.num_tokens, 1, device=device).uniform_(-2, 2, generator=generator))
        return x.to(self.input_dtype)


def tests() -> Iterator[SiluQuantCase]:
    """Every kernel instance once, then odd shapes in every layout."""
    for input_dtype, activation in product((torch.bfloat16, torch.float16), ACTIVATIONS):
        common = {"input_dtype": input_dtype, "activation": activation}
        for group_size in (64, 128):
            yield SiluQuantCase(5, 640, group_size=group_size, **common)
            yield SiluQuantCase(5, 640, group_size=group_size, ue8m0=True, **common)
            yield SiluQuantCase(5, 640, ScaleLayout.PACKED_UE8M0, group_size=group_size, **common)
            yield SiluQuantCase(5, 640, group_size=group_size, dtype=torch.int8, **common)
        for kind, dtype in product(("token", "tensor"), (torch.float8_e4m3fn, torch.int8)):
            yield SiluQuantCase(5, 640, kind=kind, dtype=dtype, **common)
    for (num_tokens, size), layout in product([(1, 128), (3, 768), (17, 2048), (1001, 384)], ScaleLayout):
        yield SiluQuantCase(num_tokens, size, layout)
    for num_tokens, size in [(1, 16), (2, 14336), (133, 2048), (133, 16384), (134, 28672)]:
        yield SiluQuantCase(num_tokens, size, kind="token")
        yield SiluQuantCase(num_tokens, size, kind="tensor")


def benchmarks() -> Iterator[SiluQuantCase]:
    for num_tokens, intermediate_size, layout in product(NUM_TOKENS, INTERMEDIATE_SIZES, LAYOUTS):
        yield SiluQuantCase(num_tokens, intermediate_size, layout)
    for num_tokens, intermediate_size, kind in product((1, 16, 1024, 8192), INTERMEDIATE_SIZES, ("token", "tensor")):
        yield SiluQuantCase(num_tokens, intermediate_size, kind=kind)


@dataclass(frozen=True)
class MaskedSiluQuantCase:
    """Experts in DeepGEMM's masked layout. counts: "even", "skewed" (most rows in a few experts), "empty"."""

    num_experts: int
    max_tokens: int
    intermediate_size: int
    num_tokens: int  # valid rows in all
    packed: bool = False
    counts: str = "even"

    def __str__(self) -> str:
        scales = "packed_ue8m0" if self.packed else "column"
        return f"{self.num_experts}x{self.max_tokens}x{self.intermediate_size}-{self.num_tokens}-{self.counts}-{scales}"

    @property
    def num_bytes(self) -> int:
        elements = self.num_tokens * self.intermediate_size
        return 5 * elements + elements // 128 * (1 if self.packed else 4) + 4 * self.num_experts

    def make_counts(self, seed: int = 0) -> torch.Tensor:
        """[num_experts] int32 that sum up to num_tokens, none above max_tokens."""
        generator = torch.Generator().manual_seed(seed)
        weights = torch.rand(self.num_experts, generator=generator)
        if self.counts == "skewed":
            weights = weights**8
        counts = (weights / weights.sum() * self.num_tokens).int().clamp(max=self.max_tokens)
        while (missing := self.num_tokens - int(counts.sum())) > 0:
            open_ = (counts < self.max_tokens).nonzero().squeeze(-1)
            counts[open_[torch.randperm(len(open_), generator=generator)[:missing]]] += 1
        return counts


def masked_tests() -> Iterator[MaskedSiluQuantCase]:
    for packed in (False, True):
        yield MaskedSiluQuantCase(1, 4, 128, 3, packed)
        yield MaskedSiluQuantCase(5, 16, 640, 40, packed, "skewed")
        yield MaskedSiluQuantCase(33, 8, 256, 100, packed)
        yield MaskedSiluQuantCase(256, 16, 512, 900, packed, "skewed")
        yield MaskedSiluQuantCase(300, 4, 384, 500, packed)
        yield MaskedSiluQuantCase(8, 4, 256, 0, packed)


def masked_benchmarks() -> Iterator[MaskedSiluQuantCase]:
    for num_experts, num_tokens, packed in product((32, 256), (16, 256, 4096, 16384), (False, True)):
        yield MaskedSiluQuantCase(num_experts, max(64, 4 * num_tokens // num_experts), 2048, num_tokens, packed)
    yield MaskedSiluQuantCase(32, 1024, 2048, 4096, counts="skewed")
