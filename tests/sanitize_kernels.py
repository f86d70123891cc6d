"""Runs every kernel of ours at small sizes, for compute-sanitizer:

    python tests/sanitize_kernels.py [parts part [family ...]]

Compares nothing, which would run kernels that are not ours; inputs come from the CPU. The lists of cases are dealt out
to `parts` parts, of which one is run, of the families named or of all. Prints the number of calls of each family. See
sanitize.sh.
"""

import sys
import time
from collections.abc import Callable, Iterator

import torch
from every_op import STEPS, Model, run
from test_cache import CASES as CACHES
from test_cache import inputs as cache_inputs
from test_cache import write as write_cache
from test_chains import inputs as chain_inputs
from test_gated_quant import CASES as GATED
from test_gated_quant import MASKED
from test_gated_quant import quantise as gated_quantise
from test_moe_align import SIZES, half_map, routing
from test_moe_experts import CASES as EXPERTS
from test_moe_experts import make as make_experts
from test_moe_experts import run as run_experts
from test_mx_quant import OPS as MX_OPS
from test_mx_quant import SHAPES as MX_SHAPES
from test_mx_quant import make_input as mx_input
from test_norm_quant import CASES as NORMS
from test_norm_quant import quantise as norm_quantise
from test_nvfp4_gemm import CASES as NVFP4_GEMMS
from test_nvfp4_gemm import CONFIGS as NVFP4_CONFIGS
from test_nvfp4_gemm import operands as nvfp4_operands
from test_nvfp4_quant import CASES as NVFP4
from test_nvfp4_quant import EXPERTS as NVFP4_EXPERTS
from test_nvfp4_quant import experts_quantise
from test_nvfp4_quant import quantise as nvfp4_quantise
from test_quant import CASES as GROUPS
from test_quant import quantise as group_quantise
from test_router import operands as gate_operands
from test_small_m_gemm import CASES as GEMMS
from test_small_m_gemm import CONFIGS, STREAMS
from test_small_m_gemm import call as call_gemm
from test_small_m_gemm import operands as gemm_operands
from test_token_quant import CASES as TOKENS
from test_token_quant import quantise as token_quantise
from test_topk import CASES as SELECTIONS

from vllm_b200_plugin.ops.gated_quant import masked_silu_group_quant
from vllm_b200_plugin.ops.moe_align import batched_moe_align_block_size, moe_align_block_size
from vllm_b200_plugin.ops.moe_sum import moe_sum
from vllm_b200_plugin.ops.nvfp4_gemm import nvfp4_linear
from vllm_b200_plugin.ops.quant import ScaleLayout, empty_scale, per_token_group_quant
from vllm_b200_plugin.ops.router import router, router_gate, split_router
from vllm_b200_plugin.ops.topk import Scoring, Selection, select_experts

SMALL = 1 << 19  # elements of an input
Call = Callable[[], object]


def quant() -> Iterator[Call]:
    for case in GROUPS:
        x = case.make_input("cpu")
        if x.numel() < SMALL and x.is_contiguous():
            yield lambda case=case, x=x: group_quantise(x.cuda(), case)


def token_quant() -> Iterator[Call]:
    for case in TOKENS:
        if case.num_tokens * case.hidden_size < SMALL:
            x = torch.nn.functional.pad(case.make_input("cpu"), (0, case.columns_right))
            yield lambda case=case, x=x: token_quantise(x.cuda()[:, : case.hidden_size], case)


def gated() -> Iterator[Call]:
    for case in GATED:
        if case.num_tokens * case.intermediate_size < SMALL:
            yield lambda case=case: gated_quantise(case.make_input("cpu").cuda(), case)


def masked() -> Iterator[Call]:
    for case in MASKED:
        shape = (case.num_experts, case.max_tokens, 2 * case.intermediate_size)
        x, counts = torch.randn(shape).bfloat16(), case.make_counts()

        def call(case=case, x=x, counts=counts) -> None:
            q = torch.empty(*x.shape[:2], case.intermediate_size, dtype=torch.float8_e4m3fn, device="cuda")
            scale = empty_scale(q, 128, ScaleLayout.PACKED_UE8M0 if case.packed else ScaleLayout.COLUMN)
            masked_silu_group_quant(x.cuda(), counts.cuda(), q, scale, ue8m0=case.packed)

        yield call


def norm() -> Iterator[Call]:
    for case in NORMS:
        if case.num_tokens * case.hidden_size < SMALL:
            tensors = case.make_inputs("cpu")
            yield lambda case=case, tensors=tensors: norm_quantise(
                *(None if t is None else t.cuda() for t in tensors), case, True
            )


def cache() -> Iterator[Call]:
    for case in CACHES:
        if case.num_tokens < 1000 and case.block_size < 100:
            yield lambda case=case: write_cache(case, cache_inputs(case, "cuda"), True)


def topk() -> Iterator[Call]:
    for case in SELECTIONS:
        logits, bias = case.make_logits("cpu"), case.make_bias("cpu")
        yield lambda case=case, logits=logits, bias=bias: select_experts(
            logits.cuda(), case.selection, None if bias is None else bias.cuda()
        )


