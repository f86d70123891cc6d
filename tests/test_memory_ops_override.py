"""Standing in for vLLM's quantisation, fused quantisation and KV-cache ops: with CPU ops of the same schemas in a
namespace of our own."""

import itertools

import pytest
import torch
from fake_cuda import CACHE_OPS, MEMORY_OPS

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.features import FEATURES, FeatureUnavailable
from vllm_b200_plugin.integration import cache_ops, gated_quant_ops, norm_quant_ops, op_override, token_quant_ops
from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops.gated_quant import gated_group_quant, gated_tensor_quant
from vllm_b200_plugin.ops.norm_quant import rms_norm_group_quant, rms_norm_tensor_quant, rms_norm_token_quant
from vllm_b200_plugin.ops.token_quant import per_tensor_quant, per_token_quant

pytestmark = pytest.mark.skipif(not _library.status().loaded, reason="the CUDA library, which overrides, was not built")

E4M3 = torch.float8_e4m3fn
FEATURE_MODULES = (token_quant_ops, gated_quant_ops, norm_quant_ops, cache_ops)
# --kv-cache-dtype
OUR_CACHES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3")
OTHER_CACHES = (
    "fp8_e5m2",
    "fp8_inc",
    "fp8_ds_mla",
    "nvfp4_ds_mla",
    "fp8_per_token_head",
    "int8_per_token_head",
    "nvfp4",
)
_namespaces = (f"b200_test_memory_{i}" for i in itertools.count())


class Ops:
    """The ops overridden, with originals that note their calls."""

    def __init__(self):
        self.namespace = next(_namespaces)
        self.library = torch.library.Library(self.namespace, "FRAGMENT")
        self.calls = []
        for schema in (*MEMORY_OPS, *CACHE_OPS):
            name = schema.split("(")[0]
            self.library.define(schema)
            self.library.impl(name, lambda *args, name=name: self.calls.append((name, args)), "CPU")
        for module in FEATURE_MODULES:
            module.override(self.namespace, "CPU")

    def __getattr__(self, name):
        return getattr(getattr(torch.ops, self.namespace), name)


@pytest.fixture(scope="module")
def shared():
    return Ops()


@pytest.fixture
def ops(shared):
    shared.calls.clear()
    return shared


