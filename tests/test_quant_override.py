"""Standing in for vLLM's quantisation ops: with CPU ops of the same schemas in a namespace of our own."""

import itertools

import pytest
import torch
from fake_cuda import define_quant_ops

from vllm_b200_plugin.features import FeatureUnavailable
from vllm_b200_plugin.integration import quant_ops
from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops.quant import ScaleLayout, per_token_group_quant

pytestmark = pytest.mark.skipif(not _library.status().loaded, reason="the CUDA library, which overrides, was not built")

E4M3 = torch.float8_e4m3fn
_namespaces = (f"b200_test_{i}" for i in itertools.count())


class Ops:
    """The three ops overridden, with originals that note their calls."""

    def __init__(self):
        self.namespace = next(_namespaces)
        self.library = torch.library.Library(self.namespace, "FRAGMENT")
        self.original_calls = []
        define_quant_ops(self.library, "CPU", lambda name, *args: self.original_calls.append((name, args)))
        quant_ops.override(self.namespace, "CPU")

    def __getattr__(self, name):
        return getattr(getattr(torch.ops, self.namespace), name)

    def fp8(self, x, q, s, group_size=128, eps=1e-10, low=-448.0, high=448.0, ue8m0=False):
        self.per_token_group_fp8_quant(x, q, s, group_size, eps, low, high, ue8m0, False, False)


@pytest.fixture(scope="module")
def shared():
    return Ops()


@pytest.fixture
def ops(shared):
    shared.original_calls.clear()
    return shared


def outputs(x, columns=None, dtype=E4M3):
    columns = x.shape[-1] // 128 if columns is None else columns
    return torch.empty(x.shape, dtype=dtype), torch.empty(*x.shape[:-1], columns)


