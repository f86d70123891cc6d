"""Cases of quantisation with one scale per token or per tensor, or with given ones in groups."""

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
    asymmetric: bool = False
    input_dtype: torch.dtype = torch.bfloat16
    group_shape: tuple[int, int] | None = None  # given scales for so many rows and columns, -1 for all
    columns_right: int = 0  # x is a slice of a tensor that has this many columns behind it

    def __str__(self) -> str:
        slice_ = f"+{self.columns_right}" if self.columns_right else ""
        input_ = "" if self.input_dtype == torch.bfloat16 else f"-{str(self.input_dtype).removeprefix('torch.')}"
        kind = ("static" if self.static else "dynamic") + ("-azp" if self.asymmetric else "")
        if self.group_shape:
            kind = "static-" + "x".join("all" if size == -1 else str(size) for size in self.group_shape)
        return f"{self.num_tokens}x{self.hidden_size}{slice_}{input_}-{self.dtype_name}-{kind}"

    @property
    def dtype_name(self) -> str:
        return "int8" if self.dtype == torch.int8 else "e4m3"

    @property
    def num_bytes(self) -> int:
        """bf16 in, one byte an element out, and the scales, read or written."""
        scales = self.num_scales[0] * self.num_scales[1]
        return 3 * self.num_tokens * self.hidden_size + 4 * scales

    @property
    def num_scales(self) -> tuple[int, int]:
        """Of rows and of columns."""
        if self.group_shape:
            rows, columns = self.group_shape
            return (1 if rows == -1 else self.num_tokens // rows, 1 if columns == -1 else self.hidden_size // columns)
        return (1 if self.static else self.num_tokens, 1)

    def make_input(self, device: torch.device | str, seed: int = 0) -> torch.Tensor:
        """Normal values, each row at a scale of its own between 2^-8 and 2^8."""
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(self.num_tokens, self.hidden_size + self.columns_right, generator=generator, device=device)
        x *= torch.exp2(torch.empty(self.num_tokens, 1, device=device).uniform_(-8, 8, generator=generator))
        return x.to(self.input_dtype)[:, : self.hidden_size]


def tests() -> Iterator[TokenQuantCase]:
    """Every kind for every input, then widths on either side of each change of launch, and slices."""
    kinds = [(torch.float8_e4m3fn, False), (torch.int8, False), (torch.int8, True)]
    inputs = (torch.bfloat16, torch.float16, torch.float32)
    for (dtype, asymmetric), static, input_dtype in product(kinds, (False, True), inputs):
        yield TokenQuantCase(5, 640, dtype, static, asymmetric, input_dtype)
        yield TokenQuantCase(133, 2064, dtype, static, asymmetric, input_dtype)
    shapes = [(1, 16), (1, 2048), (1, 7168), (3, 48), (2, 16384), (2, 16400), (3, 32768), (132, 512), (133, 512)]
    shapes += [(134, 2048), (135, 4096), (133, 7168), (133, 16384), (136, 18432), (600, 768), (1001, 1024)]
    for shape, static in product(shapes, (False, True)):
        yield TokenQuantCase(*shape, static=static)
    for num_tokens, static in product((3, 150), (False, True)):
        yield TokenQuantCase(num_tokens, 512, static=static, columns_right=64)
        yield TokenQuantCase(num_tokens, 4096, torch.int8, static, columns_right=8)
    for group_shape, input_dtype in product([(-1, 1), (1, -1), (1, 128), (5, 64), (5, 1)], inputs):
        yield TokenQuantCase(5, 640, group_shape=group_shape, input_dtype=input_dtype)
        yield TokenQuantCase(1280, 384, group_shape=group_shape, input_dtype=input_dtype)
    for shape, group_shape in product([(1, 16), (128, 7168), (131 * 128, 256)], [(-1, 1), (1, -1), (-1, 16)]):
        yield TokenQuantCase(*shape, group_shape=group_shape, columns_right=16)


def benchmarks() -> Iterator[TokenQuantCase]:
    for shape in [*product(NUM_TOKENS, HIDDEN_SIZES), (3, 640), (1001, 768)]:
        yield TokenQuantCase(*shape)
        yield TokenQuantCase(*shape, dtype=torch.int8)
        yield TokenQuantCase(*shape, static=True)
    for num_tokens, hidden_size in product((1, 16, 1024, 8192), HIDDEN_SIZES):
        yield TokenQuantCase(num_tokens, hidden_size, torch.int8, asymmetric=True)
        yield TokenQuantCase(num_tokens, hidden_size, torch.int8, static=True)
    for hidden_size, static in product(HIDDEN_SIZES, (False, True)):
        yield TokenQuantCase(8192, hidden_size, static=static)
    for shape, group_shape in product(product((1, 16, 1024, 8192), HIDDEN_SIZES), [(-1, 1), (1, 128)]):
        yield TokenQuantCase(*shape, group_shape=group_shape)
