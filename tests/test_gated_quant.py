"""Gated activations with quantisation: the reference against its parts and float64, the CUDA kernels against both.

The kernels' exp2 and reciprocal are the hardware's, so scales agree to some 1e-6 and a number may be the neighbour of
the reference's where the two lie on either side of a rounding boundary.
"""

import pytest
import torch

from benchmarks.cases.silu_quant import MaskedSiluQuantCase, SiluQuantCase, masked_tests
from benchmarks.cases.silu_quant import tests as gated_cases
from vllm_b200_plugin.ops.gated_quant import (
    activate_and_multiply,
    gated_group_quant,
    gated_tensor_quant,
    gated_token_quant,
    masked_silu_group_quant,
)
from vllm_b200_plugin.ops.quant import ScaleLayout, empty_scale, per_token_group_quant
from vllm_b200_plugin.ops.token_quant import per_tensor_quant, per_token_quant

CASES = list(gated_cases())
MASKED = list(masked_tests())
E4M3 = torch.float8_e4m3fn
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CLAMP = {"limit": 1.5, "alpha": 1.702, "beta": 1.0}


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def quantise(x: torch.Tensor, case: SiluQuantCase) -> tuple[torch.Tensor, ...]:
    kwargs = {"activation": case.activation} | (CLAMP if case.activation == "silu_clamped" else {})
    if case.kind == "token":
        return gated_token_quant(x, case.dtype, **kwargs)
    if case.kind == "tensor":
        return (gated_tensor_quant(x, torch.tensor([0.05], device=x.device), case.dtype, **kwargs),)
    return gated_group_quant(x, case.group_size, case.dtype, layout=case.layout, ue8m0=case.ue8m0, **kwargs)


def steps(q: torch.Tensor) -> torch.Tensor:
    """int8 as they are, e4m3 counted through from the smallest to the largest number: neighbours differ by 1."""
    if q.dtype == torch.int8:
        return q.int()
    byte = q.view(torch.uint8).int()
    return torch.where(byte >= 128, 128 - byte, byte)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, share: float = 1e-3) -> None:
    """The same numbers but for neighbours here and there."""
    difference = (steps(actual.cpu()) - steps(expected)).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() <= share or difference.sum() <= 2


def assert_scales_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.stride() == expected.stride()
    if expected.dtype == torch.int32:
        assert (actual.cpu() == expected).double().mean() > 0.999
    else:
        torch.testing.assert_close(actual.cpu(), expected, rtol=4e-6, atol=0)


@pytest.mark.parametrize("case", [c for c in CASES if c.num_tokens * c.intermediate_size < 2**16], ids=str)
def test_reference_is_its_parts(case: SiluQuantCase) -> None:
    x = case.make_input("cpu")
    clamp = CLAMP if case.activation == "silu_clamped" else {}
    values = activate_and_multiply(x.float(), case.activation, **clamp)
    if case.kind == "token":
        expected = per_token_quant(values, case.dtype)[:2]
    elif case.kind == "tensor":
        expected = (per_tensor_quant(values, torch.tensor([0.05]), case.dtype),)
    elif case.dtype == torch.int8:
        scale = values.unflatten(-1, (-1, case.group_size)).abs().amax(-1) / 127
        expected = ((values / scale.repeat_interleave(case.group_size, -1)).round().to(torch.int8), scale)
    else:
        expected = per_token_group_quant(values, case.group_size, case.dtype, layout=case.layout, ue8m0=case.ue8m0)
    for got, want in zip(quantise(x, case), expected, strict=True):
        assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("activation", ["silu", "silu_clamped", "gelu", "gelu_tanh"])
def test_activation_is_the_definition_in_float64(activation: str) -> None:
    x = SiluQuantCase(7, 512).make_input("cpu")
    gate, up = x.double().chunk(2, -1)
    if activation == "silu_clamped":
        gate, up = gate.clamp(max=CLAMP["limit"]), up.clamp(-CLAMP["limit"], CLAMP["limit"]) + CLAMP["beta"]
    expected = {
        "silu": lambda: gate / (1 + torch.exp(-gate)),
        "silu_clamped": lambda: gate / (1 + torch.exp(-CLAMP["alpha"] * gate)),
        "gelu": lambda: gate * (1 + torch.erf(gate / 2**0.5)) / 2,
        "gelu_tanh": lambda: gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) / 2,
    }[activation]() * up
    clamp = CLAMP if activation == "silu_clamped" else {}
    actual = activate_and_multiply(x.float(), activation, **clamp).double()
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_is_near_the_reference(case: SiluQuantCase) -> None:
    x = case.make_input("cpu")
    actual, expected = quantise(x.cuda(), case), quantise(x, case)
    assert_near(actual[0], expected[0], 3e-3 if case.dtype == torch.int8 else 1e-3)
    if len(actual) > 1:
        assert_scales_near(actual[1], expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in CASES if c.activation != "silu_clamped"], ids=str)
