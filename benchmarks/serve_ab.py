"""Decode time of one model shape with and without the plugin: python -m benchmarks.serve_ab MODEL_SHAPE.

Both engines hold the GPU at once, each in its own process and cache folder, and take turns: stock, plugin, stock,
plugin. Weights are dummies: the times are those of the shapes, the answers are noise. With --server PRESET, two
`vllm serve` and `vllm bench serve` instead.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks import serve_http, serve_variants
from benchmarks.environment import environment
from benchmarks.model_shapes import MODEL_SHAPES, shape, write_model
from benchmarks.model_size import describe
from benchmarks.serve_engine import Engine, EngineFailed, selection_lines
from benchmarks.serve_measure import (
    ABLATION_TABLES,
    Record,
    ablation_table,
    measure_pair,
    measure_prefill,
    not_applied,
    profile_pair,
)
from benchmarks.serve_options import check, engine_options, parse_arguments, profile_batches
from benchmarks.serve_variants import STOCK, Variant
from vllm_b200_plugin.environment import CannotRun


def main(argv: list[str] | None = None) -> int:
    """0 measured, 1 an engine failed, 2 it cannot run as asked, 130 interrupted; what was measured is in --out."""
    arguments = parse_arguments(argv, __doc__)
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        chosen = check(arguments)
        with tempfile.TemporaryDirectory(prefix="serve_ab_") as work, Record(arguments.out) as record:
            run(arguments, chosen, Path(work), record)
    except CannotRun as error:
        print(f"serve_ab: {error}", file=sys.stderr)
        return 2
    except EngineFailed as error:
        print(f"serve_ab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: what was measured is kept, the engines are stopped", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def run(arguments: argparse.Namespace, chosen: Variant, work: Path, record: Record) -> None:
    """Measure as asked, into `record`; `work` is a folder that is gone afterwards."""
    config = shape(arguments.model, arguments.layers)
    depth = describe(config, MODEL_SHAPES[arguments.model])
    if "cut" in depth:
        print(f"{arguments.model}: {depth['cut']}", flush=True)
    cache = work / "cache" if arguments.fresh_cache else Path(arguments.cache_dir).expanduser()
    # The logs outlive a failure, so they are not in `work`.
    logs = Path(arguments.log_dir or tempfile.mkdtemp(prefix="serve_ab_logs_"))
    logs.mkdir(parents=True, exist_ok=True)
    extra = {**depth, "device": arguments.device, "fresh_cache": arguments.fresh_cache}
    record.add({"env": environment() | extra}, shown=False)
    model = write_model(arguments.model, work, arguments.layers)
    if arguments.server:
        serve_http.run(arguments, chosen, model, config, cache, logs, record)
        return
    options = engine_options(arguments, config)
    with ExitStack() as stack:

        def start(variant: Variant) -> Engine:
            log = logs / f"{variant.name.replace(' ', '-')}.log"
            engine = Engine(variant, model, options, cache, log)
            stack.callback(engine.stop)
            return engine

        stock = start(STOCK)
        if arguments.feature_ablation:
            ablate(
                arguments,
                stock,
                serve_variants.ablation(chosen.features, arguments.feature_ablation == "both"),
                start,
                record,
            )
            return
        plugin = start(chosen)
        ready(stock, plugin)
        measure(arguments, stock, plugin, record)
        for batch in profile_batches(arguments):
            profile_pair(arguments.model, stock, plugin, batch, config["num_hidden_layers"], record)
        print("\n".join(selection_lines(plugin.log)))


def ablate(
    arguments: argparse.Namespace,
    stock: Engine,
    variants: list[Variant],
    start: Callable[[Variant], Engine],
    record: Record,
) -> None:
    """Each variant beside stock, --engines at once; those that are alike in all that applies here are measured once."""
    missing: set[str] = set()
    done: set[frozenset[str]] = {frozenset()}
    while variants:
        group = [start(variant) for variant in variants[: arguments.engines - 1]]
        variants = variants[len(group) :]
        ready(stock, *group)  # all, before any is timed
        for engine in group:
            missing |= not_applied(engine).keys()
            effective = frozenset(engine.variant.features) - missing
            if effective not in done:
                done.add(effective)
                engine.variant = replace(engine.variant, features=tuple(sorted(effective)))
                measure(arguments, stock, engine, record)
            engine.stop()
        variants = [variant for variant in variants if frozenset(variant.features) - missing not in done]
    if len(done) == 1:
        raise CannotRun("none of the features applies here; the notes above say why.")
    print("\n".join(f"\n{ablation_table(record.lines, *what)}" for what in ABLATION_TABLES))


def measure(arguments: argparse.Namespace, stock: Engine, other: Engine, record: Record) -> None:
    """Every batch and every prefill that was asked for."""
    rounds = arguments.rounds or 5
    measure_pair(arguments.model, stock, other, arguments.batch, rounds, record)
    measure_prefill(arguments.model, stock, other, arguments.prefill, rounds, record)


def ready(*engines: Engine) -> None:
    """Wait for all; raises EngineFailed where one has ended or was to load the plugin and has not."""
    for engine in engines:
        engine.wait_ready()
        if engine.variant.side == "plugin" and not engine.ready["plugin"]:
            raise EngineFailed(f"vLLM did not load the plugin; log {engine.log}")
        for name, reason in not_applied(engine).items():
            print(f"note: {name} is not applied: {reason}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