def routers() -> Iterator[Call]:
    for tokens in (1, 7, 16, 32):
        for experts, hidden in ((128, 512), (40, 104), (256, 1024)):
            x, weight = gate_operands("cpu", tokens, experts, hidden)
            yield lambda x=x, weight=weight: router_gate(x.cuda(), weight.cuda(), torch.bfloat16)
            yield lambda x=x, weight=weight: router(x.cuda(), weight.cuda(), Selection(8), pdl=True)
            yield lambda x=x, weight=weight: split_router(
                x.cuda(), weight.cuda(), Selection(8, Scoring.SIGMOID), pdl=True
            )
            if experts == 256:
                grouped = Selection(8, Scoring.TANH_SIGMOID, True, 2.5, 8, 4)
                yield lambda x=x, weight=weight, rule=grouped: split_router(x.cuda(), weight.cuda(), rule, pdl=True)


def moe_align() -> Iterator[Call]:
    for tokens, k, experts, block in [*SIZES, (1024, 8, 256, 16), (5001, 6, 160, 16)]:
        for kind in ("random", "some_missing"):
            ids, here = routing(tokens, k, experts, kind), half_map(experts, "cpu") if kind != "random" else None
            yield lambda ids=ids, here=here, e=experts, b=block: moe_align_block_size(
                ids.cuda(), e, b, None if here is None else here.cuda()
            )
    for batches, most, block in [(1, 1, 16), (5, 9, 4), (128, 100, 64), (1024, 33, 16)]:
        counts = torch.randint(most + 1, (batches,), dtype=torch.int32)
        yield lambda most=most, block=block, counts=counts: batched_moe_align_block_size(most, block, counts.cuda())


def moe_sums() -> Iterator[Call]:
    for shape in [(1, 8, 2048), (5, 3, 64), (100, 1, 256), (70, 2, 1000)]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = torch.randn(shape).to(dtype)
            yield lambda x=x: moe_sum(x.cuda())
            ids = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]) % 5 - 1
            yield lambda x=x, ids=ids: moe_sum(x.cuda(), ids.cuda())


def experts() -> Iterator[Call]:
    for case in EXPERTS:
        if case.num_experts * case.hidden_size * case.intermediate_size < 1 << 22:
            yield lambda case=case: run_experts(case, make_experts(case, "cuda"))


def gemm() -> Iterator[Call]:
    for i, case in enumerate(GEMMS):
        yield lambda case=case: call_gemm(case, gemm_operands(case, "cuda"), pdl=True)
        for config in CONFIGS[i % 25 :: 25]:
            yield lambda case=case, config=config: call_gemm(case, gemm_operands(case, "cuda"), config=config, pdl=True)


def streamed_gemm() -> Iterator[Call]:
    for i, case in enumerate(case for case in GEMMS if case.num_tokens <= 16 and case.kind != "fp16"):
        tensors = gemm_operands(case)
        if case.kind == "fp8_block":
            tensors["x"], tensors["x_scale"] = per_token_group_quant(tensors["x"])
        if case.k % 128:
            continue
        for config in STREAMS[i % 3 :: 3]:
            yield lambda case=case, tensors=tensors, config=config: call_gemm(
                case, {name: tensor.cuda() for name, tensor in tensors.items()}, config=config, pdl=True
            )


def fp4() -> Iterator[Call]:
    for case in NVFP4:
        x = case.make_input("cpu")
        if x.numel() < SMALL:
            yield lambda case=case, x=x: nvfp4_quantise(x.cuda(), case)
    for case in NVFP4_EXPERTS:
        yield lambda case=case: experts_quantise(case.make_input("cpu").cuda(), case)
    for op in MX_OPS:
        for rows, columns in MX_SHAPES:
            for swizzled in (False, True):
                x = mx_input(rows, columns)
                yield lambda op=op, x=x, swizzled=swizzled: op(x.cuda(), swizzled, pdl=True)
    for i, case in enumerate(NVFP4_GEMMS):
        for config in NVFP4_CONFIGS[i % 40 :: 40]:
            yield lambda case=case, config=config: nvfp4_linear(**nvfp4_operands(case, "cuda"), config=config, pdl=True)


def chain() -> Iterator[Call]:
    yield lambda: run(Model("cuda"), list(STEPS), chain_inputs("cuda")[0], True)


FAMILIES = {
    "chain of all": chain,
    "quant": quant,
    "token_quant": token_quant,
    "gated": gated,
    "masked": masked,
    "norm": norm,
    "cache": cache,
    "topk": topk,
    "router": routers,
    "moe_align": moe_align,
    "moe_sum": moe_sums,
    "moe_experts": experts,
    "small_m_gemm": gemm,
    "streamed_gemm": streamed_gemm,
    "fp4": fp4,
}


def main() -> None:
    parts, part = map(int, sys.argv[1:3] if len(sys.argv) > 1 else (1, 0))
    start = time.monotonic()
    for name in sys.argv[3:] or FAMILIES:
        calls = list(FAMILIES[name]())[part::parts]
        for call in calls:
            call()
        torch.cuda.synchronize()
        print(f"{name}: {len(calls)} calls, {time.monotonic() - start:.1f} s", flush=True)
    print("ran to the end")


if __name__ == "__main__":
    main()
