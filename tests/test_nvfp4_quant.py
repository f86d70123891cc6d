"""NVFP4 quantisation: the reference against the format's definition, vLLM's emulation and compressed-tensors; the CUDA
kernel against the reference, bit for bit."""

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.cases.nvfp4_quant import Nvfp4ExpertsQuantCase, Nvfp4QuantCase, experts_tests
from benchmarks.cases.nvfp4_quant import tests as quant_cases
from vllm_b200_plugin.ops.gated_quant import activate_and_multiply
from vllm_b200_plugin.ops.nvfp4_quant import (
    E2M1_VALUES,
    e2m1_to_float,
    float_to_e2m1,
    most_expert_tiles,
    nvfp4_dequant,
    nvfp4_experts_quant,
    nvfp4_global_scale,
    nvfp4_quant,
    silu_and_mul_nvfp4_quant,
    swizzle_scales,
    unswizzle_scales,
)

CASES = list(quant_cases())
EXPERTS = list(experts_tests())
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NAN, INF = float("nan"), float("inf")
KERNEL = Path(__file__).parents[1] / "csrc/kernels/quant/nvfp4_quant.cu"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None or not KERNEL.exists(), reason="nvcc or the kernel's source is missing")


def quantise(x: torch.Tensor, case: Nvfp4QuantCase) -> tuple[torch.Tensor, torch.Tensor]:
    op = silu_and_mul_nvfp4_quant if case.silu_and_mul else nvfp4_quant
    return op(x, case.make_global_scale(x.device), case.swizzled, padded_size=case.padded_size)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.cpu().contiguous().view(torch.uint8)


