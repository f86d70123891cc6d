"""Time every implementation of an op, side by side: python -m benchmarks.kernels [op ...]."""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch

from benchmarks import families
from benchmarks.ceilings import measure_ceilings
from benchmarks.compare import explain_slower, read_record, slower
from benchmarks.environment import environment
from benchmarks.families import (
    bf16_gemm,
    fp8_block_gemm,
    fp8_block_linear,
    fp8_linear,
    fp8_tensor_gemm,
    fused_experts,
    fused_linear,
    group_quant,
    int8_linear,
    kv_cache,
    masked_silu_quant,
    moe_align,
    moe_sum,
    nvfp4_experts_quant,
    nvfp4_linear,
    nvfp4_quant,
    rms_norm_quant,
    router,
    silu_quant,
    token_quant,
    topk,
)
from benchmarks.report import write_report
from benchmarks.runner import run_case

FAMILIES: dict[str, ModuleType] = {
    family.OP: family
    for family in (
        group_quant,
        token_quant,
        silu_quant,
        masked_silu_quant,
        rms_norm_quant,
        nvfp4_quant,
        nvfp4_experts_quant,
        kv_cache,
        bf16_gemm,
        fp8_tensor_gemm,
        fp8_block_gemm,
        fp8_block_linear,
        fp8_linear,
        int8_linear,
        fused_linear,
        nvfp4_linear,
        moe_align,
        topk,
        router,
        moe_sum,
        fused_experts,
    )
}


def main(argv: list[str] | None = None) -> int:
    parser, arguments = parse_arguments(argv)
    known_peers = sorted({name for family in FAMILIES.values() for name in family.IMPLEMENTATIONS})
    for what, given, known in (("op", arguments.ops, list(FAMILIES)), ("peer", arguments.peers, known_peers)):
        if unknown := sorted(set(given or ()) - set(known)):
            parser.error(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU here: kernels are timed on one; --device cpu runs the references", file=sys.stderr)
        return 2
    families.device = torch.device(arguments.device)

    work = list(chosen_cases(arguments.ops, arguments.only, arguments.tokens))[: arguments.limit]
    if not work:
        names = "\n".join(f"  {family.OP} {case}" for family, case in chosen_cases(arguments.ops))
        parser.error(f"no case contains {' or '.join(map(repr, arguments.only))}; known:\n{names}")
    try:
        old = read_record(arguments.compare)[1] if arguments.compare else []
    except (OSError, ValueError) as error:
        parser.error(f"--compare: {error}")

    env = environment() | measure_ceilings()
    print(json.dumps(env, indent=1))
    rows: list[dict[str, Any]] = []
    with open(arguments.out, "w") if arguments.out else nullcontext() as file:

        def keep(line: dict[str, Any]) -> None:
            """On disk at once: a run that is cut short keeps what it has."""
            if file:
                print(json.dumps(line), file=file, flush=True)

        keep({"env": env})
        for row in measure(work, env["copy_gbs"], {*arguments.peers, "ours"} if arguments.peers else None):
            rows.append(row)
            keep(row)
    if arguments.report:
        write_report(arguments.report, [(env, rows)])
    regressions = slower(old, rows)
    if arguments.compare:
        print(explain_slower(regressions))
    wrong = [row for row in rows if not row.get("correct", True)]
    return 1 if regressions or wrong else 0


def chosen_cases(
    ops: Sequence[str], only: Sequence[str] = ("",), num_tokens: Sequence[int] | None = None
) -> Iterator[tuple[ModuleType, Any]]:
    """The cases of these families, or of all, whose name contains one of `only` and that have so many tokens."""
    for op in ops or FAMILIES:
        for case in FAMILIES[op].cases():
            if any(text in str(case) for text in only) and (not num_tokens or case.num_tokens in num_tokens):
                yield FAMILIES[op], case


def measure(work: list[tuple[ModuleType, Any]], ceiling_gbs: float, peers: set[str] | None) -> Iterator[dict[str, Any]]:
    try:
        for index, (family, case) in enumerate(work):
            progress(index, len(work), f"{family.OP} {case}")
            for row in run_case(family, case, ceiling_gbs, peers):
                yield row
                print(f"\r\033[K{show(row)}", flush=True)
    except KeyboardInterrupt:
        print("\ninterrupted: what was measured is kept", file=sys.stderr)
    progress(len(work), len(work), "")


def progress(done: int, total: int, what: str) -> None:
    if sys.stderr.isatty():
        width = 24
        bar = "#" * (width * done // total)
        text = f"[{bar:{width}}] {done}/{total} {what}"
        print(
            f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}",
            end="\n" if done == total else "",
            file=sys.stderr,
        )


def show(row: dict[str, Any]) -> str:
    head = f"{row['op']:16s} {row['case']:44s} {row['impl']:14s}"
    if "missing" in row:
        return f"{head} missing: {row['missing']}"
    if not row["correct"]:
        why = ", ".join(f"{key} {row[key]}" for key in ("error", "bit_exact") if key in row)
        return f"{head} \033[31mWRONG, not timed: {why}\033[0m"
    ratio = f"{row['ratio_to_best_peer']:.2f}x of {row['best_peer']}" if row["best_peer"] else ""
    chained = f"chained {row['us_chained']:6.2f}" if "us_chained" in row else " " * 14
    return (
        f"{head} {row['us']:9.2f} us +-{row['us_spread']:5.2f} {chained} {row['gbs']:7.0f} GB/s "
        f"{row['share_of_ceiling']:5.0%} {ratio}"
    )


def parse_arguments(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(FAMILIES)}; all when left out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the references, for tests")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="the cases whose name contains a TEXT")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="N", help="the cases with so many tokens")
    parser.add_argument("--limit", type=int, help="at most this many cases")
    parser.add_argument("--peers", nargs="+", metavar="IMPL", help="beside ours, only these implementations")
    parser.add_argument("--out", metavar="FILE", help="write JSON lines: the environment, then one row a line")
    parser.add_argument("--report", metavar="FILE", help="write one self-contained HTML page with plots")
    parser.add_argument("--compare", metavar="OLD", help="exit 1 when something is slower than in this record")
    return parser, parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
