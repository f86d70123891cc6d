"""NVFP4 layers on CPU: vLLM picks ours, what they compute is vLLM's emulation, and a dense model serves."""

import pytest
import torch

pytest.importorskip("vllm")

from fake_cuda import config
from test_selection_cpu import moe_config

from vllm_b200_plugin import plugin
from vllm_b200_plugin.ops.nvfp4_quant import nvfp4_dequant, nvfp4_quant

BF16 = torch.bfloat16
N, K = 96, 256


@pytest.fixture(scope="module")
def linear():
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("vLLM runs on a GPU here")
    plugin.register()
    import vllm.model_executor.kernels.linear as linear

    assert plugin.results()["cpu_nvfp4_linear"] == "applied"
    return linear


@pytest.fixture(scope="module")
def oracle(linear):
    import vllm.model_executor.layers.fused_moe.oracle.nvfp4 as oracle

    assert plugin.results()["cpu_nvfp4_moe"] == "applied"
    return oracle


def quantised(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight as a checkpoint has it, and the factor that its values are multiplied by."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / shape[-1] ** 0.5
    global_scale = 2688 / weight.abs().max()
    q, scale = nvfp4_quant(weight.flatten(0, -2), global_scale)
    return q.view(*shape[:-1], -1), scale.view(*shape[:-1], -1), 1 / global_scale


def make_layer(use_a16: bool) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.weight, layer.weight_scale, layer.weight_global_scale = quantised(N, K)
    if not use_a16:
        layer.input_global_scale_inv = torch.tensor(2688 / 5.0)
    return layer


def error(x: torch.Tensor, y: torch.Tensor) -> float:
    """DeepGEMM's measure."""
    return 1 - 2 * float((x.double() * y).sum()) / float((x.double() ** 2).sum() + (y**2).sum())


@pytest.mark.parametrize("shape", [(1, K), (5, K), (0, K), (2, 3, K)])
def test_linear_is_the_emulation(linear, shape):
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import run_nvfp4_emulations

    with config():
        kernel = linear.init_nvfp4_linear_kernel()
    assert type(kernel).__name__ == "B200CpuNvFp4Kernel"
    layer, x, bias = make_layer(False), torch.randn(shape, dtype=BF16), torch.randn(N, dtype=BF16)
    kernel.process_weights_after_loading(layer)
    tensors = layer.weight, layer.weight_scale, layer.weight_global_scale
    expected = run_nvfp4_emulations(x.view(-1, K), layer.input_global_scale_inv, *tensors, swizzle=False)
    assert torch.equal(kernel.apply_weights(layer, x), expected.view(*shape[:-1], N))
    assert torch.equal(kernel.apply_weights(layer, x, bias), expected.view(*shape[:-1], N) + bias)
    if x.numel():
        global_scale = layer.input_global_scale_inv
        wide_x = nvfp4_dequant(*nvfp4_quant(x.reshape(-1, K), global_scale), global_scale).double()
        wide = nvfp4_dequant(layer.weight, layer.weight_scale, 1 / layer.weight_global_scale).double()
        assert error(expected, wide_x @ wide.t()) < 1e-4


def test_linear_with_a_16_bit_activation(linear):
    with config():
        kernel = linear.init_nvfp4_linear_kernel(use_a16=True)
    assert type(kernel).__name__ == "B200CpuNvFp4Kernel"
    layer, x = make_layer(True), torch.randn(5, K, dtype=BF16)
    wide = nvfp4_dequant(layer.weight, layer.weight_scale, 1 / layer.weight_global_scale).double()
    assert error(kernel.apply_weights(layer, x), x.double() @ wide.t()) < 1e-5


def test_linear_can_be_asked_for(linear):
    with config(linear_backend="emulation"):
        assert type(linear.init_nvfp4_linear_kernel()).__name__ == "B200CpuNvFp4Kernel"


def test_linear_is_one_op_for_torch_compile(linear):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    with config():
        kernel = linear.init_nvfp4_linear_kernel()
    layer = make_layer(False)
    compiled = torch.compile(lambda x: kernel.apply_weights(layer, x), backend=backend, fullgraph=True, dynamic=True)
    for rows in (3, 40):
        x = torch.randn(rows, K, dtype=BF16)
        assert torch.equal(compiled(x), kernel.apply_weights(layer, x))
    [graph] = graphs
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [name for name in calls if "nvfp4" in name or "mm" in name] == ["vllm_b200.cpu_nvfp4_linear"]


@pytest.mark.parametrize(
    "mapped, on_input, use_a16",
    [(False, False, False), (True, False, False), (False, True, False), (False, False, True)],
)
def test_experts_are_the_emulation(oracle, mapped, on_input, use_a16):
    """Against each token's experts in turn, on what the emulation's functions make of weights and activations."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant_dequant
    from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static

    torch.manual_seed(3)
    settings = moe_config()
    with config():
        activation_key = None if use_a16 else kNvfp4Dynamic
        backend, experts_class = oracle.select_nvfp4_moe_backend(settings, kNvfp4Static, activation_key)
    assert (backend.value, experts_class.__name__) == ("EMULATION", f"B200CpuNvFp4{'A16' if use_a16 else ''}Experts")
    (w13, w13_scale, first), (w2, w2_scale, second) = quantised(4, 256, 256), quantised(4, 256, 128)
    alphas = [scale * torch.tensor([1.0, 0.5, 2.0, 1.5]) for scale in (first, second)]
    inputs = torch.tensor(2688 / 5.0), torch.tensor(2688 / 3.0)
    quant = oracle.make_nvfp4_moe_quant_config(backend, w13_scale, w2_scale, *alphas, *inputs)
    experts = experts_class(settings, quant)
    assert experts.expects_unquantized_inputs
    x, output = torch.randn(3, 256, dtype=BF16), torch.full((3, 256), -1.0, dtype=BF16)
    topk_weights, topk_ids = torch.rand(3, 2), torch.tensor([[0, 1], [3, 2], [1, 3]], dtype=torch.int32)
    expert_map = torch.tensor([2, -1, 0, 1], dtype=torch.int32) if mapped else None
    experts.apply(
        output, x, w13, w2, topk_weights, topk_ids, MoEActivation.SILU, 4, expert_map, None, None,
        torch.empty(0), torch.empty(0), None, on_input,
    )  # fmt: skip

    def rounded(row: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return (row if use_a16 else ref_nvfp4_quant_dequant(row, factor, 16)).double()

    expected = torch.zeros(3, 256, dtype=torch.float64)
    for token in range(3):
        row = rounded(x[token : token + 1], inputs[0])
        for slot in range(2):
            expert = int(topk_ids[token, slot] if expert_map is None else expert_map[topk_ids[token, slot]])
            if expert < 0:
                continue
            up, down = (
                nvfp4_dequant(w[expert], scale[expert], 1 / alpha[expert], dtype=BF16).double()
                for w, scale, alpha in ((w13, w13_scale, alphas[0]), (w2, w2_scale, alphas[1]))
            )
            gate, value = (row @ up.t()).to(BF16).double().chunk(2, -1)
            inner = (torch.nn.functional.silu(gate) * value).to(BF16)
            part = rounded(inner, inputs[1]) @ down.t()
            expected[token] += part[0] * (1 if on_input else topk_weights[token, slot])
    assert error(output, expected) < 1e-4, "e2m1 may fall the other way where a sum is rounded to bf16"
