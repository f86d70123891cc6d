"""RMSNorm with quantisation: the reference against float64 and its parts, the CUDA kernels against the reference, bit
for bit."""

from dataclasses import replace

import pytest
import torch
from test_quant import assert_same

from benchmarks.cases.rms_norm_quant import RmsNormQuantCase
from benchmarks.cases.rms_norm_quant import tests as norm_cases
from vllm_b200_plugin.ops.norm_quant import (
    normalise,
    rms_norm_group_quant,
    rms_norm_nvfp4_quant,
    rms_norm_tensor_quant,
    rms_norm_token_quant,
)
from vllm_b200_plugin.ops.nvfp4_quant import nvfp4_quant
from vllm_b200_plugin.ops.quant import ScaleLayout, per_token_group_quant
from vllm_b200_plugin.ops.token_quant import per_tensor_quant, per_token_quant

CASES = list(norm_cases())
EPS = 1e-6
SCALE = 0.02
GLOBAL_SCALE = 400.0


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def quantise(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, case: RmsNormQuantCase, pdl: bool = False
) -> tuple[torch.Tensor, ...]:
    kwargs = {"residual": residual, "gemma": case.gemma, "pdl": pdl}
    if case.kind == "token":
        return rms_norm_token_quant(x, weight, EPS, case.dtype, **kwargs)
    if case.kind == "tensor":
        return (rms_norm_tensor_quant(x, weight, torch.tensor([SCALE], device=x.device), EPS, case.dtype, **kwargs),)
    if case.kind.startswith("nvfp4"):
        global_scale = torch.tensor([GLOBAL_SCALE], device=x.device)
        return rms_norm_nvfp4_quant(x, weight, global_scale, EPS, case.kind == "nvfp4_swizzled", **kwargs)
    return rms_norm_group_quant(
        x, weight, EPS, case.group_size, case.dtype, layout=case.layout, ue8m0=case.ue8m0, **kwargs
    )


@pytest.mark.parametrize("case", [c for c in CASES if c.num_tokens * c.hidden_size < 2**14], ids=str)
def test_reference_is_its_parts(case: RmsNormQuantCase) -> None:
    x, residual, weight = case.make_inputs("cpu")
    kept = None if residual is None else residual.clone()
    y = normalise(x, kept, weight, EPS, case.gemma)
    total = x.double() if residual is None else x.double() + residual.double()
    exact = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS)
    exact = exact * (weight.double() + (1 if case.gemma else 0))
    torch.testing.assert_close(y.double(), exact, rtol=2 ** (-7 if x.dtype == torch.bfloat16 else -10), atol=1e-6)
    got = quantise(x, residual, weight, case)
    if residual is not None:
        assert torch.equal(residual, total.to(x.dtype)) and torch.equal(residual, kept)
    if case.kind == "token":
        expected = per_token_quant(y, case.dtype)[:2]
    elif case.kind == "tensor":
        expected = (per_tensor_quant(y, torch.tensor([SCALE]), case.dtype),)
    elif case.kind.startswith("nvfp4"):
        expected = nvfp4_quant(y, torch.tensor([GLOBAL_SCALE]), case.kind == "nvfp4_swizzled")
    elif case.dtype == torch.int8:
        scale = y.float().unflatten(-1, (-1, case.group_size)).abs().amax(-1) / 127
        expected = ((y.float() / scale.repeat_interleave(case.group_size, -1)).round().to(torch.int8), scale)
    else:
        expected = per_token_group_quant(y, case.group_size, case.dtype, layout=case.layout, ue8m0=case.ue8m0)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_is_the_reference(case: RmsNormQuantCase, pdl: bool) -> None:
    x, residual, weight = case.make_inputs("cpu")
    cuda = [None if t is None else t.cuda() for t in (x, residual, weight)]
    assert_same(quantise(*cuda, case, pdl), quantise(x, residual, weight, case))
    if residual is not None:
        assert torch.equal(cuda[1].cpu().view(torch.int16), residual.view(torch.int16))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["group", "token", "tensor", "nvfp4"])
