"""Feature fp8_linear: what layers of vLLM's FP8 schemes compute with it, eagerly and compiled, and why some do without.

Batches of all kinds, parts with scales of their own, biases, reloaded weights, activations quantised before, padded
weights and adapters beside the layer.
"""

import types

import pytest
import torch

pytest.importorskip("vllm")

from fake_cuda import config

from vllm_b200_plugin import dispatch, vllm_compat
from vllm_b200_plugin.ops import small_m_gemm, token_quant

HOPPER, N, K, MOST = (9, 0), 192, 256, 32
CUT = (1, 4, 1, 0)
TABLE = {(N, K): ((MOST, CUT, False),), (1040, 1296): ((MOST, CUT, False),)}
FUSED = (96, 64, 32)  # q, k and v
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
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
    """The kernels that run. vLLM has ours before CUTLASS's class here; on a CPU references stand for its CUDA ops."""
    import vllm.model_executor.kernels.linear as linear
    from vllm import _custom_ops
    from vllm.model_executor import parameter
    from vllm.platforms import current_platform

    calls, theirs, ours = [], _custom_ops.cutlass_scaled_mm, small_m_gemm.scaled_linear
    their_quant = _custom_ops.scaled_fp8_quant

    def cutlass(a, b, scale_a, scale_b, out_dtype, bias=None):
        calls.append("cutlass")
        if a.is_cuda:
            return theirs(a, b, scale_a, scale_b, out_dtype, bias)
        return product(a, scale_a, b.t(), scale_b, bias).to(out_dtype)

    def small_m(*arguments, **options):
        calls.append("ours, early" if options["pdl"] else "ours")
        return ours(*arguments, **options)

    def quantise(x, scale=None, num_token_padding=None, scale_ub=None, use_per_token_if_dynamic=False, **rest):
        calls.append("quantised")
        if x.is_cuda:
            return their_quant(x, scale, num_token_padding, scale_ub, use_per_token_if_dynamic, **rest)
        if scale is not None:
            return token_quant.per_tensor_quant(x, scale), scale
        return token_quant.per_token_quant(x, scale_ub=scale_ub)[:2]

    kernels = [module.B200CutlassFp8Kernel, vllm_compat.CUTLASS_FP8_KERNEL.get()]
    monkeypatch.setitem(linear._POSSIBLE_FP8_KERNELS, current_platform._enum, kernels)
    monkeypatch.setattr(kernels[1], "is_supported", classmethod(lambda cls, capability=None: (True, None)))
    monkeypatch.setattr(_custom_ops, "cutlass_scaled_mm", cutlass)
    monkeypatch.setattr(_custom_ops, "scaled_fp8_quant", quantise)
    monkeypatch.setattr(small_m_gemm, "scaled_linear", small_m)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    return calls


def product(q, x_scale, weight, weight_scale, bias):
    y = (q.double() @ weight.double().t()) * x_scale.double().view(-1, 1) * weight_scale.double().view(1, -1)
    return y if bias is None else y + bias.double()


