"""Where the small-M kernel is chosen, and that the layers' ops run it there and the library elsewhere."""

import pytest
import torch

from vllm_b200_plugin import dispatch, small_m_table
from vllm_b200_plugin.integration import fp8_block_op, library, linear_bf16
from vllm_b200_plugin.integration.fp8_block_op import Engine, Machine, fp8_block_linear
from vllm_b200_plugin.ops import small_m_gemm
from vllm_b200_plugin.ops.gemm import fp8_block_scaled_mm
from vllm_b200_plugin.ops.quant import ScaleLayout, per_token_group_quant

HOPPER = (9, 0)
N, K = 192, 256
CUT, WIDE = (1, 4, 1, 0), (2, 8, 1, 0)
ROWS = ((2, CUT, False), (4, None, False), (16, WIDE, True))
TABLE = {
    (HOPPER, "fp8_block"): {(N, K): ROWS},
    (HOPPER, "bf16"): {(N, K): ROWS[:1]},
    (HOPPER, "fp8"): {(N, K): ROWS[:1]},
}


@pytest.fixture
def table(dispatch_table):
    dispatch_table(TABLE)


@pytest.mark.parametrize(
    "num_tokens, n, k, kernel, words",
    [
        (1, N, K, dispatch.SMALL_M, "faster as measured for 192x256"),
        (2, N, K, dispatch.SMALL_M, "2 tokens"),
        (3, N, K, dispatch.VLLM, "3 tokens, no faster"),
        (16, N, K, dispatch.SMALL_M, "16 tokens"),
        (17, N, K, dispatch.VLLM, "17 tokens, no faster"),
        (1, 224, K, dispatch.SMALL_M, "192x256"),
        (1, 2 * N, K, dispatch.VLLM, "no shape near 384x256"),
        (1, N, K + 16, dispatch.VLLM, "K % 128 == 0, got K=272"),
    ],
)
def test_choice(table, num_tokens, n, k, kernel, words):
    choice = dispatch.small_m_gemm("fp8_block", num_tokens, n, k, HOPPER)
    assert choice.kernel == kernel
    assert words in choice.reason


def test_cut_and_way(table):
    choices = [dispatch.small_m_gemm("fp8_block", m, N, K, HOPPER) for m in (1, 16)]
    assert [(choice.config, choice.quantise_first) for choice in choices] == [(CUT, False), (WIDE, True)]
    assert dispatch.small_m_limit("fp8_block", N, K, HOPPER) == 16
    assert dispatch.small_m_limit("fp8_block", N, 3 * K, HOPPER) == 0


@pytest.mark.parametrize("capability, batch_invariant, words", [
    ((10, 0), False, "was not measured on compute capability 10.0"), (HOPPER, True, "batch invariance"),
])  # fmt: skip
def test_steps_aside(table, capability, batch_invariant, words):
    choice = dispatch.small_m_gemm("fp8_block", 1, N, K, capability, batch_invariant=batch_invariant)
    assert choice.kernel == dispatch.VLLM
    assert words in choice.reason


