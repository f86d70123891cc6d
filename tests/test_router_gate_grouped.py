"""Routers with e_score_correction_bias, in groups and without, behind a gate of ours: vLLM's real routers on CPU, the
first call by vLLM's own PyTorch, the next by what came with the logits."""

import types

import pytest
import torch
from test_router_gate import hidden, make, vllm_gate  # noqa: F401 - fixtures

pytest.importorskip("vllm")

from vllm_b200_plugin.integration import router_gate
from vllm_b200_plugin.ops import router as router_ops

# num_experts, groups, groups kept, experts chosen, scale
DEEPSEEK, KIMI, SMALL = (256, 8, 4, 8, 2.5), (384, 1, 1, 8, 2.827), (64, 4, 2, 6, 1.0)


@pytest.fixture
def routers(make, monkeypatch):  # noqa: F811
    """Makes a gate with fp32 logits, and routers whose own selection is vLLM's PyTorch and counts its calls."""
    import vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router as bias_module
    import vllm.model_executor.layers.fused_moe.router.grouped_topk_router as grouped_module

    calls = []

    def counted(function):
        def call(*args, **kwargs):
            calls.append(len(kwargs["gating_output"]))
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(grouped_module, "grouped_topk", counted(grouped_module.grouped_topk._torchdynamo_orig_callable))
    # What fused_topk_bias falls back to where no kernel takes the router.
    elsewhere = types.SimpleNamespace(is_fused_moe_enabled=lambda: True)
    monkeypatch.setattr(bias_module, "rocm_aiter_ops", elsewhere)
    monkeypatch.setattr(bias_module, "_aiter_can_use_biased_grouped_topk", lambda *args: False)
    monkeypatch.setattr(bias_module, "fused_topk_bias", counted(bias_module.fused_topk_bias))

    def gate(num_experts, hidden_size=256):
        return make[0](num_experts=num_experts, hidden_size=hidden_size, out_dtype=torch.float32)

    def grouped(num_experts, groups, kept, topk, scale, **kwargs):
        arguments = {"scoring_func": "sigmoid", "e_score_correction_bias": biases(num_experts), **kwargs}
        return grouped_module.GroupedTopKRouter(
            topk, num_experts, groups, kept, routed_scaling_factor=scale, **arguments
        )

    def biased(num_experts, topk, **kwargs):
        bias = biases(num_experts)
        return bias_module.FusedTopKBiasRouter(topk, num_experts, bias, routed_scaling_factor=2.5, **kwargs)

    return types.SimpleNamespace(gate=gate, grouped=grouped, biased=biased, calls=calls)


def biases(num_experts):
    return torch.nn.Parameter(torch.randn(num_experts) / 8)


def by_expert(selected, num_experts):
    """[num_tokens, num_experts] weights: vLLM's PyTorch leaves the order of the experts open."""
    weights, ids = selected
    return torch.zeros(len(ids), num_experts).scatter_(1, ids.long(), weights)


@pytest.mark.parametrize("case", [DEEPSEEK, KIMI, SMALL], ids=["deepseek", "kimi", "small"])
@pytest.mark.parametrize("kind", ["grouped", "biased"])
def test_the_experts_that_come_along_are_vllms(routers, case, kind):
    num_experts, _, _, topk, _ = case
    gate = routers.gate(num_experts)
    selector = routers.grouped(*case) if kind == "grouped" else routers.biased(num_experts, topk)
    for num_tokens in (1, 16, 32, 32):
        x = hidden(num_tokens)
        mine = selector.select_experts(x, gate(x)[0])
        theirs = selector.select_experts(x, gate(x)[0].clone())  # logits that come without experts
        assert mine[1].dtype == torch.int32 and mine[0].dtype == torch.float32
        torch.testing.assert_close(by_expert(mine, num_experts), by_expert(theirs, num_experts), rtol=1e-5, atol=1e-7)
    assert routers.calls == [1, 1, 16, 32, 32]


