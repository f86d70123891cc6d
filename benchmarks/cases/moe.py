"""Cases of the ops around and in a mixture-of-experts layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

TOP_K = 8


@dataclass(frozen=True)
class MoeAlignCase:
    """Sorting the routed tokens by expert, each expert's padded to multiples of block_size."""

    num_tokens: int
    num_experts: int
    block_size: int

    def __str__(self) -> str:
        return f"{self.num_tokens}-E{self.num_experts}-k{TOP_K}-block{self.block_size}"

    @property
    def num_bytes(self) -> int:
        """32-bit ids in, and out as many sorted ids and one expert a block, as if nothing had to be padded."""
        routed = self.num_tokens * TOP_K
        return 4 * (2 * routed + -(-routed // self.block_size))


@dataclass(frozen=True)
class TopKCase:
    """Choosing TOP_K experts: softmax of all, or sigmoid with a bias from the best of the groups of experts.

    num_groups: 0 for a softmax, 1 for a sigmoid of all.
    """

    num_tokens: int
    num_experts: int
    num_groups: int = 0
    num_groups_kept: int = 1

    def __str__(self) -> str:
        return f"{self.num_tokens}-E{self.num_experts}-k{TOP_K}-{self.layout_name}"

    @property
    def grouped(self) -> bool:
        return self.num_groups > 0

    @property
    def layout_name(self) -> str:
        return f"groups{self.num_groups}of{self.num_groups_kept}" if self.grouped else "softmax"

    @property
    def num_bytes(self) -> int:
        """fp32 logits and the bias in, fp32 weights and 32-bit ids out."""
        return 4 * (self.num_tokens * (self.num_experts + 2 * TOP_K) + (self.num_experts if self.grouped else 0))


@dataclass(frozen=True)
class RouterCase:
    """Choosing TOP_K experts from the hidden states of few tokens; num_groups as in TopKCase."""

    num_tokens: int
    num_experts: int
    hidden_size: int
    num_groups: int = 0
    num_groups_kept: int = 1

    def __str__(self) -> str:
        return f"{self.num_tokens}x{self.num_experts}x{self.hidden_size}-{self.layout_name}"

    @property
    def layout_name(self) -> str:
        return TopKCase(self.num_tokens, self.num_experts, self.num_groups, self.num_groups_kept).layout_name

    @property
    def num_bytes(self) -> int:
        """bf16 hidden states and weight in, fp32 logits and weights and 32-bit ids out."""
        experts, tokens = self.num_experts, self.num_tokens
        return 2 * (experts + tokens) * self.hidden_size + 4 * tokens * (experts + 2 * TOP_K)


@dataclass(frozen=True)
class MoeSumCase:
    """The sum of a token's TOP_K expert outputs."""

    num_tokens: int
    hidden_size: int

    def __str__(self) -> str:
        return f"{self.num_tokens}x{TOP_K}x{self.hidden_size}"

    @property
    def num_bytes(self) -> int:
        return 2 * self.num_tokens * (TOP_K + 1) * self.hidden_size


# Formats of ops.moe_few_tokens.ExpertFormat; "channel" and "expert" say what the weights' scales are for, "given" that
# activations are quantised with given scales.
EXPERT_FORMATS = (
    "bf16",
    "fp8_block",
    "fp8_block_pow2",
    "fp8_token-channel",
    "fp8_token-expert",
    "fp8_tensor-expert",
    "fp8_tensor-expert-given",
    "int8_token-channel",
    "nvfp4",
)


# As the activation of ops.moe_few_tokens; gpt_oss is its silu_clamped with biases and rows of gate and up in turns.
EXPERT_ACTIVATIONS = ("silu", "silu_clamped", "gelu", "gelu_tanh", "gpt_oss")


@dataclass(frozen=True)
class FusedExpertsCase:
    """All of the routed experts: quantisation, both products, activation and weighted sum.

    format: one of EXPERT_FORMATS. activation: one of EXPERT_ACTIVATIONS.
    """

    num_tokens: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    format: str = "fp8_block"
    top_k: int = TOP_K
    activation: str = "silu"

    def __str__(self) -> str:
        format = "" if self.format == "fp8_block" else f"{self.format}-"
        activation = "" if self.activation == "silu" else f"-{self.activation}"
        sizes = f"{self.num_tokens}-{self.experts_name}-{self.hidden_size}x{self.intermediate_size}"
        return f"{format}{sizes}{activation}"

    @property
    def experts_name(self) -> str:
        return f"E{self.num_experts}-k{self.top_k}"

    @property
    def flops(self) -> int:
        return 6 * self.num_tokens * self.top_k * self.hidden_size * self.intermediate_size

    @property
    def num_bytes(self) -> int:
        """Weights and scales of as many experts as evenly spread routing hits on average; bf16 in and out."""
        hit = self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** self.num_tokens)
        weights = 3 * self.hidden_size * self.intermediate_size
        rows = 2 * self.intermediate_size + self.hidden_size
        scales = {"fp8_block": weights / 128**2, "bf16": 0, "fp8_token-channel": rows, "int8_token-channel": rows}.get(
            self.format, 2
        )
        expert = weights * {"bf16": 2, "nvfp4": 9 / 16}.get(self.format, 1) + 4 * scales
        expert += 2 * rows if self.activation == "gpt_oss" else 0
        return round(hit * expert) + self.num_tokens * (4 * self.hidden_size + 8 * self.top_k)


ALIGN_NUM_TOKENS = (1, 16, 64, 256, 512, 1024, 2048, 4096, 16384)
TOP_K_NUM_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
ROUTER_NUM_TOKENS = (1, 2, 4, 8, 16, 32)
SUM_NUM_TOKENS = (1, 16, 256, 4096)
EXPERTS_NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64)


