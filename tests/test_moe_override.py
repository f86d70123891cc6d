"""Standing in for vLLM's routing ops of MoE layers: with CPU ops of the same schemas in a namespace of our own."""

import itertools

import pytest
import torch
from fake_moe_ops import SCHEMAS, define_moe_ops

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.features import FeatureUnavailable
from vllm_b200_plugin.integration import moe_align_ops, topk_ops
from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops.moe_align import batched_moe_align_block_size, moe_align_block_size
from vllm_b200_plugin.ops.topk import Scoring, Selection, select_experts

pytestmark = pytest.mark.skipif(not _library.status().loaded, reason="the CUDA library, which overrides, was not built")

_namespaces = (f"b200_moe_test_{i}" for i in itertools.count())


class Ops:
    """The ops overridden, with originals that note their calls."""

    def __init__(self):
        self.namespace = next(_namespaces)
        self.library = torch.library.Library(self.namespace, "FRAGMENT")
        self.original_calls = []
        define_moe_ops(self.library, "CPU", self.note)
        topk_ops.override(self.namespace, "CPU")
        moe_align_ops.override(self.namespace, "CPU")

    def note(self, name, *args):
        self.original_calls.append((name, args))
        return (torch.zeros(1), torch.ones(1)) if name == "grouped_topk" else None

    def __getattr__(self, name):
        return getattr(getattr(torch.ops, self.namespace), name)


@pytest.fixture(scope="module")
def shared():
    return Ops()


@pytest.fixture
def ops(shared):
    shared.original_calls.clear()
    return shared


def plain_outputs(num_tokens, topk=8, ids_dtype=torch.int32):
    ids = torch.empty(num_tokens, topk, dtype=ids_dtype)
    return torch.empty(num_tokens, topk), ids, torch.empty(num_tokens, topk, dtype=torch.int32)


def test_the_register_names_every_op():
    assert set(vllm_compat.TOPK_OPS | vllm_compat.MOE_ALIGN_OPS) == set(SCHEMAS)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64, torch.uint32])
@pytest.mark.parametrize("renormalize", [False, True])
def test_topk_softmax(ops, ids_dtype, renormalize):
    logits = torch.randn(5, 128, dtype=torch.bfloat16)
    weights, ids, rows = plain_outputs(5, 8, ids_dtype)
    is_padding = torch.tensor([False, False, False, True, True])
    ops.topk_softmax(weights, ids, rows, logits, renormalize, None, is_padding)
    rule = Selection(8, renormalize=renormalize)
    expected = select_experts(logits, rule, ids_dtype=ids_dtype, is_padding=is_padding)
    assert torch.equal(weights, expected[0])
    assert torch.equal(ids.view(torch.uint8), expected[1].view(torch.uint8))
    assert rows[2].tolist() == [2 + 5 * k for k in range(8)]
    assert not ops.original_calls


def test_topk_sigmoid(ops):
    logits, bias = torch.randn(4, 60), torch.randn(60)
    weights, ids, rows = plain_outputs(4, 6)
    ops.topk_sigmoid(weights, ids, rows, logits, True, bias, 2.5, None)
    expected = select_experts(logits, Selection(6, Scoring.SIGMOID, scale=2.5), bias)
    assert torch.equal(weights, expected[0]) and torch.equal(ids, expected[1])
    assert not ops.original_calls


@pytest.mark.parametrize("change", ["many", "double", "bias", "strided", "rows", "ids", "padding"])
def test_what_ours_does_not_take_goes_to_the_original(ops, change):
    logits = torch.randn(4, 600 if change == "many" else 128, dtype=torch.float64 if change == "double" else None)
    weights, ids, rows = plain_outputs(4, 8, torch.int16 if change == "ids" else torch.int32)
    bias = torch.zeros(128, dtype=torch.float16) if change == "bias" else None
    is_padding = torch.zeros(3, dtype=torch.bool) if change == "padding" else None
    rows = rows[:2] if change == "rows" else rows
    logits = torch.randn(128, 4).t() if change == "strided" else logits
    ops.topk_softmax(weights, ids, rows, logits, True, bias, is_padding)
    [(name, seen)] = ops.original_calls
    assert name == "topk_softmax"
    assert seen[3].data_ptr() == logits.data_ptr() and seen[4] is True
    assert (seen[5] is None) == (bias is None) and (seen[6] is None) == (is_padding is None)


@pytest.mark.parametrize(
    "num_experts, groups, kept, topk, scoring_func",
    [(256, 8, 4, 8, 1), (256, 8, 4, 8, 0), (384, 1, 1, 8, 1), (512, 1, 1, 22, 1), (64, 8, 3, 6, 1)],
)
def test_grouped_topk(ops, num_experts, groups, kept, topk, scoring_func):
    logits, bias = torch.randn(1024, num_experts), torch.randn(num_experts)
    weights, ids = ops.grouped_topk(logits, groups, kept, topk, True, 2.5, bias, scoring_func)
    scoring = Scoring.TANH_SIGMOID if scoring_func else Scoring.NONE
    expected = select_experts(logits, Selection(topk, scoring, True, 2.5, groups, kept), bias)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    assert torch.equal(weights, expected[0]) and torch.equal(ids, expected[1])
    assert not ops.original_calls


