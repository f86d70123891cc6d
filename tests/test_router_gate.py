"""vLLM's GateLinear and FusedTopKRouter through ours, with vLLM's real code on CPU."""

import pytest
import torch

pytest.importorskip("vllm")

from vllm_b200_plugin.ops.router import router
from vllm_b200_plugin.ops.topk import Selection, select_experts


@pytest.fixture(scope="module")
def vllm_gate():
    """Ours in place; vLLM's class of gates, which makes ours, and its router. Undone at the end."""
    from vllm.model_executor import custom_op
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
    from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear

    from vllm_b200_plugin.integration import router_gate

    router_gate.put_in_place()
    router_gate.put_in_place()
    yield GateLinear, FusedTopKRouter
    del custom_op.op_registry_oot["GateLinear"]
    for router_class in router_gate._RULES:
        router_class._compute_routing = router_class._compute_routing.b200_original


@pytest.fixture
def make(vllm_gate, monkeypatch):
    """Makes a gate on one rank, with vLLM's selection replaced by one that counts its calls."""
    import vllm.model_executor.layers.fused_moe.router.fused_topk_router as router_module
    import vllm.model_executor.layers.linear as linear
    import vllm.model_executor.parameter as parameter
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.config.device import DeviceConfig

    for module in (linear, parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 1)
    calls = []

    def topk_softmax(weights, ids, rows, logits, renormalize):
        calls.append(len(logits))
        selected = select_experts(logits, Selection(ids.shape[1], renormalize=renormalize), ids_dtype=ids.dtype)
        weights.copy_(selected[0]), ids.copy_(selected[1])
        return weights, ids

    monkeypatch.setattr(router_module, "vllm_topk_softmax", topk_softmax)

    def gate(num_experts=128, hidden_size=256, dtype=torch.bfloat16, lora=None, **kwargs):
        config = VllmConfig(device_config=DeviceConfig(device="cpu"))
        config.lora_config = lora
        with set_current_vllm_config(config):
            layer = vllm_gate[0](hidden_size, num_experts, params_dtype=dtype, **kwargs)
        torch.nn.init.normal_(layer.weight, std=hidden_size**-0.5)
        layer.cpu_linear = torch.nn.functional.linear  # what vLLM makes of a loaded weight on CPU
        return layer

    return gate, vllm_gate[1], calls


def hidden(num_tokens, hidden_size=256):
    return torch.randn(num_tokens, hidden_size).bfloat16()


def test_the_gate_is_ours_and_its_logits_vllms(make):
    gate = make[0]()
    assert type(gate).__name__ == "B200GateLinear"
    for num_tokens in (1, 32, 33):
        x = hidden(num_tokens)
        logits, bias = gate(x)
        assert bias is None and logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits, torch.nn.functional.linear(x, gate.weight))


@pytest.mark.parametrize("kwargs", [{"out_dtype": torch.float32}, {"return_bias": False}, {"bias": True}])
def test_other_forms_of_the_gate(make, kwargs):
    gate = make[0](**kwargs)
    if kwargs.get("bias"):
        torch.nn.init.normal_(gate.bias)
    x = hidden(3)
    result = gate(x)
    logits = result if kwargs.get("return_bias") is False else result[0]
    bias = gate.bias.float() if gate.bias is not None else 0.0
    assert logits.dtype == kwargs.get("out_dtype", torch.bfloat16)
    torch.testing.assert_close(logits.float(), x.float() @ gate.weight.float().t() + bias, rtol=2e-2, atol=2e-2)


def test_where_vllms_low_latency_kernel_is_faster_it_runs(make, monkeypatch):
    gate = make[0](out_dtype=torch.float32)
    gate.allow_ll_bf16_gemm = True
    faster = [gate._plan(n, torch.float32, None).kernel == "gate" for n in (1, 2, 3, 16, 17)]
    assert faster == [True, True, False, False, True]
    assert gate._plan(3, torch.bfloat16, None).kernel == "gate"


