"""The experts for few tokens with other activations than silu, with biases, and with gpt-oss' rows of gate and up in
turns. Their numbers are checked with all others' in test_moe_experts."""

import pytest
import torch
from test_moe_experts import DEVICES, difference, gated, in_float64, make, run

from benchmarks.cases.moe import FewTokensCase
from vllm_b200_plugin.ops.moe_few_tokens import ExpertFormat as Format
from vllm_b200_plugin.ops.moe_few_tokens import few_tokens_moe, few_tokens_refusal, scratch_elements

GPT_OSS = FewTokensCase(5, 9, 4, 192, 320, format="bf16", activation="gpt_oss", biases=True)
# More blocks of 16 columns than an H100 or H200 has multiprocessors.
WIDE = FewTokensCase(7, 9, 4, 4096, 256, format="bf16", activation="gpt_oss", biases=True)
BIASED = [
    FewTokensCase(6, 9, 4, 384, 256, format=format, activation=activation, biases=True)
    for format, activation in (
        ("fp8_block", "silu"),
        ("fp8_token-channel", "gelu"),
        ("int8_token-channel", "gelu_tanh"),
    )
]
EACH_DEVICE = pytest.mark.parametrize("device", DEVICES)
EACH_CASE = pytest.mark.parametrize("case", [GPT_OSS, WIDE, *BIASED], ids=str)


