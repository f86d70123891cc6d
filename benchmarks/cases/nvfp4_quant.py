"""Cases of NVFP4 quantisation: of rows, of a gated activation, of rows sorted by expert."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from vllm_b200_plugin.ops.nvfp4_quant import GROUP_SIZE, TILE_ROWS


@dataclass(frozen=True)
class Nvfp4QuantCase:
    num_tokens: int
    hidden_size: int  # of the result
    swizzled: bool = False
    silu_and_mul: bool = False  # the input has rows twice as wide
    input_dtype: torch.dtype = torch.bfloat16
    padded_size: int | None = None
    columns_left: int = 0  # x is a slice of a tensor that has this many columns before it
    columns_right: int = 0  # and this many behind it

    def __str__(self) -> str:
        name = f"{self.num_tokens}x{self.hidden_size}"
        if self.columns_left or self.columns_right:
            name += f"+{self.columns_left}+{self.columns_right}"
        if self.padded_size:
            name += f"-to{self.padded_size}"
        name += "-silu" if self.silu_and_mul else ""
        dtypes = {torch.bfloat16: "", torch.float16: "-fp16", torch.float32: "-fp32"}
        return f"{name}{dtypes[self.input_dtype]}-{self.layout_name}"

    @property
    def layout_name(self) -> str:
        return "swizzled" if self.swizzled else "linear"

    @property
    def num_bytes(self) -> int:
        """What any implementation has to move: x once, half a byte an element, a byte a group. No padding."""
        elements = self.num_tokens * self.hidden_size
        width = 2 if self.silu_and_mul else 1
        return elements * width * self.input_dtype.itemsize + elements // 2 + elements // GROUP_SIZE

    def make_input(self, device: torch.device | str, seed: int = 0) -> torch.Tensor:
        """Normal values, each row at a scale of its own between 2^-4 and 2^4; zeros in the first group of the last."""
        generator = torch.Generator(device).manual_seed(seed)
        width = self.hidden_size * (2 if self.silu_and_mul else 1)
        whole = self.columns_left + width + self.columns_right
        x = torch.randn(self.num_tokens, whole, generator=generator, device=device)
        x *= torch.exp2(torch.empty(self.num_tokens, 1, device=device).uniform_(-4, 4, generator=generator))
        x[-1:, self.columns_left : self.columns_left + GROUP_SIZE] = 0
        return x.to(self.input_dtype)[:, self.columns_left : self.columns_left + width]

    def make_global_scale(self, device: torch.device | str) -> torch.Tensor:
        """One with which some scales saturate, and some are denormal."""
        return torch.full((1,), 448 * 6 / 30.0, device=device)


def tests() -> Iterator[Nvfp4QuantCase]:
    """Every kernel instance, then odd sizes, slices and padding in both layouts."""
    for swizzled, dtype in product((False, True), (torch.bfloat16, torch.float16, torch.float32)):
        yield Nvfp4QuantCase(5, 640, swizzled, input_dtype=dtype)
        yield Nvfp4QuantCase(133, 1040, swizzled, input_dtype=dtype)
        if dtype != torch.float32:
            yield Nvfp4QuantCase(5, 640, swizzled, True, dtype)
            yield Nvfp4QuantCase(133, 1040, swizzled, True, dtype)
    shapes = [
        Nvfp4QuantCase(num_tokens, hidden_size)
        for num_tokens, hidden_size in [(1, 16), (1, 7168), (3, 48), (31, 80), (33, 2880), (127, 512), (1001, 768)]
    ]
    shapes += [
        Nvfp4QuantCase(7, 2880, padded_size=3072),
        Nvfp4QuantCase(7, 16, padded_size=544),
        Nvfp4QuantCase(9, 512, columns_left=512, columns_right=64),
        Nvfp4QuantCase(130, 512, columns_left=8, columns_right=16),
        Nvfp4QuantCase(6, 1040, silu_and_mul=True, padded_size=1088),
        Nvfp4QuantCase(1, 2048, silu_and_mul=True, columns_right=64),
    ]
    for shape, swizzled in product(shapes, (False, True)):
        yield replace(shape, swizzled=swizzled)


BENCH_NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192, 16384)


def benchmarks() -> Iterator[Nvfp4QuantCase]:
    """The hidden sizes of DeepSeek-V3 and of Qwen3-30B-A3B, and what silu_and_mul leaves of a dense and an expert layer
    of theirs and of Llama-3.1-8B and 70B."""
    for num_tokens, hidden_size, swizzled in product(BENCH_NUM_TOKENS, (7168, 2048), (False, True)):
        yield Nvfp4QuantCase(num_tokens, hidden_size, swizzled)
    for num_tokens, hidden_size in product((1, 16, 128, 2048), (4096, 5120, 8192)):
        yield Nvfp4QuantCase(num_tokens, hidden_size, True)
    for num_tokens, hidden_size in product((1, 8, 16, 128, 1024, 8192), (768, 2048, 14336, 28672)):
        yield Nvfp4QuantCase(num_tokens, hidden_size, True, silu_and_mul=True)


@dataclass(frozen=True)
class Nvfp4ExpertsQuantCase:
    """num_rows rows over num_experts; `skewed` gives most of them to a few."""

    num_experts: int
    num_rows: int
    hidden_size: int
    silu_and_mul: bool = False
    skewed: bool = False
    input_dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        name = f"{self.num_experts}x{self.hidden_size}-{self.num_rows}"
        name += "-silu" if self.silu_and_mul else ""
        return name + ("-skewed" if self.skewed else "") + ("" if self.input_dtype == torch.bfloat16 else "-fp16")

    @property
    def num_bytes(self) -> int:
        elements = self.num_rows * self.hidden_size
        return elements * (4 if self.silu_and_mul else 2) + elements // 2 + elements // GROUP_SIZE

    def make_input(self, device: torch.device | str, seed: int = 0) -> torch.Tensor:
        return Nvfp4QuantCase(
            self.num_rows, self.hidden_size, silu_and_mul=self.silu_and_mul, input_dtype=self.input_dtype
        ).make_input(device, seed)

    def make_routing(
        self, device: torch.device | str, seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Global scales, expert offsets and scale offsets."""
        generator = torch.Generator().manual_seed(seed)
        weights = torch.rand(self.num_experts, generator=generator) ** (8 if self.skewed else 1)
        counts = torch.multinomial(weights, self.num_rows, replacement=True, generator=generator)
        rows = torch.bincount(counts, minlength=self.num_experts)
        tiles = (rows + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
        offsets = [torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int().to(device) for sizes in (rows, tiles)]
        global_scale = torch.rand(self.num_experts, generator=generator) * 100 + 10
        return global_scale.to(device), offsets[0], offsets[1]


def experts_tests() -> Iterator[Nvfp4ExpertsQuantCase]:
    for silu_and_mul, dtype in product((False, True), (torch.bfloat16, torch.float16)):
        yield Nvfp4ExpertsQuantCase(5, 40, 640, silu_and_mul, input_dtype=dtype)
    yield Nvfp4ExpertsQuantCase(1, 130, 48)
    yield Nvfp4ExpertsQuantCase(33, 500, 80, skewed=True)
    yield Nvfp4ExpertsQuantCase(128, 64, 2048)
    yield Nvfp4ExpertsQuantCase(300, 700, 528, silu_and_mul=True, skewed=True)


def experts_benchmarks() -> Iterator[Nvfp4ExpertsQuantCase]:
    """Qwen3-30B-A3B and DeepSeek-V3 with 1 to 2048 tokens of 8 experts each, the input and the intermediate rows."""
    for (num_experts, hidden_size, expert_size), num_tokens in product(
        ((128, 2048, 768), (256, 7168, 2048)), (1, 8, 128, 2048)
    ):
        yield Nvfp4ExpertsQuantCase(num_experts, 8 * num_tokens, hidden_size)
        yield Nvfp4ExpertsQuantCase(num_experts, 8 * num_tokens, expert_size, silu_and_mul=True)
