"""The gate and the fused router: logits against float64, the selection against select_experts on the same logits."""

import pytest
import torch

from vllm_b200_plugin.ops.router import router, router_gate, split_router
from vllm_b200_plugin.ops.topk import Scoring, Selection, select_experts

GROUPED = Scoring.TANH_SIGMOID, True, 2.5
SPLIT_CASES = [
    (256, 7168, Selection(8, *GROUPED, 8, 4)),  # DeepSeek-V3
    (384, 7168, Selection(8, *GROUPED)),  # Kimi-K2
    (256, 104, Selection(6, *GROUPED, 16, 3)),
    (64, 2048, Selection(8, Scoring.TANH_SIGMOID, False, 1.0, 16, 16)),
    (40, 1000, Selection(1, Scoring.SIGMOID)),
    (264, 520, Selection(6, Scoring.SIGMOID)),
    (512, 16384, Selection(8, Scoring.SIGMOID, False, 2.5)),
    (128, 40000, Selection(8, Scoring.NONE, True, 1.0, 4, 2)),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NUM_TOKENS = [1, 2, 7, 8, 9, 16, 17, 32]
SHAPES = [(128, 2048), (64, 2048), (256, 7168), (32, 2880), (40, 104), (200, 1000)]
GATE_SHAPES = [*SHAPES, (8, 64), (384, 7168), (512, 8), (128, 16384)]


def operands(device: str, num_tokens: int, num_experts: int, hidden_size: int):
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, hidden_size, generator=generator).bfloat16()
    weight = (torch.randn(num_experts, hidden_size, generator=generator) * hidden_size**-0.5).bfloat16()
    return x.to(device), weight.to(device)


