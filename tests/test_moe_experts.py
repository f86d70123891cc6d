"""The experts for few tokens: the CPU reference and the CUDA kernels against a float64 composition on the same
quantised operands, under the routings that occur."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.cases.moe import EXPERT_FORMATS, FewTokensCase, few_tokens_tests
from vllm_b200_plugin.ops.moe_few_tokens import (
    MAX_ASSIGNMENTS,
    ExpertFormat,
    few_tokens_moe,
    few_tokens_refusal,
    scratch_elements,
)
from vllm_b200_plugin.ops.nvfp4_experts import pack_w2, pack_w13, unpack_w2, unpack_w13, unpacked_shape
from vllm_b200_plugin.ops.nvfp4_quant import e2m1_to_float
from vllm_b200_plugin.ops.quant import per_token_group_quant
from vllm_b200_plugin.ops.token_quant import per_tensor_quant, per_token_quant

CASES = list(few_tokens_tests())
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BLOCK = 128
FORMATS = pytest.mark.parametrize("format", EXPERT_FORMATS)
INDEPENDENT_ROWS = pytest.mark.parametrize("format", [f for f in EXPERT_FORMATS if f != "fp8_tensor-expert"])


def make(case: FewTokensCase, device: str, seed: int = 0) -> tuple[torch.Tensor | None, ...]:
    """x, w13 and its scales, w2 and its scales, weights and ids of the experts."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(case.num_tokens, case.hidden_size, generator=rng).bfloat16()
    w13 = weight((case.num_experts, 2 * case.intermediate_size, case.hidden_size), case.format, rng, pack_w13)
    w2 = weight((case.num_experts, case.hidden_size, case.intermediate_size), case.format, rng, pack_w2)
    weights = torch.rand(case.num_tokens, case.top_k, generator=rng)
    ids = route(case, rng).to(getattr(torch, case.ids))
    return tuple(None if tensor is None else tensor.to(device) for tensor in (x, *w13, *w2, weights, ids))