def test_a_row_is_the_same_in_any_batch(kind: str) -> None:
    case = RmsNormQuantCase(500, 7168, kind=kind)
    x, residual, weight = case.make_inputs("cuda")
    kept = residual.clone()
    whole = quantise(x, residual, weight, case)
    for row in (0, 131, 132, 499):
        rows = slice(row, row + 1)
        again = kept[rows].clone()
        for alone, batched in zip(quantise(x[rows], again, weight, case), whole, strict=True):
            assert torch.equal(bits(alone), bits(batched[rows]))
        assert torch.equal(again, residual[rows])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_slices_and_special_values(device: str) -> None:
    case = RmsNormQuantCase(4, 256, kind="token")
    x, residual, weight = case.make_inputs("cpu")
    x[0, 3], x[1, 5], x[2], residual[2] = float("nan"), float("inf"), 0.0, 0.0
    wide = torch.zeros(4, 512, dtype=x.dtype)
    wide[:, 128:384] = x
    wide = wide.to(device)
    expected = quantise(x, residual.clone(), weight, case)
    weight = weight.to(device)
    q, scale = quantise(wide[:, 128:384], residual.to(device), weight, case)
    assert scale[0].isnan() and scale[1].isnan() and not q[2].float().any()
    assert torch.equal(q.cpu().view(torch.uint8)[2:], expected[0].view(torch.uint8)[2:])
    empty = quantise(x[:0].to(device), residual[:0].to(device), weight, case)
    assert empty[0].shape == (0, 256)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", [ScaleLayout.ROW, ScaleLayout.PACKED_UE8M0, "token", "tensor"])
@pytest.mark.parametrize("num_tokens", [5, 150])
def test_the_sum_may_go_elsewhere(device: str, kind: ScaleLayout | str, num_tokens: int) -> None:
    def run(**sums: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if kind == "token":
            return rms_norm_token_quant(x, weight, EPS, **sums)
        if kind == "tensor":
            return (rms_norm_tensor_quant(x, weight, torch.full((1,), 1 / 64, device=device), EPS, **sums),)
        return rms_norm_group_quant(x, weight, EPS, layout=kind, **sums)

    x, residual, weight = (
        torch.randn(shape, device=device).bfloat16() for shape in ((num_tokens, 1152),) * 2 + (1152,)
    )
    in_place, kept = residual.clone(), residual.clone()
    wide = torch.zeros(num_tokens, 1280, dtype=x.dtype, device=device)
    expected = run(residual=in_place)
    actual = run(residual=residual, total=wide[:, 64:1216])
    assert torch.equal(wide[:, 64:1216], in_place) and torch.equal(residual, kept)
    assert not wide[:, :64].any() and not wide[:, 1216:].any()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["group", "token", "tensor", "nvfp4"])
def test_cuda_past_2_to_the_31_elements(kind: str) -> None:
    case = RmsNormQuantCase(300_001, 7168, layout=ScaleLayout.PACKED_UE8M0, kind=kind)
    x = torch.empty(case.num_tokens, case.hidden_size, dtype=torch.bfloat16, device="cuda").normal_()
    residual, weight = torch.zeros_like(x), torch.ones(case.hidden_size, dtype=torch.bfloat16, device="cuda")
    whole = quantise(x, residual, weight, case)
    for rows in (slice(0, 4), slice(case.num_tokens - 4, case.num_tokens)):
        alone = quantise(x[rows], torch.zeros_like(x[rows]), weight, replace(case, num_tokens=4))
        for few, all_rows in zip(alone, whole, strict=True):
            assert torch.equal(bits(few), bits(all_rows[rows]))
        assert torch.equal(residual[rows], x[rows])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 256)}, "x: takes bfloat16, float16, got torch.float32"),
        ({"weight": torch.zeros(128).half()}, r"weight: takes torch.float16 \(256,\), got torch.float16 \(128,\)"),
        ({"residual": torch.zeros(2, 128).half()}, r"residual: takes torch.float16 \(2, 256\)"),
        ({"group_size": 32}, r"group_size: takes one of \(64, 128\), got 32"),
        (
            {"x": torch.zeros(1, 16512).half(), "weight": torch.zeros(16512).half()},
            "x: the last dimension takes up to 16384, got 16512",
        ),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 256).half(), "weight": torch.zeros(256).half(), "norm_eps": EPS, **change}
    with pytest.raises(ValueError, match=message):
        rms_norm_group_quant(**arguments)
