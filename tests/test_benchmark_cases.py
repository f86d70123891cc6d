"""The benchmark's families: well-formed cases, peers that say why they are missing, references that can be trusted."""

import dataclasses
import math
import operator
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import families
from benchmarks.cases.gemm import FusedLinearCase, GemmCase
from benchmarks.cases.kv_cache import KvCacheCase
from benchmarks.cases.moe import (
    EXPERT_FORMATS,
    FusedExpertsCase,
    MoeAlignCase,
    MoeSumCase,
    RouterCase,
    TopKCase,
)
from benchmarks.cases.nvfp4_quant import Nvfp4ExpertsQuantCase, Nvfp4QuantCase
from benchmarks.cases.quant import GroupQuantCase
from benchmarks.cases.rms_norm_quant import RmsNormQuantCase
from benchmarks.cases.silu_quant import MaskedSiluQuantCase, SiluQuantCase
from benchmarks.cases.token_quant import TokenQuantCase
from benchmarks.families import Missing, Run, _common
from benchmarks.kernels import FAMILIES
from vllm_b200_plugin.ops.gemm import fp8_block_scaled_mm
from vllm_b200_plugin.ops.moe import fp8_block_scaled_moe
from vllm_b200_plugin.ops.moe_few_tokens import ExpertFormat, few_tokens_moe
from vllm_b200_plugin.ops.nvfp4_quant import nvfp4_dequant, nvfp4_quant
from vllm_b200_plugin.ops.quant import ScaleLayout, per_token_group_quant
from vllm_b200_plugin.ops.token_quant import per_tensor_quant, per_token_quant
from vllm_b200_plugin.ops.topk import select_experts

RECORD_KEYS = {"m", "n", "k", "dtype", "layout", "bytes", "flops"}
GEMM = GemmCase(3, 192, 256)  # a weight whose last block of rows is a half one
SMALL: dict[str, list[Any]] = {
    "group_quant": [GroupQuantCase(3, 256), GroupQuantCase(3, 640, layout=ScaleLayout.PACKED_UE8M0)],
    "token_quant": [TokenQuantCase(3, 256), TokenQuantCase(3, 256, torch.int8), TokenQuantCase(3, 256, static=True)],
    "silu_quant": [SiluQuantCase(5, 640, layout) for layout in (ScaleLayout.ROW, ScaleLayout.COLUMN)]
    + [SiluQuantCase(5, 640, ScaleLayout.PACKED_UE8M0)]
    + [SiluQuantCase(5, 640, kind=kind) for kind in ("token", "tensor")],
    "masked_silu_quant": [MaskedSiluQuantCase(3, 4, 1024, 5, packed) for packed in (False, True)],
    "rms_norm_quant": [RmsNormQuantCase(5, 256, layout=layout) for layout in (ScaleLayout.ROW, ScaleLayout.COLUMN_TMA)]
    + [RmsNormQuantCase(5, 256, residual=False), RmsNormQuantCase(5, 256, kind="token")]
    + [RmsNormQuantCase(5, 256, kind="nvfp4_swizzled")]
    + [RmsNormQuantCase(5, 640, layout=ScaleLayout.PACKED_UE8M0)],
    "nvfp4_quant": [Nvfp4QuantCase(5, 320, swizzled, gated) for swizzled in (False, True) for gated in (False, True)],
    "nvfp4_experts_quant": [Nvfp4ExpertsQuantCase(3, 7, 320), Nvfp4ExpertsQuantCase(3, 7, 64, True)],
    "kv_cache": [KvCacheCase(7, heads, fp8) for heads in (2, None) for fp8 in (False, True)],
    "bf16_gemm": [GEMM],
    "fp8_tensor_gemm": [GEMM],
    "fp8_block_gemm": [GEMM],
    "fp8_block_linear": [GEMM],
    "fp8_linear": [GEMM],
    "int8_linear": [GEMM],
    "fused_linear": [FusedLinearCase(*kind, 3, 192, 256) for kind in product(("norm", "silu", "none"), (False, True))],
    "nvfp4_linear": [GEMM],
    "moe_align": [MoeAlignCase(3, 64, 16), MoeAlignCase(40, 16, 64)],
    "topk": [TopKCase(9, 128), TopKCase(9, 256, 8, 4)],
    "router": [RouterCase(3, 64, 128), RouterCase(3, 64, 128, 8, 4)],
    "moe_sum": [MoeSumCase(3, 64)],
    "fused_experts": [
        *(FusedExpertsCase(2, 16, 256, 128, format) for format in EXPERT_FORMATS[:2] + EXPERT_FORMATS[3:]),
        FusedExpertsCase(2, 16, 256, 128, "bf16", 4, "gpt_oss"),
        FusedExpertsCase(2, 16, 256, 128, "fp8_token-channel", 2, "silu_clamped"),
    ],
}
EACH_SMALL = [pytest.param(FAMILIES[op], case, id=f"{op} {case}") for op in SMALL for case in SMALL[op]]
EACH_FAMILY = [pytest.param(family, id=op) for op, family in FAMILIES.items()]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "device", torch.device("cpu"))