def test_the_two_kernels_of_large_gates_share_the_sum(routers, monkeypatch):
    seen, split_router = [], router_ops.split_router
    monkeypatch.setattr(router_ops, "split_router", lambda x, *a, **k: seen.append(len(x)) or split_router(x, *a, **k))
    gate, selector = routers.gate(256, 2080), routers.grouped(*DEEPSEEK)
    for num_tokens in (1, 2, 3, 32, 33):
        x = hidden(num_tokens, 2080)
        for _ in range(2):
            mine = selector.select_experts(x, gate(x)[0])
        theirs = selector.select_experts(x, gate(x)[0].clone())
        torch.testing.assert_close(by_expert(mine, 256), by_expert(theirs, 256), rtol=1e-5, atol=1e-7)
    assert seen == [3, 3, 3, 32, 32, 32]
    gate.allow_ll_bf16_gemm = True
    plans = [gate._plan(n, torch.float32, gate._consumer.selection).kernel for n in (3, 16, 17)]
    assert plans == ["vllm", "vllm", "split_router"]


@pytest.mark.parametrize("case", [DEEPSEEK, KIMI, SMALL], ids=["deepseek", "kimi", "small"])
def test_ties_have_vllms_weights(routers, case):
    """Which of equal experts vLLM's PyTorch takes is open; what they weigh is not. Ours are the lower ones."""
    num_experts = case[0]
    gate, selector = routers.gate(num_experts), routers.grouped(*case)
    gate.weight.data = gate.weight.data[: num_experts // 4].repeat_interleave(4, 0).contiguous()
    selector.e_score_correction_bias.data.zero_()
    x = hidden(8)
    theirs = selector.select_experts(x, gate(x)[0])
    weights, ids = selector.select_experts(x, gate(x)[0])
    torch.testing.assert_close(weights.sort(1).values, theirs[0].sort(1).values)
    for row, row_weights in zip(ids.tolist(), weights, strict=True):
        assert row[:4] == list(range(row[0], row[0] + 4)) and row[0] % 4 == 0
        assert row_weights[0] == row_weights[3] >= row_weights[-1]


def test_the_bias_is_that_of_the_moment(routers):
    gate, selector, x = routers.gate(256), routers.grouped(*DEEPSEEK), hidden(3)
    selector.select_experts(x, gate(x)[0])
    selector.e_score_correction_bias.data = torch.zeros(256)
    selector.e_score_correction_bias.data[7] = 10.0
    assert (selector.select_experts(x, gate(x)[0])[1][:, 0] == 7).all()
    assert routers.calls == [3]


@pytest.mark.parametrize("skip", [True, False])
def test_padding_where_the_router_leaves_it_out(routers, monkeypatch, skip):
    gate, selector, x = routers.gate(256), routers.grouped(*DEEPSEEK, skip_padding=skip), hidden(4)
    selector.select_experts(x, gate(x)[0])
    mask = torch.tensor([False, True, False, True])
    monkeypatch.setattr(router_gate, "_padding_mask", lambda num_tokens: mask[:num_tokens])
    weights, ids = selector.select_experts(x, gate(x)[0])
    assert ((ids == -1).all(1) == (mask & skip)).all() and ((weights == 0).all(1) == (mask & skip)).all()


def test_ids_as_the_experts_want_them(routers):
    for selector in (routers.grouped(*DEEPSEEK), routers.biased(256, 8)):
        gate, x = routers.gate(256), hidden(4)
        first = selector.select_experts(x, gate(x)[0], torch.int64)
        second = selector.select_experts(x, gate(x)[0], torch.int64)
        assert first[1].dtype == second[1].dtype == torch.int64
        torch.testing.assert_close(by_expert(first, 256), by_expert(second, 256))
        assert len(routers.calls) == 1
        routers.calls.clear()


def test_routers_that_do_more_select_themselves(routers, monkeypatch):
    monkeypatch.setattr(router_gate, "select_experts", None)
    x = hidden(4)
    more = {"num_fused_shared_experts": 1}, {"scoring_func": "softmax"}
    selectors = [
        routers.grouped(*DEEPSEEK, scoring_func="softmax"),
        routers.grouped(*DEEPSEEK, e_score_correction_bias=None),
        routers.grouped(256, 8, 5, 8, 1.0),
        routers.grouped(256, 2, 1, 8, 1.0),
        *(routers.biased(256, 8, **kwargs) for kwargs in more),
    ]
    for selector in selectors:
        gate = routers.gate(256)
        for _ in range(3):
            selector.select_experts(x, gate(x)[0])
        assert routers.calls == [4, 4, 4]
        routers.calls.clear()
