"""Small-M linear layers: the CPU reference against float64 computed in another way, the CUDA kernel against the
reference, over formats, shapes and every way of cutting the work."""

import itertools

import pytest
import torch

from benchmarks.cases.gemm import SmallMCase, small_m_tests
from vllm_b200_plugin.ops import small_m_gemm
from vllm_b200_plugin.ops.quant import ScaleLayout, per_token_group_quant
from vllm_b200_plugin.ops.small_m_gemm import Config

E4M3 = torch.float8_e4m3fn
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = list(small_m_tests())
CONFIGS = [
    Config(row_tiles, warps, cluster, chunks)
    for row_tiles, warps, cluster, chunks in itertools.product((1, 2, 4), (1, 3, 8), (1, 2, 4, 8), (0, 1, 3, 4))
    if not chunks or warps % chunks == 0
]
STREAMS = [
    Config(row_tiles, warps, stages=stages)
    for row_tiles, warps, stages in itertools.product((1, 2, 4), (8, 16), (2, 3, 4))
    if row_tiles * warps <= 32
]


def operands(case: SmallMCase, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Arguments of the op for one case, drawn on the CPU, so that they are the same on every device."""
    m, n, k = case.num_tokens, case.n, case.k
    rng = torch.Generator().manual_seed(m * 31 + n * 7 + k)

    def normal(*shape):
        return torch.randn(shape, generator=rng)

    def positive(*shape):
        return torch.rand(shape, generator=rng) / 50 + 1e-3

    tensors = {}
    if case.kind == "fp8_block":
        tensors = {"x": normal(m, k).to(BF16), "weight": (normal(n, k) * 60).to(E4M3)}
        tensors["weight_scale"] = positive(-(-n // 128), k // 128)
    elif case.kind == "fp8":
        tensors = {"x": (normal(m, k) * 60).to(E4M3), "weight": (normal(n, k) * 60).to(E4M3)}
    elif case.kind == "int8":
        tensors = {
            name: torch.randint(-128, 128, (rows, k), generator=rng, dtype=torch.int8)
            for name, rows in (("x", m), ("weight", n))
        }
    else:
        dtype = {"bf16": BF16, "fp16": FP16}[case.kind]
        tensors = {"x": normal(m, k).to(dtype), "weight": normal(n, k).to(dtype)}
    if case.kind in ("fp8", "int8"):
        tensors |= {"x_scale": positive(m if n % 2 else 1), "weight_scale": positive(n if m % 2 else 1)}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def call(case: SmallMCase, tensors: dict[str, torch.Tensor], **options) -> torch.Tensor:
    function = {
        "fp8_block": small_m_gemm.fp8_block_linear,
        "fp8": small_m_gemm.scaled_linear,
        "int8": small_m_gemm.scaled_linear,
    }.get(case.kind, small_m_gemm.linear)
    if case.kind == "fp8_block" and case.num_tokens > small_m_gemm.MAX_QUANTISED_TOKENS and "x_scale" not in tensors:
        q, scale = per_token_group_quant(tensors["x"], ue8m0=options.pop("ue8m0", False))
        tensors = tensors | {"x": q, "x_scale": scale}
    return function(**tensors, **options)


def in_float64(case: SmallMCase, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    x, weight = tensors["x"], tensors["weight"].double()
    if case.kind != "fp8_block":
        y = x.double() @ weight.t()
        if "x_scale" in tensors:
            y = torch.diag(tensors["x_scale"].double().expand(case.num_tokens)) @ y
            y = y @ torch.diag(tensors["weight_scale"].double().expand(case.n))
        return y
    q, scale = (x, tensors["x_scale"]) if "x_scale" in tensors else per_token_group_quant(x)
    y = torch.zeros(case.num_tokens, case.n, dtype=torch.float64)
    for i, j in itertools.product(range(-(-case.n // 128)), range(case.k // 128)):
        rows, columns = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
        product = q[:, columns].double() @ weight[rows, columns].t()
        y[:, rows] += product * scale[:, j, None].double() * tensors["weight_scale"][i, j].double()
    return y


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = FP32) -> None:
    """To the rounding of `dtype`, and of fp32 sums that may cancel."""
    expected = expected.double().cpu()
    rounding = {FP32: 1e-6, BF16: 2.0**-8, FP16: 2.0**-10}[dtype]
    limit = rounding * expected.abs() + 2e-6 * expected.abs().max() + 1e-30
    error = (actual.double().cpu() - expected).abs()
    assert actual.dtype == dtype and not (error > limit).any() and error.isfinite().all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_definition(case):
    tensors = operands(case)
    assert_close(call(case, tensors, out_dtype=FP32), in_float64(case, tensors))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [case for case in CASES if case.num_tokens in (1, 8, 32)], ids=str)
@pytest.mark.parametrize("out_dtype", [BF16, FP16, FP32])
def test_bias_and_output_types(device, case, out_dtype):
    tensors = operands(case, device)
    bias = torch.randn(case.n, generator=torch.Generator().manual_seed(0)).to(out_dtype).to(device)
    plain = call(case, tensors, out_dtype=FP32)
    if plain.abs().max() > 6e4 and out_dtype == FP16:
        pytest.skip("beyond the range of float16")
    assert_close(call(case, tensors, bias=bias, out_dtype=out_dtype), plain.double() + bias.double(), out_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_is_the_reference(case):
    expected = call(case, operands(case), out_dtype=FP32)
    tensors = operands(case, "cuda")
    for pdl in (False, True):
        assert_close(call(case, tensors, out_dtype=FP32, pdl=pdl), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp8_block", "fp8", "int8", "bf16", "fp16"])
@pytest.mark.parametrize("num_tokens", [1, 7, 16, 29])
def test_every_cut_gives_the_result_and_the_same_bits_again(kind, num_tokens):
    case = SmallMCase(kind, num_tokens, 200, {"fp8_block": 1280, "bf16": 880, "fp16": 880}.get(kind, 1328))
    tensors = operands(case, "cuda")
    expected = call(case, operands(case), out_dtype=FP32)
    for config, pdl in itertools.product(CONFIGS, (False, True)):
        out = call(case, tensors, out_dtype=FP32, config=config, pdl=pdl)
        assert_close(out, expected)
        assert torch.equal(out, call(case, tensors, out_dtype=FP32, config=config, pdl=pdl))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp8_block", "fp8", "int8", "bf16"])
@pytest.mark.parametrize("n", [7, 1100, 4333])  # one row tile, one turn of a block, several
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 16])
def test_every_way_of_streaming_gives_the_result_and_the_same_bits_again(kind, num_tokens, n):
    case = SmallMCase(kind, num_tokens, n, 2432 if kind in ("fp8_block", "fp8", "int8") else 1216)
    tensors = operands(case, "cuda")
    if kind == "fp8_block":
        tensors["x"], tensors["x_scale"] = per_token_group_quant(tensors["x"])
    expected = call(case, {name: tensor.cpu() for name, tensor in tensors.items()}, out_dtype=FP32)
    for config, pdl in itertools.product(STREAMS, (False, True)):
        out = call(case, tensors, out_dtype=FP32, config=config, pdl=pdl)
        assert_close(out, expected)
        assert torch.equal(out, call(case, tensors, out_dtype=FP32, config=config, pdl=pdl))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp8_block", "fp8", "int8", "bf16"])
@pytest.mark.parametrize("k", [256, 896])
def test_every_number_of_rows_and_tokens_streamed(kind, k):
    for n, num_tokens in [(n, 1 + n % 16) for n in range(1, 301)] + [(177, m) for m in range(1, 17)]:
        case = SmallMCase(kind, num_tokens, n, k)
        tensors = operands(case, "cuda")
        if kind == "fp8_block":
            tensors["x"], tensors["x_scale"] = per_token_group_quant(tensors["x"])
        streamed = call(case, tensors, out_dtype=FP32, config=Config(2, 8, stages=3))
        assert_close(streamed, in_float64(case, {name: tensor.cpu() for name, tensor in tensors.items()}))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config, num_tokens, k",
    [
        (Config(stages=3), 17, 256),
        (Config(stages=3), 8, 320),
        (Config(1, 4, stages=3), 8, 256),
        (Config(stages=9), 8, 256),
    ],
)
def test_what_cannot_be_streamed_is_refused(config, num_tokens, k):
    case = SmallMCase("fp8", num_tokens, 40, k)
    with pytest.raises(RuntimeError, match="small_m_gemm"):
        call(case, operands(case, "cuda"), config=config)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp8_block", "fp8", "int8", "bf16"])
@pytest.mark.parametrize("k", [256, 896])
def test_every_number_of_rows_and_tokens(kind, k):
    for n, num_tokens in [(n, 1 + n % 32) for n in range(1, 301)] + [(177, m) for m in range(1, 33)]:
        case = SmallMCase(kind, num_tokens, n, k)
        assert_close(call(case, operands(case, "cuda"), out_dtype=FP32), in_float64(case, operands(case)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["fp8_block", "fp8", "int8", "bf16"])
def test_strided_x(device, kind):
    case = SmallMCase(kind, 5, 96, 256)
    tensors = operands(case, device)
    wide = torch.zeros(5, 512, dtype=tensors["x"].dtype, device=device)
    wide[:, 128:384] = tensors["x"]
    strided = tensors | {"x": wide[:, 128:384]}
    assert torch.equal(call(case, strided, out_dtype=FP32), call(case, tensors, out_dtype=FP32))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [1, 5, 20])
def test_scale_layouts_change_nothing(device, num_tokens):
    """Every layout of the activation's scales, and DeepGEMM's packed weight scales."""
    case = SmallMCase("fp8_block", num_tokens, 200, 640)
    tensors = operands(case, device)
    exponent = torch.randint(110, 125, (2, 5), generator=torch.Generator().manual_seed(1))
    tensors["weight_scale"] = torch.exp2(exponent.float() - 127).to(device)
    q, scale = per_token_group_quant(tensors["x"], ue8m0=True)
    expected = call(case, tensors | {"x": q, "x_scale": scale}, out_dtype=FP32)
    spread = torch.nn.functional.pad(exponent, (0, 3)).to(torch.uint8).repeat_interleave(128, 0)[:200]
    packed = spread.contiguous().view(torch.int32).t().contiguous().t().to(device)  # column-major, as DeepGEMM has it
    for layout in ScaleLayout:
        q, scale = per_token_group_quant(tensors["x"], ue8m0=True, layout=layout)
        for weight_scale in (tensors["weight_scale"], packed):
            arguments = tensors | {"x": q, "x_scale": scale, "weight_scale": weight_scale}
            assert torch.equal(call(case, arguments, out_dtype=FP32), expected)
    if num_tokens <= small_m_gemm.MAX_QUANTISED_TOKENS:
        assert torch.equal(call(case, tensors, out_dtype=FP32, ue8m0=True), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 3, 8])
def test_quantised_on_the_way_or_before_is_the_same(num_tokens, ue8m0):
    case = SmallMCase("fp8_block", num_tokens, 144, 2048)
    tensors = operands(case, "cuda")
    tensors["x"][:, :128] = 0
    tensors["x"][0, 130] = 3e38
    q, scale = per_token_group_quant(tensors["x"], ue8m0=ue8m0)
    before = call(case, tensors | {"x": q, "x_scale": scale}, out_dtype=FP32)
    assert torch.equal(call(case, tensors, out_dtype=FP32, ue8m0=ue8m0), before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["fp8_block", "fp8", "bf16"])
def test_nan_stays_in_its_row_and_column(device, kind):
    case = SmallMCase(kind, 3, 40, 384)
    tensors = operands(case, device)
    tensors["x"][1, 200] = float("nan")
    tensors["weight"].view(torch.uint8 if tensors["weight"].itemsize == 1 else torch.int16)[7, 3] = 0x7FFF & (
        0xFF if tensors["weight"].itemsize == 1 else 0xFFFF
    )
    out = call(case, tensors, out_dtype=FP32).isnan().cpu()
    assert out[1].all() and out[:, 7].all()
    out[1] = False
    out[:, 7] = False
    assert not out.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["fp8_block", "fp8", "int8", "bf16"])
def test_no_tokens(device, kind):
    case = SmallMCase(kind, 0, 40, 384)
    assert call(case, operands(case, device)).shape == (0, 40)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp8_block", "fp8", "int8", "bf16"])
@pytest.mark.parametrize("config", [Config(), Config(2, 8, 4, 1), Config(2, 8, stages=3)])
def test_graph_replays_give_the_same_bits(kind, config):
    case = SmallMCase(kind, 2, 2112, 7168)
    tensors = operands(case, "cuda")
    if kind == "fp8_block":
        tensors["x"], tensors["x_scale"] = per_token_group_quant(tensors["x"])
    expected = call(case, tensors, config=config, pdl=True)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = [call(case, tensors, config=config, pdl=True) for _ in range(3)]
    for _ in range(1000):
        for y in out:
            y.fill_(float("nan"))
        graph.replay()
        wrong += sum((y != expected).any() for y in out)
    assert wrong.item() == 0


@pytest.mark.gpu
def test_a_chain_with_pdl_sees_what_its_predecessor_wrote():
    """Each product is the next one's x, over weights whose order of reading PDL changes."""
    case = SmallMCase("fp8_block", 4, 2048, 2048)
    weights = [operands(SmallMCase("fp8_block", 4, 2048, 2048 + 128 * i), "cuda") for i in range(4)]

    def chain(pdl):
        x = weights[0]["x"]
        for i in range(12):
            arguments = {name: weights[i % 4][name] for name in ("weight", "weight_scale")}
            weight, scale = arguments["weight"][:, :2048], arguments["weight_scale"][:, :16]
            tensors, config = {"x": x}, Config()
            if i % 3 == 0:
                config = Config(1, 16, stages=4)
                tensors["x"], tensors["x_scale"] = per_token_group_quant(x)
            x = call(case, tensors | {"weight": weight, "weight_scale": scale}, pdl=pdl, config=config)
            x = x / x.abs().max() if i == 5 else x * 2**-6
        return x

    expected = chain(False)
    for _ in range(20):
        assert torch.equal(chain(True), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp8_block", "fp8", "int8", "bf16"])
@pytest.mark.parametrize("config", [Config(2, 8, 4, 1), Config(2, 8, stages=4)])
def test_two_streams(kind, config):
    case = SmallMCase(kind, 4, 2048, 4096)
    tensors = operands(case, "cuda")
    if kind == "fp8_block":
        tensors["x"], tensors["x_scale"] = per_token_group_quant(tensors["x"])
    expected = call(case, tensors, config=config, pdl=True)
    torch.cuda.synchronize()
    streams, outputs = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs.append(call(case, tensors, config=config, pdl=True))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outputs)


@pytest.mark.parametrize(
    "kind, change, words",
    [
        ("fp8_block", {"x": torch.zeros(9, 256, dtype=BF16)}, "at most 8 rows"),
        ("fp8_block", {"x": torch.zeros(2, 256, dtype=FP16)}, "x: takes torch.bfloat16 without x_scale"),
        ("fp8_block", {"x": torch.zeros(2, 128, dtype=BF16)}, r"weight: takes \[N, 128\]"),
        ("fp8_block", {"weight_scale": torch.zeros(2, 2)}, r"weight_scale: takes float32 or packed .*, here \(1, 2\)"),
        ("fp8", {"x_scale": torch.zeros(3)}, "x_scale: takes 1 or 2 contiguous float32"),
        ("fp8", {"bias": torch.zeros(40, dtype=FP32)}, "bias: takes 40 of torch.bfloat16"),
        ("bf16", {"x": torch.zeros(33, 256, dtype=BF16)}, "x: takes at most 32 rows, got 33"),
        ("bf16", {"x": torch.zeros(2, 257, dtype=BF16)[:, 1:]}, "multiples of 16 bytes"),
        ("bf16", {"x": torch.zeros(2, 250, dtype=BF16), "weight": torch.zeros(4, 250, dtype=BF16)}, "K % 8 == 0"),
        ("bf16", {"out_dtype": torch.float64}, "out_dtype: takes"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(kind, change, words):
    case = SmallMCase(kind, 2, 40, 256)
    options = {name: value for name, value in change.items() if name in ("bias", "out_dtype")}
    tensors = operands(case) | {name: value for name, value in change.items() if name not in options}
    function = {"fp8_block": small_m_gemm.fp8_block_linear, "fp8": small_m_gemm.scaled_linear}.get(
        kind, small_m_gemm.linear
    )
    with pytest.raises(ValueError, match=words):
        function(**tensors, **options)
