"""Feature int8_linear: what layers of vLLM's INT8 scheme compute with it, and why some do without."""

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
BF16, FP16 = torch.bfloat16, torch.float16
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
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
    """The GEMMs that run. vLLM has ours before CUTLASS's class here; on a CPU references stand for its CUDA ops."""
    import vllm.model_executor.kernels.linear as linear
    from vllm import _custom_ops
    from vllm.model_executor import parameter
    from vllm.platforms import current_platform

    calls, theirs, ours = [], _custom_ops.cutlass_scaled_mm, small_m_gemm.scaled_linear
    their_quant = _custom_ops.scaled_int8_quant

    def cutlass(a, b, scale_a, scale_b, out_dtype, bias=None):
        calls.append("cutlass")
        if a.is_cuda:
            return theirs(a, b, scale_a, scale_b, out_dtype, bias)
        return product(a, scale_a, b.t(), scale_b, bias).to(out_dtype)

    def small_m(*arguments, **options):
        calls.append("ours")
        return ours(*arguments, **options)

    def quantise(x, scale=None, azp=None, symmetric=True):
        if x.is_cuda:
            return their_quant(x, scale, azp, symmetric)
        return (
            token_quant.per_token_quant(x, torch.int8)
            if scale is None
            else (token_quant.per_tensor_quant(x, scale, torch.int8), scale, None)
        )

    kernels = [module.B200CutlassInt8Kernel, vllm_compat.CUTLASS_INT8_KERNEL.get()]
    monkeypatch.setitem(linear._POSSIBLE_INT8_KERNELS, current_platform._enum, kernels)
    monkeypatch.setattr(kernels[1], "is_supported", classmethod(lambda cls, capability=None: (True, None)))
    monkeypatch.setattr(_custom_ops, "cutlass_scaled_mm", cutlass)
    monkeypatch.setattr(_custom_ops, "scaled_int8_quant", quantise)
    monkeypatch.setattr(small_m_gemm, "scaled_linear", small_m)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    return calls


def product(q, x_scale, weight, weight_scale, bias):
    """In float64, where sums of products of int8 are exact."""
    y = (q.double() @ weight.double().t()) * x_scale.double().view(-1, 1) * weight_scale.double().view(1, -1)
    return y if bias is None else y + bias.double()


class Layer:
    """One of vLLM's INT8 scheme, loaded with random weights."""

    def __init__(self, device="cpu", strategy="channel", static=False, widths=(N,), k=K):
        from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Int8

        self.scheme, self.layer = CompressedTensorsW8A8Int8(strategy, static, True), torch.nn.Module()
        with config(), torch.device(device):
            self.scheme.create_weights(
                self.layer, list(widths), k, params_dtype=BF16, weight_loader=lambda *arguments: None
            )
        self.layer.scheme, self.widths = self.scheme, widths
        self.created = dict(self.layer.named_parameters())
        self.load()

    def load(self):
        """Also again, as a reload does: into parameters as they were created, before the kernel lays them out."""
        for name, parameter in self.created.items():
            value = torch.rand(parameter.shape) / 100 + 1e-3
            if name == "weight":
                value = torch.randint(-128, 128, parameter.shape)
            setattr(self.layer, name, torch.nn.Parameter(value.to(parameter), requires_grad=False))
        self.weight, scale = self.layer.weight.data.clone(), self.layer.weight_scale.data.clone()
        widths = torch.tensor(self.widths, device=scale.device)
        self.scale = scale if len(scale) == widths.sum() else scale.repeat_interleave(widths)
        self.x_scale = None if self.layer.input_scale is None else self.layer.input_scale.max()
        self.scheme.process_weights_after_loading(self.layer)

    def __call__(self, x, bias=None):
        return self.scheme.apply_weights(self.layer, x, bias)

    def expected(self, x, bias=None):
        from vllm import _custom_ops

        if not x.numel():  # vLLM's op does not take it
            return x.new_empty(*x.shape[:-1], sum(self.widths), dtype=torch.float64)
        q, x_scale, _ = _custom_ops.scaled_int8_quant(x.reshape(-1, x.shape[-1]).contiguous(), self.x_scale)
        return product(q, x_scale, self.weight, self.scale, bias).view(*x.shape[:-1], sum(self.widths))


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
    layer = Layer(device, strategy, static, widths)
    assert type(layer.scheme.kernel).__name__ == OURS
    bias = torch.randn(N, dtype=dtype, device=device)
    for shape in ((1, K), (MOST, K), (MOST + 1, K), (2, 4, K), (0, K)):
        x = torch.randn(shape, dtype=dtype, device=device)
        tokens = x.shape[:-1].numel()
        kernels = [] if not tokens else ["ours" if tokens <= MOST else "cutlass"]
        for b in (None, bias):
            calls.clear()
            out = layer(x, b)
            assert calls == kernels
            assert_close(out, layer.expected(x, b), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n, k", TABLE)
def test_every_number_of_tokens(calls, device, n, k):
    layer, bias = Layer(device, widths=(n,), k=k), torch.randn(n, dtype=BF16, device=device)
    for m in range(1, MOST + 2):
        x = torch.randn(m, k, dtype=BF16, device=device)
        assert_close(layer(x, bias), layer.expected(x, bias), BF16)
    assert calls == ["ours"] * MOST + ["cutlass"]


def test_the_shape_of_a_rank_decides(calls, module):
    """N or K of a tensor-parallel part are those of no shape that was measured."""
    for n, k in ((N // 2, K), (N, K // 2)):
        layer, x = Layer(widths=(n,), k=k), torch.randn(1, k, dtype=BF16)
        assert layer.scheme.kernel.limit == 0
        assert_close(layer(x), layer.expected(x), BF16)
        assert module.choice(layer.layer, 1).kernel == CUTLASS
    assert calls == ["cutlass", "cutlass"]


def test_weights_loaded_anew(calls):
    layer, x = Layer(), torch.randn(4, K, dtype=BF16)
    before = layer(x)
    layer.load()
    assert_close(layer(x), layer.expected(x), BF16)
    assert not torch.equal(before, layer(x))


def test_rows_apart(calls):
    layer, wide = Layer(), torch.randn(4, 2 * K, dtype=BF16)
    assert torch.equal(layer(wide[:, K:]), layer(wide[:, K:].contiguous()))


def test_choice_before_and_after_loading(calls, module):
    layer = Layer()
    after = [module.choice(layer.layer, m) for m in (MOST, MOST + 1)]
    layer.layer.weight = torch.nn.Parameter(layer.weight, requires_grad=False)
    assert [module.choice(layer.layer, m) for m in (MOST, MOST + 1)] == after
    assert [choice.kernel for choice in after] == [dispatch.SMALL_M, CUTLASS]
    layer.scheme.kernel = None
    assert module.choice(layer.layer, 1) is None


def test_one_op_for_torch_compile(calls):
    layer, graphs = Layer(), []

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
    assert calls == ["ours", "ours", "cutlass", "cutlass"]
    arguments = (x[:3], layer.weight.t(), layer.scale, None, None, BF16)
    torch.library.opcheck(torch.ops.vllm_b200.scaled_linear.default, arguments, test_utils=("test_faketensor",))
