"""What the memory's own counters say of one launch of ours: python -m benchmarks.counters [op ...] --only TEXT ...

Nsight Compute (`ncu`) runs each case once, with an empty L2, and reads the bytes that went from and to device memory.
What the kernel wrote last may still lie in the L2 when it ends, so small cases write less than they should.
"""

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks import families
from benchmarks.environment import environment
from benchmarks.kernels import FAMILIES, chosen_cases

METRICS = {
    "gpu__time_duration.sum": "ncu_ns",
    "dram__bytes_read.sum": "dram_bytes_read",
    "dram__bytes_write.sum": "dram_bytes_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent_of_peak",
}
NCU = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--print-units", "base"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counters", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(FAMILIES)}; all when left out")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="the cases whose name contains a TEXT")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="N", help="the cases with so many tokens")
    parser.add_argument("--out", metavar="FILE", help="write JSON lines: the environment, then one row a line")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)  # what runs below ncu
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.ops) - set(FAMILIES):
        parser.error(f"unknown op {', '.join(sorted(unknown))}")
    work = list(chosen_cases(arguments.ops, arguments.only, arguments.tokens))
    if arguments.launch:
        launch(work)
        return 0
    if shutil.which("ncu") is None or not torch.cuda.is_available():
        print("counters need a CUDA GPU and Nsight Compute's `ncu` on the PATH", file=sys.stderr)
        return 2
    options = sys.argv[1:] if argv is None else argv
    command = [*NCU, "--metrics", ",".join(METRICS), sys.executable, "-m", "benchmarks.counters", *options, "--launch"]
    done = subprocess.run(command, capture_output=True, text=True)
    launches = list(parse(done.stdout))
    if done.returncode or len(launches) != len(work):
        print(f"{len(launches)} launches of {len(work)} cases\n{done.stdout}{done.stderr}", file=sys.stderr)
        return 1
    with open(arguments.out, "w") if arguments.out else nullcontext(sys.stdout) as file:
        print(json.dumps({"env": environment()}), file=file)
        for (family, case), counted in zip(work, launches, strict=True):
            row = {"op": family.OP, "case": str(case), "impl": "ours", "bytes": family.record(case)["bytes"]} | counted
            moved = row["dram_bytes_read"] + row["dram_bytes_written"]
            row["dram_gbs"] = round(moved / row["ncu_ns"], 1)
            print(json.dumps(row), file=file, flush=True)
    return 0


def launch(work: list[Any]) -> None:
    """Every case once outside the profiler's range, which loads its kernel, and once inside."""
    families.device = torch.device("cuda")
    for family, case in work:
        runs = [family.IMPLEMENTATIONS["ours"](case, seed) for seed in range(2)]
        runs[1].call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        runs[0].call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def parse(output: str) -> Iterator[dict[str, Any]]:
    """One dictionary a launch, of ncu's CSV: a line for every metric of every launch, other output before it."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(lines):
        launch = launches.setdefault(line["ID"], {"kernel": _function(line["Kernel Name"])})
        launch[METRICS[line["Metric Name"]]] = float(line["Metric Value"].replace(",", ""))
    yield from launches.values()


def _function(signature: str) -> str:
    """The name alone of `void ns::<unnamed>::name<int>(Params)`."""
    return re.split(r"[<(]", signature.replace("<unnamed>", ""))[0].split("::")[-1].split(" ")[-1]


if __name__ == "__main__":
    sys.exit(main())
