"""Per-token-group quantisation: the CPU reference against its definition in float64, the CUDA kernel against the
reference, bit for bit."""

import pytest
import torch

from benchmarks.cases.quant import GroupQuantCase
from benchmarks.cases.quant import tests as quant_cases
from vllm_b200_plugin.ops.quant import QUANT_MAX, ScaleLayout, per_token_group_quant

E4M3 = torch.float8_e4m3fn
CASES = list(quant_cases())
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NAN, INF = float("nan"), float("inf")


def quantise(x: torch.Tensor, case: GroupQuantCase) -> tuple[torch.Tensor, torch.Tensor]:
    return per_token_group_quant(x, case.group_size, case.dtype, layout=case.layout, ue8m0=case.ue8m0)


def e4m3_values() -> tuple[torch.Tensor, torch.Tensor]:
    """The finite non-negative e4m3 numbers from the format's definition, ascending, and their bytes."""
    byte = torch.arange(0x7F)
    exponent, mantissa = byte >> 3, (byte & 7).double()
    value = torch.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent.double() - 7))
    return value, byte


def to_e4m3_by_definition(y: torch.Tensor) -> torch.Tensor:
    """Bytes of the e4m3 numbers nearest to y (float64), ties to the even mantissa, saturating."""
    value, byte = e4m3_values()
    magnitude = y.abs().clamp(max=448.0)
    upper = torch.searchsorted(value, magnitude).clamp(max=len(value) - 1)
    lower = (upper - 1).clamp(min=0)
    below, above = magnitude - value[lower], value[upper] - magnitude
    nearest = torch.where((below < above) | ((below == above) & (byte[lower] % 2 == 0)), lower, upper)
    return (byte[nearest] | (torch.signbit(y).long() << 7)).to(torch.uint8)


def by_definition(x: torch.Tensor, case: GroupQuantCase) -> tuple[torch.Tensor, torch.Tensor]:
    """q and the unpacked fp32 scales in float64. Rounding a float64 quotient of two fp32 numbers to fp32 is exact."""
    groups = x.double().unflatten(-1, (-1, case.group_size))
    eps = torch.tensor(1e-10).double()
    scale = (groups.abs().amax(-1).clamp(min=eps) / QUANT_MAX[case.dtype]).float().double()
    if case.ue8m0:
        mantissa, exponent = torch.frexp(scale.clamp(min=eps))
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    quotient = (groups / scale.unsqueeze(-1)).float().double().flatten(-2)
    if case.dtype == torch.int8:
        return quotient.trunc().clamp(-128, 127).to(torch.int8), scale.float()
    return to_e4m3_by_definition(quotient), scale.float()


def unpack(scale: torch.Tensor, groups: int) -> torch.Tensor:
    """int32 UE8M0 words -> fp32 scales, and the bytes beyond the last group have to be 0."""
    exponents = scale.contiguous().unsqueeze(-1).view(torch.uint8).flatten(-2)
    assert not exponents[..., groups:].any()
    exponents = exponents[..., :groups].int()
    return torch.ldexp(torch.ones(exponents.shape), exponents - 127)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_definition(case: GroupQuantCase) -> None:
    x = case.make_input("cpu")
    q, scale = quantise(x, case)
    expected_q, expected_scale = by_definition(x, case)
    if case.layout is ScaleLayout.PACKED_UE8M0:
        scale = unpack(scale, expected_scale.shape[-1])
    assert torch.equal(scale, expected_scale)
    assert torch.equal(q.view(expected_q.dtype), expected_q)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_is_the_reference(case: GroupQuantCase) -> None:
    x = case.make_input("cuda")
    assert_same(quantise(x, case), quantise(x.cpu().as_strided(x.shape, x.cpu().stride()), case))


