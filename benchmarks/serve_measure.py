"""Two engines take turns: decode times of the one against the other, as lines of a record."""

import json
import statistics
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from benchmarks import serve_profile
from benchmarks.serve_variants import Variant

Line = dict[str, Any]


class Asked(Protocol):
    """What is needed of a benchmarks.serve_engine.Engine."""

    variant: Variant
    ready: dict[str, Any]

    def ask(self, **command: Any) -> dict[str, Any]: ...


@dataclass
class Record:
    """JSON lines, each on disk as soon as it is known, so that an interrupted run keeps what it has."""

    path: str | None = None
    lines: list[Line] = field(default_factory=list)
    _file: TextIO | None = None

    def __enter__(self) -> "Record":
        with ExitStack() as stack:
            if self.path:
                self._file = stack.enter_context(Path(self.path).open("w"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, line: Line, *, shown: bool = True) -> None:
        self.lines.append(line)
        text = json.dumps(line)
        if self._file:
            self._file.write(text + "\n")
            self._file.flush()
        if shown:
            print(text, flush=True)


def measure_pair(model: str, stock: Asked, other: Asked, batches: Iterable[int], rounds: int, record: Record) -> None:
    """Lines of both sides and their ratio for each batch; in every round each engine has its turn."""
    engines = (stock, other)
    for batch in batches:
        tpot: list[list[float]] = [[], []]
        ttft: list[list[float]] = [[], []]
        for _ in range(rounds):
            for index, engine in enumerate(engines):
                answer = engine.ask(batch=batch, rounds=1)
                tpot[index] += answer["tpot_ms"]
                ttft[index] += answer["ttft_ms"]
        for engine, times, firsts in zip(engines, tpot, ttft, strict=True):
            record.add(_side(model, batch, engine, times, firsts))
        ratios = {
            name: round(statistics.median(times[0]) / statistics.median(times[1]), 4)
            for name, times in (("tpot_ratio", tpot), ("ttft_ratio", ttft))
        }
        record.add({"model": model, "batch": batch, **ratios, **_variant(other)})


def measure_prefill(
    model: str, stock: Asked, other: Asked, prefills: Iterable[int], rounds: int, record: Record
) -> None:
    """The same for the time to the first token of one prompt of so many tokens."""
    for tokens in prefills:
        times: list[list[float]] = [[], []]
        for _ in range(rounds):
            for index, engine in enumerate((stock, other)):
                times[index] += engine.ask(prefill=tokens)["ttft_ms"]
        for engine, firsts in zip((stock, other), times, strict=True):
            line = {"model": model, "prefill": tokens, "side": engine.variant.side}
            line |= {"features": list(engine.variant.features), **_first_token(firsts)}
            record.add(line | _variant(engine))
        ratio = round(statistics.median(times[0]) / statistics.median(times[1]), 4)
        record.add({"model": model, "prefill": tokens, "ttft_ratio": ratio, **_variant(other)})


def _first_token(times: list[float]) -> Line:
    spread = max(times) - min(times)
    return {
        "ttft_ms": round(statistics.median(times), 3),
        "ttft_least_ms": round(min(times), 3),
        "ttft_spread": round(spread, 3),
    }


def _side(model: str, batch: int, engine: Asked, tpot: list[float], ttft: list[float]) -> Line:
    median = statistics.median(tpot)
    line: Line = {
        "model": model,
        "batch": batch,
        "side": engine.variant.side,
        "features": list(engine.variant.features),
        "tpot_ms": round(median, 4),
        "tpot_spread": round(max(tpot) - min(tpot), 4),
        **_first_token(ttft),
        "tokens_per_s": round(batch / median * 1e3, 1),
        "startup_s": round(engine.ready["startup_s"], 1),
    }
    if missing := not_applied(engine):
        line["not_applied"] = missing
    return line | _variant(engine)


def _variant(engine: Asked) -> Line:
    """The name of an ablation's variant; what is not one needs none."""
    return {} if engine.variant.name == engine.variant.side else {"variant": engine.variant.name}


def not_applied(engine: Asked) -> dict[str, str]:
    """Features that are switched on and yet not in place -> why."""
    states = engine.ready.get("plugin", {})
    return {name: state for name, state in states.items() if state not in ("applied", "pending", "disabled")}


def profile_pair(model: str, stock: Asked, other: Asked, batch: int, num_layers: int, record: Record) -> None:
    """The kernels of one decode step on both sides: full names in the record, a table on the terminal."""
    profiles = {}
    for engine in (stock, other):
        side = engine.variant.side
        profiles[side] = engine.ask(profile=batch, steps=16)
        line = {"model": model, "side": side, "features": list(engine.variant.features), "layers": num_layers}
        record.add({**line, "profile": profiles[side]}, shown=False)
    print(
        f"\n{model}, batch {batch}: kernels of one decode step\n{serve_profile.table(profiles, num_layers)}", flush=True
    )


# Of what and by what ablation_table may go, and its title.
ABLATION_TABLES = (
    ("tpot_ratio", "batch", "time per output token"),
    ("ttft_ratio", "batch", "time to the first token"),
    ("ttft_ratio", "prefill", "time to the first token of one prompt"),
)


def ablation_table(
    lines: Iterable[Line], ratio: str = "tpot_ratio", by: str = "batch", title: str = "time per output token"
) -> str:
    """Stock's time over the variant's, by variant and batch or prefill; below 1 the features slow the model down."""
    ratios: dict[str, dict[int, float]] = {}
    for line in lines:
        if ratio in line and by in line and "variant" in line:
            ratios.setdefault(line["variant"], {})[line[by]] = line[ratio]
    sizes = sorted({size for row in ratios.values() for size in row})
    width = max(map(len, ["features", *ratios]))
    lines_ = [f"{'features':{width}s}" + "".join(f" {f'{by} {size}':>13s}" for size in sizes)]
    for variant, row in ratios.items():
        cells = (f" {row[size]:13.4f}" if size in row else f" {'-':>13s}" for size in sizes)
        lines_.append(f"{variant:{width}s}" + "".join(cells))
    return "\n".join([f"stock / plugin, {title}", *lines_])
