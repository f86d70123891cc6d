"""Cases of per-token-group quantisation."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from vllm_b200_plugin.ops.quant import ScaleLayout

# (layout, scales rounded to powers of two)
SCALES = (
    (ScaleLayout.ROW, False),
    (ScaleLayout.ROW, True),
    (ScaleLayout.COLUMN, False),
    (ScaleLayout.COLUMN, True),
    (ScaleLayout.COLUMN_TMA, False),
    (ScaleLayout.COLUMN_TMA, True),
    (ScaleLayout.PACKED_UE8M0, True),
)


@dataclass(frozen=True)
class GroupQuantCase:
    num_tokens: int
    hidden_size: int
    group_size: int = 128
    input_dtype: torch.dtype = torch.bfloat16
    dtype: torch.dtype = torch.float8_e4m3fn
    layout: ScaleLayout = ScaleLayout.ROW
    ue8m0: bool = False
    num_batches: int | None = None
    columns_left: int = 0  # x is a slice of a tensor that has this many columns before it
    columns_right: int = 0  # and this many behind it

    def __str__(self) -> str:
        batches = "" if self.num_batches is None else f"{self.num_batches}x"
        slice_ = f"+{self.columns_left}+{self.columns_right}" if self.columns_left or self.columns_right else ""
        return (
            f"{batches}{self.num_tokens}x{self.hidden_size}{slice_}-g{self.group_size}-"
            f"{_short(self.input_dtype)}-{_short(self.dtype)}-{self.layout_name}"
        )

    @property
    def layout_name(self) -> str:
        return self.layout.value + ("_ue8m0" if self.ue8m0 and self.layout is not ScaleLayout.PACKED_UE8M0 else "")

    @property
    def num_bytes(self) -> int:
        """What any implementation has to move: x once, q once, the scales once."""
        elements = (self.num_batches or 1) * self.num_tokens * self.hidden_size
        scale_bytes = 1 if self.layout is ScaleLayout.PACKED_UE8M0 else 4
        return elements * (self.input_dtype.itemsize + 1) + elements // self.group_size * scale_bytes

    def make_input(self, device: torch.device | str, seed: int = 0) -> torch.Tensor:
        """Normal values, each row at a scale of its own between 2^-8 and 2^8."""
        generator = torch.Generator(device).manual_seed(seed)
        width = self.columns_left + self.hidden_size + self.columns_right
        shape = (self.num_tokens, width) if self.num_batches is None else (self.num_batches, self.num_tokens, width)
        x = torch.randn(shape, generator=generator, device=device)
        x *= torch.exp2(torch.empty(*shape[:-1], 1, device=device).uniform_(-8, 8, generator=generator))
        return x.to(self.input_dtype)[..., self.columns_left : self.columns_left + self.hidden_size]


def _short(dtype: torch.dtype) -> str:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "e4m3"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def tests() -> Iterator[GroupQuantCase]:
    """Every kernel instance once, then odd sizes, slices and batches in every scale layout."""
    for group_size, input_dtype, dtype, (layout, ue8m0) in product(
        (32, 64, 128),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float8_e4m3fn, torch.int8),
        SCALES,
    ):
        yield GroupQuantCase(5, 5 * 128, group_size, input_dtype, dtype, layout, ue8m0)
    shapes = [
        GroupQuantCase(num_tokens, hidden_size)
        for num_tokens, hidden_size in [(1, 128), (1, 7168), (2, 2048), (3, 640), (4, 1536), (7, 896), (17, 7168)]
    ]
    shapes += [
        GroupQuantCase(3, 96, 32),
        GroupQuantCase(6, 576, 64),
        GroupQuantCase(1001, 768),
        GroupQuantCase(4099, 384),
        GroupQuantCase(9, 512, columns_left=512, columns_right=64),  # aligned slice
        GroupQuantCase(9, 512, columns_left=3, columns_right=2),  # no alignment at all
        GroupQuantCase(6, 640, num_batches=3),
        GroupQuantCase(1, 256, num_batches=5, columns_right=128),
        GroupQuantCase(5, 256, num_batches=2, columns_left=1),
    ]
    for shape, (layout, ue8m0) in product(shapes, SCALES):
        yield replace(shape, layout=layout, ue8m0=ue8m0)


# The rows of decode and prefill.
BENCH_NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024, 2048, 8192, 16384)
# What else the layers of these models quantise in groups of 128: their hidden sizes, and the widths of one expert.
MODEL_WIDTHS = {
    4096: "Qwen3-235B-A22B, Llama-3.1-8B",
    5120: "GLM-4.5",
    6144: "GLM-5",
    8192: "Llama-3.1-70B",
    12288: "Mistral-Medium",
    768: "an expert of Qwen3-30B-A3B",
    1536: "an expert of Qwen3-235B-A22B",
}


def benchmarks() -> Iterator[GroupQuantCase]:
    """The hidden size of DeepSeek-V3 and Kimi-K2 in every layout, that of Qwen3-30B-A3B in those that vLLM's layers
    use, the other models' in two, and odd ones. gpt-oss's 2880 is no multiple of 128."""
    for num_tokens, (layout, ue8m0), dtype in product(BENCH_NUM_TOKENS, SCALES, (torch.float8_e4m3fn, torch.int8)):
        yield GroupQuantCase(num_tokens, 7168, dtype=dtype, layout=layout, ue8m0=ue8m0)
    for num_tokens in BENCH_NUM_TOKENS:
        for layout in (ScaleLayout.ROW, ScaleLayout.COLUMN_TMA, ScaleLayout.PACKED_UE8M0):
            yield GroupQuantCase(num_tokens, 2048, layout=layout, ue8m0=layout is ScaleLayout.PACKED_UE8M0)
        yield GroupQuantCase(num_tokens, 2048, dtype=torch.int8)
    for num_tokens, width, layout in product(
        (1, 16, 128, 2048), MODEL_WIDTHS, (ScaleLayout.COLUMN_TMA, ScaleLayout.PACKED_UE8M0)
    ):
        yield GroupQuantCase(num_tokens, width, layout=layout, ue8m0=layout is ScaleLayout.PACKED_UE8M0)
    for num_tokens, hidden_size in [(3, 640), (1001, 768), (8, 18432)]:
        yield GroupQuantCase(num_tokens, hidden_size)
    yield GroupQuantCase(16, 2880, group_size=32)
