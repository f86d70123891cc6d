"""One scale per token or tensor: the CPU reference against its definition in float64, the CUDA kernels against the
reference, bit for bit."""

import pytest
import torch
from test_quant import to_e4m3_by_definition

from benchmarks.cases.token_quant import TokenQuantCase
from benchmarks.cases.token_quant import tests as token_cases
from vllm_b200_plugin.ops.token_quant import per_tensor_quant, per_token_quant, static_group_quant

CASES = list(token_cases())
E4M3 = torch.float8_e4m3fn
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NAN, INF = float("nan"), float("inf")


def group_scales(case: TokenQuantCase) -> torch.Tensor:
    return torch.rand(case.num_scales, generator=torch.Generator().manual_seed(1)) + 0.2


def quantise(x: torch.Tensor, case: TokenQuantCase) -> tuple[torch.Tensor, ...]:
    if case.group_shape:
        return (static_group_quant(x, group_scales(case).to(x.device), case.group_shape),)
    if not case.static:
        return tuple(t for t in per_token_quant(x, case.dtype, asymmetric=case.asymmetric) if t is not None)
    scale = torch.tensor([0.37], device=x.device)
    azp = torch.tensor([-7], dtype=torch.int32, device=x.device) if case.asymmetric else None
    return (per_tensor_quant(x, scale, case.dtype, azp=azp),)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


@pytest.mark.parametrize("case", [c for c in CASES if c.num_tokens * c.hidden_size < 2**16], ids=str)
def test_reference_is_the_definition(case: TokenQuantCase) -> None:
    x = case.make_input("cpu")
    q, *rest = quantise(x, case)
    values = x.double()
    scale = (
        torch.tensor([[0.37]]).double() if case.static else rest[0].double() if rest else group_scales(case).double()
    )
    for dim, size in enumerate(x.shape):
        scale = scale.repeat_interleave(size // scale.shape[dim], dim)
    azp = None if not case.asymmetric else torch.tensor([[-7]]) if case.static else rest[1]
    if rest:
        span = values.amax(-1, keepdim=True) - values.amin(-1, keepdim=True)
        amax = values.abs().amax(-1, keepdim=True)
        expected = span / 255 if case.asymmetric else amax / (127 if case.dtype == torch.int8 else 448)
        torch.testing.assert_close(rest[0].double(), expected, rtol=3e-7, atol=0)
    if case.dtype == E4M3:
        # Rounded once or twice to fp32 before: at a tie of e4m3 that may fall to the other side.
        wrong = (q.view(torch.uint8) != to_e4m3_by_definition((values / scale).float().double())).double().mean()
        assert wrong < (1e-30 if rest else 1e-3)
        return
    exact = values / scale + (0 if azp is None else azp)
    assert ((q.double() - exact.clamp(-128, 127)).abs() <= 0.5 + 1e-4).all()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_is_the_reference(case: TokenQuantCase) -> None:
    x = case.make_input("cpu")
    wide = torch.nn.functional.pad(x, (0, case.columns_right)).cuda()
    for actual, expected in zip(quantise(wide[:, : case.hidden_size], case), quantise(x, case), strict=True):
        assert same(actual, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_upper_bound(device: str) -> None:
    x = torch.randn(4, 256, device=device).bfloat16()
    x[1] *= 1e-6
    bound = torch.tensor([1.5], device=device)
    q, scale, _ = per_token_quant(x, scale_ub=bound)
    assert scale[0].item() == pytest.approx(1.5 / 448, rel=1e-6)
    assert scale[1].item() == torch.tensor(1 / (448 * 512)).item(), "the floor"
    assert q.float().abs().max() == 448, "what is above the bound saturates"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [E4M3, torch.int8])
def test_special_values(device: str, dtype: torch.dtype, asymmetric: bool) -> None:
    if asymmetric and dtype == E4M3:
        pytest.skip("int8 only")
    x = torch.randn(6, 64, device=device).half()
    x[0, 3], x[1, 5], x[2] = NAN, INF, 0.0
    x[3] = 2.5
    x[4, 7] = -INF
    got = [t for t in per_token_quant(x, dtype, asymmetric=asymmetric) if t is not None]
    expected = [t for t in per_token_quant(x.cpu(), dtype, asymmetric=asymmetric) if t is not None]
    q, scale = got[0].cpu(), got[1].cpu().flatten()
    assert scale[0].isnan() and scale[1] == INF and scale[4] == INF
    assert not q[2].float().any()
    assert same(got[0], expected[0])
    assert torch.equal(scale.nan_to_num(nan=-1.0), expected[1].flatten().nan_to_num(nan=-1.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 32)])