def test_table_in_force():
    for (capability, kind), shapes in small_m_table.TABLE.items():
        assert capability == HOPPER, "nothing else was measured"
        for (n, k), rows in shapes.items():
            if not rows:  # measured, and never faster
                continue
            tokens = [most for most, *_ in rows]
            assert tokens == sorted(set(tokens)) and tokens[-1] < dispatch.SMALL_M_BELOW
            for most, cut, quantise_first in rows:
                if cut is None:
                    continue
                config = small_m_gemm.Config(*cut)
                assert config.row_tiles in (1, 2, 4) and config.cluster in (1, 2, 4, 8)
                assert config.warps <= (16 if config.row_tiles * -(-most // 8) <= 4 else 8)
                assert not config.chunks or config.warps % config.chunks == 0
                assert quantise_first or kind != "fp8_block" or most <= small_m_gemm.MAX_QUANTISED_TOKENS
            assert dispatch.small_m_gemm(kind, tokens[-1], n, k, capability).kernel == dispatch.SMALL_M


def fp8_operands(m):
    x = torch.randn(m, K, dtype=torch.bfloat16)
    return x, torch.randn(N, K).to(torch.float8_e4m3fn), torch.rand(2, 2) + 0.5


@pytest.mark.parametrize("engine", [Engine.DEEP_GEMM, Engine.FLASHINFER_DEEP_GEMM, Engine.CUTLASS, Engine.TRITON])
@pytest.mark.parametrize("m", [1, 16])
def test_fp8_block_layer_runs_ours_with_the_scales_of_its_engine(table, monkeypatch, engine, m):
    monkeypatch.setattr(fp8_block_op, "machine", lambda: Machine(HOPPER, False, ScaleLayout.COLUMN_TMA, True))
    x, weight, weight_scale = fp8_operands(m)
    out = fp8_block_linear(x, weight, weight_scale, (128, 128), torch.bfloat16, engine)
    q, scale = per_token_group_quant(x, ue8m0=engine == Engine.DEEP_GEMM)
    assert torch.allclose(out, fp8_block_scaled_mm(q, scale, weight, weight_scale), rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("m, batch_invariant", [(3, False), (17, False), (40, False), (1, True)])
def test_fp8_block_layer_runs_its_engine_elsewhere(table, monkeypatch, m, batch_invariant):
    here = Machine(HOPPER, batch_invariant, ScaleLayout.COLUMN_TMA, True)
    monkeypatch.setattr(fp8_block_op, "machine", lambda: here)
    monkeypatch.setitem(fp8_block_op._ENGINES, Engine.DEEP_GEMM, lambda *arguments: "the engine's")
    run = fp8_block_op._implementation
    assert run(*fp8_operands(m), [128, 128], torch.bfloat16, Engine.DEEP_GEMM) == "the engine's"


@pytest.mark.parametrize("shape", [(1, K), (2, K), (3, K), (2, 1, K), (0, K)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bf16_layer(table, monkeypatch, shape, with_bias):
    monkeypatch.setattr(library, "capability", lambda: HOPPER)
    calls = []
    run = small_m_gemm.linear
    monkeypatch.setattr(small_m_gemm, "linear", lambda *a, **k: calls.append(k["config"]) or run(*a, **k))
    x, weight = torch.randn(shape, dtype=torch.bfloat16), torch.randn(N, K, dtype=torch.bfloat16)
    bias = torch.randn(N, dtype=torch.bfloat16) if with_bias else None
    out = linear_bf16.unquantized_gemm(torch.nn.Module(), x, weight, bias)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias if bias is None else bias.double())
    assert out.shape == expected.shape and out.dtype == torch.bfloat16
    assert torch.allclose(out.double(), expected, rtol=2e-2, atol=0.2)
    assert calls == ([small_m_gemm.Config(*CUT)] if shape in ((1, K), (2, K), (2, 1, K)) else [])


@pytest.mark.parametrize("k", [K - 1, K + 1, K + 4])
def test_bf16_layer_with_odd_k_is_vllms(table, monkeypatch, k):
    monkeypatch.setattr(library, "capability", lambda: HOPPER)
    monkeypatch.setattr(small_m_gemm, "linear", None)
    x, weight = torch.randn(2, k, dtype=torch.bfloat16), torch.randn(N, k, dtype=torch.bfloat16)
    out = linear_bf16.unquantized_gemm(torch.nn.Module(), x, weight)
    assert torch.equal(out, torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_bf16_layer_at_every_number_of_tokens(dispatch_table, monkeypatch, device, contiguous):
    dispatch_table({(HOPPER, "bf16"): {(N, K): ((32, CUT, False),)}})
    monkeypatch.setattr(library, "capability", lambda: HOPPER)
    rows, run = [], small_m_gemm.linear
    monkeypatch.setattr(small_m_gemm, "linear", lambda x, *a, **k: rows.append(len(x)) or run(x, *a, **k))
    weight, bias = (torch.randn(shape, device=device).bfloat16() for shape in ((N, K), (N,)))
    for m in range(1, 34):
        wide = torch.randn(m, K if contiguous else K + 3, device=device).bfloat16()
        x = wide[:, wide.shape[1] - K :]
        out = linear_bf16.unquantized_gemm(torch.nn.Module(), x, weight, bias)
        expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        assert (out.double() - expected).abs().max() < 2**-8 * expected.abs().max()
    assert rows == list(range(1, 33))


def test_bf16_layer_compiles_to_one_op_where_ours_may_win(table, monkeypatch):
    monkeypatch.setattr(library, "capability", lambda: HOPPER)
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    module = torch.nn.Module()

    def layer(x, weight):
        return linear_bf16.unquantized_gemm(module, x, weight)

    for n in (N, 3 * N):
        torch._dynamo.reset()
        x, weight = torch.randn(2, K, dtype=torch.bfloat16), torch.randn(n, K, dtype=torch.bfloat16)
        torch.compile(layer, backend=backend, fullgraph=True)(x, weight)
    assert [names[0].split(".")[-1] for names in graphs] == ["bf16_linear", "<built-in function linear>"]


@pytest.mark.parametrize("change", [{"x": torch.float16}, {"weight": torch.float32}])
def test_bf16_layer_leaves_other_dtypes_alone(table, monkeypatch, change):
    monkeypatch.setattr(library, "capability", lambda: HOPPER)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight, bias: "theirs")
    x = torch.randn(1, K).to(change.get("x", torch.bfloat16))
    weight = torch.randn(N, K).to(change.get("weight", torch.bfloat16))
    assert linear_bf16.unquantized_gemm(torch.nn.Module(), x, weight) == "theirs"