def test_a_gate_that_ours_does_not_take_stays_vllms(make):
    gate = make[0](num_experts=60, dtype=torch.float32)
    x = torch.randn(3, 256)
    assert torch.equal(gate(x)[0], torch.nn.functional.linear(x, gate.weight))


def test_the_router_takes_what_came_with_the_logits(make):
    make_gate, router_class, calls = make
    gate, selector = make_gate(), router_class(8, 128)
    x = hidden(5)
    first = selector.select_experts(x, gate(x)[0])
    assert calls == [5], "the gate does not know the router yet"
    second = selector.select_experts(x, gate(x)[0])
    assert calls == [5]
    expected = router(x, gate.weight, Selection(8), logits_dtype=torch.bfloat16)
    for selected in (first, second):
        assert torch.equal(selected[0], expected[1]) and torch.equal(selected[1], expected[2])
    # Logits that are not the gate's own tensor, other dtypes of ids, other routers, and many tokens: as before.
    assert torch.equal(selector.select_experts(x, gate(x)[0].clone())[1], expected[2])
    assert selector.select_experts(x, gate(x)[0], torch.int64)[1].dtype == torch.int64
    assert router_class(4, 128).select_experts(x, gate(x)[0])[1].shape == (5, 4)
    many = hidden(40)
    selector.select_experts(many, gate(many)[0])
    assert calls == [5, 5, 5, 5, 40]


@pytest.mark.parametrize("num_experts, num_tokens", [(128, 2), (264, 5)])
def test_where_two_kernels_are_faster_the_experts_come_along_too(make, num_experts, num_tokens):
    make_gate, router_class, calls = make
    gate, selector, x = make_gate(num_experts=num_experts), router_class(8, num_experts), hidden(num_tokens)
    first = selector.select_experts(x, gate(x)[0])
    second = selector.select_experts(x, gate(x)[0])
    assert calls == [num_tokens]
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_a_gate_that_may_get_a_lora_hands_on_logits_alone(make):
    make_gate, router_class, calls = make
    gate, selector, x = make_gate(lora=object()), router_class(8, 128), hidden(5)
    for _ in range(3):
        selector.select_experts(x, gate(x)[0])
    assert calls == [5, 5, 5]


def test_routers_that_do_more_select_themselves(make):
    make_gate, router_class, calls = make

    class Other(router_class):
        pass

    gate, selector, x = make_gate(), Other(8, 128), hidden(5)
    for _ in range(3):
        selector.select_experts(x, gate(x)[0])
    assert calls == [5, 5, 5]


def test_padding_is_told_to_the_gate(make, monkeypatch):
    from vllm_b200_plugin.integration import router_gate

    make_gate, router_class, _ = make
    gate, selector, x = make_gate(), router_class(8, 128), hidden(4)
    selector.select_experts(x, gate(x)[0])
    mask = torch.tensor([False, False, True, True])
    monkeypatch.setattr(router_gate, "_padding_mask", lambda num_tokens: mask[:num_tokens])
    weights, ids = selector.select_experts(x, gate(x)[0])
    assert (ids[2:] == -1).all() and (ids[:2] >= 0).all() and weights.shape == (4, 8)


def test_traced_gates_go_by_the_number_of_tokens_when_they_run(make):
    gate = make[0]()
    compiled = torch.compile(lambda x: gate(x)[0], backend="aot_eager", fullgraph=True, dynamic=True)
    for num_tokens in (3, 40, 32):
        x = hidden(num_tokens)
        torch.testing.assert_close(compiled(x), torch.nn.functional.linear(x, gate.weight))


def test_batch_invariance_leaves_the_gate_to_vllm(make, monkeypatch):
    import vllm.envs

    monkeypatch.setattr(vllm.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    gate = make[0]()
    assert not gate._candidate
    gate(hidden(3))