def test_cuda_is_the_reference_where_the_activation_is_exact(case: SiluQuantCase) -> None:
    """A gate so large that its sigmoid is 1, and a power of two: the product is a number of the input's type."""
    x = case.make_input("cpu")
    x[:, : case.intermediate_size] = 32.0 * torch.exp2(torch.arange(case.num_tokens) % 2)[:, None]
    for actual, expected in zip(quantise(x.cuda(), case), quantise(x, case), strict=True):
        assert torch.equal(bits(actual.cpu()), bits(expected))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["group", "token", "tensor"])
def test_a_row_is_the_same_in_any_batch(kind: str) -> None:
    case = SiluQuantCase(600, 2048, kind=kind)
    x = case.make_input("cuda")
    whole = quantise(x, case)
    for row in (0, 131, 132, 300, 599):
        for got, want in zip(quantise(x[row : row + 1], case), whole, strict=True):
            assert torch.equal(bits(got), bits(want[row : row + 1]))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(7, 3, 640), (5, 300, 2048), (3000, 1, 128)])
def test_batches_are_quantised_as_their_rows(shape: tuple[int, int, int]) -> None:
    """Of every batch its first rows: the strides between batches are not those of the rows."""
    *rows, size = shape
    x = torch.randn(rows[0], rows[1] + 2, 2 * size, device="cuda").bfloat16()[:, : rows[1]]
    q = torch.empty(*shape, dtype=E4M3, device="cuda")
    scale = torch.empty(*rows, size // 128, device="cuda")
    torch.ops.vllm_b200.gated_group_quant(x, q, scale, 128, 1e-10, False, False, 0, 0.0, 1.0, 0.0, False)
    expected, expected_scale = gated_group_quant(x.flatten(0, 1))
    assert torch.equal(bits(q.flatten(0, 1)), bits(expected)) and torch.equal(scale.flatten(0, 1), expected_scale)


@pytest.mark.gpu
def test_pdl_changes_nothing() -> None:
    x = SiluQuantCase(64, 2048).make_input("cuda")
    for _ in range(50):
        q, scale = gated_group_quant(x, pdl=True)
        again, again_scale = gated_group_quant(x, pdl=False)
        assert torch.equal(q.view(torch.uint8), again.view(torch.uint8)) and torch.equal(scale, again_scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [ScaleLayout.COLUMN_TMA, ScaleLayout.PACKED_UE8M0])
def test_padding_rows_are_zero(device: str, layout: ScaleLayout) -> None:
    x = torch.randn(5, 1280, device=device).bfloat16()
    torch.full((5, 8), -1, dtype=torch.int32, device=device)
    _, scale = gated_group_quant(x, layout=layout)
    columns = scale.shape[1]
    storage = scale.as_strided((columns, 8), (8, 1))
    assert not storage[:, 5:].any()


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_inf(device: str) -> None:
    x = torch.randn(2, 512, device=device).bfloat16()
    x[0, 3], x[1, 256 + 130] = float("nan"), float("inf")
    _, scale = gated_group_quant(x)
    scale = scale.cpu()
    assert scale[0, 0].isnan() and scale[0, 1].isfinite()
    assert scale[1, 1] == float("inf") and scale[1, 0].isfinite()
    _, token_scale = gated_token_quant(x)
    assert token_scale[0].isnan() and token_scale[1] == float("inf")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", MASKED, ids=str)
def test_masked_writes_valid_rows_alone(device: str, case: MaskedSiluQuantCase) -> None:
    counts = case.make_counts()
    generator = torch.Generator().manual_seed(1)
    shape = (case.num_experts, case.max_tokens, 2 * case.intermediate_size)
    x = torch.randn(shape, generator=generator).bfloat16()
    layout = ScaleLayout.PACKED_UE8M0 if case.packed else ScaleLayout.COLUMN
    q = torch.full((*shape[:2], case.intermediate_size), 7, dtype=torch.uint8, device=device).view(E4M3)
    scale = empty_scale(q, 128, layout).fill_(9)
    masked_silu_group_quant(x.to(device), counts.to(device), q, scale, ue8m0=case.packed)
    expected_q, expected_scale = gated_group_quant(x.flatten(0, 1), layout=layout)
    valid = torch.arange(case.max_tokens) < counts.unsqueeze(-1)
    q, scale = q.cpu(), scale.cpu()
    assert (q.view(torch.uint8)[~valid] == 7).all() and (scale[~valid] == 9).all()
    if valid.any():
        assert_near(q[valid], expected_q.view(*q.shape)[valid])
        found, want = scale[valid], expected_scale.reshape(scale.shape)[valid]
        if case.packed:
            assert (found == want).double().mean() > 0.99
        else:
            torch.testing.assert_close(found, want, rtol=4e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts, num_tokens", [(32, 600), (256, 3000)])
def test_masked_rows_are_those_of_the_plain_op(num_experts: int, num_tokens: int) -> None:
    """Whatever the counts: a row's result depends on nothing but the row."""
    case = MaskedSiluQuantCase(num_experts, 64, 768, num_tokens, counts="skewed")
    counts = case.make_counts().cuda()
    x = torch.randn(num_experts, 64, 1536, device="cuda").bfloat16()
    q = torch.empty(num_experts, 64, 768, dtype=E4M3, device="cuda")
    scale = empty_scale(q, 128, ScaleLayout.COLUMN)
    masked_silu_group_quant(x, counts, q, scale)
    valid = torch.arange(64, device="cuda") < counts.unsqueeze(-1)
    plain, plain_scale = gated_group_quant(x[valid])
    assert torch.equal(bits(q[valid]), bits(plain)) and torch.equal(scale[valid], plain_scale)


@pytest.mark.gpu
def test_masked_past_2_to_the_31_elements() -> None:
    num_experts, max_tokens, size = 32, 20_000, 4096
    assert num_experts * max_tokens * size > 2**31
    x = torch.empty(num_experts, max_tokens, 2 * size, dtype=torch.bfloat16, device="cuda")
    q = torch.empty(num_experts, max_tokens, size, dtype=E4M3, device="cuda")
    scale = empty_scale(q, 128, ScaleLayout.COLUMN)
    counts = torch.zeros(num_experts, dtype=torch.int32)
    counts[0], counts[-1] = 3, max_tokens
    x[0, :3].normal_(), x[-1].normal_()
    masked_silu_group_quant(x, counts.cuda(), q, scale)
    for expert, rows in ((0, slice(0, 3)), (-1, slice(0, 3)), (-1, slice(max_tokens - 3, max_tokens))):
        alone, alone_scale = gated_group_quant(x[expert, rows])
        assert torch.equal(bits(q[expert, rows]), bits(alone)) and torch.equal(scale[expert, rows], alone_scale)


@pytest.mark.gpu
def test_masked_counts_out_of_range_are_clamped() -> None:
    x = torch.randn(3, 4, 256, device="cuda").bfloat16()
    q = torch.zeros(3, 4, 128, dtype=torch.uint8, device="cuda").view(E4M3)
    scale = torch.zeros(3, 4, 1, device="cuda")
    masked_silu_group_quant(x, torch.tensor([-1, 100, 2], dtype=torch.int32, device="cuda"), q, scale)
    assert (scale != 0).sum(1).flatten().tolist() == [0, 4, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["group", "token", "tensor"])
def test_cuda_past_2_to_the_31_elements(kind: str) -> None:
    num_tokens, size = 300_001, 7168
    x = torch.empty(num_tokens, 2 * size, dtype=torch.bfloat16, device="cuda").normal_()
    case = SiluQuantCase(num_tokens, size, ScaleLayout.COLUMN_TMA, kind)
    whole = quantise(x, case)
    for rows in (slice(0, 5), slice(num_tokens - 5, num_tokens)):
        for batched, alone in zip(whole, quantise(x[rows], case), strict=True):
            assert torch.equal(bits(batched[rows]), bits(alone))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"x": torch.zeros(2, 256)}, "x: takes bfloat16, float16, got torch.float32"),
        ({"x": torch.zeros(2, 128).half()}, "x: the last dimension takes multiples of 256, got 128"),
        ({"group_size": 32, "x": torch.zeros(2, 256).half()}, r"group_size: takes one of \(64, 128\), got 32"),
        ({"activation": "relu"}, "activation: takes one of silu, silu_clamped, gelu, gelu_tanh, got 'relu'"),
        ({"dtype": torch.int8, "ue8m0": True}, "ue8m0: goes with torch.float8_e4m3fn"),
        ({"eps": 0.0}, "eps: takes"),
    ],
)
def test_bad_input_is_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_group_quant(**{"x": torch.zeros(2, 512).half(), **kwargs})
