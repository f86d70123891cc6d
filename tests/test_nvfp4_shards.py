"""NVFP4 layers that vLLM fuses from parts with global scales of their own: right with the plugin, wrong without."""

import types

import pytest
import torch

pytest.importorskip("vllm")

from child import answer
from fake_cuda import config
from test_nvfp4_cpu import error, linear, oracle, quantised  # noqa: F401 (fixtures)
from test_selection_cpu import moe_config

from vllm_b200_plugin.ops.nvfp4_quant import nvfp4_dequant, nvfp4_quant

BF16 = torch.bfloat16
K, WIDTHS = 256, [64, 32, 32]
FORMATS = ["compressed-tensors", "modelopt"]


def parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


class ModelOptMethod:
    """What vLLM's method for ModelOpt's layers does to them, around any kernel."""

    def __init__(self, kernel):
        self.kernel = kernel

    def process(self, layer):
        from vllm.model_executor.layers.quantization import modelopt

        modelopt.KNvfp4Static().process(layer, modelopt.WEIGHT)
        modelopt.KNvfp4Dynamic().process(layer, modelopt.ACT)
        modelopt.maybe_fuse_global_scales(layer)
        self.kernel.process_weights_after_loading(layer)

    def apply(self, layer, x, bias=None):
        return self.kernel.apply_weights(layer=layer, x=x, bias=bias)


def fused(linear, fmt: str, spread: list[float]):  # noqa: F811
    """(layer as loaded, process, apply, dequantised weight); the parts' weights differ in size by `spread`."""
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w4a4_nvfp4 import (
        CompressedTensorsW4A4Fp4,
    )

    parts = [quantised(width, K) for width in WIDTHS]
    scales = torch.stack([scale * size for (_, _, scale), size in zip(parts, spread, strict=True)])
    wide = [nvfp4_dequant(q, s, 1 / scale) for (q, s, _), scale in zip(parts, scales, strict=True)]
    layer, inputs = torch.nn.Module(), torch.tensor([2688 / 5.0] * 3)
    layer.logical_widths, layer.params_dtype = WIDTHS, BF16
    weight = parameter(torch.cat([q for q, _, _ in parts]))
    layer.weight_scale = parameter(torch.cat([s.view(torch.uint8) for _, s, _ in parts]).view(torch.float8_e4m3fn))
    with config():
        if fmt == "compressed-tensors":
            layer.weight_packed = weight
            layer.weight_global_scale, layer.input_global_scale = parameter(1 / scales), parameter(inputs)
            layer.scheme = scheme = CompressedTensorsW4A4Fp4()
            process, run = scheme.process_weights_after_loading, lambda *args: scheme.apply_weights(layer, *args)
        else:
            layer.weight, layer.weight_scale_2 = weight, parameter(scales)
            layer.input_scale = parameter(1 / inputs)
            layer.quant_method = method = ModelOptMethod(linear.init_nvfp4_linear_kernel())
            process, run = method.process, lambda *args: method.apply(layer, *args)
    return layer, process, run, torch.cat(wide).double()


