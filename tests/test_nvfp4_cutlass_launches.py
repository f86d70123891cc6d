"""What one call of vLLM's CUTLASS experts in NVFP4 launches, counted in vLLM's own code with its kernels stubbed.

Nothing that is constant for a layer is made in a call: the alphas and the scales' layout are prepared at load, and what
vLLM's set-up kernel writes (offsets, problem sizes, the two permutations) follows from the routing. Behind the second
product vLLM weights and adds the experts' rows in four kernels of PyTorch's.
"""

import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("vllm")

TOKENS, TOPK, EXPERTS, HIDDEN, SIZE = 4, 2, 8, 128, 64
NO_LAUNCH = {"empty", "view", "slice", "_reshape_alias", "as_strided", "detach", "alias", "_unsafe_view"}


class Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in NO_LAUNCH:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def stub(launches: Launches) -> types.SimpleNamespace:
    """vllm._custom_ops as far as the experts call it, each op noting its launch."""

    def op(name, result=lambda *args, **kwargs: None):
        def call(*args, **kwargs):
            launches.names.append(name)
            with torch._C._DisableTorchDispatch():
                return result(*args, **kwargs)

        return call

    quantised = lambda a, *_: (a.new_empty(a.shape[0], a.shape[1] // 2, dtype=torch.uint8), a.new_empty(1))  # noqa: E731
    names = ("get_cutlass_moe_mm_data", "cutlass_fp4_moe_mm")
    return types.SimpleNamespace(
        **{name: op(name) for name in names},
        shuffle_rows=op("shuffle_rows", lambda a, rows: a.new_zeros(rows.numel(), a.shape[1])),
        scaled_fp4_experts_quant=op("scaled_fp4_experts_quant", quantised),
        silu_and_mul_scaled_fp4_experts_quant=op("silu_and_mul_scaled_fp4_experts_quant", quantised),
    )


def test_one_call(monkeypatch):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts import cutlass_moe

    launches = Launches()
    monkeypatch.setattr(cutlass_moe, "ops", stub(launches))
    bf16, uint8 = torch.bfloat16, torch.uint8
    scale = torch.ones(EXPERTS)
    tensors = {
        "output": torch.empty(TOKENS, HIDDEN, dtype=bf16),
        "a": torch.zeros(TOKENS, HIDDEN, dtype=bf16),
        "a1_gscale": scale,
        "w1_fp4": torch.zeros(EXPERTS, 2 * SIZE, HIDDEN // 2, dtype=uint8),
        "w1_alphas": scale,
        "a2_gscale": scale,
        "w1_blockscale": torch.zeros(EXPERTS, 2 * SIZE, HIDDEN // 16),
        "w2_alphas": scale,
        "w2_fp4": torch.zeros(EXPERTS, HIDDEN, SIZE // 2, dtype=uint8),
        "w2_blockscale": torch.zeros(EXPERTS, HIDDEN, SIZE // 16),
        "topk_weights": torch.rand(TOKENS, TOPK),
        "topk_ids": torch.zeros(TOKENS, TOPK, dtype=torch.int32),
        "workspace13": torch.zeros(TOKENS * TOPK, 2 * HIDDEN, dtype=bf16),
        "workspace2": torch.zeros(TOKENS * TOPK, HIDDEN, dtype=bf16),
    }
    with launches:
        cutlass_moe.run_cutlass_moe_fp4(
            **tensors, activation=MoEActivation.SILU, m=TOKENS, n=SIZE, k=HIDDEN, e=EXPERTS, device=torch.device("cpu")
        )
    assert launches.names == [
        "get_cutlass_moe_mm_data",
        "shuffle_rows",
        "scaled_fp4_experts_quant",
        "cutlass_fp4_moe_mm",
        "silu_and_mul_scaled_fp4_experts_quant",
        "cutlass_fp4_moe_mm",
        "shuffle_rows",
        "_to_copy",
        "mul",
        "sum",
        "copy_",
    ]
