"""Selection of experts: the CPU reference against its definition in float64, the CUDA kernel against the reference, and
both on ties, NaN, Inf and padding."""

import itertools

import pytest
import torch

from benchmarks.cases.topk import CLEAR, SelectCase
from benchmarks.cases.topk import tests as select_cases
from vllm_b200_plugin.ops.topk import Scoring, Selection, select_experts

CASES = list(select_cases())
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NAN, INF = float("nan"), float("inf")
GROUPED = Selection(8, Scoring.TANH_SIGMOID, True, 2.5, 8, 4)


def by_definition(case: SelectCase, logits: torch.Tensor, bias: torch.Tensor | None):
    """Weights and ids in plain Python from float64, and which rows are clear of near ties."""
    selection, rows = case.selection, []
    biases = [0.0] * case.num_experts if bias is None else bias.double().tolist()
    for row in logits.double().cpu():
        if selection.scoring is Scoring.SOFTMAX:
            score = row.softmax(0).tolist()
        else:
            score = row.tolist() if selection.scoring is Scoring.NONE else row.sigmoid().tolist()
        choice = [s + b for s, b in zip(score, biases, strict=True)]
        gaps, candidates = [], list(range(case.num_experts))
        if selection.num_groups > 1:
            size = case.num_experts // selection.num_groups
            worth = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(selection.num_groups)]
            order = sorted(range(selection.num_groups), key=lambda g: (-worth[g], g))
            kept = order[: selection.topk_group]
            gaps += [worth[a] - worth[b] for a, b in zip(kept[-1:], order[selection.topk_group :], strict=False)]
            candidates = [e for e in candidates if e // size in kept]
        order = sorted(candidates, key=lambda e: (-choice[e], e))
        chosen = order[: selection.topk]
        gaps += [choice[a] - choice[b] for a, b in itertools.pairwise(order[: selection.topk + 1])]
        weight = [score[e] for e in chosen]
        total = sum(weight) if selection.renormalize else 1.0
        rows.append((chosen, [w / total * selection.scale for w in weight], min(gaps, default=1.0) > CLEAR))
    ids, weights, clear = zip(*rows, strict=True)
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(ids), torch.tensor(clear)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_definition(device: str, case: SelectCase) -> None:
    logits, bias = case.make_logits(device), case.make_bias(device)
    weights, ids = select_experts(logits, case.selection, bias)
    expected, expected_ids, clear = by_definition(case, logits, bias)
    if case.dtype == torch.float32 and case.num_tokens > 4:
        assert clear.float().mean() > 0.5
    assert torch.equal(ids.cpu().long()[clear], expected_ids[clear])
    torch.testing.assert_close(weights.cpu().double()[clear], expected[clear], rtol=1e-5, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_is_the_reference(case: SelectCase) -> None:
    logits, bias = case.make_logits("cuda", 1), case.make_bias("cuda", 1)
    weights, ids = select_experts(logits, case.selection, bias)
    expected = select_experts(logits.cpu(), case.selection, None if bias is None else bias.cpu())
    clear = by_definition(case, logits, bias)[2]
    if case.bias_dtype is None and case.dtype != torch.float32:
        clear[:] = True  # equal logits are ties on both sides
    assert torch.equal(ids.cpu()[clear], expected[1][clear])
    torch.testing.assert_close(weights.cpu()[clear], expected[0][clear], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scoring", [Scoring.SOFTMAX, Scoring.SIGMOID])
def test_ties_go_to_the_lower_expert(device: str, scoring: Scoring) -> None:
    logits = torch.zeros(4, 256, device=device)
    logits[1] = torch.arange(256, device=device) // 64  # four levels
    logits[2, 200:] = 1.0
    logits[2, 3] = 1.0
    logits[3, ::7] = 2.0
    _, ids = select_experts(logits, Selection(8, scoring))
    assert ids.tolist() == [
        list(range(8)),
        list(range(192, 200)),
        [3, *range(200, 207)],
        list(range(0, 56, 7)),
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_underflown_scores_are_ties(device: str) -> None:
    """As in vLLM, which chooses by the scores: beyond the largest all are 0 here, though the logits differ."""
    logits = -1000.0 * torch.arange(64, device=device).flip(0).float().unsqueeze(0)
    weights, ids = select_experts(logits, Selection(4))
    assert ids.tolist() == [[63, 0, 1, 2]]
    assert weights.tolist() == [[1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("device", DEVICES)
def test_ties_of_groups_go_to_the_lower_group(device: str) -> None:
    logits, bias = torch.zeros(1, 256, device=device), torch.zeros(256, device=device)
    bias[[70, 71]] = 1.0  # group 2
    weights, ids = select_experts(logits, GROUPED, bias)
    assert ids.tolist() == [[70, 71, *range(6)]]
    torch.testing.assert_close(weights, torch.full((1, 8), 2.5 / 8, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_rows_with_nan_and_inf(device: str, dtype: torch.dtype) -> None:
    logits = torch.randn(6, 128, device=device)
    logits[0, 5], logits[1, 7], logits[2], logits[3], logits[4, 9] = NAN, INF, NAN, -INF, -INF
    logits = logits.to(dtype)
    weights, ids = select_experts(logits, Selection(4))
    assert ids[:4].tolist() == [[0, 1, 2, 3]] * 4 and not weights[:4].any()
    assert 9 not in ids[4].tolist() and weights[4].sum().item() == pytest.approx(1)
    weights, ids = select_experts(logits, Selection(4, Scoring.SIGMOID))
    assert 5 not in ids[0].tolist() and 7 in ids[1].tolist() and ids[2].tolist() == [0, 1, 2, 3]
    assert weights.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_grouped_rows_with_nan(device: str) -> None:
    logits = torch.randn(2, 256, device=device)
    logits[0, 100], logits[1] = NAN, NAN
    weights, ids = select_experts(logits, GROUPED, torch.zeros(256, device=device))
    assert ids[0, 0] == 100 and ids[1].tolist() == list(range(8))
    assert weights[0].isnan().all() and weights[1].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.uint32, torch.int64])
def test_padding_and_dtypes_of_ids(device: str, ids_dtype: torch.dtype) -> None:
    logits = torch.randn(5, 128, device=device)
    is_padding = torch.tensor([False, True, False, False, True], device=device)
    weights, ids = select_experts(logits, Selection(8), ids_dtype=ids_dtype, is_padding=is_padding)
    expected, expected_ids = select_experts(logits, Selection(8))
    assert ids.dtype == ids_dtype
    signed = ids.view(torch.int32) if ids_dtype == torch.uint32 else ids
    assert torch.equal(signed.int(), expected_ids.masked_fill(is_padding.unsqueeze(1), -1))
    assert torch.equal(weights, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_source_rows_and_rows_of_a_wider_tensor(device: str) -> None:
    wide = torch.randn(6, 200, device=device)
    logits = wide[:, 3:131]  # rows that start at no multiple of 16 bytes
    weights, ids = torch.empty(6, 4, device=device), torch.empty(6, 4, dtype=torch.int32, device=device)
    rows = torch.empty_like(ids)
    rule = Selection(4).schema_values()
    torch.ops.vllm_b200.topk(logits, weights, ids, rows, *rule, None, None)
    expected = select_experts(logits.contiguous(), Selection(4))
    assert torch.equal(weights, expected[0]) and torch.equal(ids, expected[1])
    assert rows.tolist() == [[k * 6 + token for k in range(4)] for token in range(6)]


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device: str) -> None:
    weights, ids = select_experts(torch.empty(0, 128, device=device), Selection(8))
    assert weights.shape == ids.shape == (0, 8)


@pytest.mark.gpu
def test_cuda_graph_and_pdl() -> None:
    logits = torch.randn(16, 128, device="cuda")
    expected = select_experts(logits, Selection(8))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [select_experts(logits, Selection(8), pdl=True) for _ in range(3)]
    for weights, ids in results:
        weights.fill_(NAN), ids.fill_(-7)
    graph.replay()
    for weights, ids in results:
        assert torch.equal(weights, expected[0]) and torch.equal(ids, expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "num_experts, selection",
    [
        (128, Selection(8)),
        (128, Selection(8, Scoring.SIGMOID)),
        (256, GROUPED),
        (384, Selection(8, Scoring.TANH_SIGMOID, True, 2.827)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_vllm_on_a_million_rows(num_experts: int, selection: Selection, dtype: torch.dtype) -> None:
    logits = (torch.randn(1_000_000, num_experts, device="cuda") * 2).to(dtype)
    bias = torch.randn(num_experts, device="cuda") / 8 if selection.scoring is Scoring.TANH_SIGMOID else None
    expected, (weights, ids) = by_vllm(logits, selection, bias), select_experts(logits, selection, bias)
    assert torch.equal(ids, expected[1])
    torch.testing.assert_close(weights, expected[0], rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts, selection", [(256, GROUPED), (384, Selection(8, Scoring.TANH_SIGMOID))])
def test_ties_and_nan_are_vllms(num_experts: int, selection: Selection) -> None:
    """Rows with few different logits, with one NaN, and with many."""
    generator = torch.Generator("cuda").manual_seed(0)
    rows = [
        torch.randint(0, levels, (500, num_experts), generator=generator, device="cuda").float()
        for levels in (1, 2, 3, 8, 64)
    ]
    few, many = torch.randn(2, 500, num_experts, generator=generator, device="cuda")
    few[torch.arange(500), torch.randint(0, num_experts, (500,), device="cuda")] = NAN
    many[torch.rand(500, num_experts, generator=generator, device="cuda") < 0.5] = NAN
    levels = torch.randint(0, 4, (num_experts,), generator=generator, device="cuda")
    for bias in (torch.zeros(num_experts, device="cuda"), levels.float() / 8):
        for logits in (*rows, few, many):
            expected, (weights, ids) = by_vllm(logits, selection, bias), select_experts(logits, selection, bias)
            assert torch.equal(ids, expected[1])
            torch.testing.assert_close(weights, expected[0], rtol=1e-6, atol=0, equal_nan=True)


def by_vllm(logits: torch.Tensor, selection: Selection, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids from vLLM's CUDA ops; skips the test where these are not there."""
    pytest.importorskip("vllm._custom_ops")
    from vllm_b200_plugin.integration import op_override

    if ("topk_softmax", "CUDA") in op_override._overridden or not hasattr(torch.ops._moe_C, "topk_softmax"):
        pytest.skip("vLLM's own ops are not there, or replaced by ours")
    if selection.scoring is Scoring.TANH_SIGMOID:
        groups, scale = (selection.num_groups, selection.topk_group), selection.scale
        return torch.ops._moe_C.grouped_topk(logits, *groups, selection.topk, True, scale, bias, 1)
    shape = len(logits), selection.topk
    weights, ids = torch.empty(shape, device="cuda"), torch.empty(shape, dtype=torch.int32, device="cuda")
    if selection.scoring is Scoring.SOFTMAX:
        torch.ops._moe_C.topk_softmax(weights, ids, torch.empty_like(ids), logits, True, None, None)
    else:
        torch.ops._moe_C.topk_sigmoid(weights, ids, torch.empty_like(ids), logits, True, None, 1.0, None)
    return weights, ids


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"logits": torch.zeros(128)}, r"logits: takes \[num_tokens, num_experts\], got shape \(128,\)"),
        ({"logits": torch.zeros(2, 128).double()}, "logits: takes float32, float16 or bfloat16, got torch.float64"),
        ({"logits": torch.zeros(128, 64).t()}, r"logits: takes a last stride of 1, got strides \(1, 64\)"),
        ({"logits": torch.zeros(2, 513)}, "num_experts: takes 1 to 512, got 513"),
        ({"selection": Selection(33)}, "topk: takes 1 to 32 of 128 experts, got 33"),
        ({"selection": Selection(8, num_groups=8)}, "num_groups: takes 1 with SOFTMAX, got 8"),
        ({"selection": Selection(8, topk_group=2)}, "topk_group: takes 1 of 1 group, got 2"),
        (
            {"selection": Selection(8, Scoring.NONE, num_groups=8, topk_group=9)},
            "topk_group: takes 1 to 8 of 8 groups, got 9",
        ),
        (
            {"selection": Selection(8, Scoring.NONE, num_groups=6)},
            r"takes groups of \(4, 8, 16, 32\) experts, got 6 of 128",
        ),
        ({"selection": Selection(8, Scoring.NONE, num_groups=32)}, "topk: takes up to 4, all of 1 groups, got 8"),
        (
            {"bias": torch.zeros(64)},
            r"bias: takes float32 or float16 or bfloat16 \[128\] on cpu",
        ),
        ({"is_padding": torch.zeros(2)}, r"is_padding: takes bool \[2\] on cpu, got torch.float32 \(2,\) on cpu"),
        ({"ids_dtype": torch.int16}, "ids_dtype: takes int32, uint32 or int64, got torch.int16"),
    ],
)
def test_bad_input_is_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_experts(**{"logits": torch.zeros(2, 128), "selection": Selection(8), **kwargs})


@pytest.mark.gpu
def test_raw_op_rejects_what_it_cannot_address() -> None:
    logits = torch.zeros(4, 128, device="cuda")
    weights, ids = torch.empty(4, 8, device="cuda"), torch.empty(4, 8, dtype=torch.int32, device="cuda")
    rule = list(Selection(8).schema_values())
    for args in [
        (logits, weights[:2], ids, None, *rule, None, None),
        (logits, weights, ids.short(), None, *rule, None, None),
        (logits, weights, ids, ids[:1], *rule, None, None),
        (logits, weights, ids, None, 9, *rule[1:], None, None),
        (logits, weights, ids, None, *rule, torch.zeros(64, device="cuda"), None),
        (logits, weights, ids, None, *rule, None, torch.zeros(4, device="cuda")),
        (logits.t(), weights, ids, None, *rule, None, None),
    ]:
        with pytest.raises(RuntimeError):
            torch.ops.vllm_b200.topk(*args, False)
