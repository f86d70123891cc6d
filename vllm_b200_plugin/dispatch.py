"""Which kernel for which layer, and why: pure functions of shapes, dtypes and the GPU, so that they can be read, tested
and explained on any machine."""

import functools
import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from vllm_b200_plugin.small_m_table import TABLE

DEEP_GEMM = "deep_gemm"
FLASHINFER_SWAP_AB = "flashinfer_swap_ab"
CUTLASS = "cutlass"
TRITON = "triton"
SMALL_M = "small_m_gemm"  # ours, ops/small_m_gemm.py
REFERENCE = "reference"  # in PyTorch, on CPU
GATE = "gate"  # our gate of MoE layers, for few tokens
ROUTER = "router"  # the gate with the selection of experts, in one kernel
SPLIT_ROUTER = "split_router"  # the same in two kernels that share the gate's sum
TOPK = "topk"  # the selection of experts on its own
FEW_TOKENS = "few_tokens"  # ours for MoE layers
VLLM = "vllm"  # none of ours: vLLM goes on through its own list

GROUP_SIZE = 128
# On an H200 from 8 tokens on DeepGEMM is 4 to 12 % faster than FlashInfer's kernel for 2048x4096, 2112x7168 and
# 3072x1536, and slower for 5120x2048 and 7168x2048 (benchmarks/results/h200: fp8_block_*.jsonl the GEMMs alone,
# tune_fp8_block.jsonl with the quantisations).
SWAP_AB_BELOW = 8
DEEP_GEMM_FROM_8_UP_TO_N = 3072
# Where vLLM passes from FlashInfer's kernel, which scales activations in plain fp32, to DeepGEMM's scale format. The
# numbers of a layer stay vLLM's, so this stays its threshold.
PLAIN_SCALES_BELOW = 32
# On an H200 in one run with vLLM 0.32's Triton experts, all of the layer after the router
# (benchmarks/results/h200/fused_experts.jsonl): 128 experts of 2048x768, 8 a token, 18 us against 28 with one token, 26
# against 37 with two, 39 against 53 with four, 64 against 86 with eight, 102 against 118 with 16, 203 against 153 with
# 32. The same experts in other formats, in another run (fused_experts_formats.jsonl), with one and 16 tokens: bf16
# 25 us against 31, 177 against 198; FP8 with scales of channels and tokens 19 against 27, 105 against 116, and 54 and
# 147 of vLLM's CUTLASS; FP8 with one scale for all activations 19 against 34, 101 against 123, given 18 against 26,
# 100 against 115. INT8 was not measured beside vLLM's. NVFP4 beside Marlin (fused_experts_nvfp4.jsonl), with one, eight
# and 16 tokens: 15 against 33, 57 against 80, 109 against 104.
FEW_TOKENS_MOE = {"fp8_block": 16, "fp8_token": 16, "fp8_tensor": 16, "int8_token": 0, "bf16": 16, "nvfp4": 8}
MIN_TOPK = 4  # 8 were measured
# Experts of more weights than this, (topk, hidden size, intermediate size), are ours as they were measured, in one run
# with Triton's and, without block scales, CUTLASS (fused_experts_large.jsonl), with one, eight and 16 tokens: 102 us
# against 115, 563 against 660, 1228 against 1040; bf16 52 against 63, 324 against 376, 600 against 602; FP8 with given
# scales of activations 87 against 116, 288 against 320, 407 against 360.
LARGE_EXPERT_WEIGHTS = 8 << 20
LARGE_EXPERTS = {
    "fp8_block": (8, 7168, 2048),  # DeepSeek-V3
    "bf16": (4, 2880, 2880),  # gpt-oss-120b
    "fp8_tensor": (2, 4096, 14336),  # Mixtral 8x7B
}
LARGE_EXPERTS_MAX_TOKENS = 8


@dataclass(frozen=True)
class Choice:
    """kernel: one of the names above. reason: in words, without a full stop."""

    kernel: str
    reason: str