def in_halves(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat((tensor[:, ::2], tensor[:, 1::2]), 1)


@EACH_DEVICE
@pytest.mark.parametrize("case", [GPT_OSS, WIDE], ids=str)
def test_rows_in_turns_are_the_rows_of_halves(case: FewTokensCase, device: str) -> None:
    x, w13, *rest = make(case, device)
    expected = run(case, (x, w13, *rest))
    bias = in_halves(gated(case, device)["w13_bias"])
    assert torch.equal(run(case, (x, in_halves(w13), *rest), interleaved=False, w13_bias=bias), expected)
    turned = w13.view(len(w13), -1, 2, w13.shape[2]).flip(2).reshape(w13.shape)
    bias = gated(case, device)["w13_bias"]
    bias = bias.view(len(bias), -1, 2).flip(2).reshape(bias.shape)
    assert torch.equal(run(case, (x, turned, *rest), up_first=True, w13_bias=bias), expected)


@EACH_DEVICE
@EACH_CASE
def test_biases_with_the_up_half_first(case: FewTokensCase, device: str) -> None:
    if case.activation == "gpt_oss":
        case = FewTokensCase(6, 9, 4, 384, 256, format="bf16", activation="silu_clamped", biases=True)
    x, w13, w13_scale, *rest = make(case, device)
    expected = run(case, (x, w13, w13_scale, *rest))
    bias = torch.cat(gated(case, device)["w13_bias"].chunk(2, 1)[::-1], 1)
    raw = w13.view(torch.uint8) if w13.element_size() == 1 else w13
    w13 = torch.cat(raw.chunk(2, 1)[::-1], 1).view(w13.dtype)
    if w13_scale is not None:
        w13_scale = torch.cat(w13_scale.chunk(2, 1)[::-1], 1)
    assert torch.equal(run(case, (x, w13, w13_scale, *rest), up_first=True, w13_bias=bias), expected)


@EACH_DEVICE
@pytest.mark.parametrize("format", ["bf16", "fp8_block", "fp8_token-expert"])
def test_biases_of_zero_change_nothing(format: str, device: str) -> None:
    case = FewTokensCase(11, 9, 4, 384, 256, format=format)
    operands = make(case, device)
    zeros = {
        "w13_bias": torch.zeros(9, 512, dtype=torch.bfloat16, device=device),
        "w2_bias": torch.zeros(9, 384, dtype=torch.bfloat16, device=device),
    }
    assert torch.equal(run(case, operands, **zeros), run(case, operands))


@EACH_DEVICE
@EACH_CASE
def test_one_bias_without_the_other(case: FewTokensCase, device: str) -> None:
    operands = make(case, device)
    for name in ("w13_bias", "w2_bias"):
        more = gated(case, device) | {name: None}
        expected = in_float64(*operands, case.format, {k: v for k, v in more.items() if v is not None})
        assert abs(difference(run(case, operands, **{name: None}), expected)) < 1e-4


@EACH_DEVICE
@pytest.mark.parametrize("case", [GPT_OSS, *BIASED], ids=str)
def test_expert_parallel_halves_add_up(case: FewTokensCase, device: str) -> None:
    """An expert's bias comes from the rank that has it; a missing one adds none."""
    x, *experts, weights, ids = make(case, device)
    more = gated(case, device)
    whole = run(case, (x, *experts, weights, ids))
    total = torch.zeros_like(whole, dtype=torch.float64)
    for here in (slice(0, 4), slice(4, 9)):
        count = here.stop - here.start
        expert_map = torch.full((9,), -1, dtype=torch.int32, device=device)
        expert_map[here] = torch.arange(count, dtype=torch.int32, device=device)
        part = [None if tensor is None else tensor[here].clone() for tensor in experts]
        biases = {name: more[name][here].clone() for name in ("w13_bias", "w2_bias")}
        total += run(case, (x, *part, weights, ids), expert_map=expert_map, **biases).double()
    assert difference(total, whole) < 2e-5


@EACH_DEVICE
@pytest.mark.parametrize("case", [GPT_OSS, *BIASED], ids=str)
def test_router_weight_on_the_input(case: FewTokensCase, device: str) -> None:
    """vLLM multiplies x by the weight of the one expert of a token before; products and biases then have none."""
    x, *experts, weights, ids = make(case, device)
    scaled = x * weights[:, :1].to(x.dtype)
    out = run(case, (scaled, *experts, None, ids[:, :1].contiguous()))
    ones = torch.ones_like(weights[:, :1])
    assert abs(difference(out, in_float64(scaled, *experts, ones, ids[:, :1], case.format, gated(case, device)))) < 1e-4
    assert torch.equal(out, run(case, (scaled, *experts, ones, ids[:, :1].contiguous())))


@EACH_DEVICE
@pytest.mark.parametrize("case", [GPT_OSS, *BIASED], ids=str)
def test_nan_and_inf(case: FewTokensCase, device: str) -> None:
    """They stay in their row; where the gate is -Inf, its activation is NaN."""
    operands = make(case, device)
    expected = run(case, operands)
    x = operands[0].clone()
    x[2, 5] = float("nan")
    x[4, 130] = float("inf")
    out = run(case, (x, *operands[1:]))
    assert out[2].isnan().all()
    assert not out[4].isfinite().any()
    assert torch.equal(out[[0, 1, 3]], expected[[0, 1, 3]])


@pytest.mark.gpu
@EACH_CASE
def test_cuda_a_row_depends_on_no_other(case: FewTokensCase) -> None:
    x, *rest, weights, ids = make(case, "cuda")
    together = run(case, (x, *rest, weights, ids))
    order = torch.randperm(len(x), device="cuda")
    shuffled = run(case, (x[order].contiguous(), *rest, weights[order].contiguous(), ids[order].contiguous()))
    assert torch.equal(shuffled, together[order])
    alone = torch.cat([run(case, (x[i : i + 1], *rest, weights[i : i + 1], ids[i : i + 1])) for i in range(len(x))])
    assert torch.equal(alone, together)


@pytest.mark.gpu
@EACH_CASE
def test_cuda_graph_of_a_chain(case: FewTokensCase) -> None:
    """Layers one after another with one scratch tensor, each started while the one before ends."""
    layers = [(make(case, "cuda", seed)[1:5], gated(case, "cuda", seed)) for seed in range(3)]
    x, *_, weights, ids = make(case, "cuda", 7)
    scratch = x.new_empty(scratch_elements(ids.numel(), case.intermediate_size))
    format = Format[case.format.split("-")[0].upper()]

    def chain(x: torch.Tensor) -> torch.Tensor:
        for i in range(9):
            experts, more = layers[i % 3]
            x = few_tokens_moe(x, *experts, weights, ids, scratch=scratch, format=format, **more)
            x = x / x.float().square().mean(-1, keepdim=True).sqrt().to(x.dtype)
        return x

    expected = chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(x)
    for _ in range(20):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"activation": "relu2"}, "activation: takes one of silu"),
        ({"activation": "silu_clamped"}, "limit: silu_clamped takes one above 0, got 0.0"),
        ({"w13_bias": torch.zeros(4, 128).bfloat16()}, r"w13_bias: takes bfloat16 \[4, 256\]"),
        ({"w2_bias": torch.zeros(4, 128)}, "w2_bias: takes bfloat16"),
        ({"interleaved": True}, "interleaved: goes with BF16, got FP8_BLOCK"),
    ],
)
def test_errors_name_the_argument(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        few_tokens_moe(*make(FewTokensCase(3, 4, 2, 128, 128), "cpu"), **change)


def test_sizes_of_gpt_oss() -> None:
    assert few_tokens_refusal(64, 128, 2880, 2880, Format.BF16) is None
    assert "multiples of 128, got 2880" in (few_tokens_refusal(64, 128, 2880, 2880, Format.FP8_BLOCK) or "")
    assert "multiples of 64, got 1440" in (few_tokens_refusal(64, 128, 2880, 1440, Format.BF16) or "")
