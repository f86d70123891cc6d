"""Feature int8_linear: what layers of vLLM's INT8 scheme compute with it, and why some do without."""

import types

import pytest
import torch

pytest.importorskip("vllm")

import scaled_layers
from scaled_layers import BF16, DEVICES, FP16, FUSED, HOPPER, INT8, MOST, TABLE, Calls, K, N, product

from vllm_b200_plugin import dispatch, vllm_compat

OURS, CUTLASS = "B200CutlassInt8Kernel", "CutlassInt8ScaledMMLinearKernel"


@pytest.fixture
def module(monkeypatch, dispatch_table):
    from vllm_b200_plugin.integration import library, linear_int8_scaled

    dispatch_table({(HOPPER, "int8"): TABLE})
    monkeypatch.setattr(library, "capability", lambda: HOPPER)
    return linear_int8_scaled


@pytest.mark.parametrize(
    "variable, symmetric, table, words",
    [
        (None, False, TABLE, "zero point of an activation"),
        (None, True, {}, "not measured to be faster for INT8 on this GPU"),
        (("VLLM_BATCH_INVARIANT", "1"), True, TABLE, "VLLM_BATCH_INVARIANT"),
        (("VLLM_DISABLED_KERNELS", CUTLASS), True, TABLE, f"names {CUTLASS}"),
    ],
)
def test_reasons(module, dispatch_table, monkeypatch, variable, symmetric, table, words):
    if variable:
        monkeypatch.setenv(*variable)
    dispatch_table({(HOPPER, "int8"): table})
    takes, reason = module.B200CutlassInt8Kernel.can_implement(types.SimpleNamespace(input_symmetric=symmetric))
    assert not takes and words in reason


@pytest.fixture
def calls(module, monkeypatch):
    return Calls(monkeypatch, INT8, module.B200CutlassInt8Kernel, vllm_compat.CUTLASS_INT8_KERNEL.get())


class Layer(scaled_layers.Layer):
    def make_scheme(self, strategy, static):
        from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Int8

        return CompressedTensorsW8A8Int8(strategy, static, True)

    def value(self, name, shape):
        return torch.randint(-128, 128, shape) if name == "weight" else super().value(name, shape)

    @property
    def weight(self):
        return self.loaded["weight"]

    @property
    def scale(self):
        scale, widths = self.loaded["weight_scale"], torch.tensor(self.widths)
        return scale if len(scale) == widths.sum() else scale.repeat_interleave(widths.to(scale.device))

    def expected_rows(self, rows, bias):
        q, x_scale, _ = self.calls.quantise(rows, self.loaded["input_scale"].max() if self.static else None)
        return product(q, x_scale, self.weight, self.scale, bias)


def assert_close(out, expected, dtype):
    assert out.dtype == dtype and out.shape == expected.shape
    # of the result, and of the fp32 product before a bias that may cancel it
    rounding = {BF16: 2.0**-8, FP16: 2.0**-10}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "strategy, widths", [("channel", (N,)), ("channel", FUSED), ("tensor", (N,)), ("tensor", FUSED)]
)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_layer(calls, device, strategy, widths, static, dtype):
    layer = Layer(calls, device, strategy, static, widths)
    assert type(layer.scheme.kernel).__name__ == OURS
    bias = torch.randn(N, dtype=dtype, device=device)
    for shape in ((1, K), (MOST, K), (MOST + 1, K), (2, 4, K), (0, K)):
        x = torch.randn(shape, dtype=dtype, device=device)
        tokens = x.shape[:-1].numel()
        kernels = [] if not tokens else ["ours, early"] if tokens <= MOST else ["quantised", "cutlass"]
        for b in (None, bias):
            calls.clear()
            out = layer(x, b)
            assert calls == kernels
            assert_close(out, layer.expected(x, b), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n, k", TABLE)
def test_every_number_of_tokens(calls, device, n, k):
    layer, bias = Layer(calls, device, widths=(n,), k=k), torch.randn(n, dtype=BF16, device=device)
    for m in range(1, MOST + 2):
        x = torch.randn(m, k, dtype=BF16, device=device)
        assert_close(layer(x, bias), layer.expected(x, bias), BF16)
    assert calls == ["ours, early"] * MOST + ["quantised", "cutlass"]


def test_the_shape_of_a_rank_decides(calls, module):
    """N or K of a tensor-parallel part are those of no shape that was measured, or K is odd."""
    for n, k in ((N // 2, K), (N, K // 2), (N, K - 8), (N, K + 1)):
        layer, x = Layer(calls, widths=(n,), k=k), torch.randn(1, k, dtype=BF16)
        assert layer.scheme.kernel.limit == 0
        assert module.choice(layer.layer, 1).kernel == CUTLASS
        if k % 16 == 0:  # what the references on a CPU take
            assert_close(layer(x), layer.expected(x), BF16)
    assert calls == ["quantised", "cutlass"] * 2


def test_weights_loaded_anew(calls):
    layer, x = Layer(calls), torch.randn(4, K, dtype=BF16)
    before = layer(x)
    layer.load()
    assert_close(layer(x), layer.expected(x), BF16)
    assert not torch.equal(before, layer(x))


def test_rows_apart(calls):
    layer, wide = Layer(calls), torch.randn(4, 2 * K, dtype=BF16)
    assert torch.equal(layer(wide[:, K:]), layer(wide[:, K:].contiguous()))


def test_choice_before_and_after_loading(calls, module):
    layer = Layer(calls)
    after = [module.choice(layer.layer, m) for m in (MOST, MOST + 1)]
    layer.layer.weight = torch.nn.Parameter(layer.weight, requires_grad=False)
    assert [module.choice(layer.layer, m) for m in (MOST, MOST + 1)] == after
    assert [choice.kernel for choice in after] == [dispatch.SMALL_M, CUTLASS]
    layer.scheme.kernel = None
    assert module.choice(layer.layer, 1) is None


def test_one_op_for_torch_compile(calls):
    layer, graphs = Layer(calls), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for rows in (3, 40):
        x = torch.randn(rows, K, dtype=BF16)
        assert torch.equal(compiled(x), layer(x))
    [graph] = graphs
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [name for name in targets if "linear" in name or "mm" in name] == ["vllm_b200.scaled_linear"]
    assert calls == ["ours, early"] * 2 + ["quantised", "cutlass"] * 2
    arguments = (x[:3], layer.weight.t(), layer.scale, None, None, BF16)
    torch.library.opcheck(torch.ops.vllm_b200.scaled_linear.default, arguments, test_utils=("test_faketensor",))