def align_benchmarks() -> Iterator[MoeAlignCase]:
    for num_tokens, num_experts, block_size in product(ALIGN_NUM_TOKENS, (128, 256), (16, 64)):
        yield MoeAlignCase(num_tokens, num_experts, block_size)


def top_k_benchmarks() -> Iterator[TopKCase]:
    for num_tokens in TOP_K_NUM_TOKENS:
        yield TopKCase(num_tokens, 128)  # Qwen3-30B-A3B
        yield TopKCase(num_tokens, 256, 8, 4)  # DeepSeek-V3
        yield TopKCase(num_tokens, 384, 1)  # Kimi-K2


def router_benchmarks() -> Iterator[RouterCase]:
    for num_tokens in ROUTER_NUM_TOKENS:
        yield RouterCase(num_tokens, 128, 2048)  # Qwen3-30B-A3B
        yield RouterCase(num_tokens, 128, 4096)  # Qwen3-235B-A22B
        yield RouterCase(num_tokens, 256, 7168, 8, 4)  # DeepSeek-V3
        yield RouterCase(num_tokens, 384, 7168, 1)  # Kimi-K2


def sum_benchmarks() -> Iterator[MoeSumCase]:
    for num_tokens, hidden_size in product(SUM_NUM_TOKENS, (2048, 7168)):
        yield MoeSumCase(num_tokens, hidden_size)


def fused_experts_benchmarks() -> Iterator[FusedExpertsCase]:
    for num_tokens in EXPERTS_NUM_TOKENS:
        yield FusedExpertsCase(num_tokens, 128, 2048, 768)  # Qwen3-30B-A3B
    for num_tokens in (1, 2, 4, 8, 16):
        yield FusedExpertsCase(num_tokens, 256, 7168, 2048)  # DeepSeek-V3
        yield FusedExpertsCase(num_tokens, 128, 2880, 2880, "bf16", 4, "gpt_oss")  # gpt-oss-120b
        yield FusedExpertsCase(num_tokens, 8, 4096, 14336, "fp8_tensor-expert-given", 2)  # Mixtral 8x7B
    for num_tokens in (1, 8):
        yield FusedExpertsCase(num_tokens, 8, 4096, 14336, "fp8_tensor-expert", 2)
        yield FusedExpertsCase(num_tokens, 128, 4096, 1536)  # Qwen3-235B-A22B
        yield FusedExpertsCase(num_tokens, 128, 4096, 1536, "fp8_token-channel")
        yield FusedExpertsCase(num_tokens, 128, 2816, 704, "bf16", activation="gelu_tanh")  # Gemma 4 26B-A4B
        yield FusedExpertsCase(num_tokens, 128, 2048, 768, activation="silu_clamped")
    eight_bits = ("fp8_token-channel", "fp8_tensor-expert", "fp8_tensor-expert-given", "int8_token-channel")
    for format in ("bf16", *eight_bits, "nvfp4"):
        for num_tokens in (1, 2, 4, 8, 16, 32):
            yield FusedExpertsCase(num_tokens, 128, 2048, 768, format)


