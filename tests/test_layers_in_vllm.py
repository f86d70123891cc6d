"""What vLLM's own linear layers give with a kernel of ours: what they give with vLLM's, whatever is done to them.

The layer is of two parts, as gate and up are, each with scales of its own, loaded by vLLM's loaders from the tensors of
a checkpoint, whole and as one rank of two; with a bias; loaded again; below a LoRA; and with VLLM_BATCH_INVARIANT.
"""

import dataclasses
import types

import pytest
import torch

pytest.importorskip("vllm")

from fake_cuda import config

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.ops import small_m_gemm, token_quant
from vllm_b200_plugin.ops.gemm import fp8_block_scaled_mm
from vllm_b200_plugin.ops.quant import ScaleLayout

HOPPER, K, PARTS = (9, 0), 256, (512, 256)
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
ROWS = ((32, (1, 2, 1, 0), True),)
SHAPES = {(sum(PARTS) // size, K): ROWS for size in (1, 2)}
KINDS = {"fp8 tensor": "fp8", "fp8 channel": "fp8", "int8": "int8", "fp8 block": "fp8_block", "bf16": "bf16"}


@pytest.fixture
def vllm(monkeypatch, dispatch_table):
    """vLLM's kernels as references, ours before them; how many tokens ours have had."""
    import vllm.model_executor.kernels.linear as kernels
    import vllm.model_executor.layers.linear as layers
    from vllm import _custom_ops, distributed
    from vllm.model_executor import parameter
    from vllm.model_executor.layers.quantization import fp8
    from vllm.platforms import current_platform

    from vllm_b200_plugin.integration import (
        fp8_block_op,
        library,
        linear_bf16,
        linear_fp8,
        linear_fp8_scaled,
        linear_int8_scaled,
    )

    def cutlass(a, b, scale_a, scale_b, out_dtype, bias=None):
        y = (a.double() @ b.double()) * scale_a.double().view(-1, 1) * scale_b.double().view(1, -1)
        return (y if bias is None else y + bias.double()).to(out_dtype)

    def quantise_int8(x, scale=None, azp=None, symmetric=True):
        return token_quant.per_token_quant(x, torch.int8)

    def quantise_fp8(x, scale=None, *rest, **options):
        if scale is None:
            return token_quant.per_token_quant(x)[:2]
        return token_quant.per_tensor_quant(x.contiguous(), scale), scale

    def triton(a, b, a_scale, b_scale, block_shape, out_dtype):
        return fp8_block_scaled_mm(a, a_scale, b, b_scale, (128, 128), out_dtype)

    class State(types.SimpleNamespace):
        def parallel(self, rank, size):
            for module in (distributed, layers, parameter, fp8):
                monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank, raising=False)
                monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

        def with_ours(self, ours):
            block = vllm_compat.TRITON_KERNEL.get()
            for registry, mine, theirs in (
                ("FP8", linear_fp8_scaled.B200CutlassFp8Kernel, vllm_compat.CUTLASS_FP8_KERNEL.get()),
                ("INT8", linear_int8_scaled.B200CutlassInt8Kernel, vllm_compat.CUTLASS_INT8_KERNEL.get()),
                ("FP8_BLOCK", linear_fp8.B200TritonFp8BlockKernel, block),
            ):
                monkeypatch.setattr(theirs, "is_supported", classmethod(lambda cls, capability=None: (True, None)))
                found = [mine, theirs] if ours else [theirs]
                monkeypatch.setitem(getattr(kernels, f"_POSSIBLE_{registry}_KERNELS"), current_platform._enum, found)

    torch.manual_seed(0)
    state = State(tokens=[], unquantized=linear_bf16.unquantized_gemm)
    state.parallel(0, 1)
    monkeypatch.setattr(library, "capability", lambda: HOPPER)
    here = fp8_block_op.Machine(HOPPER, False, ScaleLayout.COLUMN_TMA, False)
    monkeypatch.setattr(fp8_block_op, "machine", lambda: here)
    monkeypatch.setattr(_custom_ops, "cutlass_scaled_mm", cutlass)
    monkeypatch.setattr(_custom_ops, "scaled_int8_quant", quantise_int8)
    monkeypatch.setattr(_custom_ops, "scaled_fp8_quant", quantise_fp8)
    monkeypatch.setattr(f"{vllm_compat.TRITON_GEMM.module}.{vllm_compat.TRITON_GEMM.attribute}", triton)
    for name in ("scaled_linear", "fp8_block_linear", "linear"):
        run = getattr(small_m_gemm, name)

        def counted(x, *arguments, run=run, **options):
            state.tokens.append(x.shape[0])
            return run(x, *arguments, **options)

        monkeypatch.setattr(small_m_gemm, name, counted)
    dispatch_table({(HOPPER, kind): SHAPES for kind in set(KINDS.values())})
    return state


def quantisation(kind):
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    if kind == "bf16":
        return None
    if kind == "fp8 block":
        return Fp8Config(weight_block_size=[128, 128])
    if kind == "fp8 tensor":
        return Fp8Config(activation_scheme="static")
    name = "int" if kind == "int8" else "float"
    common = {"num_bits": 8, "type": name, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": common | {"strategy": "channel", "dynamic": False},
        "input_activations": common | {"strategy": "token", "dynamic": True},
    }
    return CompressedTensorsConfig.from_config({"format": f"{name}-quantized", "config_groups": {"group_0": group}})


def checkpoint(kind, seed):
    """Of each part: name of a parameter -> tensor. The parts' weights differ in size by a factor of 8."""
    rng = torch.Generator().manual_seed(seed)
    parts = []
    for n, size in zip(PARTS, (1.0, 8.0), strict=True):
        tensors = {"bias": torch.randn(n, generator=rng).to(BF16)}
        normal = torch.randn(n, K, generator=rng)
        if kind == "bf16":
            tensors["weight"] = (normal * size / 16).to(BF16)
        else:
            tensors["weight"] = (normal * 30).round().clamp(-127, 127).to(torch.int8 if kind == "int8" else E4M3)
            shape = {"fp8 tensor": (), "fp8 block": (n // 128, K // 128)}.get(kind, (n, 1))
            name = "weight_scale_inv" if kind == "fp8 block" else "weight_scale"
            tensors[name] = (torch.rand(shape, generator=rng) + 0.5) * size / 500
            if kind == "fp8 tensor":
                tensors["input_scale"] = torch.tensor(1 / 64) * size
        parts.append(tensors)
    return parts


def load(layer, parts):
    for shard, tensors in enumerate(parts):
        for name, tensor in tensors.items():
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, shard)


def build(kind, parts):
    """vLLM's layer, as its loader leaves it."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    torch.set_default_dtype(BF16)
    try:
        with config():
            layer = MergedColumnParallelLinear(
                K, list(PARTS), params_dtype=BF16, quant_config=quantisation(kind), prefix="gate_up", return_bias=False
            )
    finally:
        torch.set_default_dtype(torch.float32)
    layer._cpu_skip_gemm_dispatch = True  # else vLLM lays an unquantised weight out for its CPU kernels
    record_metadata_for_reloading(layer)
    load(layer, parts)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def both(vllm, kind, parts):
    """The layer with vLLM's kernel and with ours."""
    layers = []
    for ours in (False, True):
        vllm.with_ours(ours)
        layers.append(build(kind, parts))
        if kind == "bf16":  # a CPU has a method of its own; on CUDA the feature puts ours in the place of F.linear
            layers[-1].quant_method._gemm_impl = (
                vllm.unquantized if ours else lambda layer, *rest: torch.nn.functional.linear(*rest)
            )
    return layers


def assert_same(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    difference, size = (actual.float() - expected.float()).abs(), expected.float().abs()
    # vLLM multiplies by the reciprocal of a scale that is found: a neighbour in FP8 now and then.
    assert float(difference.max()) < 3e-2 * float(size.max()) and float(difference.mean()) < 6e-3 * float(size.mean())


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_with_scales_of_their_own(vllm, kind, size):
    """Whole, and every rank of two, with a bias."""
    for rank in range(size):
        vllm.parallel(rank, size)
        theirs, ours = both(vllm, kind, checkpoint(kind, 0))
        # Of the other kinds test_fp8_linear.py and test_int8_linear.py try every number of rows.
        for rows in range(1, 34) if size == 1 and kind in ("fp8 block", "bf16") else (1, 32, 33):
            vllm.tokens.clear()
            x = torch.randn(rows, K).to(BF16)
            expected = theirs(x)
            assert vllm.tokens == []
            assert_same(ours(x), expected)
            assert vllm.tokens == ([rows] if rows < 33 else [])


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_again(vllm, kind):
    """As vLLM reloads weights: into the same memory, which CUDA graphs read."""
    from vllm.model_executor.model_loader import reload

    layers, x, outs = both(vllm, kind, checkpoint(kind, 0)), torch.randn(4, K).to(BF16), []
    before = layers[1](x)
    for layer in layers:
        places = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
        with config():
            reload.initialize_layerwise_reload(layer)
            load(layer, checkpoint(kind, 1))
            reload.finalize_layerwise_reload(layer, None)
        assert {name: parameter.data_ptr() for name, parameter in layer.named_parameters()} == places
        outs.append(layer(x))
    assert_same(outs[1], outs[0])
    assert not torch.equal(outs[1], before)


@pytest.mark.parametrize("kind", KINDS)
def test_below_a_lora(vllm, kind):
    """It asks the method of the layer for the product, and adds to it in place."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    theirs, ours = both(vllm, kind, checkpoint(kind, 0))
    x, outs = torch.randn(4, K).to(BF16), []
    for layer in (theirs, ours):
        lora = BaseLinearLayerWithLoRA.__new__(BaseLinearLayerWithLoRA)
        torch.nn.Module.__init__(lora)
        lora.base_layer, lora._enable_aux_cuda_stream = layer, False
        lora.lora_a_stacked = lora.lora_b_stacked = lora.output_slices = ()
        lora.punica_wrapper = types.SimpleNamespace(add_lora_linear=lambda output, x, *rest: output.add_(x[:, :1]))
        outs.append(lora.apply(x, layer.bias))
    assert_same(outs[1], outs[0])
    assert torch.equal(outs[1], ours(x) + x[:, :1])
    assert vllm.tokens == [4, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_batch_invariance(vllm, kind, monkeypatch):
    """Ours, which go by the number of tokens, take none; unquantised layers are vLLM's own before they come to ours."""
    from vllm import envs
    from vllm.model_executor.layers import linear

    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    from vllm_b200_plugin.integration import fp8_block_op, linear_bf16

    here = dataclasses.replace(fp8_block_op.machine(), batch_invariant=True)
    monkeypatch.setattr(fp8_block_op, "machine", lambda: here)
    monkeypatch.setattr(linear, "linear_batch_invariant", torch.nn.functional.linear, raising=False)
    _, ours = both(vllm, kind, checkpoint(kind, 0))
    monkeypatch.setattr(linear.current_platform, "is_cuda_alike", lambda: True, raising=False)
    x = torch.randn(8, K).to(BF16)
    out = ours(x)
    assert out.shape == (8, sum(PARTS)) and vllm.tokens == []
    assert linear_bf16.choice(ours, 1) is None
