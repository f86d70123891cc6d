"""Feature fp8_linear: what layers of vLLM's FP8 schemes compute with it, eagerly and compiled, and why some do without.

Batches of all kinds, parts with scales of their own, biases, reloaded weights, activations quantised before, padded
weights and adapters beside the layer.
"""

import types

import pytest
import torch

pytest.importorskip("vllm")

import scaled_layers
from scaled_layers import BF16, CUT, DEVICES, E4M3, FUSED, HOPPER, MOST, TABLE, Calls, K, N, product

from vllm_b200_plugin import dispatch, vllm_compat
from vllm_b200_plugin.ops import token_quant

OURS, CUTLASS = "B200CutlassFp8Kernel", "CutlassFP8ScaledMMLinearKernel"


@pytest.fixture
def module(monkeypatch, dispatch_table):
    from vllm_b200_plugin.integration import library, linear_fp8_scaled

    dispatch_table({(HOPPER, "fp8"): TABLE})
    monkeypatch.setattr(library, "capability", lambda: HOPPER)
    return linear_fp8_scaled


@pytest.mark.parametrize(
    "variable, shape, words",
    [
        (None, (N, 2 * K), "not measured to be faster"),
        (("VLLM_BATCH_INVARIANT", "1"), (N, K), "VLLM_BATCH_INVARIANT"),
        (("VLLM_DISABLED_KERNELS", CUTLASS), (N, K), f"names {CUTLASS}"),
    ],
)
def test_reasons(module, monkeypatch, variable, shape, words):
    if variable:
        monkeypatch.setenv(*variable)
    takes, reason = module.B200CutlassFp8Kernel.can_implement(types.SimpleNamespace(weight_shape=shape))
    assert not takes and words in reason


@pytest.fixture
def calls(module, monkeypatch):
    return Calls(monkeypatch, E4M3, module.B200CutlassFp8Kernel, vllm_compat.CUTLASS_FP8_KERNEL.get())


class Layer(scaled_layers.Layer):
    def make_scheme(self, strategy, static):
        from compressed_tensors.quantization import QuantizationArgs
        from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Fp8

        return CompressedTensorsW8A8Fp8(QuantizationArgs(num_bits=8, type="float", strategy=strategy), static)

    @property
    def kernel(self):
        return self.scheme.fp8_linear

    def value(self, name, shape):
        if name == "weight":
            return torch.randn(shape) * 64
        return torch.full(shape, 1 / 64) if name == "input_scale" else super().value(name, shape)

    def expected_rows(self, rows, bias):
        """With the weight as the scheme leaves it: parts with scales of their own it may quantise again."""
        if self.static:
            q, x_scale = token_quant.per_tensor_quant(rows, self.layer.input_scale), self.layer.input_scale
        else:
            q, x_scale, _ = token_quant.per_token_quant(rows)
        n = sum(self.widths)
        weight, scale = self.layer.weight.t()[:n, : rows.shape[1]], self.layer.weight_scale
        return product(q, x_scale, weight, scale.flatten()[:n], bias)


def assert_close(out, expected):
    assert out.dtype == BF16 and out.shape == expected.shape
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    atol = (2e-3 if out.is_cuda else 1e-5) * largest  # a GPU's tensor cores add FP8 products in fewer bits than fp32's
    torch.testing.assert_close(out.double(), expected, rtol=2.0**-8, atol=atol)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strategy, static", [("channel", False), ("tensor", False), ("tensor", True)])
@pytest.mark.parametrize("widths", [(N,), FUSED])
def test_layer(calls, device, strategy, static, widths):
    """Parts with scales of their own, too, which vLLM makes one where the strategy is tensor."""
    layer = Layer(calls, device, strategy, static, widths)
    assert type(layer.kernel).__name__ == OURS
    bias = torch.randn(N, dtype=BF16, device=device)
    for shape in ((1, K), (MOST, K), (MOST + 1, K), (2, 4, K), (0, K)):
        x = torch.randn(shape, dtype=BF16, device=device)
        tokens = x.shape[:-1].numel()
        kernels = [] if not tokens else ["ours, early"] if tokens <= MOST else ["quantised", "cutlass"]
        for b in (None, bias):
            calls.clear()
            out = layer(x, b)
            assert calls == kernels
            assert_close(out, layer.expected(x, b))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n, k", TABLE)
def test_every_number_of_tokens(calls, device, n, k):
    layer, bias = Layer(calls, device, widths=(n,), k=k), torch.randn(n, dtype=BF16, device=device)
    for m in range(1, MOST + 2):
        x = torch.randn(m, k, dtype=BF16, device=device)
        calls.clear()
        assert_close(layer(x, bias), layer.expected(x, bias))
        assert calls == (["ours, early"] if m <= MOST else ["quantised", "cutlass"])


