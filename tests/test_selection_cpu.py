"""FP8 block-scaled layers on CPU: vLLM picks ours, and what it computes is the W8A8 product."""

import types

import pytest
import torch

pytest.importorskip("vllm")

from fake_cuda import config, select

from vllm_b200_plugin import plugin
from vllm_b200_plugin.ops.moe import fp8_block_scaled_moe
from vllm_b200_plugin.ops.quant import per_token_group_quant


@pytest.fixture(scope="module")
def linear():
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("vLLM runs on a GPU here")
    plugin.register()
    import vllm.model_executor.kernels.linear as linear

    assert plugin.results()["fp8_block_linear"] == "applied"
    return linear


def test_selection(linear, monkeypatch):
    assert select((576, 256)) == "B200CpuFp8BlockKernel"
    assert select((96, 128)) == "B200CpuFp8BlockKernel"
    assert select((96, 128), torch.float32) == "B200CpuFp8BlockKernel"
    assert select((96, 128), linear_backend="torch") == "B200CpuFp8BlockKernel"
    assert select((128, 64), block=64) == "B200CpuFp8BlockKernel"
    assert (
        "B200CpuFp8BlockKernel needs K % 128 == 0, got K=64" in select((96, 64)) or torch.cpu._is_amx_tile_supported()
    )
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "B200CpuFp8BlockKernel")
    assert select((576, 256)) != "B200CpuFp8BlockKernel"


N, K = 200, 256


@pytest.fixture
def kernel(linear):
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym, kFp8Static128BlockSym

    with config():
        return linear.init_fp8_linear_kernel(
            activation_quant_key=kFp8Dynamic128Sym,
            weight_quant_key=kFp8Static128BlockSym,
            input_dtype=torch.bfloat16,
            out_dtype=torch.bfloat16,
            weight_shape=(N, K),
        )


def make_layer(scale_name: str = "weight_scale_inv") -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.randn(N, K).to(torch.float8_e4m3fn), requires_grad=False)
    scale = torch.rand(-(-N // 128), K // 128) + 0.5
    setattr(layer, scale_name, torch.nn.Parameter(scale, requires_grad=False))
    layer.weight_block_size = [128, 128]
    return layer


def expected(layer: torch.nn.Module, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    q, q_scale = per_token_group_quant(x.reshape(-1, K))
    a = q.double() * q_scale.double().repeat_interleave(128, 1)
    spread = scale.double().repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)
    return (a @ (layer.weight.double() * spread).t()).view(*x.shape[:-1], N)


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("processed", [True, False], ids=["processed", "not processed"])
@pytest.mark.parametrize("shape", [(1, K), (5, K), (0, K), (2, 3, K)])
def test_apply_weights(kernel, shape, name, processed):
    layer = make_layer(name)
    if processed:
        kernel.process_weights_after_loading(layer)
    x = torch.randn(shape, dtype=torch.bfloat16)
    out = kernel.apply_weights(layer, x)
    assert out.shape == (*shape[:-1], N)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected(layer, x, getattr(layer, name)), rtol=2**-8, atol=1e-3)


def test_bias(kernel):
    layer, x, bias = make_layer(), torch.randn(4, K, dtype=torch.bfloat16), torch.randn(N, dtype=torch.bfloat16)
    assert torch.equal(kernel.apply_weights(layer, x, bias), kernel.apply_weights(layer, x) + bias)


def test_strided_rows(kernel):
    layer, wide = make_layer(), torch.randn(6, 2 * K, dtype=torch.bfloat16)
    for x in (wide[:, K:], torch.randn(K, 6, dtype=torch.bfloat16).t()):
        assert torch.equal(kernel.apply_weights(layer, x), kernel.apply_weights(layer, x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint8])
def test_ue8m0_scales_of_the_checkpoint(kernel, dtype):
    layer, x = make_layer(), torch.randn(4, K, dtype=torch.bfloat16)
    scale = torch.tensor([[0.5, 2.0], [1.0, 4.0]])
    layer.weight_scale_inv = torch.nn.Parameter(scale.to(torch.float8_e8m0fnu).view(dtype), requires_grad=False)
    out = kernel.apply_weights(layer, x)
    torch.testing.assert_close(out.double(), expected(layer, x, scale), rtol=2**-8, atol=1e-3)


def test_one_op_for_torch_compile(kernel):
    layer, graphs = make_layer(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: kernel.apply_weights(layer, x), backend=backend, fullgraph=True, dynamic=True)
    for rows in (3, 40):
        x = torch.randn(rows, K, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), kernel.apply_weights(layer, x))
    [graph] = graphs
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [name for name in calls if "quant" in name or "linear" in name or "mm" in name] == [
        "vllm_b200.fp8_block_linear"
    ]
    torch.library.opcheck(
        torch.ops.vllm_b200.fp8_block_linear.default,
        (x, layer.weight, layer.weight_scale_inv, [128, 128], torch.bfloat16, "reference"),
        test_utils=("test_faketensor",),  # the others multiply e4m3 tensors themselves
    )