def fp8_block_linear(
    out_dtype: torch.dtype,
    weight_shape: tuple[int, int],
    block_shape: tuple[int, int] = (128, 128),
    available: Collection[str] = (DEEP_GEMM, CUTLASS, TRITON),
) -> Choice:
    """The GEMM of an FP8 block-scaled linear layer, whose activations we quantise in groups of 128.

    Args:
        out_dtype: dtype of the result.
        weight_shape: (N, K) of this rank's part of the weight.
        block_shape: (rows, columns) of the weight that share a scale.
        available: the kernels that the machine and the user's settings allow.
    """
    refusals = []
    for kernel in (DEEP_GEMM, CUTLASS, TRITON):
        if kernel not in available:
            refusals.append(f"{kernel} is not available")
        elif (refusal := fp8_block_refusal(kernel, out_dtype, weight_shape, block_shape)) is None:
            return Choice(kernel, "; ".join([*refusals, FITS[kernel]]))
        else:
            refusals.append(refusal)
    return Choice(VLLM, "; ".join(refusals))


FITS = {
    DEEP_GEMM: "bfloat16 out, N % 64 == 0 and K % 128 == 0",
    CUTLASS: "CUTLASS takes bfloat16 and float16 out, N % 16 == 0 and K % 128 == 0",
    TRITON: "Triton takes any out dtype and any N, K % 128 == 0",
    REFERENCE: "on any processor",
}


def fp8_block_refusal(
    kernel: str, out_dtype: torch.dtype, weight_shape: tuple[int, int], block_shape: tuple[int, int] = (128, 128)
) -> str | None:
    """Why `kernel` cannot do a layer, or None where it can. Arguments as for fp8_block_linear."""
    n, k = weight_shape
    out = str(out_dtype).removeprefix("torch.")
    if block_shape != (128, GROUP_SIZE):
        return f"{kernel} needs weight blocks of 128x128, got {block_shape[0]}x{block_shape[1]}"
    if k % GROUP_SIZE:
        return f"{kernel} needs K % 128 == 0, got K={k}"
    if kernel == DEEP_GEMM:
        if out_dtype != torch.bfloat16:
            return f"{kernel} needs bfloat16 out, got {out}"
        if n % 64:
            return f"{kernel} needs N % 64 == 0, got N={n}"
    if kernel == CUTLASS:
        if out_dtype not in (torch.bfloat16, torch.float16):
            return f"{kernel} needs bfloat16 or float16 out, got {out}"
        if n % 16:
            return f"{kernel} needs N % 16 == 0, got N={n}"
    return None


@functools.lru_cache(maxsize=1 << 16)  # asked in every eager call of a layer
def fp8_block_gemm(
    num_tokens: int, n: int, capability: tuple[int, int], *, flashinfer: bool, batch_invariant: bool
) -> Choice:
    """DeepGEMM or, for few tokens on Hopper, FlashInfer's kernel with the operands swapped.

    Args:
        num_tokens: rows of the activation.
        n: rows of the weight on this rank.
        capability: compute capability, for example (9, 0).
        flashinfer: whether FlashInfer's fp8_blockscale_gemm_sm90 may be used.
        batch_invariant: whether a row's result must not depend on the number of rows (VLLM_BATCH_INVARIANT).
    """
    if batch_invariant:
        return Choice(DEEP_GEMM, "batch invariance rules out a choice by the number of tokens")
    if capability != (9, 0):
        return Choice(DEEP_GEMM, "FlashInfer's swap-AB kernel is for Hopper")
    if not flashinfer:
        return Choice(DEEP_GEMM, "FlashInfer's fp8_blockscale_gemm_sm90 is not available")
    limit = SWAP_AB_BELOW if n <= DEEP_GEMM_FROM_8_UP_TO_N else PLAIN_SCALES_BELOW
    if num_tokens >= limit:
        return Choice(DEEP_GEMM, f"{num_tokens} tokens, DeepGEMM is faster from {limit} on with N={n}")
    return Choice(FLASHINFER_SWAP_AB, f"{num_tokens} tokens, below {limit} with N={n}")


# Of the fused router, which one cluster runs. On an H200 its time grows with the weight, which 16 SMs read: with 0.5 MB
# it takes 3.3 us for 4 tokens where gate and selection take 4.0, with 1 MB 4.5 against 4.1. Up to 2 tokens the gate on
# its own is so fast that the two kernels win, 2.9 against 3.2 (benchmarks/results/h200/router_sweep.jsonl).
FUSED_ROUTER_BYTES = 1 << 19
FUSED_ROUTER_FROM = 3
# Two kernels that share the gate's sum: 256x7168 in groups 4.7 us for 4 tokens, where gate and selection take 5.1 and
# vLLM's two 9.8; 6.4 against 8.0 for 32. 384x7168: 5.7 against 8.0 for 4. Up to 2 tokens as above. With 1 MB no gain.
SPLIT_ROUTER_FROM_BYTES = (1 << 20) + 1


