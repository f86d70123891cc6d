"""Cases of linear layers: y [M, N] = x [M, K] @ weight [N, K].T."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class GemmCase:
    num_tokens: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.num_tokens}x{self.n}x{self.k}"

    @property
    def flops(self) -> int:
        return 2 * self.num_tokens * self.n * self.k

    def num_bytes(self, x_bits: int, weight_bits: int, scale_bytes: int = 0) -> int:
        """x and the weight once, a bf16 result, and `scale_bytes`."""
        m, n, k = self.num_tokens, self.n, self.k
        return (m * k * x_bits + n * k * weight_bits) // 8 + 2 * m * n + scale_bytes

    def block_scale_bytes(self, activation: bool) -> int:
        """fp32 scales of 128x128 blocks of the weight and, where they are an input, of the activation's groups."""
        groups = self.k // 128
        return 4 * (-(-self.n // 128) * groups + activation * self.num_tokens * groups)


# N x K
BF16_SHAPES = (
    (256, 7168),  # router of DeepSeek-V3
    (384, 7168),  # router of Kimi-K2
    (128, 2048),  # router of Qwen3-30B-A3B
    (128, 2880),  # router of gpt-oss-120b
    (2112, 7168),  # fused_qkv_a of DeepSeek-V3
    (24576, 1536),  # q_b of DeepSeek-V3
    (3072, 1536),  # the same, TP8
    (7168, 2048),  # o of DeepSeek-V3, TP8
    (5120, 2048),  # qkv of Qwen3-30B-A3B
    (2048, 4096),  # o of the same
    (5120, 2880),  # qkv of gpt-oss-120b
    (2880, 4096),  # o of the same
    (1024, 8192),  # kv of Llama-3.1-70B, TP2
    (6144, 4096),  # Llama-3.1-8B: qkv,
    (4096, 4096),  # o,
    (28672, 4096),  # gate and up,
    (4096, 14336),  # down
)
BF16_NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 1024)

FP8_TENSOR_SHAPES = (
    (6144, 4096),  # Llama-3.1-8B: qkv,
    (4096, 4096),  # o,
    (28672, 4096),  # gate and up,
    (4096, 14336),  # down
    (1792, 12288),  # Mistral-Medium, TP8: qkv,
    (12288, 1536),  # o
    (5120, 2048),  # qkv of Qwen3-30B-A3B
)
FP8_TENSOR_NUM_TOKENS = (1, 4, 8, 16, 64, 1024)

INT8_SHAPES = (
    (6144, 4096),  # Llama-3.1-8B: qkv,
    (4096, 4096),  # o,
    (28672, 4096),  # gate and up,
    (4096, 14336),  # down
)
INT8_NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 1024)

FP8_BLOCK_SHAPES = (
    (2112, 7168),  # DeepSeek-V3: fused_qkv_a,
    (576, 7168),  # kv_a alone,
    (3072, 1536),  # q_b, TP8,
    (24576, 1536),  # q_b whole,
    (7168, 2048),  # o, TP8, and down of the shared expert,
    (7168, 16384),  # o whole,
    (4096, 7168),  # gate and up of the shared expert,
    (4608, 7168),  # those of the dense layers, TP8
    (5120, 2048),  # Qwen3-30B-A3B: qkv,
    (2048, 4096),  # o
    (6144, 4096),  # Llama-3.1-8B: qkv,
    (4096, 4096),  # o,
    (28672, 4096),  # gate and up,
    (4096, 14336),  # down
)
# vLLM changes kernels at 32 on Hopper.
FP8_BLOCK_NUM_TOKENS = (1, 2, 4, 8, 16, 24, 31, 32, 64, 128, 1024, 4096)


def bf16_benchmarks() -> Iterator[GemmCase]:
    return _cases(BF16_SHAPES, BF16_NUM_TOKENS)


def fp8_tensor_benchmarks() -> Iterator[GemmCase]:
    return _cases(FP8_TENSOR_SHAPES, FP8_TENSOR_NUM_TOKENS)


def int8_benchmarks() -> Iterator[GemmCase]:
    return _cases(INT8_SHAPES, INT8_NUM_TOKENS)


def fp8_block_benchmarks() -> Iterator[GemmCase]:
    return _cases(FP8_BLOCK_SHAPES, FP8_BLOCK_NUM_TOKENS)


def _cases(shapes: tuple[tuple[int, int], ...], num_tokens: tuple[int, ...]) -> Iterator[GemmCase]:
    for (n, k), m in product(shapes, num_tokens):
        yield GemmCase(m, n, k)


NVFP4_SHAPES = (
    (5120, 2048),  # Qwen3-30B-A3B: qkv,
    (2048, 4096),  # o
    (2112, 7168),  # DeepSeek-V3: fused_qkv_a,
    (3072, 1536),  # q_b, TP8,
    (7168, 2048),  # o, TP8,
    (4608, 7168),  # gate and up of the dense layers, TP8
    (6144, 4096),  # Llama-3.1-8B: qkv,
    (4096, 4096),  # o,
    (28672, 4096),  # gate and up,
    (4096, 14336),  # down
    (10240, 8192),  # Llama-3.1-70B: qkv,
    (8192, 8192),  # o,
    (57344, 8192),  # gate and up,
    (8192, 28672),  # down
)
NVFP4_NUM_TOKENS = (1, 2, 4, 8, 16, 32)


def nvfp4_benchmarks() -> Iterator[GemmCase]:
    return _cases(NVFP4_SHAPES, NVFP4_NUM_TOKENS)


def nvfp4_tests() -> Iterator[GemmCase]:
    for m, n, k in ((1, 128, 128), (3, 200, 384), (8, 576, 1024), (9, 1, 64), (17, 40, 704), (32, 144, 1280)):
        yield GemmCase(m, n, k)


@dataclass(frozen=True)
class SmallMCase:
    """A case of ops/small_m_gemm.py. kind: fp8_block, fp8, int8, bf16 or fp16."""

    kind: str
    num_tokens: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.num_tokens}x{self.n}x{self.k}"


def small_m_tests() -> Iterator[SmallMCase]:
    shapes = ((1, 128, 128), (3, 200, 384), (8, 576, 1024), (9, 1, 256), (17, 40, 512), (32, 144, 1280))
    for kind, (m, n, k) in product(("fp8_block", "fp8", "int8", "bf16", "fp16"), shapes):
        yield SmallMCase(kind, m, n, k)
        if kind != "fp8_block":
            yield SmallMCase(kind, m, n, k + 48)