@dataclass(frozen=True)
class FewTokensCase:
    """The experts of one layer for few tokens. format and activation: as in FusedExpertsCase."""

    num_tokens: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    routing: str = "random"
    ids: str = "int32"
    format: str = "fp8_block"
    activation: str = "silu"
    biases: bool = False

    def __str__(self) -> str:
        sizes = f"{self.num_tokens}-E{self.num_experts}-k{self.top_k}-{self.hidden_size}x{self.intermediate_size}"
        more = f"-{self.activation}{'-biases' if self.biases else ''}".removeprefix("-silu")
        return f"{self.format}-{sizes}-{self.routing}-{self.ids}{more}"


ROUTINGS = ("random", "one_expert", "one_empty", "duplicated", "half_missing", "all_missing")


def few_tokens_tests() -> Iterator[FewTokensCase]:
    for i, (routing, num_tokens) in enumerate(product(ROUTINGS, (1, 2, 7, 16, 33))):
        format = "fp8_block_pow2" if i % 3 == 1 else "fp8_block"
        yield FewTokensCase(num_tokens, 12, 4, 384, 256, routing, ("int32", "int64")[i % 2], format)
    for i, (format, routing, num_tokens) in enumerate(product(EXPERT_FORMATS, ROUTINGS, (1, 7, 16))):
        if not format.startswith("fp8_block"):
            yield FewTokensCase(num_tokens, 12, 4, 384, 256, routing, ("int32", "int64")[i % 2], format)
    for format in EXPERT_FORMATS:
        if format != "fp8_tensor-expert":
            yield FewTokensCase(64, 20, 8, 128, 128, format=format)
        yield FewTokensCase(3, 5, 1, 128, 640, format=format)
        yield FewTokensCase(1, 5, 2, 1152, 1536, format=format)
        yield FewTokensCase(4, 300, 8, 256, 128, ids="int64", format=format)
        yield FewTokensCase(9, 4, 2, 512, 1408, "one_expert", format=format)
        yield FewTokensCase(6, 1023, 3, 128, 128, format=format)
        yield FewTokensCase(2, 1, 1, 128, 128, format=format)
        # Rows of more than 2048 bytes, which come in pieces.
        yield FewTokensCase(5, 3, 2, 2304, 256, format=format)
        yield FewTokensCase(12, 3, 2, 2304, 1152, "one_empty", format=format)
        yield FewTokensCase(2, 3, 2, 8192, 128, format=format)
    yield FewTokensCase(7, 3, 2, 4224, 1152, format="nvfp4")  # rows in pieces, the last of one block
    yield FewTokensCase(16, 6, 4, 2048, 1088, format="bf16")
    yield FewTokensCase(5, 3, 2, 192, 320, format="bf16")  # odd multiples of 64
    for i, (format, activation) in enumerate(product(EXPERT_FORMATS, EXPERT_ACTIVATIONS)):
        if format == "bf16" or (activation != "gpt_oss" and format != "nvfp4"):
            for routing, num_tokens, biases in (("random", 3, True), ("duplicated", 13, i % 2 == 0)):
                sizes = (num_tokens, 7, 4, 256, 128, routing)
                yield FewTokensCase(*sizes, format=format, activation=activation, biases=biases)
    # Many experts with biases, rows in pieces, and more blocks of down_kernel than multiprocessors.
    yield FewTokensCase(16, 40, 6, 256, 320, "half_missing", format="bf16", activation="gpt_oss", biases=True)
    for format in ("bf16", "fp8_block", "fp8_token-channel", "fp8_tensor-expert"):
        yield FewTokensCase(1, 3, 2, 2304, 1152, format=format, activation="gelu", biases=True)
        yield FewTokensCase(11, 3, 2, 4096, 256, format=format, biases=True)
    yield FewTokensCase(7, 3, 2, 2880, 2880, format="bf16", activation="gpt_oss", biases=True)