def assert_same(actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Shape, strides and every byte, the padding of the scales included."""
    for got, want in zip(actual, expected, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype and got.stride() == want.stride()
        assert got.untyped_storage().nbytes() == want.untyped_storage().nbytes()
        got, want = (t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,)).cpu() for t in (got, want))
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ScaleLayout)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 9])
def test_layout_and_padding(device: str, layout: ScaleLayout, num_tokens: int) -> None:
    x = torch.randn(num_tokens, 5 * 128, device=device).bfloat16()
    # Freed right away: the next allocation of the size finds a poisoned buffer.
    torch.full((5, num_tokens + 3), -1, dtype=torch.int32, device=device)
    _, scale = per_token_group_quant(x, layout=layout)
    padded = -(-num_tokens // 4) * 4
    shape, stride = {
        ScaleLayout.ROW: ((num_tokens, 5), (5, 1)),
        ScaleLayout.COLUMN: ((num_tokens, 5), (1, num_tokens)),
        ScaleLayout.COLUMN_TMA: ((num_tokens, 5), (1, padded)),
        ScaleLayout.PACKED_UE8M0: ((num_tokens, 2), (1, padded)),
    }[layout]
    assert (tuple(scale.shape), scale.stride()) == (shape, stride)
    storage = scale.as_strided((scale.untyped_storage().nbytes() // 4,), (1,)).view(shape[1], -1)
    if layout in (ScaleLayout.COLUMN_TMA, ScaleLayout.PACKED_UE8M0):
        assert not storage[:, num_tokens:].any()


@pytest.mark.parametrize("device", DEVICES)
def test_padding_stops_at_the_end_of_the_storage(device: str) -> None:
    """vLLM allocates the packed scales with empty_strided: the last column has no padding rows to write."""
    x = torch.randn(5, 1024, device=device).bfloat16()
    guarded = torch.full((5 + 8 + 3,), 7, dtype=torch.int32, device=device)
    scale = guarded[:13].as_strided((5, 2), (1, 8))
    q = torch.empty(x.shape, dtype=E4M3, device=device)
    exact = torch.empty_strided((5, 2), (1, 8), dtype=torch.int32, device=device)
    for s in (scale, exact):
        torch.ops.vllm_b200.per_token_group_quant(x, q, s, 128, 1e-10, True, True)
    assert torch.equal(scale, exact)
    assert guarded[5:8].eq(0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_without_pad_the_rows_behind_are_left_alone(device: str) -> None:
    """The scales of the leading rows of a larger tensor, whose leading dimension looks like TMA padding."""
    x = torch.randn(6, 512, device=device).bfloat16()
    whole = torch.full((4, 8), 7.0, device=device).t()
    q = torch.empty(x.shape, dtype=E4M3, device=device)
    torch.ops.vllm_b200.per_token_group_quant(x, q, whole[:6], 128, 1e-10, False, False)
    assert torch.equal(whole[:6], per_token_group_quant(x)[1])
    assert whole[6:].eq(7.0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ScaleLayout)
@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (0, 4, 128), (2, 0, 128)])
def test_empty(device: str, layout: ScaleLayout, shape: tuple[int, ...]) -> None:
    q, scale = per_token_group_quant(torch.empty(shape, device=device), layout=layout)
    assert q.shape == shape and scale.shape[:-1] == torch.Size(shape[:-1]) and scale.numel() == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [E4M3, torch.int8])
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_special_values(device: str, dtype: torch.dtype, ue8m0: bool, input_dtype: torch.dtype) -> None:
    groups = torch.ones(6, 32)
    groups[0] = 0.0
    groups[0, 1] = -0.0
    groups[1, 5] = NAN
    groups[2, 6], groups[2, 7] = INF, -2.0
    groups[3] = torch.finfo(input_dtype).tiny / 4  # denormal
    groups[4, 9] = torch.finfo(input_dtype).max
    groups[5, 3], groups[5, 4] = INF, NAN
    x = groups.view(2, 96).to(input_dtype).to(device)
    q, scale = per_token_group_quant(x, 32, dtype, ue8m0=ue8m0)
    q, scale = q.cpu().float().view(6, 32), scale.cpu().flatten()
    floor = 2.0**-33 if ue8m0 else (torch.tensor(1e-10) / QUANT_MAX[dtype]).item()
    none = 0.0 if dtype == torch.int8 else NAN

    assert not q[0].any() and scale[0] == floor
    assert torch.equal(q[1], torch.full((32,), none)) or q[1].isnan().all()
    assert scale[1].isnan()
    assert scale[2] == INF
    assert torch.equal(
        q[2].nan_to_num(nan=99.0), torch.zeros(32).index_fill(0, torch.tensor([6]), 0.0 if none == 0 else 99.0)
    )
    tiny = x.view(6, 32)[3, 0].float().item()
    assert scale[3] == max(floor, scale[3]) and torch.isfinite(q[3]).all() and q[3, 0] <= tiny / floor + 1
    assert torch.isfinite(scale[4]) and q[4, 9] > QUANT_MAX[dtype] / 2 - 1
    assert scale[5].isnan()
    if dtype == E4M3:
        assert torch.signbit(q[0, 1]), "-0 keeps its sign"
        assert q[5].isnan().all()


def test_packed_scale_of_nan_and_inf_is_ue8m0_nan() -> None:
    x = torch.ones(1, 4 * 128)
    x[0, 5], x[0, 200] = NAN, INF
    _, scale = per_token_group_quant(x, layout=ScaleLayout.PACKED_UE8M0)
    assert scale.item() & 0xFFFF == 0xFFFF


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [E4M3, torch.int8])
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cuda_special_values_are_the_reference(dtype: torch.dtype, input_dtype: torch.dtype) -> None:
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1e-40, -1e-7, 1.0, torch.finfo(input_dtype).max])
    index = torch.randint(len(special), (64, 1024), generator=torch.Generator().manual_seed(0))
    x = special[index].to(input_dtype)
    x[:, 128:] = torch.where(x[:, 128:].isnan(), 1.0, x[:, 128:])
    x[:, 256:] = torch.where(x[:, 256:].isinf(), 2.0, x[:, 256:])
    for layout in ScaleLayout:
        for ue8m0 in (False, True):
            kwargs = {"dtype": dtype, "layout": layout, "ue8m0": ue8m0}
            actual = per_token_group_quant(x.cuda(), **kwargs)
            expected = per_token_group_quant(x, **kwargs)
            nan = expected[1].isnan() if expected[1].is_floating_point() else torch.zeros_like(expected[1], dtype=bool)
            assert torch.equal(actual[0].cpu().view(torch.uint8), expected[0].view(torch.uint8))
            assert torch.equal(actual[1].cpu().masked_fill(nan, 0), expected[1].masked_fill(nan, 0))
            assert actual[1].cpu().masked_select(nan).isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [E4M3, torch.int8])
@pytest.mark.parametrize("input_dtype, mantissas, binades", [(torch.bfloat16, 128, 20), (torch.float16, 1024, 12)])
def test_cuda_division_is_exact_for_all_mantissas(
    dtype: torch.dtype, input_dtype: torch.dtype, mantissas: int, binades: int
) -> None:
    """Every 16-bit mantissa under every maximum's mantissa: the kernel's quotient is the correctly rounded one."""
    maximum = 1 + torch.arange(mantissas) / mantissas
    values = (maximum * torch.exp2(-torch.arange(binades).float()).unsqueeze(-1)).flatten()
    values = torch.nn.functional.pad(values, (0, -len(values) % 31)).view(-1, 31)
    for chunk in maximum.split(64):
        groups = values.expand(len(chunk), *values.shape).minimum(chunk.view(-1, 1, 1))
        x = torch.cat([chunk.view(-1, 1, 1).expand(-1, len(values), 1), groups], -1).reshape(-1, 32 * len(values))
        x = x.to(input_dtype)
        assert_same(per_token_group_quant(x.cuda(), 32, dtype), per_token_group_quant(x, 32, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [E4M3, torch.int8])
def test_cuda_scale_is_exact_for_all_fp32_mantissas(dtype: torch.dtype) -> None:
    maximum = (torch.arange(1 << 23, dtype=torch.int32) + 0x3F800000).view(torch.float32)
    x = torch.zeros(1 << 13, 32 << 10, device="cuda")
    x[:, ::32] = maximum.view(1 << 13, -1).cuda()
    _, scale = per_token_group_quant(x, 32, dtype)
    assert torch.equal(scale.cpu().flatten(), maximum / QUANT_MAX[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [ScaleLayout.ROW, ScaleLayout.PACKED_UE8M0])
def test_a_row_is_the_same_in_any_batch(layout: ScaleLayout) -> None:
    x = torch.randn(500, 7168, device="cuda").bfloat16()
    q, scale = per_token_group_quant(x, layout=layout)
    for row in (0, 3, 255, 499):
        alone, alone_scale = per_token_group_quant(x[row : row + 1], layout=layout)
        assert torch.equal(q[row : row + 1].view(torch.uint8), alone.view(torch.uint8))
        assert torch.equal(scale[row : row + 1], alone_scale)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [ScaleLayout.ROW, ScaleLayout.COLUMN_TMA, ScaleLayout.PACKED_UE8M0])
def test_cuda_past_2_to_the_31_elements(layout: ScaleLayout) -> None:
    num_tokens, hidden_size = 300_001, 7168
    assert num_tokens * hidden_size > 2**31
    x = torch.empty(num_tokens, hidden_size, dtype=torch.bfloat16, device="cuda").normal_()
    q, scale = per_token_group_quant(x, layout=layout)
    first = 2**31 // hidden_size - 2
    for rows in (slice(0, 9), slice(first, first + 9), slice(num_tokens - 9, num_tokens)):
        alone = per_token_group_quant(x[rows].cpu(), layout=layout)
        assert torch.equal(q[rows].cpu().view(torch.uint8), alone[0].view(torch.uint8))
        assert torch.equal(scale[rows].cpu(), alone[1])


@pytest.mark.parametrize("device", DEVICES)
def test_out_may_be_a_slice(device: str) -> None:
    x = torch.randn(6, 256, device=device).half()
    wide = torch.zeros(6, 512, dtype=torch.int8, device=device)
    q, scale = per_token_group_quant(x, 64, torch.int8, out=wide[:, 128:384])
    expected, expected_scale = per_token_group_quant(x, 64, torch.int8)
    assert q.data_ptr() == wide[:, 128:].data_ptr()
    assert torch.equal(wide[:, 128:384], expected) and torch.equal(scale, expected_scale)
    assert not wide[:, :128].any() and not wide[:, 384:].any()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"x": torch.zeros(256)}, r"x: takes 2 or 3 dimensions, got shape \(256,\)"),
        ({"x": torch.zeros(2, 256, dtype=torch.int32)}, "x: takes bfloat16, float16 or float32, got torch.int32"),
        ({"x": torch.zeros(2, 200)}, "x: the last dimension takes multiples of group_size 128, got 200"),
        ({"x": torch.zeros(256, 2).t()}, r"x: takes a last stride of 1, got strides \(1, 2\)"),
        ({"group_size": 48}, r"group_size: takes one of \(32, 64, 128\), got 48"),
        ({"dtype": torch.float8_e5m2}, "dtype: takes torch.float8_e4m3fn or torch.int8, got torch.float8_e5m2"),
        ({"eps": 0.0}, "eps: takes 1e-20 to 1, got 0.0"),
        ({"eps": NAN}, "eps: takes 1e-20 to 1, got nan"),
        ({"out": torch.zeros(2, 128).to(E4M3)}, r"out: takes torch.float8_e4m3fn \(2, 256\) on cpu"),
        ({"out": torch.zeros(2, 265).to(E4M3)[:, 9:]}, "out: takes a last stride of 1 and rows at multiples of 16"),
    ],
)
def test_bad_input_is_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        per_token_group_quant(**{"x": torch.zeros(2, 256), **kwargs})


@pytest.mark.gpu
def test_raw_op_rejects_what_it_cannot_address() -> None:
    x = torch.zeros(4, 256, device="cuda")
    q = torch.empty(4, 256, dtype=E4M3, device="cuda")
    scale = torch.empty(4, 2, device="cuda")
    op = torch.ops.vllm_b200.per_token_group_quant
    for args in [
        (x, q[:2], scale, 128, 1e-10, False),
        (x, q, scale[:, :1], 128, 1e-10, False),
        (x, q, scale.cpu(), 128, 1e-10, False),
        (x, q, scale.int(), 128, 1e-10, True),
        (x, q, scale, 96, 1e-10, False),
        (x.t(), q, scale, 128, 1e-10, False),
    ]:
        with pytest.raises(RuntimeError):
            op(*args, False)


def test_compiles_without_graph_breaks() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        q, scale = per_token_group_quant(x * 2, layout=ScaleLayout.COLUMN_TMA)
        return q.float() * scale.repeat_interleave(128, -1)

    x = torch.randn(3, 256)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))