def test_the_shape_of_a_rank_decides(calls):
    """N or K of a tensor-parallel part are those of no shape that was measured, or K is odd: vLLM's own layer."""
    for n, k in ((N // 2, K), (N, K // 2), (N, K - 8), (N, K + 1)):
        layer = Layer(calls, widths=(n,), k=k)
        assert type(layer.kernel).__name__ == CUTLASS


def test_weights_loaded_anew(calls):
    layer, x = Layer(calls), torch.randn(4, K, dtype=BF16)
    before = layer(x)
    layer.load()
    assert_close(layer(x), layer.expected(x))
    assert not torch.equal(before, layer(x))


def test_rows_apart(calls):
    layer, wide = Layer(calls), torch.randn(4, 2 * K, dtype=BF16)
    assert torch.equal(layer(wide[:, K:]), layer(wide[:, K:].contiguous()))


def test_quantised_before(calls):
    """By a kernel of vLLM's that ends in this layer's input."""
    from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation, get_input_quant_key

    layer, x = Layer(calls, strategy="tensor", static=True), torch.randn(4, K, dtype=BF16)
    key, scale = get_input_quant_key(layer.layer), layer.layer.input_scale
    assert key == layer.kernel.input_quant_key() is not None
    calls.clear()
    quantised = QuantizedActivation(token_quant.per_tensor_quant(x, scale), scale, BF16, x.shape, key)
    assert torch.equal(layer(quantised), layer(x))
    assert calls == ["ours", "ours, early"]


def test_measured_behind_our_quantisation_holds_behind_it_alone(calls, dispatch_table):
    dispatch_table({(HOPPER, "fp8"): {(N, K): ((MOST, CUT, True),)}})
    layer, x = Layer(calls, strategy="tensor", static=True), torch.randn(4, K, dtype=BF16)
    calls.clear()
    layer(x)
    layer.kernel.apply_scaled_mm(
        A=token_quant.per_tensor_quant(x, layer.layer.input_scale),
        B=layer.layer.weight,
        out_dtype=BF16,
        As=layer.layer.input_scale,
        Bs=layer.layer.weight_scale,
        bias=None,
        output_shape=[4, N],
    )
    assert calls == ["ours, early", "cutlass"]


def test_a_weight_padded_for_cutlass_is_cutlasss(calls):
    layer, x = Layer(calls), torch.randn(4, K, dtype=BF16)
    layer.kernel.logical_output_size = N - 8
    assert layer(x).shape == (4, N - 8)
    assert calls == ["cutlass"]


def test_an_upper_bound_is_vllms(calls):
    layer, x = Layer(calls), torch.randn(4, K, dtype=BF16)
    free = layer(x)
    layer.kernel.layer_param_names = [*layer.kernel.layer_param_names[:3], "bound"]
    layer.layer.bound = torch.tensor(0.5)
    calls.clear()
    assert not torch.equal(layer(x), free)
    assert calls == ["ours"]


def test_adapter_beside_the_layer(calls):
    """A LoRA's layer asks the base layer's quant_method, which asks the scheme, and adds to what comes back."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsLinearMethod,
    )

    layer, x = Layer(calls), torch.randn(4, K, dtype=BF16)
    layer.layer.quant_method = CompressedTensorsLinearMethod(None)

    adapted = BaseLinearLayerWithLoRA.__new__(BaseLinearLayerWithLoRA)
    torch.nn.Module.__init__(adapted)
    adapted.base_layer, adapted._enable_aux_cuda_stream = layer.layer, False
    adapted.lora_a_stacked = adapted.lora_b_stacked = adapted.output_slices = ()
    adapted.punica_wrapper = types.SimpleNamespace(add_lora_linear=lambda output, *rest: output.add_(1))
    assert torch.equal(adapted.apply(x), layer(x) + 1)
    assert calls == ["ours, early", "ours, early"]


@pytest.mark.parametrize("fused", [False, True])
def test_compiled(calls, monkeypatch, fused):
    """One op that quantises where the fusion runs; else the quantisation is inductor's, and our op behind it."""
    if not fused:
        monkeypatch.setenv("VLLM_B200_DISABLE", "norm_linear_fusion")
    layer, graphs = Layer(calls, strategy="tensor", static=True), []
    calls.clear()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for rows in (3, 40):
        x = torch.randn(rows, K, dtype=BF16)
        assert_close(compiled(x), layer.expected(x))
    [graph] = graphs
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [name for name in targets if "linear" in name or "mm" in name] == ["vllm_b200.scaled_linear"]
    assert ("reciprocal" in str(graph.graph)) is not fused
    assert calls == (["ours, early", "quantised", "cutlass"] if fused else ["ours", "cutlass"])


def test_op_traces(calls):
    weight, scale = torch.randn(N, K).to(E4M3), torch.rand(N, 1)
    arguments = (torch.randn(3, K, dtype=BF16), weight.t(), scale, None, None, BF16)
    torch.library.opcheck(torch.ops.vllm_b200.scaled_linear.default, arguments, test_utils=("test_faketensor",))


def test_choice(calls, module):
    layer = Layer(calls)
    choices = [module.choice(layer.layer, m).kernel for m in (MOST, MOST + 1)]
    assert choices == [dispatch.SMALL_M, CUTLASS]
    layer.scheme.fp8_linear = None
    assert module.choice(layer.layer, 1) is None