def same(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("shape", [(5, 256), (2, 3, 256), (256,), (2, 3, 4, 256), (0, 256)])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_row_major_scales_of_any_number_of_dimensions(ops, shape, ue8m0):
    x = torch.randn(shape, dtype=torch.bfloat16)
    q, s = outputs(x)
    ops.fp8(x, q, s, ue8m0=ue8m0)
    expected_q, expected_s = per_token_group_quant(x.view(-1, 256), ue8m0=ue8m0)
    assert same(q, expected_q.view(q.shape))
    assert torch.equal(s, expected_s.view(s.shape))
    assert not ops.original_calls


@pytest.mark.parametrize("layout", [ScaleLayout.COLUMN, ScaleLayout.COLUMN_TMA])
@pytest.mark.parametrize("shape", [(1, 384), (3, 384), (7, 384), (8, 384), (2, 5, 384)])
def test_column_major_scales(ops, layout, shape):
    x = torch.randn(shape)
    expected_q, expected_s = per_token_group_quant(x, layout=layout)
    q = torch.empty_like(expected_q)
    s = torch.empty_strided(expected_s.shape, expected_s.stride()).fill_(-1)
    ops.fp8(x, q, s)
    assert same(q, expected_q)
    assert torch.equal(s, expected_s)
    assert not ops.original_calls


@pytest.mark.parametrize("rows, taken", [(8, 5), (8, 7), (12, 9), (4, 1), (4, 3)])
def test_leading_rows_of_a_larger_tensor_leave_the_other_rows_alone(ops, rows, taken):
    x = torch.randn(taken, 256)
    s = torch.full((2, rows), -1.0).t()
    q = torch.empty(taken, 256, dtype=E4M3)
    ops.fp8(x, q, s[:taken])
    expected_q, expected_s = per_token_group_quant(x)
    assert same(q, expected_q)
    assert torch.equal(s[:taken], expected_s)
    assert (s[taken:] == -1).all()


@pytest.mark.parametrize("shape", [(3, 640), (2, 3, 640)])
def test_packed_scales_are_of_the_flattened_rows(ops, shape):
    x = torch.randn(shape, dtype=torch.bfloat16)
    expected_q, expected_s = per_token_group_quant(x.view(-1, 640), layout=ScaleLayout.PACKED_UE8M0)
    q = torch.empty(shape, dtype=E4M3)
    s = torch.empty_strided(expected_s.shape, expected_s.stride(), dtype=torch.int32)
    ops.per_token_group_fp8_quant_packed(x, q, s, 128, 1e-10, -448.0, 448.0)
    assert same(q, expected_q.view(shape))
    assert torch.equal(s, expected_s)
    assert not ops.original_calls


def test_int8(ops):
    x = torch.randn(6, 192, dtype=torch.float16)
    q, s = outputs(x, 3, torch.int8)
    ops.per_token_group_quant_int8(x, q, s, 64, 1e-10, -128.0, 127.0)
    expected_q, expected_s = per_token_group_quant(x, 64, torch.int8)
    assert torch.equal(q, expected_q)
    assert torch.equal(s, expected_s)
    assert not ops.original_calls


def test_rows_of_a_wider_tensor_are_read_in_place(ops):
    x = torch.randn(5, 512)[:, 128:384]
    q, s = torch.empty(5, 256, dtype=E4M3), torch.empty(5, 2)
    ops.fp8(x, q, s)
    assert same(q, per_token_group_quant(x)[0])
    assert not ops.original_calls


def unaligned(shape):
    count = torch.Size(shape).numel()
    return torch.empty(count + 1, dtype=E4M3)[1:].view(shape)


@pytest.mark.parametrize(
    "change",
    [
        {"low": -240.0, "high": 240.0},
        {"group_size": 16, "s": torch.empty(4, 16)},
        {"eps": 1e-30},
        {"eps": 2.0},
        {"x": torch.randn(4, 256, dtype=torch.float64)},
        {"q": torch.empty(4, 256, dtype=torch.float8_e5m2)},
        {"q": unaligned((4, 256))},
        {"s": torch.empty(4, 2, dtype=torch.float64)},
        {"s": torch.empty(4, 3)},
        {"x": torch.randn(256, 4).t()},
        {"x": torch.randn(4, 2, 2, 256)[:, :, 0], "q": torch.empty(4, 2, 256, dtype=E4M3), "s": torch.empty(8, 2)},
    ],
    ids=lambda change: "-".join(change),
)
def test_what_ours_does_not_take_goes_to_the_original(ops, change):
    x = torch.randn(4, 256)
    arguments = {"x": x, "q": torch.empty(4, 256, dtype=E4M3), "s": torch.empty(4, 2), **change}
    ops.fp8(**arguments)
    [(name, seen)] = ops.original_calls
    assert name == "per_token_group_fp8_quant"
    assert seen[0].data_ptr() == arguments["x"].data_ptr()
    assert seen[3:] == (
        arguments.get("group_size", 128),
        arguments.get("eps", 1e-10),
        arguments.get("low", -448.0),
        arguments.get("high", 448.0),
        False,
        False,
        False,
    )


def test_int8_with_another_range_goes_to_the_original(ops):
    x = torch.randn(2, 128)
    ops.per_token_group_quant_int8(x, *outputs(x, 1, torch.int8), 128, 1e-10, -127.0, 127.0)
    assert [name for name, _ in ops.original_calls] == ["per_token_group_quant_int8"]


def test_twice_is_once(ops):
    quant_ops.override(ops.namespace, "CPU")
    x = torch.randn(4, 256)
    q, s = outputs(x)
    ops.fp8(x, q, s)
    ops.fp8(x, q, s, low=-1.0)
    assert len(ops.original_calls) == 1, "the kept kernel is still vLLM's, not ours"


def test_another_namespace_is_refused_and_keeps_its_kernels(ops):
    namespace = next(_namespaces)
    library = torch.library.Library(namespace, "FRAGMENT")
    calls = []
    define_quant_ops(library, "CPU", lambda name, *args: calls.append(name))
    with pytest.raises(FeatureUnavailable, match=f"{ops.namespace}::per_token_group_fp8_quant is ours for CPU already"):
        quant_ops.override(namespace, "CPU")
    x = torch.randn(2, 128)
    getattr(torch.ops, namespace).per_token_group_quant_int8(x, *outputs(x, 1, torch.int8), 128, 1e-10, -128.0, 127.0)
    assert calls == ["per_token_group_quant_int8"]


def test_compiled_callers_use_it(ops):
    def quantise(x):
        q, s = torch.empty(x.shape, dtype=E4M3), torch.empty(x.shape[0], 2)
        ops.per_token_group_fp8_quant(x, q, s, 128, 1e-10, -448.0, 448.0, False, False, False)
        return s

    x = torch.randn(4, 256)
    assert torch.equal(torch.compile(quantise, backend="aot_eager", fullgraph=True)(x), per_token_group_quant(x)[1])


def test_a_new_schema_is_refused_and_nothing_is_changed():
    namespace = next(_namespaces)
    library = torch.library.Library(namespace, "FRAGMENT")
    calls = []
    define_quant_ops(library, "CPU", lambda name, *args: calls.append(name), flags=", bool scale_ue8m0, bool new")
    with pytest.raises(FeatureUnavailable, match=r"per_token_group_fp8_quant takes \(input, .*, new\)"):
        quant_ops.override(namespace, "CPU")
    x = torch.randn(2, 128)
    getattr(torch.ops, namespace).per_token_group_quant_int8(x, *outputs(x, 1, torch.int8), 128, 1e-10, -128.0, 127.0)
    assert calls == ["per_token_group_quant_int8"]


def test_missing_ops_are_named():
    with pytest.raises(FeatureUnavailable, match="no op b200_test_none::per_token_group_fp8_quant"):
        quant_ops.override("b200_test_none", "CPU")


def test_a_missing_kernel_is_named():
    namespace = next(_namespaces)
    library = torch.library.Library(namespace, "FRAGMENT")
    define_quant_ops(library, "CPU", lambda *args: None)
    with pytest.raises(FeatureUnavailable, match="has no kernel for CUDA"):
        quant_ops.override(namespace, "CUDA")
