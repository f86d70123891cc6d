"""Policy tables."""

import subprocess
import sys

import pytest
import torch

from vllm_b200_plugin import dispatch
from vllm_b200_plugin.dispatch import CUTLASS, DEEP_GEMM, FLASHINFER_SWAP_AB, TRITON, VLLM

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    "weight_shape, out_dtype, kernel, words",
    [
        ((2112, 7168), BF16, DEEP_GEMM, "N % 64 == 0 and K % 128 == 0"),
        ((576, 7168), BF16, DEEP_GEMM, "N % 64 == 0 and K % 128 == 0"),
        ((64, 128), BF16, DEEP_GEMM, "N % 64 == 0 and K % 128 == 0"),
        ((96, 64), BF16, VLLM, "K % 128 == 0, got K=64"),
        ((2112, 7100), BF16, VLLM, "K % 128 == 0, got K=7100"),
        ((96, 128), BF16, CUTLASS, "N % 64 == 0, got N=96"),
        ((2112, 7168), FP16, CUTLASS, "bfloat16 out, got float16"),
        ((2112, 7168), FP32, TRITON, "got float32"),
        ((8, 128), BF16, TRITON, "N % 16 == 0, got N=8"),
    ],
)
def test_fp8_block_linear(weight_shape, out_dtype, kernel, words):
    choice = dispatch.fp8_block_linear(out_dtype, weight_shape)
    assert choice.kernel == kernel
    assert words in choice.reason


def test_fp8_block_linear_takes_the_next_where_one_is_missing():
    without = {DEEP_GEMM: CUTLASS, CUTLASS: DEEP_GEMM}
    for missing, kernel in without.items():
        available = {DEEP_GEMM, CUTLASS, TRITON} - {missing}
        assert dispatch.fp8_block_linear(BF16, (2112, 7168), available=available).kernel == kernel
    choice = dispatch.fp8_block_linear(BF16, (2112, 7168), available={TRITON})
    assert choice.kernel == TRITON
    assert "deep_gemm is not available; cutlass is not available" in choice.reason
    assert dispatch.fp8_block_linear(BF16, (2112, 7168), available=()).kernel == VLLM


def test_fp8_block_linear_takes_128x128_blocks_only():
    choice = dispatch.fp8_block_linear(BF16, (2112, 7168), (64, 64))
    assert choice.kernel == VLLM
    assert "128x128, got 64x64" in choice.reason


@pytest.mark.parametrize(
    "num_tokens, n, capability, flashinfer, batch_invariant, kernel",
    [
        (1, 2112, (9, 0), True, False, FLASHINFER_SWAP_AB),
        (7, 2112, (9, 0), True, False, FLASHINFER_SWAP_AB),
        (8, 2112, (9, 0), True, False, DEEP_GEMM),
        (8, 3136, (9, 0), True, False, FLASHINFER_SWAP_AB),
        (31, 5120, (9, 0), True, False, FLASHINFER_SWAP_AB),
        (32, 5120, (9, 0), True, False, DEEP_GEMM),
        (4096, 2112, (9, 0), True, False, DEEP_GEMM),
        (1, 2112, (9, 0), False, False, DEEP_GEMM),
        (1, 2112, (9, 0), True, True, DEEP_GEMM),
        (1, 2112, (10, 0), True, False, DEEP_GEMM),
        (1, 2112, (12, 0), True, False, DEEP_GEMM),
    ],
)
def test_fp8_block_gemm(num_tokens, n, capability, flashinfer, batch_invariant, kernel):
    choice = dispatch.fp8_block_gemm(num_tokens, n, capability, flashinfer=flashinfer, batch_invariant=batch_invariant)
    assert choice.kernel == kernel
    assert choice.reason


@pytest.mark.parametrize(
    "num_tokens, shape, kernel, words",
    [
        (1, (128, 2048), dispatch.GATE, "1 tokens, below 3"),
        (3, (128, 2048), dispatch.ROUTER, "one kernel from 3 tokens on"),
        (32, (64, 2048), dispatch.ROUTER, "one kernel"),
        (8, (256, 7168), dispatch.GATE, "3670016 bytes of weight are too much"),
        (8, (384, 512), dispatch.GATE, "32 to 256 experts, got 384"),
    ],
)
def test_fused_router(num_tokens, shape, kernel, words):
    choice = dispatch.fused_router(num_tokens, *shape)
    assert choice.kernel == kernel
    assert words in choice.reason


@pytest.mark.parametrize(
    "num_tokens, shape, kernel",
    [
        (2, (256, 7168), dispatch.GATE),
        (3, (256, 7168), dispatch.SPLIT_ROUTER),
        (32, (384, 7168), dispatch.SPLIT_ROUTER),
        (16, (128, 4096), dispatch.GATE),
        (16, (128, 2048), dispatch.GATE),
    ],
)
def test_router_in_groups(num_tokens, shape, kernel):
    assert dispatch.fused_router(num_tokens, *shape, one_cluster=False, split=True).kernel == kernel


def test_gate():
    assert dispatch.gate(16, 256, 7168).kernel == dispatch.GATE
    assert dispatch.gate(32, 128, 4096).kernel == dispatch.GATE
    assert dispatch.gate(17, 256, 7168).kernel == VLLM
    assert dispatch.gate(1, 128, 2048, low_latency=True).kernel == dispatch.GATE
    for num_tokens, hidden_size in ((3, 2048), (1, 4096), (1, 7168)):
        choice = dispatch.gate(num_tokens, 128, hidden_size, low_latency=True)
        assert choice.kernel == VLLM and "low-latency kernel" in choice.reason


def test_imports_no_vllm():
    code = "import sys, vllm_b200_plugin.dispatch; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("hidden_size, intermediate_size, limit", [(2048, 768, 16), (2048, 384, 16), (7168, 2048, 8)])
def test_experts_for_few_tokens_end_at_the_limit(hidden_size, intermediate_size, limit):
    layer = (8, 128, hidden_size, intermediate_size, (9, 0))
    assert dispatch.few_tokens_limit(*layer) == limit
    assert dispatch.few_tokens_moe(limit, *layer).kernel == dispatch.FEW_TOKENS
    beyond = dispatch.few_tokens_moe(limit + 1, *layer)
    assert beyond.kernel == VLLM and f"{limit} at most" in beyond.reason


@pytest.mark.parametrize(
    "topk, sizes, format, limit",
    [
        (2, (4096, 14336), "fp8_tensor", 8),
        (4, (2880, 2880), "bf16", 8),
        (8, (7168, 2048), "fp8_block", 8),
        (8, (7168, 2048), "fp8_token", 0),
        (2, (4096, 14336), "bf16", 0),
        (8, (7168, 1024), "fp8_block", 0),
    ],
)
def test_large_experts_for_few_tokens_only_as_measured(topk, sizes, format, limit):
    layer = (topk, 8, *sizes, (9, 0), format)
    assert dispatch.few_tokens_limit(*layer) == limit
    choice = dispatch.few_tokens_moe(1, *layer)
    assert choice.kernel == (dispatch.FEW_TOKENS if limit else VLLM)
    assert limit or f"{topk} experts a token of {sizes[0]}x{sizes[1]}" in choice.reason


@pytest.mark.parametrize("topk, capability, words", [(2, (9, 0), "2 experts"), (8, (10, 0), "9.0 alone")])
def test_experts_for_few_tokens_only_where_measured(topk, capability, words):
    layer = (topk, 128, 2048, 768, capability)
    assert dispatch.few_tokens_limit(*layer) == 0
    choice = dispatch.few_tokens_moe(1, *layer)
    assert choice.kernel == VLLM and words in choice.reason