def weight(
    shape: tuple[int, int, int], format: str, rng: torch.Generator, pack: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """pack: for NVFP4."""
    normal = torch.randn(shape, generator=rng)
    if format == "bf16":
        return (normal / shape[2] ** 0.5).bfloat16(), None
    if format == "nvfp4":
        bits = torch.randint(0, 256, (*shape[:2], shape[2] // 2), generator=rng, dtype=torch.uint8)
        groups = (torch.rand(*shape[:2], shape[2] // 16, generator=rng) * 60 + 2).to(torch.float8_e4m3fn)
        scale = (torch.rand(shape[0], generator=rng) + 0.5) / (100 * shape[2] ** 0.5)
        return pack(bits, groups), scale
    blocks = (shape[0], shape[1] // BLOCK, shape[2] // BLOCK)
    dtype, largest = (torch.int8, 127) if "int8" in format else (torch.float8_e4m3fn, 448)
    scales = shape[:2] if "channel" in format else shape[:1] if "expert" in format else blocks
    scale = (torch.rand(scales, generator=rng) + 0.5) / (100 * shape[2] ** 0.5)
    return (normal * 100).clamp(-largest, largest).to(dtype), scale


def options(format: str, device: str) -> dict[str, object]:
    """Keyword arguments that go with the operands."""
    given = {name: torch.tensor(scale, device=device) for name, scale in (("x_scale", 0.01), ("hidden_scale", 0.002))}
    return {"format": ExpertFormat[format.split("-")[0].upper()], **(given if "given" in format else {})}


def gated(case: FewTokensCase, device: str, seed: int = 0) -> dict[str, object]:
    """Keyword arguments for the activation and the biases."""
    more: dict[str, object] = {"activation": case.activation}
    if case.activation in ("silu_clamped", "gpt_oss"):
        more = {"activation": "silu_clamped", "limit": 1.5, "alpha": 1.702, "beta": 1.0}
    if case.activation == "gpt_oss":
        more["interleaved"] = True
    if case.biases:
        rng = torch.Generator().manual_seed(seed)
        for name, rows in (("w13_bias", 2 * case.intermediate_size), ("w2_bias", case.hidden_size)):
            more[name] = torch.randn(case.num_experts, rows, generator=rng).div(2).bfloat16().to(device)
    return more


def run(case: FewTokensCase, operands: tuple[torch.Tensor | None, ...], **changes: object) -> torch.Tensor:
    device = operands[0].device.type
    return few_tokens_moe(*operands, **(options(case.format, device) | gated(case, device) | changes))


def route(case: FewTokensCase, rng: torch.Generator) -> torch.Tensor:
    ids = torch.rand(case.num_tokens, case.num_experts, generator=rng).topk(case.top_k).indices
    if case.routing == "one_expert":
        ids[:] = case.num_experts - 1
    if case.routing == "one_empty":
        ids[ids == 0] = 1
    if case.routing == "duplicated":
        ids[:, 1::2] = ids[:, ::2]
    if case.routing == "half_missing":
        ids[:, ::2] = -1
    if case.routing == "all_missing":
        ids[:] = -1
    return ids


def weights_of(
    expert: int, w: torch.Tensor, scale: torch.Tensor | None, unpack: Callable[..., tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    if scale is None:
        return w[expert].double()
    own = scale[expert].double()
    if w.dtype == torch.uint8:
        bits, groups = (tensor.squeeze(0) for tensor in unpack(w[expert : expert + 1]))
        return e2m1_to_float(bits).double() * groups.double().repeat_interleave(16, 1) * own
    if own.dim() == 2:
        own = own.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return w[expert].double() * (own.unsqueeze(-1) if own.dim() == 1 else own)


def quantised(x: torch.Tensor, format: str, given: torch.Tensor | None) -> torch.Tensor:
    """The values that rows stand for, in float64."""
    if format in ("bf16", "nvfp4"):
        return x.double()
    if "block" in format:
        q, scale = per_token_group_quant(x, ue8m0="pow2" in format)
        return q.double() * scale.double().repeat_interleave(BLOCK, -1)
    if "int8" in format:
        largest = x.double().abs().amax(-1, keepdim=True).clamp(min=1e-10)
        return (x.double() * 127 / largest).round().nan_to_num(nan=0.0) * (largest / 127)
    if "token" in format:
        q, scale, _ = per_token_quant(x)
        return q.double() * scale.double()
    if given is None:
        given = x.float().abs().max() / 448
    return per_tensor_quant(x, given).double() * given.double()


def in_float64(
    x: torch.Tensor, w13: torch.Tensor, w13_scale: torch.Tensor | None, w2: torch.Tensor,
    w2_scale: torch.Tensor | None, weights: torch.Tensor, ids: torch.Tensor, format: str = "fp8_block",
    gated: dict[str, object] | None = None,
) -> torch.Tensor:  # fmt: skip
    given, gated = options(format, x.device.type), gated or {"activation": "silu"}
    none = torch.zeros(1, 1, device=x.device).expand(len(w13), 1)
    w13_bias, w2_bias = (gated.get(name, none).double() for name in ("w13_bias", "w2_bias"))
    values = quantised(x, format, given.get("x_scale"))
    hidden = x.new_zeros(*ids.shape, unpacked_shape(w2)[2] if format == "nvfp4" else w2.shape[2])
    routed = [(expert, (ids == expert).nonzero(as_tuple=True)) for expert in ids[ids >= 0].unique().tolist()]
    for expert, (tokens, slots) in routed:
        gate_up = values[tokens] @ weights_of(expert, w13, w13_scale, unpack_w13).T + w13_bias[expert]
        gate_up = gate_up.bfloat16().double()
        gate, up = (gate_up[:, ::2], gate_up[:, 1::2]) if gated.get("interleaved") else gate_up.chunk(2, -1)
        hidden[tokens, slots] = product_of(gate, up, gated).bfloat16()
    values = quantised(hidden.flatten(0, 1), format, given.get("hidden_scale")).view(hidden.shape)
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert, (tokens, slots) in routed:
        products = values[tokens, slots] @ weights_of(expert, w2, w2_scale, unpack_w2).T + w2_bias[expert]
        out.index_put_((tokens,), weights[tokens, slots].double().unsqueeze(-1) * products, accumulate=True)
    return out


def product_of(gate: torch.Tensor, up: torch.Tensor, gated: dict[str, object]) -> torch.Tensor:
    if gated["activation"] == "silu_clamped":
        gate = gate.where(gate < gated["limit"], gated["limit"])
        up = up.where(up < gated["limit"], gated["limit"])
        up = up.where(up > -gated["limit"], -gated["limit"])
        return (up + gated["beta"]) * gate / (1 + torch.exp(-gated["alpha"] * gate))
    if gated["activation"] == "gelu":
        return gate / 2 * (1 + torch.erf(gate / 2**0.5)) * up
    if gated["activation"] == "gelu_tanh":
        return gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    return gate * torch.sigmoid(gate) * up


def limit_of(format: str) -> float:
    """Of difference(): looser where one rounding of a value between the products shows, in a scale or a coarse step."""
    return 1e-4 if format in ("fp8_tensor-expert", "int8_token-channel") else 2e-5


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.double(), y.double()
    norms = float((x * x + y * y).sum())
    return 1 - 2 * float((x * y).sum()) / norms if norms else 0.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: FewTokensCase, device: str) -> None:
    operands = make(case, device)
    out = torch.full_like(operands[0], float("nan"))
    assert run(case, operands, out=out) is out
    expected = in_float64(*operands, case.format, gated(case, device))
    assert abs(difference(out, expected)) < limit_of(case.format)
    assert (out[~(operands[-1] >= 0).any(-1)] == 0).all()


@pytest.mark.gpu
@FORMATS
@pytest.mark.parametrize("top_k", [1, 8])
def test_cuda_every_number_of_tokens(top_k: int, format: str) -> None:
    for num_tokens in range(1, 17 if format == "fp8_tensor-expert" else 65):
        case = FewTokensCase(num_tokens, 24, top_k, 256, 256, format=format)
        operands = make(case, "cuda", seed=num_tokens)
        assert abs(difference(run(case, operands), in_float64(*operands, format))) < limit_of(format), num_tokens


@pytest.mark.parametrize("format", [f for f in EXPERT_FORMATS if f != "nvfp4"])
@pytest.mark.parametrize("device", DEVICES)
def test_up_first(device: str, format: str) -> None:
    case = FewTokensCase(5, 6, 2, 256, 384, format=format)
    operands = list(make(case, device))
    expected = run(case, operands)
    for i in (1, 2):
        if operands[i] is not None and operands[i].dim() > 1:
            tensor = operands[i].view(torch.uint8) if operands[i].element_size() == 1 else operands[i]
            operands[i] = torch.cat(tensor.chunk(2, 1)[::-1], 1).view(operands[i].dtype)
    assert torch.equal(run(case, operands, up_first=True), expected)


@INDEPENDENT_ROWS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [1, 6])
def test_expert_parallel_halves_add_up(device: str, num_tokens: int, format: str) -> None:
    case = FewTokensCase(num_tokens, 8, 4, 256, 256, format=format)
    x, *experts, weights, ids = make(case, device)
    whole = run(case, (x, *experts, weights, ids))
    halves = []
    for here in (slice(0, 4), slice(4, 8)):
        expert_map = torch.full((8,), -1, dtype=torch.int32, device=device)
        expert_map[here] = torch.arange(4, dtype=torch.int32, device=device)
        # As copies, for the scales have to begin at multiples of 16 bytes.
        part = [None if tensor is None else tensor[here].clone() for tensor in experts]
        halves.append(run(case, (x, *part, weights, ids), expert_map=expert_map))
    assert difference(halves[0].double() + halves[1].double(), whole) < 2e-5


@pytest.mark.parametrize("device", DEVICES)
def test_strided_rows_no_weights_and_unknown_ids(device: str) -> None:
    x, *rest, weights, ids = make(FewTokensCase(5, 6, 2, 256, 128), device)
    wide = torch.zeros(5, 256 + 64, dtype=x.dtype, device=device)
    wide[:, 8:264] = x
    out = torch.zeros_like(wide)
    expected = few_tokens_moe(x, *rest, torch.ones_like(weights), ids)
    few_tokens_moe(wide[:, 8:264], *rest, None, ids, out=out[:, 8:264])
    assert torch.equal(out[:, 8:264], expected)
    assert not out[:, :8].any() and not out[:, 264:].any()
    unknown = ids.clone()
    unknown[:, 0] = 6
    missing = ids.clone()
    missing[:, 0] = -1
    assert torch.equal(few_tokens_moe(x, *rest, weights, unknown), few_tokens_moe(x, *rest, weights, missing))


@FORMATS
@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device: str, format: str) -> None:
    case = FewTokensCase(0, 4, 2, 128, 128, format=format)
    assert run(case, make(case, device)).shape == (0, 128)


@FORMATS
@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_inf(device: str, format: str) -> None:
    """They stay in their row; but the one scale of all activations is Inf where one of these is."""
    case = FewTokensCase(9, 3, 2, 256, 128, format=format)
    operands = make(case, device)
    expected = run(case, operands)
    x = operands[0].clone()
    x[2, 5] = float("nan")
    independent = format != "fp8_tensor-expert"
    if independent:
        x[4, 130] = float("inf")
    out = run(case, (x, *operands[1:]))
    assert out[2].isnan().all()
    if independent:
        assert out[4].isfinite().all() if "given" in format else not out[4].isfinite().any()  # there it saturates
    others = [row for row in range(9) if row not in (2, 4)]
    if independent:
        assert torch.equal(out[others], expected[others])
    else:
        assert out[others].isfinite().all()
        x[4, 130] = float("inf")
        assert run(case, (x, *operands[1:])).isnan().all()


@INDEPENDENT_ROWS
@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [2, 8, 31])
def test_cuda_a_row_depends_on_no_other(num_tokens: int, format: str) -> None:
    case = FewTokensCase(num_tokens, 16, 4, 512, 256, format=format)
    x, *rest, weights, ids = make(case, "cuda")
    together = run(case, (x, *rest, weights, ids))
    order = torch.randperm(num_tokens, device="cuda")
    shuffled = run(case, (x[order].contiguous(), *rest, weights[order].contiguous(), ids[order].contiguous()))
    assert torch.equal(shuffled, together[order])


@FORMATS
@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8])
def test_cuda_graph_chain_and_streams(num_tokens: int, format: str) -> None:
    """Layers one after another with one scratch tensor, replayed, and beside each other on two streams."""
    case = FewTokensCase(num_tokens, 16, 4, 512, 256, format=format)
    layers = [make(case, "cuda", seed)[1:5] for seed in range(3)]
    x, *_, weights, ids = make(case, "cuda", 7)
    more = options(format, "cuda")

    def chain(x: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        for i in range(9):
            x = few_tokens_moe(x, *layers[i % 3], weights, ids, scratch=scratch, **more)
            x = x / x.float().square().mean(-1, keepdim=True).sqrt().to(x.dtype)
        return x

    scratch = [torch.empty(scratch_elements(num_tokens * 4, 256)).bfloat16().cuda() for _ in range(2)]
    expected = chain(x, scratch[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(x, scratch[0])
    for _ in range(20):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, expected)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for stream, own in zip(streams, scratch, strict=True):
            with torch.cuda.stream(stream):
                results.append(chain(x, own))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@FORMATS
def test_is_one_op_for_torch_compile(format: str) -> None:
    torch._dynamo.reset()  # there are more formats than recompilations allowed
    operands, more = make(FewTokensCase(3, 4, 2, 128, 128, format=format), "cpu"), options(format, "cpu")
    compiled = torch.compile(few_tokens_moe, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*operands, **more), few_tokens_moe(*operands, **more))


def test_opcheck() -> None:
    x, w13, w13_scale, w2, w2_scale, weights, ids = make(FewTokensCase(3, 4, 2, 128, 128), "cpu")
    scratch = torch.zeros(3, 2, 144, dtype=torch.bfloat16)
    torch.library.opcheck(
        torch.ops.vllm_b200.few_tokens_moe.default,
        (
            *(x, w13, w13_scale, w2, w2_scale, weights, ids, None, None, None, None, None),
            *(scratch, torch.zeros_like(x), False, False, 1, 0, 0.0, 1.0, 0.0, True),
        ),
        test_utils="test_faketensor",  # the other tests compare, which float8_e4m3fn lacks
    )


@pytest.mark.parametrize(
    "sizes, words",
    [
        ((MAX_ASSIGNMENTS + 1, 8, 128, 128), "num_tokens"),
        ((8, 1025, 128, 128), "num_experts"),
        ((8, 8, 2880, 128), "hidden_size: takes multiples of 128, got 2880"),
        ((8, 8, 128, 96), "intermediate_size: takes multiples of 128, got 96"),
    ],
)
def test_refusals_name_the_size(sizes: tuple[int, int, int, int], words: str) -> None:
    assert words in (few_tokens_refusal(*sizes) or "")
    assert few_tokens_refusal(512, 128, 2048, 768) is None
    assert few_tokens_refusal(8, 8, 192, 64, ExpertFormat.BF16) is None


@pytest.mark.parametrize(
    "index, change, words",
    [
        (0, lambda t: t.half(), "x: takes bfloat16"),
        (0, lambda t: t[0], "x: takes"),
        (3, lambda t: t[:, :, 1:], "w2: takes"),
        (5, lambda t: t[:, :1], "topk_weights: takes"),
        (6, lambda t: t.float(), "topk_ids: takes integers"),
    ],
)
def test_errors_name_the_argument(index: int, change: object, words: str) -> None:
    operands = list(make(FewTokensCase(3, 4, 2, 128, 128), "cpu"))
    operands[index] = change(operands[index])
    with pytest.raises(ValueError, match=words):
        few_tokens_moe(*operands)


@pytest.mark.parametrize(
    "format, index, words",
    [
        ("nvfp4", 2, "w13_scale, w2_scale: NVFP4 takes"),
        ("nvfp4", 1, "w13, w2: NVFP4 takes"),
        ("fp8_block", 2, "w13_scale, w2_scale: FP8_BLOCK takes"),
        ("bf16", 1, "w13: takes torch.bfloat16 with BF16"),
        ("fp8_token-channel", 4, "FP8_TOKEN takes"),
    ],
)
def test_formats_need_their_dtypes_and_scales(format: str, index: int, words: str) -> None:
    case = FewTokensCase(3, 4, 2, 128, 256, format=format)
    operands = list(make(case, "cpu"))
    operands[index] = operands[index].half() if index == 1 else operands[index][:2]
    with pytest.raises(ValueError, match=words):
        run(case, operands)


def test_one_scale_for_all_activations() -> None:
    case = FewTokensCase(17, 4, 2, 128, 128, format="fp8_tensor-expert")
    operands = make(case, "cpu")
    with pytest.raises(ValueError, match="x_scale: takes a scale for more than 16 tokens"):
        run(case, operands)
    with pytest.raises(ValueError, match="x_scale: goes with FP8_TENSOR"):
        few_tokens_moe(*operands, format=ExpertFormat.FP8_TOKEN, x_scale=torch.ones(1))


def test_nvfp4_goes_with_the_gate_first() -> None:
    operands = make(FewTokensCase(3, 4, 2, 128, 128, format="nvfp4"), "cpu")
    with pytest.raises(ValueError, match="NVFP4 takes the gate's rows first"):
        few_tokens_moe(*operands, format=ExpertFormat.NVFP4, up_first=True)
