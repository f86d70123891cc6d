"""What the op feeds each GEMM, for which functions stand in that compute the product from it. Needs no vLLM, no GPU."""

import pytest
import torch

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.integration import fp8_block_op
from vllm_b200_plugin.integration.fp8_block_op import Engine, Machine, fp8_block_linear
from vllm_b200_plugin.ops.gemm import fp8_block_scaled_mm
from vllm_b200_plugin.ops.quant import ScaleLayout, per_token_group_quant

M, N, K = 5, 192, 256
HOPPER = Machine((9, 0), False, ScaleLayout.COLUMN_TMA, True)
HOPPER_FP32 = Machine((9, 0), False, ScaleLayout.COLUMN_TMA, False)
BLACKWELL = Machine((10, 0), False, ScaleLayout.PACKED_UE8M0, True)


class Gemms:
    """Stand-ins for vLLM's GEMMs, with their signatures; each notes its name and the scale of the activation."""

    def __init__(self):
        self.calls = []

    def fp8_gemm_nt(self, a, b, out, *, is_deep_gemm_e8m0_used):
        self.calls.append(("deep_gemm", a[1], is_deep_gemm_e8m0_used))
        out.copy_(fp8_block_scaled_mm(a[0], unpacked(a[1]), *b, out_dtype=out.dtype))

    def fp8_blockscale_gemm_sm90(self, *, input, weight, input_scale, weight_scale, out_dtype):
        self.calls.append(("flashinfer", input_scale, False))
        return fp8_block_scaled_mm(input, input_scale, weight, weight_scale, out_dtype=out_dtype)

    def cutlass_scaled_mm(self, a, b, scale_a, scale_b, out_dtype):
        assert b.stride() == (1, K)
        self.calls.append(("cutlass", scale_a, False))
        return fp8_block_scaled_mm(a, scale_a, b.t(), scale_b.t(), out_dtype=out_dtype)

    def triton(self, a, b, a_scale, b_scale, block_size, out_dtype):
        self.calls.append(("triton", a_scale, False))
        return fp8_block_scaled_mm(a, a_scale, b, b_scale, tuple(block_size), out_dtype)


def unpacked(scale):
    if scale.dtype != torch.int32:
        return scale
    exponents = scale.clone(memory_format=torch.contiguous_format).view(torch.uint8)[:, : K // 128]
    return (exponents.to(torch.int32) << 23).view(torch.float32)


@pytest.fixture
def gemms(monkeypatch):
    gemms = Gemms()
    for name, function in (
        ("FP8_GEMM_NT", gemms.fp8_gemm_nt),
        ("FLASHINFER_GEMM", gemms.fp8_blockscale_gemm_sm90),
        ("CUTLASS_GEMM", gemms.cutlass_scaled_mm),
        ("TRITON_GEMM", gemms.triton),
    ):
        monkeypatch.setattr(
            vllm_compat, name, type("Found", (), {"get": staticmethod(lambda function=function: function)})
        )
    return gemms


def operands(m=M):
    x = torch.randn(m, K, dtype=torch.bfloat16)
    weight = torch.randn(N, K).to(torch.float8_e4m3fn)
    return x, weight, torch.rand(2, 2) + 0.5


@pytest.mark.parametrize(
    "engine, machine, m, called, layout, ue8m0",
    [
        (Engine.DEEP_GEMM, HOPPER, 5, "deep_gemm", ScaleLayout.COLUMN_TMA, True),
        (Engine.DEEP_GEMM, HOPPER_FP32, 5, "deep_gemm", ScaleLayout.COLUMN_TMA, False),
        (Engine.DEEP_GEMM, BLACKWELL, 5, "deep_gemm", ScaleLayout.PACKED_UE8M0, True),
        (Engine.FLASHINFER_DEEP_GEMM, HOPPER, 7, "flashinfer", ScaleLayout.COLUMN_TMA, False),
        (Engine.FLASHINFER_DEEP_GEMM, HOPPER, 8, "deep_gemm", ScaleLayout.COLUMN_TMA, False),
        (Engine.FLASHINFER_DEEP_GEMM, HOPPER, 31, "deep_gemm", ScaleLayout.COLUMN_TMA, False),
        (Engine.FLASHINFER_DEEP_GEMM, HOPPER, 32, "deep_gemm", ScaleLayout.COLUMN_TMA, True),
        (Engine.FLASHINFER_DEEP_GEMM, HOPPER_FP32, 32, "deep_gemm", ScaleLayout.COLUMN_TMA, False),
        (Engine.CUTLASS, HOPPER, 5, "cutlass", ScaleLayout.COLUMN, False),
        (Engine.TRITON, HOPPER, 5, "triton", ScaleLayout.ROW, False),
    ],
)
def test_each_gemm_gets_the_scales_it_takes(gemms, monkeypatch, engine, machine, m, called, layout, ue8m0):
    monkeypatch.setattr(fp8_block_op, "machine", lambda: machine)
    x, weight, weight_scale = operands(m)
    out = fp8_block_linear(x, weight, weight_scale, (128, 128), torch.bfloat16, engine)
    q, scale = per_token_group_quant(x, layout=layout, ue8m0=ue8m0)
    [(name, seen, cast)] = gemms.calls
    assert name == called
    assert seen.stride() == scale.stride()
    assert torch.equal(seen, scale)
    assert cast == (ue8m0 and name == "deep_gemm")
    assert torch.equal(out, fp8_block_scaled_mm(q, unpacked(scale), weight, weight_scale))


def test_batch_invariance_keeps_to_one_gemm(gemms, monkeypatch):
    monkeypatch.setattr(fp8_block_op, "machine", lambda: Machine((9, 0), True, ScaleLayout.COLUMN_TMA, True))
    fp8_block_linear(*operands(), (128, 128), torch.bfloat16, Engine.FLASHINFER_DEEP_GEMM)
    assert [name for name, *_ in gemms.calls] == ["deep_gemm"]


@pytest.mark.parametrize("engine", Engine)
def test_no_rows_call_no_gemm(gemms, engine):
    out = fp8_block_linear(*operands(0), (128, 128), torch.bfloat16, engine)
    assert out.shape == (0, N)
    assert not gemms.calls


def test_every_engine_has_a_function():
    assert set(fp8_block_op._ENGINES) == set(Engine)