@pytest.mark.parametrize(
    "num_experts, groups, kept, topk", [(160, 8, 3, 6), (512, 8, 4, 8), (256, 8, 5, 8), (128, 1, 1, 10), (256, 8, 4, 9)]
)
def test_grouped_topk_that_vllm_does_otherwise(ops, num_experts, groups, kept, topk):
    weights, ids = ops.grouped_topk(
        torch.randn(1024, num_experts), groups, kept, topk, True, 2.5, torch.randn(num_experts), 1
    )
    [(name, seen)] = ops.original_calls
    assert name == "grouped_topk" and seen[1:6] == (groups, kept, topk, True, 2.5)
    assert weights.tolist() == [0] and ids.tolist() == [1]


def test_sizes_at_which_vllm_is_as_fast_go_to_the_original(ops):
    ops.grouped_topk(torch.randn(1023, 256), 8, 4, 8, True, 2.5, torch.randn(256), 1)
    for num_tokens, num_experts in ((33, 128), (4095, 128), (1, 64)):
        ids = torch.randint(num_experts, (num_tokens, 8), dtype=torch.int32)
        outputs = [torch.empty_like(t) for t in moe_align_block_size(ids, num_experts, 16)]
        ops.moe_align_block_size(ids, num_experts, 16, *outputs, None, None)
    names = ["grouped_topk", *["moe_align_block_size"] * 3]
    assert [name for name, _ in ops.original_calls] == names


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_moe_align(ops, mapped, dtype):
    ids = torch.randint(80, (30, 4), dtype=dtype)
    expert_map = torch.arange(80, dtype=torch.int32) - 32 if mapped else None
    expected = moe_align_block_size(ids, 80, 16, expert_map)
    outputs, scatter = [torch.empty_like(t) for t in expected], torch.empty(120, 1, dtype=torch.int32)
    ops.moe_align_block_size(ids, 80, 16, *outputs, expert_map, scatter)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    missing = ids.flatten() < 32 if mapped else torch.zeros(120, dtype=torch.bool)
    assert torch.equal(scatter.flatten(), torch.arange(120, dtype=torch.int32).masked_fill(missing, -1))
    assert not ops.original_calls


def test_moe_align_with_too_little_room_goes_to_the_original(ops):
    ids = torch.randint(80, (30, 4), dtype=torch.int32)
    outputs = [torch.empty_like(t) for t in moe_align_block_size(ids, 80, 16)]
    ops.moe_align_block_size(ids, 80, 16, outputs[0][:-1], *outputs[1:], None, None)
    ops.moe_align_block_size(ids.short(), 80, 16, *outputs, None, None)
    assert [name for name, _ in ops.original_calls] == ["moe_align_block_size"] * 2


def test_batched_moe_align(ops):
    counts = torch.tensor([2, 3, 0, 6, 8], dtype=torch.int32)
    expected = batched_moe_align_block_size(8, 4, counts)
    outputs = [torch.empty_like(t) for t in expected]
    ops.batched_moe_align_block_size(8, 4, counts, *outputs)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert not ops.original_calls
    ops.batched_moe_align_block_size(8, 4, counts.long(), *outputs)
    assert [name for name, _ in ops.original_calls] == ["batched_moe_align_block_size"]


def test_twice_is_once(ops):
    topk_ops.override(ops.namespace, "CPU")
    ops.topk_softmax(*plain_outputs(2), torch.randn(2, 600), True, None, None)
    assert len(ops.original_calls) == 1, "the kept kernel is still vLLM's, not ours"


def test_another_namespace_is_refused_and_keeps_its_kernels(ops):
    namespace = next(_namespaces)
    library, calls = torch.library.Library(namespace, "FRAGMENT"), []
    define_moe_ops(library, "CPU", lambda name, *args: calls.append(name))
    with pytest.raises(FeatureUnavailable, match=f"{ops.namespace}::topk_softmax is ours for CPU already"):
        topk_ops.override(namespace, "CPU")
    with pytest.raises(FeatureUnavailable, match="no op b200_none::moe_align_block_size"):
        moe_align_ops.override("b200_none", "Meta")
    getattr(torch.ops, namespace).topk_softmax(*plain_outputs(2), torch.randn(2, 64), True, None, None)
    assert calls == ["topk_softmax"]


def test_compiled_callers_use_it(ops):
    def choose(logits):
        weights, ids, rows = plain_outputs(4)
        ops.topk_softmax(weights, ids, rows, logits, True, None, None)
        return ids

    logits = torch.randn(4, 128)
    compiled = torch.compile(choose, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(logits), select_experts(logits, Selection(8))[1])