def moe_config(**changes):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType

    settings = {
        "num_experts": 4,
        "experts_per_token": 2,
        "hidden_dim": 256,
        "intermediate_size": 128,
        "num_local_experts": 4,
        "num_logical_experts": 4,
        "activation": MoEActivation.SILU,
        "device": "cpu",
        "routing_method": RoutingMethodType.Renormalize,
        "moe_parallel_config": FusedMoEParallelConfig.make_no_parallel(),
        "in_dtype": torch.bfloat16,
    }
    return FusedMoEConfig(**{**settings, **changes})


@pytest.fixture
def oracle(linear):
    import vllm.model_executor.layers.fused_moe.oracle.fp8 as oracle

    assert plugin.results()["cpu_fp8_moe"] == "applied"
    return oracle


def pick(oracle, **changes):
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym, kFp8Static128BlockSym

    with config():
        return oracle.select_fp8_moe_backend(moe_config(**changes), kFp8Static128BlockSym, kFp8Dynamic128Sym)


def test_experts_selection(oracle):
    backend, experts = pick(oracle)
    assert backend.value == "EMULATION"
    assert experts.__name__ == "B200CpuFp8BlockExperts"
    for size in (96, 64 + 128):
        _, experts = pick(oracle, intermediate_size=size)
        assert experts is None or experts.__name__ != "B200CpuFp8BlockExperts"


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_experts(oracle, mapped, on_input):
    _, experts_class = pick(oracle)
    w13, w2 = (torch.randn(4, n, k).to(torch.float8_e4m3fn) for n, k in ((256, 256), (256, 128)))
    w13_scale, w2_scale = torch.rand(4, 2, 2) / 10, torch.rand(4, 2, 1) / 10
    quant = oracle.make_fp8_moe_quant_config(
        oracle.Fp8MoeBackend.EMULATION, w13_scale, w2_scale, None, None, block_shape=[128, 128]
    )
    experts = experts_class(moe_config(), quant)
    assert experts.expects_unquantized_inputs
    x, output = torch.randn(3, 256, dtype=torch.bfloat16), torch.full((3, 256), -1.0, dtype=torch.bfloat16)
    topk_weights, topk_ids = torch.rand(3, 2), torch.tensor([[0, 1], [3, 2], [1, 3]], dtype=torch.int32)
    expert_map = torch.tensor([2, -1, 0, 1], dtype=torch.int32) if mapped else None
    experts.apply(
        output, x, w13, w2, topk_weights, topk_ids, types.SimpleNamespace(), 4, expert_map, None, None,
        torch.empty(0), torch.empty(0), None, on_input,
    )  # fmt: skip
    local = topk_ids if expert_map is None else expert_map[topk_ids]
    weights = torch.ones_like(topk_weights) if on_input else topk_weights
    assert torch.equal(output, fp8_block_scaled_moe(x, w13, w13_scale, w2, w2_scale, weights, local))