def product(x: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    factor = torch.tensor(2688 / 5.0)
    return nvfp4_dequant(*nvfp4_quant(x, factor), factor).double() @ wide.t()


@pytest.mark.parametrize("fmt", FORMATS)
def test_linear(linear, fmt):  # noqa: F811
    from vllm_b200_plugin.integration.nvfp4_shards import prepare

    x, bias = torch.randn(5, K, dtype=BF16), torch.randn(sum(WIDTHS), dtype=BF16)
    layer, process, run, wide = fused(linear, fmt, [1.0, 3.7, 0.21])
    prepare(layer)
    process(layer)
    expected = product(x, wide)
    for first, last in ((0, 64), (64, 96), (96, 128)):
        assert error(run(x)[:, first:last], expected[:, first:last]) < 1e-4
    assert error(run(x, bias), expected + bias) < 1e-4
    compiled = torch.compile(lambda x: run(x, bias), backend="eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(x), run(x, bias))

    layer, process, run, _ = fused(linear, fmt, [1.0, 3.7, 0.21])
    process(layer)
    assert error(run(x), expected) > 1e-2, "one scale for all is wrong"


@pytest.mark.parametrize("fmt", FORMATS)
def test_linear_of_one_scale_stays_as_it_is(linear, fmt):  # noqa: F811
    from vllm_b200_plugin.integration.nvfp4_shards import prepare

    layer, process, _, _ = fused(linear, fmt, [1.0, 1.0, 1.0])
    scales = layer.weight_scale_2 if fmt == "modelopt" else layer.weight_global_scale
    scales.data.fill_(scales[0])
    prepare(layer)
    process(layer)
    assert not hasattr(layer, "b200_column_factor")
    owner = layer.quant_method if fmt == "modelopt" else layer.scheme
    assert not {"apply", "apply_weights"} & vars(owner).keys()


def test_the_input_scale_that_saturates_nowhere(linear):  # noqa: F811
    from vllm_b200_plugin.integration.nvfp4_shards import prepare

    layer, process, run, wide = fused(linear, "compressed-tensors", [1.0, 1.0, 1.0])
    layer.input_global_scale.data.copy_(torch.tensor([2688 / 5.0, 2688 / 0.5, 2688 / 4.0]))
    prepare(layer)
    process(layer)
    x = torch.randn(5, K, dtype=BF16)
    assert error(run(x), product(x, wide)) < 1e-4


@pytest.mark.parametrize("fmt", FORMATS)
def test_experts(oracle, fmt):  # noqa: F811
    torch.manual_seed(0)
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static

    from vllm_b200_plugin.integration.nvfp4_shards import prepare

    (w13, w13_scale, first), (w2, w2_scale, second) = quantised(4, 256, 256), quantised(4, 256, 128)
    ratios = torch.tensor([1.0, 4.0, 0.3, 1.5])  # of up to gate
    scales = first * torch.stack([torch.ones(4), ratios], 1), second * torch.tensor([1.0, 0.5, 2.0, 1.5])
    inputs = [torch.full((4,), 5.0 / 2688), 6.0 * ratios / 2688]
    stored = [s if fmt == "modelopt" else 1 / s for s in (*scales, *inputs)]
    layer = torch.nn.Module()
    layer.activation = MoEActivation.SILU
    names = ("weight_scale_2", "input_scale") if fmt == "modelopt" else ("weight_global_scale", "input_global_scale")
    for part, name, value in (("w13", 0, stored[0]), ("w2", 0, stored[1]), ("w2", 1, stored[3])):
        setattr(layer, f"{part}_{names[name]}", parameter(value.clone()))
    prepare(layer)
    loaded = [getattr(layer, f"{p}_{names[i]}").data for p, i in (("w13", 0), ("w2", 0), ("w2", 1))]
    assert torch.equal(loaded[0][:, 0], loaded[0][:, 1])
    w13_factor, w2_factor, w2_input = (t if fmt == "modelopt" else 1 / t for t in loaded)

    settings = moe_config()
    with config():
        backend, experts_class = oracle.select_nvfp4_moe_backend(settings, kNvfp4Static, kNvfp4Dynamic)
    quant = oracle.make_nvfp4_moe_quant_config(
        backend, w13_scale, w2_scale, w13_factor[:, 0].contiguous(), w2_factor, 1 / inputs[0].max(), 1 / w2_input.max()
    )
    experts = experts_class(settings, quant)
    x, output = torch.randn(3, 256, dtype=BF16), torch.empty(3, 256, dtype=BF16)
    topk_weights, topk_ids = torch.rand(3, 2), torch.tensor([[0, 1], [3, 2], [1, 3]], dtype=torch.int32)
    nothing = torch.empty(0)
    experts.apply(
        output,
        x,
        w13,
        w2,
        topk_weights,
        topk_ids,
        MoEActivation.SILU,
        4,
        None,
        None,
        None,
        nothing,
        nothing,
        None,
        False,
    )
    row_factor = scales[0].repeat_interleave(128, 1)
    expected = torch.zeros(3, 256, dtype=torch.float64)
    for token, slot in ((t, s) for t in range(3) for s in range(2)):
        e = int(topk_ids[token, slot])
        up = nvfp4_dequant(w13[e], w13_scale[e], torch.ones(())).double() * row_factor[e, :, None]
        down = nvfp4_dequant(w2[e], w2_scale[e], 1 / scales[1][e]).double()
        gate, value = (x[token].double() @ up.t()).chunk(2)
        expected[token] += down @ (torch.nn.functional.silu(gate) * value) * topk_weights[token, slot]
    assert error(output, expected) < 2e-2, "NVFP4 activations"


def test_experts_that_are_not_linear_in_up_stay_as_they_are(linear):  # noqa: F811
    from vllm_b200_plugin.integration.nvfp4_shards import prepare

    layer = torch.nn.Module()
    layer.activation = types.SimpleNamespace(value="swigluoai")
    layer.w13_weight_scale_2, layer.w2_weight_scale_2 = parameter(torch.rand(4, 2)), parameter(torch.rand(4))
    before = layer.w13_weight_scale_2.clone(), layer.w2_weight_scale_2.clone()
    prepare(layer)
    assert torch.equal(layer.w13_weight_scale_2, before[0]) and torch.equal(layer.w2_weight_scale_2, before[1])


@pytest.mark.parametrize("zero", [False, True])
def test_input_scales_of_all_ranks(linear, zero):  # noqa: F811
    from vllm_b200_plugin.integration.nvfp4_shards import prepare

    layer = torch.nn.Module()
    layer.activation = types.SimpleNamespace(value="silu")
    layer.w13_weight_scale_2 = parameter(torch.tensor([[1.0, 0.5], [0.0 if zero else 1.0, 4.0]]))
    layer.w2_weight_scale_2, layer.w2_input_scale = parameter(torch.ones(2)), parameter(torch.ones(8))
    prepare(layer)
    assert torch.equal(layer.w2_weight_scale_2, torch.ones(2) if zero else torch.tensor([0.5, 4.0]))
    assert torch.equal(layer.w2_input_scale, torch.full((8,), 1.0 if zero else 2.0))


def test_made_up_weights_are_left_alone(linear):  # noqa: F811
    from vllm_b200_plugin.integration import nvfp4_shards

    with config():
        assert not nvfp4_shards._made_up_weights()
        from vllm.config.vllm import get_current_vllm_config

        get_current_vllm_config().load_config.load_format = "dummy"
        assert nvfp4_shards._made_up_weights()


SERVE = """
import json
from pathlib import Path
import dense_nvfp4, torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

ids, found = [5, 9, 33, 70, 2, 11, 64], {}
expected = dense_nvfp4.logprobs(ids, shared=False)
sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=dense_nvfp4.VOCAB, detokenize=False)
for fmt in ("compressed-tensors", "modelopt"):
    folder = Path(FOLDER) / fmt
    dense_nvfp4.write(folder, fmt, shared=False)
    engine = LLM(str(folder), enforce_eager=True, max_model_len=64, skip_tokenizer_init=True, max_logprobs=200)
    [result] = engine.generate({"prompt_token_ids": ids}, sampling)
    of = result.outputs[0].logprobs[0]
    got = torch.tensor([of[token].logprob for token in range(dense_nvfp4.VOCAB)], dtype=torch.float64)
    found[fmt] = float((expected.exp() * (expected - got)).sum())
    del engine
    cleanup_dist_env_and_memory()
print(json.dumps(found))
"""


@pytest.mark.serve
def test_a_dense_model_serves(tmp_path):
    """Kullback-Leibler divergence of the next token's distribution from that of transformers' Llama in float64."""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    found = answer(f"FOLDER = {str(tmp_path)!r}" + SERVE, **env)
    assert found.keys() == {"compressed-tensors", "modelopt"}
    assert all(divergence < 0.01 for divergence in found.values()), f"{found}; with one scale for all 0.05 and 3"
