"""NVFP4 linear layers for few tokens: the CPU reference against float64 computed in another way, the CUDA kernel
against the reference, over shapes, layouts and every way of cutting the work."""

import itertools

import pytest
import torch

from benchmarks.cases.gemm import GemmCase, nvfp4_tests
from vllm_b200_plugin.ops.nvfp4_gemm import nvfp4_linear
from vllm_b200_plugin.ops.nvfp4_quant import nvfp4_dequant, swizzle_scales
from vllm_b200_plugin.ops.small_m_gemm import Config

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = list(nvfp4_tests())
CONFIGS = [
    Config(row_tiles, warps, cluster, chunks)
    for row_tiles, warps, cluster, chunks in itertools.product((1, 2, 4), (1, 3, 8), (1, 2, 4, 8), (0, 1, 3, 4))
    if not chunks or warps % chunks == 0
]


def operands(case: GemmCase, device: str = "cpu", swizzled: bool = False, per_row: bool = False) -> dict:
    """Arguments for one case, drawn on the CPU: every code, every scale from the smallest to the largest, and 0."""
    m, n, k = case.num_tokens, case.n, case.k
    rng = torch.Generator().manual_seed(m * 31 + n * 7 + k)
    weight = torch.randint(0, 256, (n, k // 2), generator=rng, dtype=torch.uint8)
    scale = torch.randint(0, 127, (n, k // 16), generator=rng, dtype=torch.uint8).view(torch.float8_e4m3fn)
    global_scale = (torch.rand(n if per_row else 1, generator=rng) + 0.1) / 100
    tensors = {
        "x": torch.randn(m, k, generator=rng).to(BF16),
        "weight": weight,
        "weight_scale": swizzle_scales(scale) if swizzled else scale,
        "weight_global_scale": global_scale,
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()} | {"swizzled": swizzled}


def in_float64(tensors: dict) -> torch.Tensor:
    one = torch.ones(1)
    weight = nvfp4_dequant(tensors["weight"].cpu(), tensors["weight_scale"].cpu(), one, tensors["swizzled"])
    wide = weight.double() * tensors["weight_global_scale"].double().cpu().view(-1, 1)
    return torch.einsum("mk,nk->mn", tensors["x"].double().cpu(), wide)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = FP32) -> None:
    """To the rounding of `dtype`, and of fp32 sums that may cancel."""
    expected = expected.double().cpu()
    rounding = {FP32: 1e-6, BF16: 2.0**-8, FP16: 2.0**-10}[dtype]
    limit = rounding * expected.abs() + 2e-6 * expected.abs().max() + 1e-30
    error = (actual.double().cpu() - expected).abs()
    assert actual.dtype == dtype and not (error > limit).any() and error.isfinite().all()


@pytest.mark.parametrize("swizzled", [False, True], ids=["linear", "swizzled"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_definition(case, swizzled):
    for per_row in (False, True):
        tensors = operands(case, swizzled=swizzled, per_row=per_row)
        assert_close(nvfp4_linear(**tensors, out_dtype=FP32), in_float64(tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("swizzled", [False, True], ids=["linear", "swizzled"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_is_the_reference(case, swizzled):
    for per_row, pdl in itertools.product((False, True), (False, True)):
        tensors = operands(case, "cuda", swizzled, per_row)
        assert_close(nvfp4_linear(**tensors, out_dtype=FP32, pdl=pdl), in_float64(tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 7, 16, 29])
def test_every_cut_gives_the_result_and_the_same_bits_again(num_tokens):
    tensors = operands(GemmCase(num_tokens, 200, 960), "cuda")
    expected = in_float64(tensors)
    for config, pdl in itertools.product(CONFIGS, (False, True)):
        out = nvfp4_linear(**tensors, out_dtype=FP32, config=config, pdl=pdl)
        assert_close(out, expected)
        assert torch.equal(out, nvfp4_linear(**tensors, out_dtype=FP32, config=config, pdl=pdl))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [512, 960])
def test_every_number_of_rows_and_tokens(k):
    for n, num_tokens in [(n, 1 + n % 32) for n in range(1, 301, 3)] + [(177, m) for m in range(1, 33)]:
        tensors = operands(GemmCase(num_tokens, n, k), "cuda", swizzled=bool(n % 2))
        assert_close(nvfp4_linear(**tensors, out_dtype=FP32), in_float64(tensors))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("out_dtype", [BF16, FP16, FP32])
def test_bias_and_output_types(device, out_dtype):
    tensors = operands(GemmCase(5, 96, 256), device)
    tensors["weight_global_scale"] /= 100  # within float16
    bias = torch.randn(96, generator=torch.Generator().manual_seed(0)).to(out_dtype).to(device)
    expected = in_float64(tensors) + bias.double().cpu()
    assert_close(nvfp4_linear(**tensors, bias=bias, out_dtype=out_dtype), expected, out_dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_x_and_weight(device):
    tensors = operands(GemmCase(5, 96, 256), device)
    expected = nvfp4_linear(**tensors)
    for name in ("x", "weight"):
        wide = torch.zeros_like(tensors[name]).repeat(1, 3)
        width = tensors[name].shape[1]
        wide[:, width : 2 * width] = tensors[name]
        assert torch.equal(nvfp4_linear(**{**tensors, name: wide[:, width : 2 * width]}), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_shards_with_scales_of_their_own(device):
    """A layer fused from three, as vLLM fuses q, k and v, is the three apart; with one scale for all it is not."""
    shards = [operands(GemmCase(3, n, 512), device) for n in (128, 32, 32)]
    x, sizes = shards[0]["x"], [shard["weight"].shape[0] for shard in shards]
    fused = {name: torch.cat([shard[name] for shard in shards]) for name in ("weight", "weight_global_scale")}
    scale = torch.cat([shard["weight_scale"].view(torch.uint8) for shard in shards]).view(torch.float8_e4m3fn)
    rows = fused["weight_global_scale"].repeat_interleave(torch.tensor(sizes, device=device))
    apart = torch.cat([nvfp4_linear(**{**shard, "x": x}, out_dtype=FP32) for shard in shards], 1)
    assert torch.equal(nvfp4_linear(x, fused["weight"], scale, rows, out_dtype=FP32), apart)
    naive = nvfp4_linear(x, fused["weight"], scale, rows.max().view(1), out_dtype=FP32)
    assert (naive - apart).abs().max() > 0.01 * apart.abs().max()


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_inf(device):
    """A NaN in x spoils its row, one among the scales its column, as does an Inf; a scale of 0 is one."""
    tensors = operands(GemmCase(3, 40, 384), device)
    tensors["x"][1, 200] = float("nan")
    tensors["weight_scale"].view(torch.uint8)[7, 3] = 0x7F
    tensors["weight_scale"].view(torch.uint8)[8] = 0
    out = nvfp4_linear(**tensors, out_dtype=FP32).cpu()
    assert out[1].isnan().all() and out[:, 7].isnan().all()
    assert not out[0, :7].isnan().any() and not out[2, 8:].isnan().any()
    assert (out[[0, 2], 8] == 0).all()
    tensors["x"][1, 200] = float("inf")
    assert not nvfp4_linear(**tensors, out_dtype=FP32)[1].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device):
    assert nvfp4_linear(**operands(GemmCase(0, 40, 384), device)).shape == (0, 40)


@pytest.mark.gpu
def test_graph_replays_give_the_same_bits():
    tensors = operands(GemmCase(2, 2112, 7168), "cuda")
    config = Config(1, 14, 1, 0)
    expected = nvfp4_linear(**tensors, config=config, pdl=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = [nvfp4_linear(**tensors, config=config, pdl=True) for _ in range(5)]
    for _ in range(100):
        for y in out:
            y.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(y, expected) for y in out)


@pytest.mark.gpu
def test_a_chain_with_pdl_sees_what_its_predecessor_wrote():
    layers = [operands(GemmCase(4, 2048, 2048 + 256 * i), "cuda") for i in range(4)]

    def chain(pdl):
        x = layers[0]["x"]
        for i in range(12):
            layer = layers[i % 4]
            weight, scale = layer["weight"][:, :1024], layer["weight_scale"][:, :128].contiguous()
            x = nvfp4_linear(x, weight, scale, layer["weight_global_scale"], pdl=pdl)
            x = x / x.abs().max()
        return x

    expected = chain(False)
    for _ in range(20):
        assert torch.equal(chain(True), expected)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": torch.zeros(33, 256, dtype=BF16)}, "x: takes at most 32 rows, got 33"),
        ({"x": torch.zeros(2, 256, dtype=FP16)}, "x: takes 2 dimensions of bfloat16"),
        ({"x": torch.zeros(2, 96, dtype=BF16)}, "x: needs K % 64 == 0, got K=96"),
        ({"x": torch.zeros(2, 128, dtype=BF16)}, r"weight: takes \[N, 64\] uint8"),
        ({"weight_scale": torch.zeros(40, 8).to(torch.float8_e4m3fn)}, r"weight_scale: takes \(40, 16\)"),
        ({"swizzled": True}, r"weight_scale: takes \(128, 16\)"),
        ({"weight_global_scale": torch.ones(3)}, "weight_global_scale: takes 1 or 40 contiguous float32"),
        ({"bias": torch.zeros(40)}, "bias: takes 40 of torch.bfloat16"),
        ({"out_dtype": torch.float64}, "out_dtype: takes"),
        ({"x": torch.zeros(2, 257, dtype=BF16)[:, 1:]}, "x: takes rows that start at multiples of 16 bytes"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change, words):
    with pytest.raises(ValueError, match=words):
        nvfp4_linear(**{**operands(GemmCase(2, 40, 256)), **change})