def assert_same(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
        assert torch.equal(bits(got), bits(want))


# --- the conversion


def conversion_inputs() -> torch.Tensor:
    """Every bf16 and fp16 value, and every rounding boundary and e2m1 number with its neighbours in fp32, as fp32."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    ties = [(a + b) / 2 for a, b in itertools.pairwise(E2M1_VALUES)]
    around = torch.tensor([*ties, *E2M1_VALUES, 6.5, 7.0, 8.0, 2.0**105, 3e38]).view(torch.int32)
    near = (around.unsqueeze(-1) + torch.arange(-20, 21)).clamp(min=0).flatten().int().view(torch.float32)
    return torch.cat([every.view(torch.bfloat16).float(), every.view(torch.float16).float(), near, -near])


def e2m1_by_definition(y: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest numbers in float64, ties to the even code, saturating; NaN is 6."""
    magnitude = y.double().abs().nan_to_num(nan=6.0, posinf=6.0).clamp(max=6.0)
    distance = (magnitude.unsqueeze(-1) - torch.tensor(E2M1_VALUES).double()).abs()
    nearest = distance.min(-1, keepdim=True).values
    candidates = distance == nearest
    even = candidates & (torch.arange(8) % 2 == 0)
    code = torch.where((candidates.sum(-1) == 2).unsqueeze(-1), even, candidates).int().argmax(-1)
    return code | ((y.signbit() & ~y.isnan()).long() << 3)


def codes(q: torch.Tensor) -> torch.Tensor:
    return torch.stack((q & 0xF, q >> 4), -1).flatten(-2).long()


def test_conversion_is_the_definition() -> None:
    y = conversion_inputs()
    y = torch.nn.functional.pad(y, (0, len(y) % 2))
    assert torch.equal(codes(float_to_e2m1(y)), e2m1_by_definition(y))


def test_conversion_and_back() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(float_to_e2m1(e2m1_to_float(every)), every)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_op_converts_every_value(device: str, dtype: torch.dtype) -> None:
    """In a group that holds 6 or more, under a global scale of 448, the scale is 448 and the factor 1."""
    y = conversion_inputs().to(dtype)
    y = y[~y.isnan()]
    groups = torch.nn.functional.pad(y, (0, -len(y) % 15)).view(-1, 15)
    x = torch.cat([groups, torch.full((len(groups), 1), 6.0, dtype=dtype)], -1)
    q, scale = nvfp4_quant(x.to(device), torch.tensor([448.0], device=device))
    assert (scale.float() == 448).all()
    assert torch.equal(codes(q.cpu()), e2m1_by_definition(x.float()))


@needs_nvcc
def test_conversion_is_cuda_fp4(tmp_path: Path) -> None:
    """NVIDIA's own conversion, as cuda_fp4.h does it in software."""
    (tmp_path / "convert.cu").write_text(
        "#include <cuda_fp4.h>\n#include <cstdio>\n"
        "int main() { float2 y; while (fread(&y, sizeof y, 1, stdin) == 1)"
        " putchar(__nv_cvt_float2_to_fp4x2(y, __NV_E2M1, cudaRoundNearest)); }\n"
    )
    program = tmp_path / "convert"
    subprocess.run([str(NVCC), "-arch=sm_90a", "-o", str(program), str(tmp_path / "convert.cu")], check=True)
    y = conversion_inputs()
    y = torch.nn.functional.pad(y, (0, len(y) % 2))
    found = subprocess.run([str(program)], input=y.numpy().tobytes(), capture_output=True, check=True).stdout
    assert torch.equal(torch.frombuffer(bytearray(found), dtype=torch.uint8), float_to_e2m1(y))


@needs_nvcc
@pytest.mark.parametrize("arch, expected", [("90a", False), ("100a", True), ("103a", True), ("120a", True)])
def test_blackwell_code_has_the_instruction(arch: str, expected: bool, tmp_path: Path) -> None:
    ptx = tmp_path / "kernel.ptx"
    subprocess.run([str(NVCC), "-std=c++20", f"-arch=compute_{arch}", "-ptx", "-o", str(ptx), str(KERNEL)], check=True)
    assert ("cvt.rn.satfinite.e2m1x2.f32" in ptx.read_text()) is expected


# --- the arithmetic


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_reference_is_vllms_emulation(dtype: torch.dtype, seed: int) -> None:
    emulation = pytest.importorskip("vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils")
    x = Nvfp4QuantCase(50, 512, input_dtype=dtype).make_input("cpu", seed)
    x[3, 7], x[4, :16] = INF, torch.finfo(dtype).tiny
    for global_scale in (nvfp4_global_scale(x.clamp(-100, 100)), torch.tensor([3.7]), torch.tensor([4e4])):
        q, scale = nvfp4_quant(x, global_scale)
        values, expected_scale = emulation.ref_nvfp4_quant(x.clone(), global_scale, 16)
        assert torch.equal(scale.float(), expected_scale)
        assert torch.equal(e2m1_to_float(q), values)
        swizzled_q, swizzled = nvfp4_quant(x, global_scale, True)
        assert torch.equal(swizzled_q, q)
        dequantised = emulation.dequantize_to_dtype(q, swizzled, 1 / global_scale, dtype, 16)
        torch.testing.assert_close(dequantised, nvfp4_dequant(q, scale, global_scale, dtype=dtype), rtol=1e-2, atol=0)
        assert torch.equal(
            nvfp4_dequant(q, swizzled, global_scale, True, dtype),
            emulation.ref_nvfp4_quant_dequant(x.clone(), global_scale, 16),
        )


@pytest.mark.parametrize("seed", range(3))
def test_reference_is_compressed_tensors_but_for_roundings(seed: int) -> None:
    """It divides where vLLM multiplies with a reciprocal: another last bit, which rarely decides."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.quant_scheme import NVFP4
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp, generate_gparam

    x = Nvfp4QuantCase(200, 512, input_dtype=torch.float32).make_input("cpu", seed)
    x[x == 0] = 0.01  # for a group of zeros it has another scale
    global_scale = generate_gparam(x.min(), x.max())
    assert torch.equal(global_scale, nvfp4_global_scale(x))
    args = NVFP4["input_activations"]
    with torch.compiler.set_stance("force_eager"):
        expected_scale, zero_point = compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), global_scale)
        values = quantize(x, expected_scale, zero_point, args, global_scale=global_scale)
    q, scale = nvfp4_quant(x, global_scale)
    same_scale = scale.float() == expected_scale.float()
    assert same_scale.float().mean() > 0.9999
    same = codes(q).view(-1, 16) == codes(pack_fp4_to_uint8(values)).view(-1, 16)
    assert same[same_scale.flatten()].float().mean() > 0.9999


@pytest.mark.parametrize("case", [c for c in CASES if c.silu_and_mul], ids=str)
def test_gated_reference_is_its_parts(case: Nvfp4QuantCase) -> None:
    x = case.make_input("cpu")
    hidden = activate_and_multiply(x.float(), "silu").to(x.dtype)
    assert_same(
        quantise(x, case),
        nvfp4_quant(hidden, case.make_global_scale("cpu"), case.swizzled, padded_size=case.padded_size),
    )


def test_global_scale() -> None:
    x = torch.tensor([[1.0, -7.0, 2.0]]).bfloat16()
    assert nvfp4_global_scale(x).item() == pytest.approx(448 * 6 / 7)
    for nothing in (torch.full((1, 2), NAN), torch.zeros(3, 4), torch.empty(0, 16)):
        assert nvfp4_global_scale(nothing).tolist() == [1.0]
    assert nvfp4_global_scale(torch.full((1, 2), INF)).tolist() == [0.0]


# --- layouts


@pytest.mark.parametrize("rows, groups", [(1, 1), (128, 4), (129, 5), (300, 48)])
def test_swizzle_is_the_definition(rows: int, groups: int) -> None:
    scale = torch.randint(1, 255, (rows, groups), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    swizzled = swizzle_scales(scale)
    tiles_down, tiles_across = -(-rows // 128), -(-groups // 4)
    assert swizzled.shape == (128 * tiles_down, 4 * tiles_across)
    flat, seen = swizzled.flatten(), torch.zeros(swizzled.numel(), dtype=torch.bool)
    for m in range(rows):
        for g in range(groups):
            tile = m // 128 * tiles_across + g // 4
            offset = 512 * tile + m % 32 * 16 + m % 128 // 32 * 4 + g % 4
            assert flat[offset] == scale[m, g]
            seen[offset] = True
    assert not flat[~seen].any()
    assert torch.equal(unswizzle_scales(swizzled, rows, groups), scale)


def test_swizzle_is_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)  # it insists on moving the result there
    utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.nvfp4_utils")
    scale = torch.rand(300, 50).to(torch.float8_e4m3fn)
    assert torch.equal(bits(swizzle_scales(scale)), bits(utils.swizzle_blockscale(scale)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [1, 32, 129])
@pytest.mark.parametrize("hidden_size, padded_size", [(80, None), (2064, 2592)])
def test_padding_is_zero(device: str, num_tokens: int, hidden_size: int, padded_size: int | None) -> None:
    x = torch.randn(num_tokens, hidden_size, device=device).bfloat16()
    one = torch.ones(1, device=device)
    for _ in range(3):  # freed right away: the next allocations of the sizes find poisoned buffers
        poisoned = [t.view(torch.uint8).fill_(0xFF) for t in nvfp4_quant(x, one, True, padded_size=padded_size)]
        del poisoned
        q, scale = nvfp4_quant(x, one, True, padded_size=padded_size)
        assert not q[:, hidden_size // 2 :].any()
        linear = unswizzle_scales(scale, *scale.shape).float()
        assert (linear[:num_tokens, : hidden_size // 16] > 0).all()
        assert not linear[num_tokens:].any() and not linear[:, hidden_size // 16 :].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (0, 0)])
def test_empty(device: str, swizzled: bool, shape: tuple[int, int]) -> None:
    q, scale = nvfp4_quant(torch.empty(shape, device=device), torch.ones(1, device=device), swizzled)
    assert q.shape == (shape[0], shape[1] // 2) and scale.numel() == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_special_values(device: str, dtype: torch.dtype) -> None:
    groups = torch.ones(6, 16)
    groups[0] = 0.0
    groups[0, 1] = -0.0
    groups[1, 5] = NAN
    groups[2, 6], groups[2, 7] = INF, -INF
    groups[3] = torch.finfo(dtype).tiny / 4  # denormal
    groups[4, 9] = torch.finfo(dtype).max
    groups[5, 3], groups[5, 4] = INF, NAN
    q, scale = nvfp4_quant(groups.to(dtype).view(2, 48).to(device), torch.ones(1, device=device))
    q, scale = codes(q.cpu()).view(6, 16), bits(scale).flatten()
    assert q[0].tolist() == [0, 8] + [0] * 14 and scale[0] == 0
    assert (q[1] == 7).all() and scale[1] == 0x7F
    assert q[2].tolist() == [0] * 6 + [7, 15] + [0] * 8 and scale[2] == 0x7E
    assert not q[3].any() and scale[3] == 0
    assert q[4, 9] == 7 and not q[4, :9].any() and scale[4] == 0x7E
    assert (q[5] == 7).all() and scale[5] == 0x7F


# --- the CUDA kernel


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in CASES if not c.silu_and_mul], ids=str)
def test_cuda_is_the_reference(case: Nvfp4QuantCase) -> None:
    x = case.make_input("cpu")
    assert_same(quantise(x.cuda(), case), quantise(x, case))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in CASES if c.silu_and_mul], ids=str)
def test_cuda_gated_is_near_the_reference(case: Nvfp4QuantCase) -> None:
    """A last bit of a bf16 or fp16 product may be another one, and then a rounding to e2m1 or e4m3."""
    x = case.make_input("cpu")
    for got, want in zip(quantise(x.cuda(), case), quantise(x, case), strict=True):
        different = bits(got) != bits(want)
        assert got.shape == want.shape
        assert different.double().mean() < 2e-3 or different.sum() <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("global_scale", [1e-30, 0.3, 1.0, 77.7, 448.0, 5e4, 1e20, 3e38, 1e-40, 0.0, INF, NAN])
def test_cuda_is_the_reference_for_any_value(dtype: torch.dtype, global_scale: float) -> None:
    """All 16-bit patterns, or random fp32 ones, shuffled."""
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.float32:
        pattern = torch.randint(-(1 << 31), 1 << 31, (1 << 17,), generator=generator).int().view(dtype)
    else:
        pattern = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).repeat(2)
    pattern = pattern[torch.randperm(len(pattern), generator=generator)]
    near_one = torch.randn(1 << 17, generator=generator).to(dtype)  # in which nothing hides behind a NaN or an Inf
    x = torch.cat([pattern, near_one]).view(-1, 1024)
    scale = torch.tensor([global_scale])
    assert_same(nvfp4_quant(x.cuda(), scale.cuda()), nvfp4_quant(x, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_is_the_reference_for_every_pair_of_mantissas(dtype: torch.dtype) -> None:
    """Every scale with every mantissa of an element, under global scales of all kinds."""
    maxima = torch.arange(1, 128).to(torch.uint8).view(torch.float8_e4m3fn).float()
    maxima = (maxima[:126] * 6).to(dtype)
    mantissas = (1 + torch.arange(256) / 256).to(dtype)
    elements = torch.cat([mantissas * 2.0**e for e in range(-3, 3)])
    x = elements.expand(126, -1) * (maxima / 8).unsqueeze(-1)
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % 15)).view(126, -1, 15)
    x = torch.cat([x, maxima.view(-1, 1, 1).expand(-1, x.shape[1], 1)], -1).flatten(1)
    for global_scale in (1.0, 0.7, 1.3333334, 3.1e-3, 2688 / 17.3, 2688 / 5.01):
        scale = torch.tensor([global_scale])
        assert_same(nvfp4_quant(x.cuda(), scale.cuda()), nvfp4_quant(x, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("silu_and_mul", [False, True])
@pytest.mark.parametrize("swizzled", [False, True])
def test_a_row_is_the_same_in_any_batch(silu_and_mul: bool, swizzled: bool) -> None:
    case = Nvfp4QuantCase(600, 2048, swizzled, silu_and_mul)
    x = case.make_input("cuda")
    q, scale = quantise(x, case)
    linear = unswizzle_scales(scale, 600, 128) if swizzled else scale
    for row in (0, 131, 132, 300, 599):
        alone, alone_scale = quantise(x[row : row + 1], case)
        alone_scale = unswizzle_scales(alone_scale, 1, 128) if swizzled else alone_scale
        assert_same((alone, alone_scale), (q[row : row + 1], linear[row : row + 1]))


@pytest.mark.gpu
def test_pdl_changes_nothing() -> None:
    case = Nvfp4QuantCase(64, 2048, True)
    x, global_scale = case.make_input("cuda"), case.make_global_scale("cuda")
    expected = nvfp4_quant(x, global_scale, True)
    for _ in range(50):
        assert_same(nvfp4_quant(x, global_scale, True, pdl=True), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("swizzled", [False, True])
def test_cuda_past_2_to_the_31_elements(swizzled: bool) -> None:
    num_tokens, hidden_size = 2**31 // 7168 + 301, 7168
    x = torch.empty(num_tokens, hidden_size, dtype=torch.bfloat16, device="cuda").normal_()
    global_scale = torch.full((1,), 500.0, device="cuda")
    q, scale = nvfp4_quant(x, global_scale, swizzled)
    if swizzled:
        scale = unswizzle_scales(scale, num_tokens, hidden_size // 16)
    for first in (0, 2**31 // hidden_size - 2, num_tokens - 9):
        rows = slice(first, first + 9)
        assert_same((q[rows], scale[rows]), nvfp4_quant(x[rows].cpu(), global_scale.cpu()))


# --- experts


def experts_quantise(x: torch.Tensor, case: Nvfp4ExpertsQuantCase) -> tuple[torch.Tensor, torch.Tensor, int]:
    """q, the scales, and the rows of scales that are in use."""
    global_scale, expert_offsets, scale_offsets = case.make_routing(x.device)
    q, scale = nvfp4_experts_quant(x, global_scale, expert_offsets, scale_offsets, silu_and_mul=case.silu_and_mul)
    return q, scale, int(scale_offsets[-1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", EXPERTS, ids=str)
def test_experts_are_each_on_their_own(device: str, case: Nvfp4ExpertsQuantCase) -> None:
    x = case.make_input(device)
    q, scale, in_use = experts_quantise(x, case)
    assert len(scale) >= in_use
    global_scale, *offsets = case.make_routing(device)
    rows, tiles = (o.tolist() for o in offsets)
    op = silu_and_mul_nvfp4_quant if case.silu_and_mul else nvfp4_quant
    for e in range(case.num_experts):
        alone = op(x[rows[e] : rows[e + 1]], global_scale[e : e + 1], True)
        assert_same((q[rows[e] : rows[e + 1]], scale[tiles[e] : tiles[e + 1]]), alone)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in EXPERTS if not c.silu_and_mul], ids=str)
def test_cuda_experts_are_the_reference(case: Nvfp4ExpertsQuantCase) -> None:
    x = case.make_input("cpu")
    q, scale, in_use = experts_quantise(x.cuda(), case)
    expected_q, expected_scale, _ = experts_quantise(x, case)
    assert_same((q, scale[:in_use]), (expected_q, expected_scale[:in_use]))


@pytest.mark.parametrize("device", DEVICES)
def test_experts_leave_what_is_behind_alone(device: str) -> None:
    x = torch.randn(3, 64, device=device).bfloat16()
    offsets = torch.tensor([0, 1, 1, 3], dtype=torch.int32, device=device)
    tiles = torch.tensor([0, 128, 128, 256], dtype=torch.int32, device=device)
    q = torch.empty(3, 32, dtype=torch.uint8, device=device)
    scale = torch.full((512, 4), 0xEE, dtype=torch.uint8, device=device)
    ones = torch.ones(3, device=device)
    torch.ops.vllm_b200.nvfp4_experts_quant(x, ones, offsets, tiles, q, scale.view(torch.float8_e4m3fn), False)
    assert (scale[256:] == 0xEE).all() and not (scale[:256] == 0xEE).any()


def test_most_expert_tiles() -> None:
    assert most_expert_tiles(0, 8) == 0
    assert most_expert_tiles(3, 8) == 3
    assert most_expert_tiles(8, 3) == 3
    assert most_expert_tiles(1024, 1) == 8
    assert most_expert_tiles(1025, 1) == 9


# --- arguments


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"x": torch.zeros(32)}, r"x: takes 2 dimensions, got shape \(32,\)"),
        ({"x": torch.zeros(2, 32, dtype=torch.int32)}, "x: takes bfloat16, float16, float32, got torch.int32"),
        ({"x": torch.zeros(2, 24)}, "x: the last dimension takes multiples of 16"),
        ({"x": torch.zeros(32, 32).t()}, "x: takes a last stride of 1"),
        ({"x": torch.zeros(2, 33).half()[:, 1:]}, "rows at multiples of 16 bytes"),
        ({"global_scale": torch.ones(2)}, r"global_scale: takes one torch.float32, got torch.float32 \(2,\)"),
        ({"global_scale": torch.ones(1).double()}, "global_scale: takes one torch.float32, got torch.float64"),
        ({"padded_size": 16}, "padded_size: takes multiples of 16 from 32 on, got 16"),
        ({"padded_size": 40}, "padded_size: takes multiples of 16 from 32 on, got 40"),
    ],
)
def test_bad_input_is_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nvfp4_quant(**{"x": torch.zeros(2, 32), "global_scale": torch.ones(1), **kwargs})


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"x": torch.zeros(2, 32)}, "x: takes bfloat16, float16, got torch.float32"),
        ({"x": torch.zeros(2, 48).half(), "silu_and_mul": True}, "x: the last dimension takes multiples of 32, got 48"),
        ({"global_scale": torch.ones(())}, r"global_scale: takes \[num_experts\]"),
        ({"expert_offsets": torch.zeros(2, dtype=torch.int32)}, r"expert_offsets: takes \[3\] torch.int32"),
        ({"scale_offsets": torch.zeros(3)}, r"scale_offsets: takes \[3\] torch.int32, contiguous, got torch.float32"),
    ],
)
def test_bad_expert_input_is_named(kwargs: dict, message: str) -> None:
    offsets = torch.zeros(3, dtype=torch.int32)
    good = {"x": torch.zeros(2, 32).half(), "global_scale": torch.ones(2), "expert_offsets": offsets}
    with pytest.raises(ValueError, match=message):
        nvfp4_experts_quant(**{**good, "scale_offsets": offsets, **kwargs})


@pytest.mark.gpu
def test_raw_op_rejects_what_it_cannot_address() -> None:
    x = torch.zeros(4, 256, device="cuda").half()
    q = torch.empty(4, 128, dtype=torch.uint8, device="cuda")
    scale = torch.empty(4, 16, device="cuda").to(torch.float8_e4m3fn)
    one = torch.ones(1, device="cuda")
    for args in [
        (x, one, q[:2], scale, False, False),
        (x, one, q[:, :64], scale, False, False),
        (x, one, q, scale[:, :8], False, False),
        (x, one, q, scale, True, False),
        (x, one, q, scale.cpu(), False, False),
        (x, one.cpu(), q, scale, False, False),
        (x, one.half(), q, scale, False, False),
        (x.t(), one, q, scale, False, False),
        (torch.zeros(4, 512, device="cuda"), one, q, scale, False, True),
    ]:
        with pytest.raises(RuntimeError):
            torch.ops.vllm_b200.nvfp4_quant(*args)


def test_compiles_without_graph_breaks() -> None:
    def f(x: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
        q, scale = nvfp4_quant(x * 2, global_scale, True)
        return q.float().sum() + scale.float().sum()

    x, one = torch.randn(3, 256), torch.ones(1)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x, one), f(x, one))
