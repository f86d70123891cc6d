"""The experts for few tokens: the CPU reference and the CUDA kernels against a float64 composition on the same
quantised operands, under the routings that occur."""

import pytest
import torch

from benchmarks.cases.moe import FewTokensCase, few_tokens_tests
from vllm_b200_plugin.ops.moe import MAX_ASSIGNMENTS, few_tokens_moe, few_tokens_refusal
from vllm_b200_plugin.ops.quant import per_token_group_quant

CASES = list(few_tokens_tests())
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BLOCK = 128


def make(case: FewTokensCase, device: str, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x, w13 and its scales, w2 and its scales, weights and ids of the experts."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(case.num_tokens, case.hidden_size, generator=rng).bfloat16()
    w13, w13_scale = block_weight((case.num_experts, 2 * case.intermediate_size, case.hidden_size), rng)
    w2, w2_scale = block_weight((case.num_experts, case.hidden_size, case.intermediate_size), rng)
    weights = torch.rand(case.num_tokens, case.top_k, generator=rng)
    ids = route(case, rng).to(getattr(torch, case.ids))
    return tuple(tensor.to(device) for tensor in (x, w13, w13_scale, w2, w2_scale, weights, ids))


def block_weight(shape: tuple[int, ...], rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    weight = (torch.randn(shape, generator=rng) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(shape[0], shape[1] // BLOCK, shape[2] // BLOCK, generator=rng) + 0.5
    return weight, scale / (100 * shape[2] ** 0.5)


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


def dequantised(q: torch.Tensor, scale: torch.Tensor, rows: int) -> torch.Tensor:
    return q.double() * scale.double().repeat_interleave(rows, -2).repeat_interleave(BLOCK, -1)


def in_float64(
    x: torch.Tensor, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor,
    weights: torch.Tensor, ids: torch.Tensor, ue8m0: bool,
) -> torch.Tensor:  # fmt: skip
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    quantised = dequantised(*per_token_group_quant(x, ue8m0=ue8m0), 1)
    for expert in ids[ids >= 0].unique().tolist():
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        gate_up = (quantised[tokens] @ dequantised(w13[expert], w13_scale[expert], BLOCK).T).bfloat16().double()
        gate, up = gate_up.chunk(2, -1)
        hidden = dequantised(*per_token_group_quant((gate * torch.sigmoid(gate) * up).bfloat16(), ue8m0=ue8m0), 1)
        products = hidden @ dequantised(w2[expert], w2_scale[expert], BLOCK).T
        out.index_put_((tokens,), weights[tokens, slots].double().unsqueeze(-1) * products, accumulate=True)
    return out


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.double(), y.double()
    norms = float((x * x + y * y).sum())
    return 1 - 2 * float((x * y).sum()) / norms if norms else 0.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: FewTokensCase, device: str) -> None:
    operands = make(case, device)
    out = torch.full_like(operands[0], float("nan"))
    returned = few_tokens_moe(*operands, ue8m0=case.ue8m0, out=out)
    assert returned is out
    expected = in_float64(*operands, case.ue8m0)
    assert abs(difference(out, expected)) < 2e-5
    assert (out[~(operands[-1] >= 0).any(-1)] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [1, 8])
def test_cuda_every_number_of_tokens(top_k: int) -> None:
    for num_tokens in range(1, 65):
        case = FewTokensCase(num_tokens, 24, top_k, 256, 256)
        operands = make(case, "cuda", seed=num_tokens)
        assert abs(difference(few_tokens_moe(*operands), in_float64(*operands, False))) < 2e-5, num_tokens


@pytest.mark.parametrize("device", DEVICES)
def test_up_first(device: str) -> None:
    x, w13, w13_scale, w2, w2_scale, weights, ids = make(FewTokensCase(5, 6, 2, 256, 384), device)
    swapped = (
        torch.cat([t[:, t.shape[1] // 2 :].view(b), t[:, : t.shape[1] // 2].view(b)], 1).view(t.dtype)
        for t, b in ((w13, torch.uint8), (w13_scale, torch.float32))
    )
    expected = few_tokens_moe(x, w13, w13_scale, w2, w2_scale, weights, ids)
    assert torch.equal(few_tokens_moe(x, *swapped, w2, w2_scale, weights, ids, up_first=True), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [1, 6])
def test_expert_parallel_halves_add_up(device: str, num_tokens: int) -> None:
    case = FewTokensCase(num_tokens, 8, 4, 256, 256)
    x, w13, w13_scale, w2, w2_scale, weights, ids = make(case, device)
    whole = few_tokens_moe(x, w13, w13_scale, w2, w2_scale, weights, ids)
    halves = []
    for here in (slice(0, 4), slice(4, 8)):
        expert_map = torch.full((8,), -1, dtype=torch.int32, device=device)
        expert_map[here] = torch.arange(4, dtype=torch.int32, device=device)
        part = [tensor[here].contiguous() for tensor in (w13, w13_scale, w2, w2_scale)]
        halves.append(few_tokens_moe(x, *part, weights, ids, expert_map=expert_map))
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


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device: str) -> None:
    operands = make(FewTokensCase(0, 4, 2, 128, 128), device)
    assert few_tokens_moe(*operands).shape == (0, 128)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_inf_stay_in_their_row(device: str) -> None:
    operands = make(FewTokensCase(9, 3, 2, 256, 128), device)
    expected = few_tokens_moe(*operands)
    x = operands[0].clone()
    x[2, 5], x[4, 130] = float("nan"), float("inf")
    out = few_tokens_moe(x, *operands[1:])
    assert out[2].isnan().all() and not out[4].isfinite().any()
    others = [row for row in range(9) if row not in (2, 4)]
    assert torch.equal(out[others], expected[others])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [2, 8, 31])
def test_cuda_a_row_depends_on_no_other(num_tokens: int) -> None:
    x, *rest, weights, ids = make(FewTokensCase(num_tokens, 16, 4, 512, 256), "cuda")
    together = few_tokens_moe(x, *rest, weights, ids)
    order = torch.randperm(num_tokens, device="cuda")
    shuffled = few_tokens_moe(x[order].contiguous(), *rest, weights[order].contiguous(), ids[order].contiguous())
    assert torch.equal(shuffled, together[order])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8])
def test_cuda_graph_chain_and_streams(num_tokens: int) -> None:
    """Layers one after another with one scratch tensor, replayed, and beside each other on two streams."""
    case = FewTokensCase(num_tokens, 16, 4, 512, 256)
    layers = [make(case, "cuda", seed)[1:5] for seed in range(3)]
    x, *_, weights, ids = make(case, "cuda", 7)

    def chain(x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        for i in range(9):
            x = few_tokens_moe(x, *layers[i % 3], weights, ids, hidden=hidden)
            x = x / x.float().square().mean(-1, keepdim=True).sqrt().to(x.dtype)
        return x

    scratch = [torch.empty(num_tokens, 4, 256, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
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
        for stream, hidden in zip(streams, scratch, strict=True):
            with torch.cuda.stream(stream):
                results.append(chain(x, hidden))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_is_one_op_for_torch_compile() -> None:
    operands = make(FewTokensCase(3, 4, 2, 128, 128), "cpu")
    compiled = torch.compile(few_tokens_moe, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*operands), few_tokens_moe(*operands))


def test_opcheck() -> None:
    x, w13, w13_scale, w2, w2_scale, weights, ids = make(FewTokensCase(3, 4, 2, 128, 128), "cpu")
    hidden = torch.zeros(3, 2, 128, dtype=torch.bfloat16)
    torch.library.opcheck(
        torch.ops.vllm_b200.few_tokens_moe.default,
        (x, w13, w13_scale, w2, w2_scale, weights, ids, None, hidden, torch.zeros_like(x), False, False, True),
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
