"""References of the FP8 products against float64 on the same quantised operands."""

import pytest
import torch

from vllm_b200_plugin.ops.gemm import fp8_block_scaled_mm
from vllm_b200_plugin.ops.quant import ScaleLayout, per_token_group_quant

BLOCK = (128, 128)


def operands(m: int, n: int, k: int, block=BLOCK, layout=ScaleLayout.ROW):
    generator = torch.Generator().manual_seed(m * 31 + n * 7 + k)
    x = torch.randn(m, k, generator=generator)
    a, a_scale = per_token_group_quant(x, block[1], layout=layout)
    b = torch.randn(n, k, generator=generator).clamp(-4, 4).mul(100).to(torch.float8_e4m3fn)
    b_scale = torch.rand(-(-n // block[0]), -(-k // block[1]), generator=generator) / 100 + 1e-3
    return a, a_scale, b, b_scale


def in_float64(a, a_scale, b, b_scale, block):
    """Sums of products block by block, so that scales are spread in another way than in the reference."""
    out = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64)
    for i in range(b_scale.shape[0]):
        for j in range(b_scale.shape[1]):
            rows, columns = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            product = a[:, columns].double() @ b[rows, columns].double().t()
            out[:, rows] += product * a_scale[:, j, None].double() * b_scale[i, j].double()
    return out


@pytest.mark.parametrize("m, n, k", [(1, 128, 128), (7, 200, 384), (33, 576, 1024), (5, 1, 256), (128, 2112, 256)])
@pytest.mark.parametrize("layout", [ScaleLayout.ROW, ScaleLayout.COLUMN_TMA])
def test_against_float64(m, n, k, layout):
    arguments = operands(m, n, k, layout=layout)
    out = fp8_block_scaled_mm(*arguments, BLOCK, torch.float32)
    expected = in_float64(*arguments, BLOCK)
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    bf16 = fp8_block_scaled_mm(*arguments, BLOCK)
    assert bf16.dtype == torch.bfloat16
    assert torch.equal(bf16, out.to(torch.bfloat16))


@pytest.mark.parametrize("block", [(64, 128), (32, 32), (128, 64)])
def test_other_blocks(block):
    arguments = operands(9, 150, 256, block)
    out = fp8_block_scaled_mm(*arguments, block, torch.float32)
    expected = in_float64(*arguments, block)
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_no_rows():
    out = fp8_block_scaled_mm(*operands(0, 200, 256), BLOCK, torch.float16)
    assert out.shape == (0, 200)
    assert out.dtype == torch.float16


def test_scales_with_nan_stay_in_their_row():
    a, a_scale, b, b_scale = operands(3, 128, 128)
    a_scale[1] = float("nan")
    out = fp8_block_scaled_mm(a, a_scale, b, b_scale, BLOCK, torch.float32)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda a, s, b, t: (a.float(), s, b, t), "a: takes 2 dimensions of torch.float8_e4m3fn"),
        (lambda a, s, b, t: (a, s.double(), b, t), "a_scale: takes 2 dimensions of torch.float32"),
        (lambda a, s, b, t: (a, s, b[None], t), "b: takes 2 dimensions"),
        (lambda a, s, b, t: (a, s, b[:, :128], t), r"b: takes \[N, 256\]"),
        (lambda a, s, b, t: (a, s[:, :1], b, t), r"a_scale: takes \(4, 2\), got \(4, 1\)"),
        (lambda a, s, b, t: (a, s, b, t[:1]), r"b_scale: takes \(2, 2\), got \(1, 2\)"),
    ],
)
def test_errors_name_the_argument(change, words):
    with pytest.raises(ValueError, match=words):
        fp8_block_scaled_mm(*change(*operands(4, 200, 256)), BLOCK)


def test_block_shape_must_be_positive():
    with pytest.raises(ValueError, match="block_shape"):
        fp8_block_scaled_mm(*operands(4, 200, 256), (0, 128))