# vLLM's low-latency kernel for fp32 logits, up to 16 tokens: on an H200 slower than ours for one token with 2048
# columns (128 experts: 1.84 us against 1.42), as fast with 4096, faster with 7168 and for more tokens.
LOW_LATENCY_GATE_FROM = 3
LOW_LATENCY_GATE_COLUMNS = 2048
# Above 16 tokens cuBLAS comes close with large weights: 256x7168, 32 tokens, 7.5 us against 6.4.
GATE_FEW_TOKENS = 16
GATE_MANY_TOKENS_BYTES = 1 << 20


def gate(num_tokens: int, num_experts: int, hidden_size: int, low_latency: bool = False) -> Choice:
    """The gate of an MoE layer, bf16 [num_experts, hidden_size], for up to 32 tokens.

    Args:
        num_tokens: rows of the activation.
        num_experts, hidden_size: of the weight.
        low_latency: whether vLLM would run its low-latency kernel.
    """
    shape = f"{num_experts}x{hidden_size} bfloat16, {num_tokens} tokens"
    if low_latency and (num_tokens >= LOW_LATENCY_GATE_FROM or hidden_size > LOW_LATENCY_GATE_COLUMNS):
        return Choice(VLLM, f"{shape}: vLLM's low-latency kernel is as fast or faster")
    if num_tokens > GATE_FEW_TOKENS and 2 * num_experts * hidden_size > GATE_MANY_TOKENS_BYTES:
        return Choice(VLLM, f"{shape}: too many tokens for a weight of more than {GATE_MANY_TOKENS_BYTES} bytes")
    return Choice(GATE, shape)


def fused_router(
    num_tokens: int, num_experts: int, hidden_size: int, one_cluster: bool = True, split: bool = False
) -> Choice:
    """The kernels of a gate, bf16 [num_experts, hidden_size], and the selection of experts; GATE: one for each.

    Args:
        num_tokens: rows of the activation.
        num_experts, hidden_size: of the weight.
        one_cluster, split: whether the router of one cluster, and the split one, take the selection.
    """
    weight_bytes = 2 * num_experts * hidden_size
    if num_tokens < FUSED_ROUTER_FROM:
        return Choice(GATE, f"two kernels: {num_tokens} tokens, below {FUSED_ROUTER_FROM}")
    if split and weight_bytes >= SPLIT_ROUTER_FROM_BYTES:
        return Choice(SPLIT_ROUTER, f"two kernels that share the gate's sum, from {FUSED_ROUTER_FROM} tokens on")
    if not one_cluster:
        return Choice(GATE, "two kernels: one cluster does not take the selection")
    if not 32 <= num_experts <= 256:
        return Choice(GATE, f"two kernels: one cluster takes 32 to 256 experts, got {num_experts}")
    if weight_bytes > FUSED_ROUTER_BYTES:
        return Choice(GATE, f"two kernels: {weight_bytes} bytes of weight are too much for one cluster")
    return Choice(ROUTER, f"one kernel from {FUSED_ROUTER_FROM} tokens on, else two")


def few_tokens_limit(
    topk: int,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    capability: tuple[int, int],
    format: str = "fp8_block",
) -> int:
    """Up to how many tokens our kernels for few tokens take an MoE layer; 0: none.

    Args:
        topk: experts of a token.
        num_experts, hidden_size, intermediate_size: of the layer on this GPU.
        capability: compute capability, for example (9, 0).
        format: fp8_block, fp8_token (a scale for each channel and token), fp8_tensor (for each expert and all
            activations), int8_token, bf16 or nvfp4 (bf16 activations).
    """
    if capability != (9, 0):
        return 0
    if _are_large(hidden_size, intermediate_size):
        measured = LARGE_EXPERTS.get(format) == (topk, hidden_size, intermediate_size)
        return LARGE_EXPERTS_MAX_TOKENS if measured else 0
    return FEW_TOKENS_MOE[format] if topk >= MIN_TOPK else 0


def _are_large(hidden_size: int, intermediate_size: int) -> bool:
    return 3 * hidden_size * intermediate_size > LARGE_EXPERT_WEIGHTS


