"""Reference of the FP8 experts against a float64 composition on the same quantised operands."""

import pytest
import torch

from vllm_b200_plugin.ops.moe import fp8_block_scaled_moe
from vllm_b200_plugin.ops.quant import per_token_group_quant

EXPERTS, HIDDEN, INTERMEDIATE, TOPK = 6, 256, 384, 2


def weights(generator, *shape):
    *experts, rows, columns = shape
    weight = (torch.randn(shape, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(*experts, rows // 128, columns // 128, generator=generator) / 2000 + 1e-4
    return weight, scale


def layer(num_tokens: int, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(num_tokens)
    w13, w13_scale = weights(generator, EXPERTS, 2 * INTERMEDIATE, HIDDEN)
    w2, w2_scale = weights(generator, EXPERTS, HIDDEN, INTERMEDIATE)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
    scores = torch.rand(num_tokens, EXPERTS, generator=generator)
    topk_weights, topk_ids = scores.topk(TOPK)
    return x, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids


def product(x, weight, scale):
    q, q_scale = per_token_group_quant(x)
    a = q.double() * q_scale.double().repeat_interleave(128, 1)
    b = weight.double() * scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return a @ b.t()


def in_float64(x, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids):
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for weight, expert in zip(topk_weights[token], topk_ids[token], strict=True):
            hidden = product(x[token : token + 1], w13[expert], w13_scale[expert])
            gate, up = hidden[:, :INTERMEDIATE], hidden[:, INTERMEDIATE:]
            hidden = (gate * torch.sigmoid(gate) * up).to(x.dtype)
            out[token] += weight.double() * product(hidden, w2[expert], w2_scale[expert])[0]
    return out


def difference(x, y):
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())


@pytest.mark.parametrize("num_tokens", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_against_float64(num_tokens, dtype):
    arguments = layer(num_tokens, dtype)
    out = fp8_block_scaled_moe(*arguments)
    assert out.dtype == dtype
    assert difference(out, in_float64(*arguments)) < 1e-3


def test_no_tokens():
    assert fp8_block_scaled_moe(*layer(0)).shape == (0, HIDDEN)


def test_experts_that_are_not_here_add_nothing():
    *arguments, topk_weights, topk_ids = layer(4)
    here = topk_ids.masked_fill(topk_ids >= 3, -1)
    out = fp8_block_scaled_moe(*arguments, topk_weights, here)
    expected = fp8_block_scaled_moe(*arguments, topk_weights * (here >= 0), topk_ids)
    assert torch.equal(out, expected)
    assert not fp8_block_scaled_moe(*arguments, topk_weights, torch.full_like(topk_ids, -1)).any()


def test_is_one_op_for_torch_compile():
    arguments = layer(3)
    compiled = torch.compile(fp8_block_scaled_moe, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), fp8_block_scaled_moe(*arguments))


@pytest.mark.parametrize(
    "index, change, words",
    [
        (0, lambda t: t[0], "x: takes"),
        (1, lambda t: t[:, 1:], "w13: takes"),
        (3, lambda t: t[:, :, 1:], "w2: takes"),
        (5, lambda t: t[:, :1], "topk_weights: takes"),
        (6, lambda t: t.float(), "topk_ids: takes integers"),
        (6, lambda t: t + EXPERTS, f"topk_ids: takes ids below {EXPERTS}"),
    ],
)
def test_errors_name_the_argument(index, change, words):
    arguments = list(layer(3))
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=words):
        fp8_block_scaled_moe(*arguments)
