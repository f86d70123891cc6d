"""Runs one case of a family: check every implementation, then time those that are right, in turns."""

import gc
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from benchmarks import families
from benchmarks.families import Missing, Run
from benchmarks.timing import HOT_SETS, Recording, num_sets, record_calls, time_recordings

CHAINED_MAX_TOKENS = 64  # decode batches
COPY = "copy"  # of as many bytes; no implementation has this name


def run_case(
    family: ModuleType, case: Any, ceiling_gbs: float, only: set[str] | None = None
) -> Iterator[dict[str, Any]]:
    """One row for each implementation, the missing and the wrong ones included."""
    base = {"op": family.OP, "case": str(case), **family.record(case)}
    sets = num_sets(base["bytes"])
    base["l2"] = "hot" if sets == HOT_SETS else "cold"
    rows: list[dict[str, Any]] = []
    recordings: dict[str, Recording] = {}
    runs: dict[str, list[Run]] = {}
    for name, make in family.IMPLEMENTATIONS.items():
        if only and name not in only:
            continue
        row = {**base, "impl": name}
        rows.append(row)
        try:
            runs[name] = [make(case, seed) for seed in range(sets)]
            runs[name][0].poison()
            runs[name][0].call()
            row["correct"], details = family.check(case, 0, runs[name][0].outputs)
            row |= details
            if row["correct"]:
                recordings[name] = record_calls([run.call for run in runs[name]])
        except Missing as reason:
            row["missing"] = str(reason)
        except torch.OutOfMemoryError:
            runs.pop(name, None)
            row["missing"] = f"out of memory: {sets} sets of {base['bytes'] / 1e9:.2f} GB"
        except Exception as error:
            if name.startswith("ours"):
                raise
            runs.pop(name, None)
            row["missing"] = f"raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    copy = {COPY: _copy(base["bytes"], sets)} if recordings and _moves_bytes_only(base) else {}
    timings = time_recordings(recordings | copy)
    us_copy = timings.pop(COPY).us if copy else None
    chained = _chained(base, runs, recordings) if (base["m"] or 0) <= CHAINED_MAX_TOKENS else {}
    for row in rows:
        if timing := timings.get(row["impl"]):
            row |= {"us": round(timing.us, 3), "us_spread": round(timing.us_spread, 3)}
            if row["impl"] in chained:
                row["us_chained"] = round(chained[row["impl"]], 3)
            peers = {name: t.us for name, t in timings.items() if _is_peer(name, row["impl"])}
            row |= _ratios(base, timing.us, peers, ceiling_gbs)
            if us_copy is not None:
                row["us_copy"] = round(us_copy, 3)
        yield row
    del recordings, runs
    gc.collect()
    if families.device.type == "cuda":
        torch.cuda.empty_cache()


def _moves_bytes_only(base: dict[str, Any]) -> bool:
    return families.device.type == "cuda" and not base.get("flops")


def _copy(num_bytes: int, sets: int) -> Recording:
    """An elementwise kernel that reads half as many bytes and writes as many: what this size allows a plain kernel."""
    elements = max(1, num_bytes // 8)
    pairs = [[torch.ones(elements, device=families.device) for _ in range(2)] for _ in range(sets)]
    return record_calls([lambda x=x, y=y: torch.neg(x, out=y) for x, y in pairs])


def _is_peer(name: str, of: str) -> bool:
    """Every other implementation; two launches of ours are none of each other."""
    return name != of and not (name.startswith("ours") and of.startswith("ours"))


def _ratios(base: dict[str, Any], us: float, peers: dict[str, float], ceiling_gbs: float) -> dict[str, Any]:
    best_peer = min(peers, key=peers.__getitem__, default=None)
    gbs = base["bytes"] / us / 1e3
    return {
        "gbs": round(gbs, 1),
        "tflops": round(base.get("flops", 0) / us / 1e6, 1),
        "share_of_ceiling": round(gbs / ceiling_gbs, 3),
        "best_peer": best_peer,
        "ratio_to_best_peer": round(peers[best_peer] / us, 3) if best_peer else None,
    }


def _chained(base: dict[str, Any], runs: dict[str, list[Run]], recordings: dict[str, Recording]) -> dict[str, float]:
    """Time that each implementation adds behind a producer that writes as much as the op's activations."""
    if families.device.type != "cuda" or not recordings:
        return {}
    source = torch.zeros(max(1, (base["m"] or 1) * (base["k"] or 1)), dtype=torch.bfloat16, device=families.device)
    target = torch.empty_like(source)

    def produce() -> None:
        target.copy_(source)

    chains = {"": record_calls([produce] * len(next(iter(runs.values()))))}
    for name in recordings:
        chains[name] = record_calls([call for run in runs[name] for call in (produce, run.call)], per=2)
    timings = time_recordings(chains)
    return {name: timings[name].us - timings[""].us for name in recordings}