class Layer:
    """One of a scheme of vLLM's, loaded with random weights."""

    def __init__(self, device="cpu", strategy="channel", static=False, widths=(N,), k=K):
        from compressed_tensors.quantization import QuantizationArgs
        from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Fp8

        self.layer, self.widths, self.static = torch.nn.Module(), widths, static
        torch.set_default_dtype(BF16)
        try:
            with config(), torch.device(device):
                self.scheme = CompressedTensorsW8A8Fp8(
                    QuantizationArgs(num_bits=8, type="float", strategy=strategy), static
                )
                self.scheme.create_weights(
                    self.layer, k, list(widths), k, sum(widths), params_dtype=BF16, weight_loader=lambda *a: None
                )
        finally:
            torch.set_default_dtype(torch.float32)
        self.layer.scheme = self.scheme
        self.created = dict(self.layer.named_parameters())
        self.load()

    @property
    def kernel(self):
        return self.scheme.fp8_linear

    def load(self):
        """Also again, as a reload does: into parameters as they were created, before the kernel lays them out."""
        for name, parameter in self.created.items():
            value = torch.rand(parameter.shape) / 100 + 1e-3
            if name == "weight":
                value = torch.randn(parameter.shape) * 64
            elif name == "input_scale":
                value = torch.full(parameter.shape, 1 / 64)
            setattr(self.layer, name, torch.nn.Parameter(value.to(parameter), requires_grad=False))
        self.scheme.process_weights_after_loading(self.layer)

    def __call__(self, x, bias=None):
        return self.scheme.apply_weights(self.layer, x, bias)

    def expected(self, x, bias=None):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if self.static:
            q, x_scale = token_quant.per_tensor_quant(rows, self.layer.input_scale), self.layer.input_scale
        else:
            q, x_scale, _ = token_quant.per_token_quant(rows)
        n = sum(self.widths)
        weight, scale = self.layer.weight.t()[:n, : x.shape[-1]], self.layer.weight_scale
        return product(q, x_scale, weight, scale.flatten()[:n], bias).view(*x.shape[:-1], n)


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
    layer = Layer(device, strategy, static, widths)
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
    layer, bias = Layer(device, widths=(n,), k=k), torch.randn(n, dtype=BF16, device=device)
    for m in range(1, MOST + 2):
        x = torch.randn(m, k, dtype=BF16, device=device)
        calls.clear()
        assert_close(layer(x, bias), layer.expected(x, bias))
        assert calls == (["ours, early"] if m <= MOST else ["quantised", "cutlass"])


def test_the_shape_of_a_rank_decides(calls):
    """N or K of a tensor-parallel part are those of no shape that was measured: the layer is vLLM's own."""
    for n, k in ((N // 2, K), (N, K // 2)):
        layer = Layer(widths=(n,), k=k)
        assert type(layer.kernel).__name__ == CUTLASS


def test_weights_loaded_anew(calls):
    layer, x = Layer(), torch.randn(4, K, dtype=BF16)
    before = layer(x)
    layer.load()
    assert_close(layer(x), layer.expected(x))
    assert not torch.equal(before, layer(x))


def test_rows_apart(calls):
    layer, wide = Layer(), torch.randn(4, 2 * K, dtype=BF16)
    assert torch.equal(layer(wide[:, K:]), layer(wide[:, K:].contiguous()))


def test_quantised_before(calls):
    """By a kernel of vLLM's that ends in this layer's input."""
    from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation, get_input_quant_key

    layer, x = Layer(strategy="tensor", static=True), torch.randn(4, K, dtype=BF16)
    key, scale = get_input_quant_key(layer.layer), layer.layer.input_scale
    assert key == layer.kernel.input_quant_key() is not None
    calls.clear()
    quantised = QuantizedActivation(token_quant.per_tensor_quant(x, scale), scale, BF16, x.shape, key)
    assert torch.equal(layer(quantised), layer(x))
    assert calls == ["ours", "ours, early"]


def test_measured_behind_our_quantisation_holds_behind_it_alone(calls, dispatch_table):
    dispatch_table({(HOPPER, "fp8"): {(N, K): ((MOST, CUT, True),)}})
    layer, x = Layer(strategy="tensor", static=True), torch.randn(4, K, dtype=BF16)
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
    layer, x = Layer(), torch.randn(4, K, dtype=BF16)
    layer.kernel.logical_output_size = N - 8
    assert layer(x).shape == (4, N - 8)
    assert calls == ["cutlass"]


def test_an_upper_bound_is_vllms(calls):
    layer, x = Layer(), torch.randn(4, K, dtype=BF16)
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

    layer, x = Layer(), torch.randn(4, K, dtype=BF16)
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
    if fused:
        monkeypatch.setenv("VLLM_B200_ENABLE", "norm_linear_fusion")
    layer, graphs = Layer(strategy="tensor", static=True), []
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
    layer = Layer()
    choices = [module.choice(layer.layer, m).kernel for m in (MOST, MOST + 1)]
    assert choices == [dispatch.SMALL_M, CUTLASS]
    layer.scheme.fp8_linear = None
    assert module.choice(layer.layer, 1) is None