def same(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_every_op_that_we_know_is_defined_here():
    known = (
        vllm_compat.TOKEN_QUANT_OPS | vllm_compat.GATED_QUANT_OPS | vllm_compat.NORM_QUANT_OPS | vllm_compat.CACHE_OPS
    )
    assert set(known) == {schema.split("(")[0] for schema in (*MEMORY_OPS, *CACHE_OPS)}
    assert {module.__name__ for module in FEATURE_MODULES} <= {feature.module for feature in FEATURES}


@pytest.mark.parametrize("shape", [(3, 256), (2, 3, 256)])
def test_per_token(ops, shape):
    x = torch.randn(shape, dtype=torch.bfloat16)
    q, scale = torch.empty(shape, dtype=E4M3), torch.empty(x.numel() // 256, 1)
    ops.dynamic_per_token_scaled_fp8_quant(q, x, scale, None)
    assert same(q, per_token_quant(x)[0]) and torch.equal(scale, per_token_quant(x)[1])
    ops.dynamic_per_token_scaled_fp8_quant(q, x, scale, torch.tensor([1.0]))
    assert torch.equal(scale, per_token_quant(x, scale_ub=torch.tensor([1.0]))[1])
    q, azp = torch.empty(shape, dtype=torch.int8), torch.empty(x.numel() // 256, 1, dtype=torch.int32)
    ops.dynamic_scaled_int8_quant(q, x, scale, None)
    assert torch.equal(q, per_token_quant(x, torch.int8)[0])
    ops.dynamic_scaled_int8_quant(q, x, scale, azp)
    for got, want in zip((q, scale, azp), per_token_quant(x, torch.int8, asymmetric=True), strict=True):
        assert torch.equal(got, want)
    assert not ops.calls


def test_per_tensor(ops):
    x, scale = torch.randn(4, 64).half(), torch.tensor(0.1)
    q = torch.empty(4, 64, dtype=E4M3)
    ops.static_scaled_fp8_quant(q, x, scale)
    assert same(q, per_tensor_quant(x, scale))
    q = torch.empty(4, 64, dtype=torch.int8)
    ops.static_scaled_int8_quant(q, x, scale, None)
    assert torch.equal(q, per_tensor_quant(x, scale, torch.int8))
    azp = torch.tensor([5], dtype=torch.int32)
    ops.static_scaled_int8_quant(q, x, scale, azp)
    assert torch.equal(q, per_tensor_quant(x, scale, torch.int8, azp=azp))
    assert not ops.calls


def test_given_groups_are_left_to_the_original(ops):
    x, q = torch.randn(4, 256).half(), torch.empty(4, 256, dtype=E4M3)
    channels, tokens, groups = torch.rand(256) + 0.1, torch.rand(4) + 0.1, torch.rand(2, 4).t() + 0.1
    for scale, shape in ((channels, [-1, 1]), (channels[None], None), (tokens, [1, -1]), (groups, [1, 128])):
        ops.static_scaled_fp8_quant(q, x, scale, shape)
    assert len(ops.calls) == 4


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype, eps", [(E4M3, 1 / 512), (torch.int8, 127 * 2.0**-23)])
def test_gated_groups(ops, transposed, dtype, eps):
    x = torch.randn(901, 512).bfloat16()
    x[3] = 0
    q = torch.empty(901, 256, dtype=dtype)
    scale = torch.empty(2, 901).t() if transposed else torch.empty(901, 2)
    ops.silu_and_mul_per_block_quant(q, x, scale, 128, None, transposed)
    expected = gated_group_quant(x, dtype=dtype, eps=eps)
    assert same(q, expected[0]) and torch.equal(scale, expected[1])
    floor = 1 / (448 * 512) if dtype == E4M3 else 2.0**-23
    assert scale[3, 0] == torch.tensor(floor), "vLLM's lower bound"
    assert not ops.calls


def test_few_gated_groups_are_left_to_the_original(ops):
    x = torch.randn(16, 2 * 2048).bfloat16()
    ops.silu_and_mul_per_block_quant(torch.empty(16, 2048, dtype=E4M3), x, torch.empty(16, 16), 128, None, False)
    assert [name for name, _ in ops.calls] == ["silu_and_mul_per_block_quant"]


def test_gated_with_one_scale(ops):
    x, scale, q = torch.randn(2, 3, 64).half(), torch.tensor([0.1]), torch.empty(2, 3, 32, dtype=E4M3)
    ops.silu_and_mul_quant(q, x, scale)
    assert same(q, gated_tensor_quant(x, scale))
    assert not ops.calls


@pytest.mark.parametrize("packed", [False, True])
def test_masked(ops, packed):
    x, counts = torch.randn(3, 4, 1024).bfloat16(), torch.tensor([4, 0, 2], dtype=torch.int32)
    q = torch.zeros(3, 4, 512, dtype=torch.uint8).view(E4M3)
    columns, dtype = (1, torch.int32) if packed else (4, torch.float32)
    scale = torch.zeros(3, columns, 4, dtype=dtype).transpose(1, 2)
    ops.persistent_masked_m_silu_mul_quant(x, counts, q, scale, packed)
    assert (scale.view(torch.int32) != 0).any(-1).sum(-1).tolist() == [4, 0, 2]
    assert not ops.calls


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("leading_rows", [None, 5, 8])
def test_norm_groups(ops, with_residual, leading_rows):
    x, weight = torch.randn(5, 384).bfloat16(), torch.rand(384).bfloat16()
    residual = torch.randn(5, 384).bfloat16() if with_residual else None
    kept = residual.clone() if with_residual else None
    q = torch.empty(5, 384, dtype=E4M3)
    scale = torch.empty(5, 3) if leading_rows is None else torch.empty_strided((5, 3), (1, leading_rows))
    ops.rms_norm_per_block_quant(q, x, weight, scale, 1e-6, None, residual, 128, leading_rows is not None)
    expected = rms_norm_group_quant(x, weight, 1e-6, residual=kept, eps=1 / 512)
    assert same(q, expected[0]) and torch.equal(scale, expected[1])
    assert not with_residual or torch.equal(residual, kept)
    assert not ops.calls


def test_norm_with_one_scale(ops):
    x, weight, scale = torch.randn(2, 3, 64).half(), torch.rand(64).half(), torch.tensor([0.1])
    q, scales = torch.empty(2, 3, 64, dtype=E4M3), torch.empty(6, 1)
    ops.rms_norm_dynamic_per_token_quant(q, x, weight, scales, 1e-5, None, None)
    expected = rms_norm_token_quant(x, weight, 1e-5)
    assert same(q, expected[0]) and torch.equal(scales, expected[1])
    residual, kept = torch.ones_like(x), torch.ones_like(x)
    ops.fused_add_rms_norm_static_fp8_quant(q, x, residual, weight, scale, 1e-5)
    assert same(q, rms_norm_tensor_quant(x, weight, scale, 1e-5, residual=kept)) and torch.equal(residual, kept)
    assert not ops.calls


@pytest.mark.parametrize("kv_cache_dtype, dtype", [("auto", torch.bfloat16), ("fp8", torch.uint8), ("fp8_e4m3", E4M3)])
def test_cache(ops, kv_cache_dtype, dtype):
    key, value = torch.randn(4, 2, 64).bfloat16(), torch.randn(4, 2, 64).bfloat16()
    cache = torch.zeros(3, 2, 16, 128, dtype=torch.uint8 if dtype == E4M3 else dtype).view(dtype)
    keys, values = cache.transpose(1, 2).split(64, dim=-1)
    slots, one = torch.tensor([17, -1, 5]), torch.tensor(1.0)
    ops.reshape_and_cache_flash(key, value, keys, values, slots, kv_cache_dtype, one, one)
    stored = values[1, 1].view(E4M3) if dtype != torch.bfloat16 else values[1, 1]
    assert torch.equal(stored.float(), value[0].to(stored.dtype).float())
    latents = torch.zeros(2, 16, 80, dtype=torch.uint8 if dtype == E4M3 else dtype).view(dtype)
    ops.concat_and_cache_mla(key[:, 0], value[:, 0, :16], latents, slots, kv_cache_dtype, one)
    stored = latents[1, 1].view(E4M3) if dtype != torch.bfloat16 else latents[1, 1]
    assert torch.equal(stored[64:].float(), value[0, 0, :16].to(stored.dtype).float())
    assert not ops.calls


@pytest.mark.parametrize("name", (*OUR_CACHES, *OTHER_CACHES))
def test_every_kind_of_cache_is_written_by_ours_or_left_to_the_originals(ops, name):
    """e4m3 and the numbers as they are; e5m2, fp8_ds_mla with its scales inside and all others are vLLM's."""
    dtype = torch.float16 if name == "float16" else torch.bfloat16
    key, value = torch.randn(4, 2, 64, dtype=dtype), torch.randn(4, 2, 64, dtype=dtype)
    latents, ropes = torch.randn(4, 512, dtype=dtype), torch.randn(4, 64, dtype=dtype)
    stored = dtype if name in ("auto", "bfloat16", "float16") else torch.uint8
    caches = [torch.zeros(2, 16, 2, 64, dtype=stored) for _ in range(2)]
    mla = torch.zeros(2, 16, 656 if name == "fp8_ds_mla" else 576, dtype=stored)
    slots, one = torch.arange(4), torch.ones(1)
    ops.reshape_and_cache_flash(key, value, *caches, slots, name, one, one)
    ops.concat_and_cache_mla(latents, ropes, mla, slots, name, one)
    if name in OUR_CACHES:
        assert not ops.calls and all(cache.any() for cache in (*caches, mla))
    else:
        assert [call[0] for call in ops.calls] == ["reshape_and_cache_flash", "concat_and_cache_mla"]
        assert [ops.calls[0][1][5], ops.calls[1][1][4]] == [name, name]
        assert not any(cache.any() for cache in (*caches, mla))


def test_what_ours_do_not_take_goes_to_the_originals(ops):
    x, q = torch.randn(4, 256).bfloat16(), torch.empty(4, 256, dtype=E4M3)
    half, one = torch.empty(4, 128, dtype=E4M3), torch.ones(1)
    weight, four, ub = torch.ones(256).bfloat16(), torch.empty(4, 1), torch.ones(1)
    key = torch.randn(4, 2, 64).bfloat16()
    cache = torch.zeros(1, 16, 2, 64, dtype=torch.uint8)
    slots = torch.arange(4)
    ops.dynamic_per_token_scaled_fp8_quant(torch.empty(5, 256, dtype=E4M3), x, torch.empty(5, 1), None)
    ops.dynamic_per_token_scaled_fp8_quant(q[:, :40], x[:, :40], four, None)
    ops.dynamic_scaled_int8_quant(
        torch.empty(4, 256, dtype=torch.int8), x, torch.empty(4, 1, dtype=torch.float64), None
    )
    ops.static_scaled_fp8_quant(q, x, torch.ones(32), [-1, 8])
    ops.static_scaled_int8_quant(torch.empty(4, 256, dtype=torch.int8), x.double(), one, None)
    ops.silu_and_mul_per_block_quant(half, x, torch.empty(4, 1), 128, ub, False)
    ops.silu_and_mul_per_block_quant(half, x, torch.empty(4, 4), 32, None, False)
    ops.silu_and_mul_quant(half, x.float(), one)
    ops.persistent_masked_m_silu_mul_quant(x.view(1, 4, 256), slots, half.view(1, 4, 128), four.view(1, 4, 1), False)
    ops.rms_norm_per_block_quant(q, x, weight, torch.empty(4, 2), 1e-6, ub, None, 128, False)
    ops.rms_norm_dynamic_per_token_quant(q, x, weight.float(), four, 1e-6, None, None)
    ops.fused_add_rms_norm_static_fp8_quant(q, x, x.float(), weight, one, 1e-6)
    ops.reshape_and_cache_flash(key, key, cache, cache, slots, "fp8_e5m2", one, one)
    ops.reshape_and_cache_flash(key[..., :40], key[..., :40], cache[..., :40], cache[..., :40], slots, "fp8", one, one)
    ops.concat_and_cache_mla(key[:, 0], key[:, 1], cache.view(1, 16, 128), slots, "fp8_ds_mla", one)
    assert [name for name, _ in ops.calls] == [
        "dynamic_per_token_scaled_fp8_quant",
        "dynamic_per_token_scaled_fp8_quant",
        "dynamic_scaled_int8_quant",
        "static_scaled_fp8_quant",
        "static_scaled_int8_quant",
        "silu_and_mul_per_block_quant",
        "silu_and_mul_per_block_quant",
        "silu_and_mul_quant",
        "persistent_masked_m_silu_mul_quant",
        "rms_norm_per_block_quant",
        "rms_norm_dynamic_per_token_quant",
        "fused_add_rms_norm_static_fp8_quant",
        "reshape_and_cache_flash",
        "reshape_and_cache_flash",
        "concat_and_cache_mla",
    ]
    assert ops.calls[3][1][3] == [-1, 8] and ops.calls[12][1][5] == "fp8_e5m2"


def test_twice_is_once(ops):
    token_quant_ops.override(ops.namespace, "CPU")
    x = torch.randn(4, 256).bfloat16()
    ops.dynamic_per_token_scaled_fp8_quant(torch.empty(5, 256, dtype=E4M3), x, torch.empty(5, 1), None)
    assert len(ops.calls) == 1, "the kept kernel is still vLLM's, not ours"


def test_batch_invariance_leaves_out_what_changes_with_the_number_of_tokens(monkeypatch):
    taken = []
    monkeypatch.setattr(op_override, "override", lambda ops, *_: taken.extend(ops))
    gated_quant_ops.override("unused", "CPU", batch_invariant=True)
    assert set(vllm_compat.GATED_QUANT_OPS) - set(taken) == {"silu_and_mul_per_block_quant"}


def test_a_new_schema_keeps_its_kernel_and_the_others_are_taken():
    namespace = next(_namespaces)
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define("silu_and_mul_quant(Tensor! result, Tensor input, Tensor scale, bool new) -> ()")
    with pytest.raises(FeatureUnavailable, match=r"silu_and_mul_quant takes \(result, input, scale, new\)"):
        op_override.override(
            {"silu_and_mul_quant": vllm_compat.GATED_QUANT_OPS["silu_and_mul_quant"]}, namespace, "CPU", "x"
        )
    with pytest.raises(FeatureUnavailable, match=r"has no op .*reshape_and_cache_flash; .*concat_and_cache_mla"):
        cache_ops.override(namespace, "CPU")