def test_every_family_has_a_small_case() -> None:
    assert set(SMALL) == set(FAMILIES)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_cases_are_well_formed(family: ModuleType) -> None:
    cases = list(family.cases())
    assert cases
    assert len({str(case) for case in cases}) == len(cases), "names are unique"
    for case in cases:
        record = family.record(case)
        assert set(record) >= RECORD_KEYS
        assert record["bytes"] > 0 and isinstance(record["bytes"], int)
        assert record["flops"] >= 0
        assert record["m"] >= 1 and record["k"] >= 1
        assert dataclasses.is_dataclass(case) and len(str(case)) <= 44, "fits the column"
    # One plot shows one shape: rows that share all but the tokens differ in the tokens.
    keys = [tuple(record[k] for k in ("m", "n", "k", "dtype", "layout")) for record in map(family.record, cases)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("family, case", EACH_SMALL)
def test_implementations_run_or_say_why_not(family: ModuleType, case: Any) -> None:
    made, missing = {}, {}
    for name, make in family.IMPLEMENTATIONS.items():
        try:
            made[name] = make(case, 0)
        except Missing as reason:
            missing[name] = str(reason)
    assert all(missing.values())
    for name, run in made.items():
        run.poison()
        run.call()
        correct, details = family.check(case, 0, run.outputs)
        assert correct, (name, details)
        assert "error" in details


@pytest.mark.parametrize("family, case", EACH_SMALL)
def test_peers_without_their_package_are_missing(
    family: ModuleType, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str, *_: Any) -> Any:
        raise Missing(f"{name} is not installed")

    for name in ("peer", "vllm_op", "import_peer"):
        if hasattr(family, name):
            monkeypatch.setattr(family, name, nothing)
    monkeypatch.setattr(_common, "vllm_op", nothing)
    for name, make in family.IMPLEMENTATIONS.items():
        if name.startswith(("vllm", "flashinfer", "deep_gemm")):
            with pytest.raises(Missing):
                make(case, 0)


@pytest.mark.parametrize("family, case", EACH_SMALL)
def test_check_accepts_the_naive_result_and_nothing_else(family: ModuleType, case: Any) -> None:
    if family.OP == "group_quant":
        pytest.skip("its reference has tests of its own")
    outputs = NAIVE[family.OP](family, case)
    correct, details = family.check(case, 0, outputs)
    assert correct, details
    assert not family.check(case, 1, outputs)[0], "another seed has another result"
    for index, output in enumerate(outputs):
        spoiled = [tensor.clone() for tensor in outputs]
        Run(lambda: None, (spoiled[index],)).poison()
        assert not family.check(case, 0, tuple(spoiled))[0], f"output {index} of {output.dtype} left unwritten"


def test_error_of() -> None:
    x = torch.tensor([1.0, 2.0])
    assert _common.error_of(x, x) == pytest.approx(0, abs=1e-15)
    assert _common.error_of(2 * x, x) == pytest.approx(1 - 2 * 10 / 25)
    assert math.isnan(_common.error_of(x * torch.nan, x))
    assert _common.verdict(math.nan, 1.0) == (False, {"error": pytest.approx(math.nan, nan_ok=True)})
    assert not _common.verdict(0.0, 1.0, finite=False)[0]


@pytest.mark.parametrize("ue8m0", [False, True])
def test_quantise_groups_is_the_plugins(ue8m0: bool) -> None:
    x = torch.randn(7, 384) * torch.exp2(torch.randint(-20, 20, (7, 1)))
    x[3] = 448.0  # a scale that is a power of two already
    q, scale = _common.quantise_groups(x, ue8m0)
    expected = per_token_group_quant(x, 128, ue8m0=ue8m0)
    assert torch.equal(q.view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(scale, expected[1])


def test_dequantise_and_unpack() -> None:
    q = torch.arange(1, 1 + 3 * 256).view(3, 256).remainder(16).to(torch.float8_e4m3fn)
    scale = torch.tensor([[2.0, 0.5], [4.0, 8.0]])
    wide = _common.dequantise(q, scale, (2, 128))
    for row, column in ((0, 0), (1, 127), (1, 128), (2, 5), (2, 255)):
        assert wide[row, column] == float(q[row, column]) * float(scale[row // 2, column // 128])
    x = torch.randn(5, 640)
    packed = per_token_group_quant(x, layout=ScaleLayout.PACKED_UE8M0)[1]
    plain = per_token_group_quant(x, ue8m0=True)[1]
    assert torch.equal(_common.unpack_scale(packed, 5), plain.double())


def test_returned_outputs_are_poisoned_once() -> None:
    calls = []
    run = _common.Returned(lambda: calls.append(1) or torch.ones(4))
    run.poison()
    assert run.outputs == () and len(calls) == 1
    run.call()
    assert torch.equal(run.outputs[0], torch.ones(4))
    pair = _common.Returned(lambda: (torch.ones(2), torch.zeros(2)))
    pair.call()
    assert len(pair.outputs) == 2


def test_an_updated_input_is_not_poisoned() -> None:
    q, residual = torch.ones(2), torch.ones(2)
    _common.Updating(lambda: None, (q, residual), num_poisoned=1).poison()
    assert q.isnan().all() and residual.eq(1).all()


@pytest.mark.parametrize("case", [c for c in SMALL["rms_norm_quant"] if "per_" not in str(c)][:3], ids=str)
def test_a_replayed_residual_stays_finite(case: RmsNormQuantCase) -> None:
    family = FAMILIES["rms_norm_quant"]
    run = family.IMPLEMENTATIONS["inductor"](case, 0)
    for _ in range(2000):
        run.call()
    assert all(output.float().isfinite().all() for output in run.outputs)
    assert all(output.float().abs().max() < 1e5 for output in run.outputs)


# --- naive results: element by element, or by the plugin's own references


def _naive_token_quant(family: ModuleType, case: TokenQuantCase) -> tuple[torch.Tensor, ...]:
    x = family._input(case, 0).tolist()
    if case.static:
        return (torch.tensor([[v / family.STATIC_SCALE for v in row] for row in x]).to(case.dtype),)
    qmax = 127 if case.dtype == torch.int8 else 448
    scales = [max(abs(v) for v in row) / qmax for row in x]
    values = torch.tensor([[v / s for v in row] for row, s in zip(x, scales, strict=True)])
    return (values.round() if qmax == 127 else values).to(case.dtype), torch.tensor(scales).unsqueeze(1)


def _naive_silu_quant(family: ModuleType, case: SiluQuantCase) -> tuple[torch.Tensor, ...]:
    x, half = family._input(case, 0).tolist(), case.intermediate_size
    hidden = [[row[i] / (1 + math.exp(-row[i])) * row[half + i] for i in range(half)] for row in x]
    if case.kind == "token":
        return per_token_quant(torch.tensor(hidden))[:2]
    if case.kind == "tensor":
        return (torch.tensor([[v / family.STATIC_SCALE for v in row] for row in hidden]).to(torch.float8_e4m3fn),)
    return per_token_group_quant(torch.tensor(hidden), layout=case.layout)


def _naive_masked_silu_quant(family: ModuleType, case: MaskedSiluQuantCase) -> tuple[torch.Tensor, ...]:
    x, counts, q, scale = family._tensors(case, 0)
    for expert, count in enumerate(counts.tolist()):
        for row in range(count):
            gate, up = x[expert, row].double().chunk(2)
            hidden = (gate / (1 + torch.exp(-gate)) * up).float().unsqueeze(0)
            layout = ScaleLayout.PACKED_UE8M0 if case.packed else ScaleLayout.ROW
            one, one_scale = per_token_group_quant(hidden, layout=layout)
            q.view(torch.uint8)[expert, row], scale[expert, row] = one.view(torch.uint8)[0], one_scale[0]
    return q, scale


def _naive_rms_norm_quant(family: ModuleType, case: RmsNormQuantCase) -> tuple[torch.Tensor, ...]:
    x, residual, weight = (tensor.tolist() for tensor in family._inputs(case, 0))
    if case.residual:
        x = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(x, residual, strict=True)]
    normed = []
    for row in x:
        rms = math.sqrt(sum(v * v for v in row) / len(row) + 1e-6)
        normed.append([v / rms * w for v, w in zip(row, weight, strict=True)])
    if case.kind == "token":
        quantised = per_token_quant(torch.tensor(normed))[:2]
    elif case.kind == "nvfp4_swizzled":
        quantised = nvfp4_quant(torch.tensor(normed), family._global_scale(), True)
    else:
        quantised = per_token_group_quant(torch.tensor(normed), layout=case.layout)
    return (*quantised, torch.tensor(x).bfloat16()) if case.residual else quantised


def _naive_nvfp4(x: list[float], global_scale: float) -> tuple[list[int], list[float]]:
    """Bytes of one row, and its scales."""
    numbers, found, scales = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), [], []
    for first in range(0, len(x), 16):
        group = x[first : first + 16]
        scale = torch.tensor(global_scale * max(map(abs, group)) / 6).clamp(max=448).to(torch.float8_e4m3fn).item()
        scales.append(scale)
        for v in group:
            y = abs(v) * global_scale / scale
            found.append(min(range(8), key=lambda n: (abs(numbers[n] - y), n % 2)) + (8 if v < 0 else 0))
    return [a + 16 * b for a, b in zip(found[::2], found[1::2], strict=True)], scales


def _naive_nvfp4_quant(family: ModuleType, case: Nvfp4QuantCase) -> tuple[torch.Tensor, ...]:
    x, global_scale, q, scale = family._tensors(case, 0)
    scale.view(torch.uint8).zero_()
    for m, row in enumerate(x.tolist()):
        half = case.hidden_size
        hidden = [row[i] / (1 + math.exp(-row[i])) * row[half + i] for i in range(half)] if case.silu_and_mul else row
        packed, scales = _naive_nvfp4(hidden, global_scale.item())
        q[m] = torch.tensor(packed)
        for g, value in enumerate(scales):
            if case.swizzled:
                scale.view(-1)[g // 4 * 512 + m * 16 + g % 4] = value
            else:
                scale[m, g] = value
    return q, scale


def _naive_nvfp4_experts_quant(family: ModuleType, case: Nvfp4ExpertsQuantCase) -> tuple[torch.Tensor, ...]:
    x, global_scale, expert_offsets, scale_offsets, q, scale = family._tensors(case, 0)
    rows, half = expert_offsets.tolist(), case.hidden_size
    for e in range(case.num_experts):
        for m in range(rows[e], rows[e + 1]):
            row = x[m].tolist()
            if case.silu_and_mul:
                row = [row[i] / (1 + math.exp(-row[i])) * row[half + i] for i in range(half)]
            packed, scales = _naive_nvfp4(row, global_scale[e].item())
            q[m] = torch.tensor(packed)
            first = int(scale_offsets[e]) * scale.shape[1] + (m - rows[e]) * 16
            for g, value in enumerate(scales):
                scale.view(-1)[first + g // 4 * 512 + g % 4] = value
    return q, scale


def _naive_kv_cache(family: ModuleType, case: KvCacheCase) -> tuple[torch.Tensor, ...]:
    first, second, slots = family._inputs(case, 0)
    cache = family._cache(case)
    cache.view(torch.uint8).fill_(0xFF)
    for token, slot in enumerate(slots.tolist()):
        value = torch.cat([first[token], second[token]], dim=-1)
        if case.fp8:
            value = (value.float() / 0.5).to(torch.float8_e4m3fn).view(torch.uint8)
        cache[slot // 16, slot % 16] = value
    return (cache,)


def _naive_bf16_gemm(family: ModuleType, case: GemmCase) -> tuple[torch.Tensor, ...]:
    x, weight = (tensor.tolist() for tensor in family._operands(case, 0))
    return (torch.tensor([[sum(map(operator.mul, a, b)) for b in weight] for a in x]).bfloat16(),)


def _naive_fp8_tensor_gemm(family: ModuleType, case: GemmCase) -> tuple[torch.Tensor, ...]:
    x, weight, x_scale, weight_scale = family._operands(case, 0)
    return ((x.float() @ weight.float().t() * x_scale * weight_scale).bfloat16(),)


def _naive_fp8_block_gemm(family: ModuleType, case: GemmCase) -> tuple[torch.Tensor, ...]:
    return (fp8_block_scaled_mm(*family._operands(case, 0)),)


def _naive_fp8_block_linear(family: ModuleType, case: GemmCase) -> tuple[torch.Tensor, ...]:
    x, weight, scale = family._operands(case, 0)
    return (fp8_block_scaled_mm(*per_token_group_quant(x, ue8m0=True), weight, scale),)


def _naive_fp8_linear(family: ModuleType, case: GemmCase) -> tuple[torch.Tensor, ...]:
    x, weight, x_scale, weight_scale = family._operands(case, 0)
    return ((per_tensor_quant(x, x_scale).float() @ weight.float().t() * x_scale * weight_scale).bfloat16(),)


def _naive_int8_linear(family: ModuleType, case: GemmCase) -> tuple[torch.Tensor, ...]:
    x, weight, scale = family._operands(case, 0)
    q, x_scale, _ = per_token_quant(x, torch.int8)
    product = torch.tensor([[sum(map(operator.mul, a, b)) for b in weight.tolist()] for a in q.tolist()])
    return ((product * x_scale * scale.t()).bfloat16(),)


def _naive_fused_linear(family: ModuleType, case: FusedLinearCase) -> tuple[torch.Tensor, ...]:
    x, residual, norm_weight, weight, weight_scale, x_scale = family._operands(case, 0)
    q, scale, *_ = family.compose(case.before, case.per_token, x, residual, norm_weight, x_scale)
    return ((q.float() @ weight.float().t() * scale * weight_scale).bfloat16(),)


def _naive_nvfp4_linear(family: ModuleType, case: GemmCase) -> tuple[torch.Tensor, ...]:
    x, weight, scale, global_scale = family._operands(case, 0)
    return ((x.float() @ nvfp4_dequant(weight, scale, 1 / global_scale).t()).bfloat16(),)


def _naive_moe_align(family: ModuleType, case: MoeAlignCase) -> tuple[torch.Tensor, ...]:
    ids = family._ids(case, 0).flatten().tolist()
    sorted_ids, experts = [], []
    for expert in range(case.num_experts):
        mine = [i for i, chosen in reversed(list(enumerate(ids))) if chosen == expert]
        while len(mine) % case.block_size:
            mine.append(len(ids))
        sorted_ids += mine
        experts += [expert] * (len(mine) // case.block_size)
    outputs = family._outputs(case)
    for output, values in zip(outputs, (sorted_ids, experts, [len(sorted_ids)]), strict=True):
        output.fill_(-7)
        output[: len(values)] = torch.tensor(values)
    return outputs


def _naive_topk(family: ModuleType, case: TopKCase) -> tuple[torch.Tensor, ...]:
    logits, bias = (tensor.tolist() for tensor in family._inputs(case, 0))
    all_weights, all_ids = [], []
    for row in logits:
        if case.grouped:
            scores = [1 / (1 + math.exp(-v)) for v in row]
            choice = [s + b for s, b in zip(scores, bias, strict=True)]
            size = case.num_experts // case.num_groups
            best = sorted(range(case.num_groups), key=lambda g: -sum(sorted(choice[g * size : (g + 1) * size])[-2:]))
            open_to = [e for e in range(case.num_experts) if e // size in best[: case.num_groups_kept]]
        else:
            scores, choice, open_to = [math.exp(v) for v in row], row, list(range(case.num_experts))
        ids = sorted(open_to, key=lambda e: -choice[e])[:8]
        factor = (2.5 if case.grouped else 1.0) / sum(scores[e] for e in ids)
        all_weights.append([scores[e] * factor for e in ids])
        all_ids.append(ids)
    return torch.tensor(all_weights), torch.tensor(all_ids, dtype=torch.int32)


def _naive_router(family: ModuleType, case: RouterCase) -> tuple[torch.Tensor, ...]:
    x, weight, bias = family._inputs(case, 0)
    logits = (x.double() @ weight.double().t()).float()
    selection = family.topk_family.selection(family._top_k_case(case))
    return logits, *select_experts(logits, selection, bias)


def _naive_moe_sum(family: ModuleType, case: MoeSumCase) -> tuple[torch.Tensor, ...]:
    x = family._input(case, 0).tolist()
    return (torch.tensor([[sum(column) for column in zip(*token, strict=True)] for token in x]).bfloat16(),)


def _naive_fused_experts(family: ModuleType, case: FusedExpertsCase) -> tuple[torch.Tensor, ...]:
    if case.format == "fp8_block":
        return (fp8_block_scaled_moe(*family._operands(case, 0)),)
    format = ExpertFormat[case.format.split("-")[0].upper()]
    more = family._given(case) | family._gated(case, 0)
    return (few_tokens_moe(*family._operands(case, 0), format=format, **more),)


NAIVE = {op: globals()[f"_naive_{op}"] for op in SMALL if op != "group_quant"}
