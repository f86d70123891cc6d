"""Times ops/small_m_gemm.py, cut in every likely way, beside its peers, and makes the dispatch table from the records.

python -m benchmarks.tune measure fp8_block bf16 fp8 --out tune.jsonl
python -m benchmarks.tune table tune.jsonl
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.gemm import (
    BF16_SHAPES,
    FP8_BLOCK_SHAPES,
    FP8_TENSOR_SHAPES,
    INT8_SHAPES,
    NVFP4_SHAPES,
    GemmCase,
)
from benchmarks.ceilings import measure_ceilings
from benchmarks.compare import read_record
from benchmarks.environment import environment
from benchmarks.families import Missing, Run, bf16_gemm, fp8_block_linear, fp8_linear, int8_linear, nvfp4_linear
from benchmarks.families._common import Returned
from benchmarks.kernels import show
from benchmarks.runner import run_case
from benchmarks.timing import num_sets, record_calls
from vllm_b200_plugin import small_m_table
from vllm_b200_plugin.ops import nvfp4_gemm, small_m_gemm
from vllm_b200_plugin.ops.quant import ScaleLayout, per_token_group_quant
from vllm_b200_plugin.ops.small_m_gemm import Config

NUM_TOKENS = (1, 2, 4, 8, 16, 32)
MAX_WEIGHT_BYTES = 36 << 20  # beyond, libraries read most weights at the speed of memory: timed where --only names one
CLEARLY = 0.95  # of the best peer's time; what lies between is noise or another GPU's luck
TABLE = Path(__file__).parents[1] / "vllm_b200_plugin" / "small_m_table.py"
# kind -> family of its peers, shapes, bytes of an element
KINDS: dict[str, tuple[ModuleType, tuple[tuple[int, int], ...], float]] = {
    "fp8_block": (fp8_block_linear, FP8_BLOCK_SHAPES, 1),
    "bf16": (bf16_gemm, BF16_SHAPES, 2),
    "fp8": (fp8_linear, FP8_TENSOR_SHAPES, 1),
    "int8": (int8_linear, INT8_SHAPES, 1),
    "nvfp4": (nvfp4_linear, NVFP4_SHAPES, 0.5),
}


def likely_cuts(n: int, row_bytes: int, num_tokens: int, sms: int = 132) -> Iterator[Config]:
    """Few: the most warps up to 8 and up to 16 that share K evenly, for each tile and cluster that fills the GPU."""
    pieces = -(-row_bytes // 128)
    for row_tiles, cluster in product((1, 2, 4), (1, 2, 4)):
        blocks = -(-n // (16 * row_tiles)) * cluster
        if (row_tiles == 4 and (blocks < 2 * sms // 3 or num_tokens < 8)) or (cluster > 1 and blocks > 5 * sms):
            continue
        if blocks < 2 * sms // 5 and cluster < 4 and n > 1024:
            continue
        found = set()
        for most in (16, 8) if row_tiles * -(-num_tokens // 8) <= 4 else (8,):
            for warps in range(min(most, -(-pieces // cluster)), 1, -1):
                steps = -(-pieces // (warps * cluster))
                if pieces >= 0.9 * steps * warps * cluster and 16 * row_tiles * warps * steps * 128 <= 200 << 10:
                    found.add(warps)
                    break
        for warps in sorted(found):
            yield Config(row_tiles, warps, cluster, 0)
            if cluster == 1 and warps % 2 == 0:
                yield Config(row_tiles, warps, cluster, 2)


def stream_cuts(n: int, row_bytes: int, num_tokens: int, sms: int = 132) -> Iterator[Config]:
    """Of the kernel that streams the weight: every one that gives each multiprocessor rows and has room."""
    if row_bytes % small_m_gemm.STREAM_BYTES or num_tokens > small_m_gemm.MAX_STREAM_TOKENS or n < 8 * sms:
        return
    for row_tiles, warps, stages in product((1, 2, 4), (8, 16), (3, 4, 6)):
        token_tiles = -(-num_tokens // 8)
        room = stages * 16 * (2048 + 64) + 512 * warps * row_tiles * token_tiles <= 220 << 10
        fits = warps == 8 or row_tiles < 4
        if room and fits and (row_tiles == 1 or n > 8 * row_tiles * sms):
            yield Config(row_tiles, warps, 1, 0, stages)


def ours(kind: str, config: Config, quantise_first: bool) -> Callable[[GemmCase, int], Run]:
    def make(case: GemmCase, seed: int) -> Run:
        tensors = _operands(kind, case, seed)
        if kind == "fp8_block" and quantise_first:

            def call() -> torch.Tensor:
                x, weight, scale = tensors
                q, x_scale = per_token_group_quant(x, layout=ScaleLayout.COLUMN)
                return small_m_gemm.fp8_block_linear(q, weight, scale, x_scale, config=config, pdl=True)
        elif kind == "fp8_block":

            def call() -> torch.Tensor:
                return small_m_gemm.fp8_block_linear(*tensors, config=config, pdl=True)
        elif kind == "fp8":

            def call() -> torch.Tensor:
                return fp8_linear.linear(*tensors, config)
        elif kind == "int8":

            def call() -> torch.Tensor:
                return int8_linear.linear(*tensors, config)
        elif kind == "nvfp4":

            def call() -> torch.Tensor:
                return nvfp4_gemm.nvfp4_linear(*tensors, config=config, pdl=True)
        else:

            def call() -> torch.Tensor:
                return small_m_gemm.linear(*tensors, config=config, pdl=True)

        try:
            call()
        except RuntimeError as error:
            raise Missing(str(error).splitlines()[0]) from None
        return Returned(call)

    return make


@functools.lru_cache(maxsize=64)
def _operands(kind: str, case: GemmCase, seed: int) -> tuple[torch.Tensor, ...]:
    return KINDS[kind][0]._operands(case, seed)


def _name(config: Config, quantise_first: bool) -> str:
    fields = config if config.stages else config[:-1]
    return f"ours {'q ' if quantise_first else ''}{' '.join(map(str, fields))}"


def measure(
    kinds: list[str], only: list[str], tokens: list[int], names: set[str], most_cuts: int, ceiling_gbs: float
) -> Iterator[dict[str, Any]]:
    for kind in kinds:
        family, shapes, size = KINDS[kind]
        for n, k in shapes:
            if f"{n}x{k}" not in only if only else n * k * size > MAX_WEIGHT_BYTES:
                continue
            for num_tokens in tokens:
                yield from _measure_case(kind, family, GemmCase(num_tokens, n, k), size, names, most_cuts, ceiling_gbs)
                _operands.cache_clear()


def _measure_case(
    kind: str,
    family: ModuleType,
    case: GemmCase,
    size: float,
    names: set[str],
    most_cuts: int,
    ceiling_gbs: float,
) -> Iterator[dict[str, Any]]:
    peers = {name: make for name, make in family.IMPLEMENTATIONS.items() if not name.startswith("ours")}
    peers = {name: make for name, make in peers.items() if not names or name in names}
    cuts = list(likely_cuts(case.n, int(case.k * size), case.num_tokens))
    ways = {"fp8_block": [True] if case.num_tokens > 8 else [False, True]}.get(kind, [kind in ("fp8", "int8")])
    variants = {_name(cut, way): ours(kind, cut, way) for way in ways for cut in cuts}
    if kind != "nvfp4":
        streams = stream_cuts(case.n, int(case.k * size), case.num_tokens)
        variants |= {_name(cut, ways[-1]): ours(kind, cut, ways[-1]) for cut in streams}
    one = SimpleNamespace(OP=family.OP, record=family.record, check=family.check)
    if len(variants) > most_cuts:  # all of them, briefly; then the best ones beside the peers
        one.IMPLEMENTATIONS = variants
        brief = sorted(_briefly(variants, case), key=lambda pair: pair[1])
        variants = {name: variants[name] for name, _ in brief[:most_cuts]}
    one.IMPLEMENTATIONS = peers | variants
    for row in run_case(one, case, ceiling_gbs):
        yield row | {"kind": kind}


def _briefly(variants: dict[str, Callable[[GemmCase, int], Run]], case: GemmCase) -> Iterator[tuple[str, float]]:
    """Time of each variant that takes the case, from a few replays behind a kernel that lets none start early."""
    weight_bytes = case.n * case.k
    sets = num_sets(weight_bytes)
    source = torch.zeros(case.num_tokens * case.k, dtype=torch.bfloat16, device=families.device)
    target = torch.empty_like(source)
    for name, make in variants.items():
        try:
            calls = [make(case, seed).call for seed in range(sets)]
        except Missing:
            continue
        chained = record_calls([step for call in calls for step in (lambda: target.copy_(source), call)], per=2)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        chained.replay()
        start.record()
        for _ in range(5):
            chained.replay()
        end.record()
        end.synchronize()
        yield name, start.elapsed_time(end)


def make_table(records: list[Path]) -> str:
    """The source of vllm_b200_plugin/small_m_table.py. Ours is taken where it clearly beats every peer; shapes that are
    in none of the records keep their rows."""
    table: dict[Any, dict[Any, Any]] = {key: dict(shapes) for key, shapes in small_m_table.TABLE.items()}
    for record in records:
        env, rows = read_record(record)
        capability = tuple(env["capability"])
        for kind in sorted({row["kind"] for row in rows}):
            shapes = table.setdefault((capability, kind), {})
            for shape in sorted({(row["n"], row["k"]) for row in rows if row["kind"] == kind}):
                of_shape = [row for row in rows if row["kind"] == kind and (row["n"], row["k"]) == shape]
                shapes[shape] = _thresholds(of_shape)
    lines = [
        TABLE.read_text().split("TABLE: ")[0]
        + "TABLE: dict[tuple[tuple[int, int], str], dict[tuple[int, int], Rows]] = {"
    ]
    for key, shapes in sorted(table.items()):
        lines.append(f"    {key!r}: {{".replace("'", '"'))
        for shape, thresholds in sorted(shapes.items()):
            rows = "".join(f"\n            {row!r}," for row in thresholds)
            lines.append(f"        {shape!r}: ({rows}\n        )," if rows else f"        {shape!r}: (),")
        lines.append("    },")
    return "\n".join([*lines, "}"]) + "\n"


def _thresholds(rows: list[dict[str, Any]]) -> list[tuple[int, Any, bool]]:
    thresholds: list[tuple[int, Any, bool]] = []
    for num_tokens in sorted({row["m"] for row in rows}):
        timed = [row for row in rows if row["m"] == num_tokens and "us_chained" in row]
        peers = [row for row in timed if not row["impl"].startswith("ours")]
        mine = [row for row in timed if row["impl"].startswith("ours")]
        if not peers:
            raise ValueError(f"no peer was timed for {rows[0]['case']}: a table from it would prove nothing")
        faster = [
            row for row in mine
            if row["us"] < CLEARLY * min(peer["us"] for peer in peers)
            and row["us_chained"] < CLEARLY * min(peer["us_chained"] for peer in peers)
        ]  # fmt: skip
        best = min(faster, key=lambda row: row["us_chained"], default=None)
        if best is None:
            entry: tuple[int, Any, bool] = (num_tokens, None, False)
        else:
            words = best["impl"].split()[1:]
            entry = (num_tokens, tuple(int(word) for word in words if word != "q"), words[0] == "q")
        if thresholds and thresholds[-1][1:] == entry[1:]:
            thresholds.pop()
        thresholds.append(entry)
    while thresholds and thresholds[-1][1] is None:
        thresholds.pop()
    return thresholds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="time every likely cut beside the peers")
    measuring.add_argument("kinds", nargs="+", choices=KINDS)
    measuring.add_argument("--only", nargs="+", default=[], metavar="NxK", help="these shapes, whatever their size")
    measuring.add_argument("--num-tokens", nargs="+", type=int, default=NUM_TOKENS, metavar="M")
    measuring.add_argument("--peers", nargs="+", default=[], metavar="IMPL", help="beside these implementations only")
    measuring.add_argument("--most-cuts", type=int, default=6, metavar="COUNT", help="of ours to time beside the peers")
    measuring.add_argument("--out", required=True, metavar="FILE", help="write JSON lines")
    tabling = commands.add_parser("table", help="make the dispatch table from records")
    tabling.add_argument("records", nargs="+", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.command == "table":
        TABLE.write_text(make_table(arguments.records))
        return 0
    if not torch.cuda.is_available():
        print("no CUDA GPU here", file=sys.stderr)
        return 2
    env = environment() | measure_ceilings() | {"capability": torch.cuda.get_device_capability()}
    with open(arguments.out, "w") as file:
        file.write(json.dumps({"env": env}) + "\n")
        cases = arguments.kinds, arguments.only, arguments.num_tokens
        for row in measure(*cases, set(arguments.peers), arguments.most_cuts, env["copy_gbs"]):
            file.write(json.dumps(row) + "\n")
            file.flush()
            if "missing" not in row:
                print(show(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