def error_of(x: torch.Tensor, reference: torch.Tensor) -> float:
    x, reference = x.double(), reference.double()
    return float(1 - 2 * (x * reference).sum() / (x.square().sum() + reference.square().sum()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_experts, hidden_size", GATE_SHAPES)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_gate(device: str, num_tokens: int, num_experts: int, hidden_size: int) -> None:
    x, weight = operands(device, num_tokens, num_experts, hidden_size)
    logits = router_gate(x, weight)
    assert logits.dtype == torch.float32
    assert error_of(logits, x.double() @ weight.double().t()) < 1e-9
    assert torch.equal(router_gate(x, weight, torch.bfloat16), logits.bfloat16())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_experts, hidden_size", SHAPES)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router(device: str, num_tokens: int, num_experts: int, hidden_size: int, dtype: torch.dtype) -> None:
    x, weight = operands(device, num_tokens, num_experts, hidden_size)
    bias = torch.linspace(-0.2, 0.2, 256, device=device) if num_experts == 256 else None
    selection = Selection(8, Scoring.SOFTMAX if bias is None else Scoring.SIGMOID, scale=2.5)
    is_padding = torch.arange(num_tokens, device=device) % 5 == 4
    logits, weights, ids = router(
        x, weight, selection, bias, logits_dtype=dtype, ids_dtype=torch.int64, is_padding=is_padding
    )
    assert error_of(logits, x.double() @ weight.double().t()) < (1e-9 if dtype == torch.float32 else 1e-5)
    assert torch.equal(logits, router_gate(x, weight).to(dtype)) or device == "cuda"
    expected = select_experts(logits, selection, bias, ids_dtype=torch.int64, is_padding=is_padding)
    assert torch.equal(weights, expected[0]) and torch.equal(ids, expected[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_experts, hidden_size, selection", SPLIT_CASES)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_split_router(device: str, num_tokens: int, num_experts: int, hidden_size: int, selection: Selection) -> None:
    x, weight = operands(device, num_tokens, num_experts, hidden_size)
    bias = None if selection.scoring is Scoring.SIGMOID else torch.randn(num_experts).to(device) / 8
    is_padding = torch.arange(num_tokens, device=device) % 5 == 4
    for dtype, ids_dtype, padding in ((torch.float32, torch.int64, is_padding), (torch.bfloat16, torch.int32, None)):
        logits, weights, ids = split_router(
            x, weight, selection, bias, logits_dtype=dtype, ids_dtype=ids_dtype, is_padding=padding
        )
        assert error_of(logits, x.double() @ weight.double().t()) < (1e-9 if dtype == torch.float32 else 1e-5)
        expected = select_experts(logits, selection, bias, ids_dtype=ids_dtype, is_padding=padding)
        assert torch.equal(ids, expected[1]) and torch.equal(weights, expected[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("equal", [2, 8, 256])
def test_ties_of_a_split_router_go_to_the_lower_expert(device: str, equal: int) -> None:
    x, weight = operands(device, 32, 256, 512)
    weight = weight[: 256 // equal].repeat_interleave(equal, 0).contiguous()
    for selection in (Selection(8, *GROUPED, 8, 4), Selection(8, *GROUPED), Selection(7, Scoring.SIGMOID)):
        logits, weights, ids = split_router(x, weight, selection)
        expected = select_experts(logits.cpu(), selection)
        assert torch.equal(ids.cpu(), expected[1])
        torch.testing.assert_close(weights.cpu(), expected[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_wider_tensors(device: str) -> None:
    x, weight = operands(device, 6, 64, 512)
    logits, weights, ids = router(x[:, 128:384], weight[:, 256:], Selection(4))
    expected = router(x[:, 128:384].contiguous(), weight[:, 256:].contiguous(), Selection(4))
    assert torch.equal(logits, expected[0]) and torch.equal(weights, expected[1]) and torch.equal(ids, expected[2])
    grouped = Selection(4, *GROUPED, 8, 4)
    split = split_router(x[:, 128:384], weight[:, 256:], grouped)
    expected = split_router(x[:, 128:384].contiguous(), weight[:, 256:].contiguous(), grouped)
    assert all(torch.equal(a, b) for a, b in zip(split, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device: str) -> None:
    x, weight = operands(device, 1, 128, 256)
    assert router_gate(x[:0], weight).shape == (0, 128)
    assert [t.shape for t in router(x[:0], weight, Selection(8))] == [(0, 128), (0, 8), (0, 8)]
    assert [t.shape for t in split_router(x[:0], weight, Selection(8, *GROUPED))] == [(0, 128), (0, 8), (0, 8)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_stays_in_its_row(device: str) -> None:
    x, weight = operands(device, 4, 128, 256)
    clean = router(x, weight, Selection(8))
    x[2, 5] = float("nan")
    logits, weights, ids = router(x, weight, Selection(8))
    assert logits[2].isnan().all() and ids[2].tolist() == list(range(8)) and not weights[2].any()
    for row in (0, 1, 3):
        assert torch.equal(logits[row], clean[0][row]) and torch.equal(ids[row], clean[2][row])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [2, 5])
def test_a_nan_stays_in_its_row_of_a_split_router(device: str, num_tokens: int) -> None:
    x, weight = operands(device, num_tokens, 256, 512)
    rule = Selection(8, *GROUPED, 8, 4)
    clean = split_router(x, weight, rule)
    x[1, 5] = float("nan")
    logits, weights, ids = split_router(x, weight, rule)
    assert logits[1].isnan().all() and ids[1].tolist() == list(range(8)) and weights[1].isnan().all()
    for row in (0, *range(2, num_tokens)):
        assert all(torch.equal(a[row], b[row]) for a, b in zip((logits, weights, ids), clean, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [3, 16, 32])
def test_split_router_in_a_cuda_graph(num_tokens: int) -> None:
    x, weight = operands("cuda", num_tokens, 256, 7168)
    rule, bias = Selection(8, *GROUPED, 8, 4), torch.randn(256, device="cuda") / 8
    expected = split_router(x, weight, rule, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [split_router(x, weight, rule, bias, pdl=True) for _ in range(20)]
    for tensors in results:
        for tensor in tensors:
            tensor.fill_(-7)
    graph.replay()
    for tensors in results:
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts, hidden_size", [(128, 2048), (256, 7168)])
def test_cuda_graph_and_pdl(num_experts: int, hidden_size: int) -> None:
    x, weight = operands("cuda", 4, num_experts, hidden_size)
    expected = router(x, weight, Selection(8))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused = [router(x, weight, Selection(8), pdl=True) for _ in range(20)]
        logits = router_gate(x, weight, pdl=True)
        two = select_experts(logits, Selection(8), pdl=True)
    for tensors in fused:
        for tensor in tensors:
            tensor.fill_(-7)
    graph.replay()
    for tensors in fused:
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    assert error_of(logits, expected[0]) < 1e-9
    assert torch.equal(two[1], select_experts(logits, Selection(8))[1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 256)}, r"x: takes bfloat16 \[num_tokens, hidden_size\], got torch.float32"),
        ({"x": torch.zeros(33, 256).bfloat16()}, "x: takes up to 32 tokens, got 33"),
        ({"x": torch.zeros(2, 264).bfloat16()}, "x: takes the weight's hidden_size 256 on cpu, got 264 on cpu"),
        ({"x": torch.zeros(2, 300).bfloat16()[:, 3:259]}, "x: takes a last stride of 1 and rows at multiples of 16"),
        ({"weight": torch.zeros(64, 256)}, "weight: takes bfloat16"),
        ({"weight": torch.zeros(60, 256).bfloat16()}, "weight: takes 8 to 512 experts, a multiple of 8, got 60"),
        ({"weight": torch.zeros(64, 100).bfloat16()}, "weight: takes a hidden_size that is a multiple of 8, got 100"),
        ({"out_dtype": torch.float16}, "out_dtype: takes float32 or bfloat16"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 256).bfloat16(), "weight": torch.zeros(64, 256).bfloat16(), **change}
    with pytest.raises(ValueError, match=message):
        router_gate(**arguments)


def test_router_takes_what_fits_a_cluster() -> None:
    for num_experts in (24, 264):
        with pytest.raises(ValueError, match=f"weight: takes 32 to 256 experts, got {num_experts}"):
            router(torch.zeros(1, 64).bfloat16(), torch.zeros(num_experts, 64).bfloat16(), Selection(8))
    with pytest.raises(ValueError, match="selection: takes SOFTMAX or SIGMOID, got NONE"):
        router(torch.zeros(1, 64).bfloat16(), torch.zeros(64, 64).bfloat16(), Selection(8, Scoring.NONE))
    with pytest.raises(ValueError, match="topk: takes 1 to 32 of 64 experts, got 40"):
        router(torch.zeros(1, 64).bfloat16(), torch.zeros(64, 64).bfloat16(), Selection(40))


def test_split_router_takes_what_a_block_selects() -> None:
    x, weight = torch.zeros(1, 64).bfloat16(), torch.zeros(128, 64).bfloat16()
    for selection, message in (
        (Selection(8), "selection: takes SIGMOID, TANH_SIGMOID or NONE, got SOFTMAX"),
        (Selection(9, *GROUPED), "topk: takes up to 8, got 9"),
        (Selection(8, *GROUPED, 32, 4), "num_groups: takes up to 16, got 32"),
        (Selection(8, *GROUPED, 6, 4), "num_groups: takes groups of"),
    ):
        with pytest.raises(ValueError, match=message):
            split_router(x, weight, selection)