def test_empty(device: str, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=device)
    assert per_token_quant(x)[0].shape == shape
    assert per_tensor_quant(x, torch.ones(1, device=device)).shape == shape


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        TokenQuantCase(500, 7168, dtype, static, asymmetric)
        for dtype, asymmetric in ((E4M3, False), (torch.int8, False), (torch.int8, True))
        for static in (False, True)
    ]
    + [TokenQuantCase(500, 7168, group_shape=(-1, 1))],
    ids=str,
)
def test_a_row_is_the_same_in_any_batch(case: TokenQuantCase) -> None:
    x = case.make_input("cuda")
    whole = quantise(x, case)
    for row in (0, 131, 132, 499):
        for alone, batched in zip(quantise(x[row : row + 1], case), whole, strict=True):
            assert same(alone, batched[row : row + 1])


@pytest.mark.gpu
def test_cuda_past_2_to_the_31_elements() -> None:
    num_tokens, hidden_size = 300_001, 7168
    x = torch.empty(num_tokens, hidden_size, dtype=torch.bfloat16, device="cuda").normal_()
    q, scale, _ = per_token_quant(x)
    fixed = per_tensor_quant(x, torch.full((1,), 0.01, device="cuda"))
    channels = torch.rand(1, hidden_size, device="cuda") + 0.01
    by_channel = static_group_quant(x, channels)
    first = 2**31 // hidden_size - 2
    for rows in (slice(0, 9), slice(first, first + 9), slice(num_tokens - 9, num_tokens)):
        part = x[rows].cpu()
        assert same(q[rows], per_token_quant(part)[0]) and torch.equal(scale[rows].cpu(), per_token_quant(part)[1])
        assert same(fixed[rows], per_tensor_quant(part, torch.full((1,), 0.01)))
        assert same(by_channel[rows], static_group_quant(part, channels.cpu()))


@pytest.mark.parametrize("device", DEVICES)
def test_given_scales_may_have_one_dimension_and_any_stride(device: str) -> None:
    x = torch.randn(6, 2, 64, device=device).bfloat16()
    wide = torch.rand(12, 3, 64, device=device) + 0.1
    assert same(static_group_quant(x, wide[0, 0]), static_group_quant(x, wide[0, :1]))
    assert same(
        static_group_quant(x, wide[:, 0, 0], (1, -1)), static_group_quant(x, wide[:, :1, 0].contiguous(), (1, -1))
    )
    transposed = wide[0, :2, :4].t()
    assert same(static_group_quant(x, transposed, (3, 32)), static_group_quant(x, transposed.contiguous(), (3, 32)))
    assert static_group_quant(x[:0], wide[0, 0]).shape == (0, 2, 64)
    with pytest.raises(ValueError, match=r"scale: takes torch.float32 \(4, 4\), got torch.float32 \(4, 3\)"):
        static_group_quant(x, wide[:4, :, 0], (3, 16))
    with pytest.raises(ValueError, match="group_shape: takes rows that divide 12 and columns that divide 64"):
        static_group_quant(x, wide[0, 0], (5, 1))
    nan = static_group_quant(x, torch.full((64,), NAN, device=device))
    assert (nan.view(torch.uint8) == 0x7F).all()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"x": torch.zeros(2, 40)}, "x: the last dimension takes multiples of 16"),
        ({"x": torch.zeros(2, 32, dtype=torch.int32)}, "x: takes bfloat16, float16, float32, got torch.int32"),
        ({"x": torch.zeros(2, 33)[:, 1:]}, "x: takes a last stride of 1 and rows at multiples of 16 bytes"),
        ({"x": torch.zeros(32, 32).t()}, "x: takes a last stride of 1"),
        ({"x": torch.zeros(1, 32784)}, "x: the last dimension takes up to 32768, got 32784"),
        ({"dtype": torch.float8_e5m2}, "dtype: takes torch.float8_e4m3fn or torch.int8"),
        ({"asymmetric": True}, "asymmetric: goes with torch.int8"),
        ({"dtype": torch.int8, "scale_ub": torch.ones(1)}, "scale_ub: goes with torch.float8_e4m3fn"),
    ],
)
def test_bad_input_is_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        per_token_quant(**{"x": torch.zeros(2, 32), **kwargs})


@pytest.mark.parametrize("scale", [torch.ones(2), torch.ones(1, dtype=torch.float64)])
def test_bad_scale_is_named(scale: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="scale: takes one torch"):
        per_tensor_quant(torch.zeros(2, 32), scale)
