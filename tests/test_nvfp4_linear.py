"""Feature nvfp4_linear: its place in vLLM's list, what its op runs for how many tokens, and what a layer keeps."""

import pytest
import torch

pytest.importorskip("vllm")

from child import answer

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.ops import nvfp4_gemm
from vllm_b200_plugin.ops.nvfp4_quant import nvfp4_quant

HOPPER, N, K = (9, 0), 96, 256
CUT = (1, 4, 1, 0)

SELECTION = """
import json, os
from fake_cuda import pretend, config
pretend({capability})
from vllm_b200_plugin import dispatch
dispatch.TABLE = {{((9, 0), "nvfp4"): {table}}}
from vllm import plugins
plugins.load_general_plugins()
import vllm.model_executor.kernels.linear as linear
from vllm_b200_plugin import plugin

def pick(**settings):
    with config():
        try:
            return type(linear.init_nvfp4_linear_kernel(**settings)).__name__
        except ValueError as error:
            return str(error)

picks = [pick(), pick(use_a16=True)]
os.environ["VLLM_DISABLED_KERNELS"] = "B200MarlinNvFp4Kernel"
print(json.dumps([[*picks, pick()], plugin.results()["nvfp4_linear"]]))
"""
TABLE = {(N, K): ((8, CUT, False),)}
OURS, MARLIN = "B200MarlinNvFp4Kernel", "MarlinNvFp4LinearKernel"


@pytest.mark.parametrize(
    "env, kernels, state",
    [({}, [OURS, OURS, MARLIN], "applied"), ({"VLLM_DISABLED_KERNELS": MARLIN}, None, "in place of")],
)
def test_selection(env, kernels, state):
    code = SELECTION.format(capability=HOPPER, table=TABLE)
    picks, result = answer(code, **{"VLLM_B200_ENABLE": "nvfp4_linear", **env})
    assert state in result
    assert picks == kernels if kernels else OURS not in picks


@pytest.fixture
def module(monkeypatch, dispatch_table):
    from vllm_b200_plugin.integration import library, linear_nvfp4

    dispatch_table({(HOPPER, "nvfp4"): TABLE})
    monkeypatch.setattr(library, "capability", lambda: HOPPER)
    return linear_nvfp4


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, K), (2, 4, K), (9, K), (0, K)])
def test_ours_for_few_tokens_and_marlin_for_more(module, monkeypatch, shape, with_bias):
    weight, scale = nvfp4_quant(torch.randn(N, K), torch.tensor(500.0))
    factor, x = torch.tensor([1 / 500.0]), torch.randn(shape, dtype=torch.bfloat16)
    bias = torch.randn(N, dtype=torch.bfloat16) if with_bias else None
    calls = []

    def marlin(**arguments):
        calls.append(arguments)
        return arguments["input"].new_zeros((*arguments["input"].shape[:-1], arguments["size_n"]))

    monkeypatch.setattr(type(vllm_compat.NVFP4_MARLIN_GEMM), "get", lambda self: marlin)
    others = [torch.zeros(1) for _ in range(3)]
    out = torch.ops.vllm_b200.nvfp4_linear(x, weight, scale, factor, bias, *others, bias)
    assert out.shape == (*shape[:-1], N)
    if 0 < x.shape[:-1].numel() <= 8:
        expected = nvfp4_gemm.nvfp4_linear(x.view(-1, K), weight, scale, factor, bias=bias)
        assert not calls and torch.equal(out.view(-1, N), expected)
    else:
        [call] = calls
        assert (call["size_n"], call["size_k"], call["bias"] is bias) == (N, K, True)


@pytest.mark.parametrize(
    "n, dtype, keeps", [(N, torch.bfloat16, True), (640, torch.bfloat16, False), (N, torch.half, False)]
)
def test_what_a_layer_keeps(module, monkeypatch, n, dtype, keeps):
    marlin = module.B200MarlinNvFp4Kernel.__bases__[0]
    monkeypatch.setattr(marlin, "process_weights_after_loading", lambda self, layer: setattr(layer, "weight", None))
    monkeypatch.setattr(marlin, "apply_weights", lambda self, layer, x, bias=None: "Marlin's")
    kernel, layer = object.__new__(module.B200MarlinNvFp4Kernel), torch.nn.Module()
    weight, scale = nvfp4_quant(torch.randn(n, K), torch.tensor(500.0))
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    layer.weight_global_scale, layer.params_dtype = torch.nn.Parameter(torch.tensor(1 / 500.0)), dtype
    kernel.process_weights_after_loading(layer)
    layer.weight_scale = layer.weight_global_scale = layer.weight = torch.nn.Parameter(torch.zeros(1))
    x = torch.randn(3, K, dtype=torch.bfloat16)
    out = kernel.apply_weights(layer, x)
    if keeps:
        assert torch.equal(out, nvfp4_gemm.nvfp4_linear(x, weight, scale, torch.tensor([1 / 500.0])))
    else:
        assert out == "Marlin's"
    layer.scheme = torch.nn.Module()
    layer.scheme.__dict__["kernel"] = kernel
    assert [module.choice(layer, m).kernel for m in (8, 9)] == ["small_m_gemm", "vllm"] if keeps else True
