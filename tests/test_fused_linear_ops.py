"""The ops of a linear layer and what comes before it: the same numbers as one after the other."""

import pytest
import torch

pytest.importorskip("vllm")

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.ops.gated_quant import activate_and_multiply
from vllm_b200_plugin.ops.norm_quant import normalise

HOPPER, N, K, MOST, EPS = (9, 0), 192, 256, 8, 1e-5
BF16, FP16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MEASURED = {(N, K): ((MOST, (1, 4, 1, 0), False),)}


@pytest.fixture
def ops(monkeypatch, dispatch_table):
    """Ours for up to MOST tokens; a reference stands for CUTLASS."""
    import vllm_b200_plugin.integration.fused_linear_ops  # noqa: F401
    from vllm_b200_plugin.integration import library

    def cutlass(a, b, *, out_dtype, scale_a, scale_b, bias):
        y = (a.double() @ b.double()) * scale_a.double().view(-1, 1) * scale_b.double().view(1, -1)
        return (y if bias is None else y + bias.double()).to(out_dtype)

    monkeypatch.setattr(library, "capability", lambda: HOPPER)
    monkeypatch.setattr(vllm_compat, "CUTLASS_GEMM", type("Found", (), {"get": staticmethod(lambda: cutlass)}))
    dispatch_table({(HOPPER, "fp8"): MEASURED, (HOPPER, "int8"): MEASURED})
    return torch.ops.vllm_b200


def layer(device, kind, static, dtype, with_bias=True):
    """The arguments of a layer behind x."""
    weight = torch.randn(N, K) * 20
    weight = weight.round().clamp(-127, 127).to(kind) if kind == torch.int8 else weight.to(kind)
    scale = (torch.rand(N, 1) + 0.5) / 300
    x_scale = torch.tensor(1 / 32 if kind == torch.int8 else 1 / 64) if static else None
    bias = torch.randn(N, dtype=dtype) if with_bias else None
    tensors = [None if t is None else t.to(device) for t in (weight, scale, x_scale, bias)]
    return tensors[0].t(), *tensors[1:], dtype


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [E4M3, torch.int8])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("num_tokens", [0, 1, MOST, MOST + 1, 40])
def test_norm(ops, device, kind, static, dtype, num_tokens):
    """Bit for bit: what is quantised is rounded to the dtype of x on both sides."""
    arguments = layer(device, kind, static, dtype)
    x, residual = (torch.randn(num_tokens, K, dtype=dtype, device=device) for _ in range(2))
    norm_weight = 1 + torch.randn(K, dtype=dtype, device=device) / 8
    kept = residual.clone()
    on_cpu = [tensor.cpu() for tensor in (x, residual.clone(), norm_weight)]
    expected = run(normalise(on_cpu[0], None, on_cpu[2], EPS, False).to(device), arguments)
    assert torch.equal(ops.norm_scaled_linear(x, norm_weight, EPS, *arguments), expected)
    expected = run(normalise(*on_cpu, EPS, False).to(device), arguments)
    out, summed = ops.add_norm_scaled_linear(x, residual, norm_weight, EPS, *arguments)
    assert torch.equal(out, expected) and torch.equal(summed.cpu(), on_cpu[1]) and torch.equal(residual, kept)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [E4M3, torch.int8])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, MOST, MOST + 1, 40])
def test_silu(ops, device, kind, static, num_tokens):
    """Nothing is rounded before the quantisation, whose results may be neighbours on a GPU."""
    from vllm_b200_plugin.ops import token_quant

    weight, scale, x_scale, bias, dtype = arguments = layer(device, kind, static, BF16)
    x = torch.randn(num_tokens, 2 * K, dtype=BF16, device=device)
    y = activate_and_multiply(x.float(), "silu")
    if static:
        q, y_scale = token_quant.per_tensor_quant(y, x_scale, kind), x_scale
    else:
        q, y_scale, _ = token_quant.per_token_quant(y, kind)
    expected = (q.double() @ weight.double()) * y_scale.double() * scale.double().t() + bias.double()
    out = ops.silu_scaled_linear(x, *arguments)
    assert out.dtype == dtype and out.shape == expected.shape
    if num_tokens:
        difference = (out.double() - expected).abs()
        assert float(difference.max()) <= 2e-2 * float(expected.abs().max())
        assert float(difference.mean()) <= 4e-3 * float(expected.abs().mean())


def run(y, arguments):
    """Quantised by the same arithmetic, and the same GEMM."""
    from vllm_b200_plugin.integration import scaled_linear
    from vllm_b200_plugin.ops import token_quant

    weight, scale, x_scale, bias, dtype = arguments
    if x_scale is None:
        q, x_scale, _ = token_quant.per_token_quant(y, weight.dtype)
    else:
        q = token_quant.per_tensor_quant(y, x_scale, weight.dtype)
    return scaled_linear.multiply(q, x_scale, weight, scale, bias, dtype, early=True)


@pytest.mark.parametrize("static", [False, True])
def test_ops_trace(ops, static):
    arguments = layer("cpu", E4M3, static, BF16, with_bias=False)
    x, norm_weight = torch.randn(3, K, dtype=BF16), torch.randn(K, dtype=BF16)
    for op, inputs in (
        (ops.norm_scaled_linear, (x, norm_weight, EPS)),
        (ops.add_norm_scaled_linear, (x, x.clone(), norm_weight, EPS)),
        (ops.silu_scaled_linear, (torch.randn(3, 2 * K, dtype=BF16),)),
    ):
        torch.library.opcheck(op.default, (*inputs, *arguments), test_utils=("test_faketensor",))
