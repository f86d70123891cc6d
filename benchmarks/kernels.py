"""Time every implementation of an op, side by side: python -m benchmarks.kernels [op ...] [--out FILE]."""

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.families import Missing, group_quant
from benchmarks.timing import HOT_SETS, capture, num_sets, time_graphs

FAMILIES: dict[str, ModuleType] = {group_quant.OP: group_quant}
COPY_BYTES = 1 << 30


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(FAMILIES)}; all when left out")
    parser.add_argument("--out", help="write JSON lines to this file")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    arguments = parser.parse_args()
    unknown = set(arguments.ops) - set(FAMILIES)
    if unknown:
        parser.error(f"unknown op {', '.join(sorted(unknown))}; known: {', '.join(FAMILIES)}")
    if not torch.cuda.is_available():
        print("no CUDA GPU: kernels are timed on one", file=sys.stderr)
        return 2
    env = environment() | {"copy_gbs": round(copy_gbs(), 1)}
    lines = [{"env": env}]
    print(json.dumps(env, indent=1))
    try:
        for op in arguments.ops or FAMILIES:
            for case in FAMILIES[op].cases():
                if arguments.only in str(case):
                    for row in run_case(FAMILIES[op], case, env["copy_gbs"]):
                        lines.append(row)
                        print(show(row), flush=True)
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept", file=sys.stderr)
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return 0 if all(row.get("correct", True) for row in lines[1:]) else 1


def run_case(family: ModuleType, case: Any, ceiling_gbs: float) -> Iterator[dict[str, Any]]:
    """One row for each implementation, the missing and the wrong ones included."""
    base = {"op": family.OP, "case": str(case), **family.record(case)}
    sets = num_sets(base["bytes"])
    base["l2"] = "hot" if sets == HOT_SETS else "cold"
    rows: list[dict[str, Any]] = []
    graphs, runs = {}, {}
    for name, make in family.IMPLEMENTATIONS.items():
        row = {**base, "impl": name}
        rows.append(row)
        try:
            runs[name] = [make(case, seed) for seed in range(sets)]
        except Missing as reason:
            row["missing"] = str(reason)
            continue
        runs[name][0].poison()
        runs[name][0].call()
        row["correct"], details = family.check(case, 0, runs[name][0].outputs)
        row |= details
        if row["correct"]:
            graphs[name] = capture([run.call for run in runs[name]])
    timings = time_graphs(graphs, sets)
    for row in rows:
        if timing := timings.get(row["impl"]):
            peers = {name: t.us for name, t in timings.items() if name != row["impl"]}
            best_peer = min(peers, key=peers.__getitem__, default=None)
            gbs = base["bytes"] / timing.us / 1e3
            row |= {"us": round(timing.us, 3), "us_spread": round(timing.us_spread, 3), "gbs": round(gbs, 1)}
            row |= {"share_of_ceiling": round(gbs / ceiling_gbs, 3), "best_peer": best_peer}
            row["ratio_to_best_peer"] = round(peers[best_peer] / timing.us, 3) if best_peer else None
        yield row
    del graphs, runs
    gc.collect()
    torch.cuda.empty_cache()


def copy_gbs() -> float:
    """Bytes read and written per second by PyTorch's elementwise kernel (negation of 1 GiB of fp32): the ceiling."""
    source = torch.empty(COPY_BYTES // 4, device="cuda").normal_()
    target = torch.empty_like(source)
    timing = time_graphs({"copy": capture([lambda: torch.neg(source, out=target)] * 4)}, 4)["copy"]
    return 2 * COPY_BYTES / timing.us / 1e3


def show(row: dict[str, Any]) -> str:
    head = f"{row['op']} {row['case']:44s} {row['impl']:12s}"
    if "missing" in row:
        return f"{head} missing: {row['missing']}"
    if not row["correct"]:
        return f"{head} \033[31mWRONG, not timed: error {row['error']:.2e}\033[0m"
    ratio = f"{row['ratio_to_best_peer']:.2f}x of {row['best_peer']}" if row["best_peer"] else ""
    return (
        f"{head} {row['us']:9.2f} us +-{row['us_spread']:5.2f} {row['gbs']:7.0f} GB/s {row['share_of_ceiling']:5.0%} "
        f"{'exact' if row['bit_exact'] else 'close'} {ratio}"
    )


if __name__ == "__main__":
    sys.exit(main())
