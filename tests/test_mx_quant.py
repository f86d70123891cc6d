"""MXFP4 and MXFP8 quantisation: the reference against vLLM and compressed-tensors, the CUDA kernel against the
reference, bit for bit."""

import pytest
import torch
from test_nvfp4_quant import assert_same, codes

from vllm_b200_plugin.ops.mx_quant import mxfp4_quant, mxfp8_quant
from vllm_b200_plugin.ops.nvfp4_quant import e2m1_to_float, swizzle_scales, unswizzle_scales

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OPS = [mxfp4_quant, mxfp8_quant]
SHAPES = [(1, 32), (5, 640), (31, 96), (129, 2880), (300, 1056)]


def make_input(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal values, each row at a scale of its own; every fourth group is about a power of two."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp2(torch.empty(rows, 1).uniform_(-6, 6, generator=generator))
    ulp = torch.finfo(dtype).eps
    around = torch.tensor([1 - ulp / 2, 1.0, 1 + ulp, 1.75 - ulp, 1.75, 1.75 + ulp])
    x[:, ::128] = 64 * around[torch.randint(6, (rows, -(-columns // 128)), generator=generator)]
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp8_reference_is_vllms(dtype: torch.dtype) -> None:
    utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.mxfp8_utils")
    x = make_input(300, 1056, dtype)
    x[5, :32] = 0
    expected_q, expected_scale = utils._mxfp8_e4m3_quantize_torch(x)
    assert_same(mxfp8_quant(x), (expected_q, expected_scale))
    swizzled = mxfp8_quant(x, True)[1]
    assert torch.equal(swizzled.flatten(), utils.swizzle_mxfp8_scale(expected_scale, 300, 1056))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_reference_is_compressed_tensors(dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    x = make_input(300, 1056, dtype)
    groups = x.float().unflatten(-1, (-1, 32))
    expected = generate_mx_scales(groups.abs().amax(-1))
    q, scale = mxfp4_quant(x)
    assert torch.equal(scale.float(), expected)
    with torch.compiler.set_stance("force_eager"):
        scaled = groups / torch.exp2(expected - 127).unsqueeze(-1)
        values = FP4_E2M1_DATA.cast_to_fp4(scaled.clamp(-6, 6)).flatten(-2)
    assert torch.equal(e2m1_to_float(q), values)
    same = codes(q) == codes(pack_fp4_to_uint8(values))
    assert same[values != 0].all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_swizzled_scales_are_the_linear_ones(device: str, op, rows: int, columns: int) -> None:
    x = make_input(rows, columns).to(device)
    (q, scale), (swizzled_q, swizzled) = op(x), op(x, True)
    assert torch.equal(q.view(torch.uint8), swizzled_q.view(torch.uint8))
    assert torch.equal(swizzle_scales(scale), swizzled)
    assert torch.equal(unswizzle_scales(swizzled, rows, columns // 32), scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_special_values(device: str, op) -> None:
    groups = torch.ones(5, 32)
    groups[0] = 0.0
    groups[1, 5] = float("nan")
    groups[2, 6], groups[2, 7] = float("inf"), float("-inf")
    groups[3] = 2.0**-130
    groups[4, 9] = torch.finfo(torch.float32).max
    q, scale = op(groups.view(1, -1).to(device))
    q, scale = q.cpu(), scale.cpu().flatten()
    if op is mxfp4_quant:
        q = codes(q).view(5, 32)
        assert scale.tolist() == [0, 255, 253, 0, 253]
        assert not q[0].any() and (q[1] == 7).all() and not q[3].any()
        assert q[2].tolist() == [0] * 6 + [7, 15] + [0] * 24 and q[4, 9] == 6
    else:
        q = q.float().view(5, 32)
        assert scale.tolist() == [0, 255, 254, 0, 247]
        assert not q[0].any() and q[1].isnan().all() and (q[3] == 0.125).all()
        assert q[2].tolist() == [0] * 6 + [448, -448] + [0] * 24 and q[4, 9] == 256


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("swizzled", [False, True])
def test_empty(device: str, op, swizzled: bool) -> None:
    for shape in ((0, 64), (3, 0)):
        q, scale = op(torch.empty(shape, device=device), swizzled)
        assert q.numel() == scale.numel() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("swizzled", [False, True])
def test_cuda_is_the_reference(op, dtype: torch.dtype, swizzled: bool) -> None:
    for shape in SHAPES:
        x = make_input(*shape, dtype)
        assert_same(op(x.cuda(), swizzled), op(x, swizzled))
        wide = torch.cat([x, x, x], -1)
        assert_same(op(wide.cuda()[:, shape[1] : 2 * shape[1]], swizzled, pdl=True), op(x, swizzled))


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_is_the_reference_for_any_value(op, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.float32:
        pattern = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), generator=generator).int().view(dtype)
    else:
        pattern = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        pattern = pattern[torch.randperm(len(pattern), generator=generator)]
    alone = torch.zeros(len(pattern), 32, dtype=dtype)  # every value as the largest of its group
    alone[:, 7] = pattern
    for x in (pattern.view(-1, 1024), alone.view(-1, 1024)):
        assert_same(op(x.cuda()), op(x))


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_cuda_past_2_to_the_31_elements(op) -> None:
    num_tokens, hidden_size = 2**31 // 7168 + 301, 7168
    x = torch.empty(num_tokens, hidden_size, dtype=torch.bfloat16, device="cuda").normal_()
    q, scale = op(x)
    for first in (0, 2**31 // hidden_size - 2, num_tokens - 9):
        rows = slice(first, first + 9)
        assert_same((q[rows], scale[rows]), op(x[rows].cpu()))


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(32), r"x: takes 2 dimensions, got shape \(32,\)"),
        (torch.zeros(2, 48), "x: the last dimension takes multiples of 32, got 48"),
        (torch.zeros(2, 32).double(), "x: takes bfloat16, float16, float32, got torch.float64"),
    ],
)
def test_bad_input_is_named(x: torch.Tensor, message: str) -> None:
    for op in OPS:
        with pytest.raises(ValueError, match=message):
            op(x)