def few_tokens_moe(
    num_tokens: int,
    topk: int,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    capability: tuple[int, int],
    format: str = "fp8_block",
) -> Choice:
    """Our kernels for few tokens or vLLM's experts. Arguments as for few_tokens_limit."""
    limit = few_tokens_limit(topk, num_experts, hidden_size, intermediate_size, capability, format)
    if capability != (9, 0):
        return Choice(VLLM, "our kernels for few tokens were measured on compute capability 9.0 alone")
    large = _are_large(hidden_size, intermediate_size)
    if limit == 0 and large:
        return Choice(VLLM, f"ours were not measured with {topk} experts a token of {hidden_size}x{intermediate_size}")
    if topk < MIN_TOPK and not large:
        return Choice(VLLM, f"{topk} experts a token, ours were measured with 8 and are for {MIN_TOPK} at least")
    if num_tokens > limit:
        return Choice(VLLM, f"{num_tokens} tokens, ours are for {limit} at most")
    return Choice(FEW_TOKENS, f"{num_tokens} tokens, {limit} at most")


SMALL_M_BELOW = 33  # tokens; above, nobody need ask
# A shape that was not measured goes by the nearest one that was, up to a factor of 1.2 away in N and K together.
_NEAR = math.log(1.2)


@dataclass(frozen=True)
class SmallMChoice:
    """kernel: SMALL_M or VLLM. reason: in words, without a full stop.

    config: how ours cuts the work, the fields of ops.small_m_gemm.Config. quantise_first: whether a bfloat16 activation
    is quantised by a kernel of its own rather than on the way; both only mean something for SMALL_M.
    """

    kernel: str
    reason: str
    config: tuple[int, ...] = (1, 8, 1, 0)
    quantise_first: bool = False


@functools.lru_cache(maxsize=1 << 16)  # asked in every eager call of a layer
def small_m_gemm(
    kind: str, num_tokens: int, n: int, k: int, capability: tuple[int, int], *, batch_invariant: bool = False
) -> SmallMChoice:
    """Our kernel for few tokens, where it was measured to be faster than what vLLM has, or vLLM's.

    Args:
        kind: fp8_block, fp8 (a scale per tensor, or per channel and token), int8, bf16 or nvfp4 (bf16 activation).
        num_tokens: rows of the activation.
        n, k: shape of the weight on this rank.
        capability: compute capability, for example (9, 0).
        batch_invariant: whether a row's result must not depend on the number of rows (VLLM_BATCH_INVARIANT).
    """
    if batch_invariant:
        return SmallMChoice(VLLM, "batch invariance rules out a choice by the number of tokens")
    if not (measured := TABLE.get((capability, kind))):
        return SmallMChoice(VLLM, f"{kind} was not measured on compute capability {capability[0]}.{capability[1]}")
    multiple = {"fp8_block": GROUP_SIZE, "bf16": 8, "nvfp4": 64}.get(kind, 16)
    if k % multiple:
        return SmallMChoice(VLLM, f"{SMALL_M} needs K % {multiple} == 0, got K={k}")
    distance, shape = min((abs(math.log(n / N)) + abs(math.log(k / K)), (N, K)) for N, K in measured)
    if distance > _NEAR:
        return SmallMChoice(VLLM, f"no shape near {n}x{k} was measured")
    where = f"as measured for {shape[0]}x{shape[1]}"
    for most_tokens, config, quantise_first in measured[shape]:
        if num_tokens <= most_tokens:
            if config is None:
                break
            return SmallMChoice(SMALL_M, f"{num_tokens} tokens, faster {where}", config, quantise_first)
    return SmallMChoice(VLLM, f"{num_tokens} tokens, no faster {where}")


def small_m_measured(kind: str, capability: tuple[int, int]) -> bool:
    """Whether small_m_gemm takes any shape of this kind on this GPU."""
    return any(TABLE.get((capability, kind), {}).values())


@functools.lru_cache(maxsize=1 << 12)  # asked in every eager call of a layer
def small_m_limit(kind: str, n: int, k: int, capability: tuple[int, int]) -> int:
    """The most tokens for which small_m_gemm takes a layer; 0 where it never does."""
    counts = range(SMALL_M_BELOW - 1, 0, -1)
    return next((m for m in counts if small_m_gemm(kind, m, n, k, capability).kernel == SMALL_M), 0)
