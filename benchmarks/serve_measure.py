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
        ratio = statistics.median(tpot[0]) / statistics.median(tpot[1])
        record.add({"model": model, "batch": batch, "tpot_ratio": round(ratio, 4), **_variant(other)})


def _side(model: str, batch: int, engine: Asked, tpot: list[float], ttft: list[float]) -> Line:
    median = statistics.median(tpot)
    line: Line = {
        "model": model,
        "batch": batch,
        "side": engine.variant.side,
        "features": list(engine.variant.features),
        "tpot_ms": round(median, 4),
        "tpot_spread": round(max(tpot) - min(tpot), 4),
        "ttft_ms": round(statistics.median(ttft), 3),
        "ttft_spread": round(max(ttft) - min(ttft), 3),
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


def ablation_table(lines: Iterable[Line]) -> str:
    """Stock's time per token over the variant's, by variant and batch; below 1 the features slow the model down."""
    ratios: dict[str, dict[int, float]] = {}
    for line in lines:
        if "tpot_ratio" in line and "variant" in line:
            ratios.setdefault(line["variant"], {})[line["batch"]] = line["tpot_ratio"]
    batches = sorted({batch for row in ratios.values() for batch in row})
    width = max(map(len, ["features", *ratios]))
    lines_ = [f"{'features':{width}s}" + "".join(f" {f'batch {batch}':>10s}" for batch in batches)]
    for variant, row in ratios.items():
        lines_.append(
            f"{variant:{width}s}" + "".join(f" {row[b]:10.4f}" if b in row else f" {'-':>10s}" for b in batches)
        )
    return "\n".join(["stock / plugin, time per output token", *lines_])
