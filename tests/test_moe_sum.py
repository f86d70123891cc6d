"""The sum over a token's experts: against float64, and CUDA bit for bit against the reference."""

import pytest
import torch

from vllm_b200_plugin.ops.moe_sum import moe_sum

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 8, 2048), (3, 6, 7168), (5, 3, 64), (100, 1, 256), (2, 10, 8), (70, 2, 1000)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sum(device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, device=device).to(dtype)
    out = moe_sum(x)
    torch.testing.assert_close(out.double(), x.double().sum(1), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert torch.equal(out.cpu(), moe_sum(x.cpu()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mapped", [False, True])
def test_missing_experts_are_left_out_unread(device: str, ids_dtype: torch.dtype, mapped: bool) -> None:
    x = torch.randn(9, 8, 128, device=device).bfloat16()
    ids = torch.arange(72, device=device).view(9, 8) % 5 - 1
    expert_map = torch.tensor([0, -1, 1, -1], dtype=torch.int32, device=device) if mapped else None
    missing = (ids < 0) | (ids == 1) | (ids == 3) if mapped else ids < 0
    expected = x.masked_fill(missing.unsqueeze(2), 0)
    out = moe_sum(x.masked_fill(missing.unsqueeze(2), float("nan")), ids.to(ids_dtype), expert_map)
    assert torch.equal(out, moe_sum(expected))


@pytest.mark.parametrize("device", DEVICES)
def test_strides_and_no_tokens(device: str) -> None:
    x = torch.randn(6, 12, 256, device=device).half()
    assert torch.equal(moe_sum(x[::2, 1:9, 64:192]), moe_sum(x[::2, 1:9, 64:192].contiguous()))
    assert moe_sum(x[:0]).shape == (0, 256)


@pytest.mark.gpu
def test_cuda_past_2_to_the_31_elements_and_65535_tokens() -> None:
    x = torch.empty(150_000, 2, 7168, dtype=torch.bfloat16, device="cuda").normal_()
    assert x.numel() > 2**31
    out = moe_sum(x)
    for rows in (slice(0, 5), slice(65_533, 65_538), slice(-5, None)):
        assert torch.equal(out[rows].cpu(), moe_sum(x[rows].cpu()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(4, 64)}, r"x: takes float32, float16 or bfloat16 \[num_tokens, topk, hidden_size\]"),
        ({"x": torch.zeros(4, 2, 63)}, "x: takes rows of whole 16 bytes"),
        ({"x": torch.zeros(4, 2, 65)[:, :, 1:]}, "x: takes rows of whole 16 bytes at multiples of 16 bytes"),
        (
            {"topk_ids": torch.zeros(4, 3, dtype=torch.int32)},
            r"topk_ids: takes int32 or int64 \(4, 2\), got torch.int32",
        ),
        ({"expert_map": torch.zeros(4, dtype=torch.int32)}, r"expert_map: takes int32 \[num_experts\], with topk_ids"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe_sum(**{"x": torch.zeros(4, 2, 64), **change})
