"""Decode time of one model shape with and without the plugin: python -m benchmarks.serve_ab MODEL_SHAPE.

Both engines hold the GPU at once, each in its own process and cache folder, and take turns: stock, plugin, stock,
plugin. Weights are dummies: the times are those of the shapes, the answers are noise.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.model_shapes import MODEL_SHAPES, write_model

SIDES = ("stock", "plugin")


class Engine:
    """A benchmarks.engine_worker process."""

    def __init__(self, side: str, model: Path, options: dict[str, Any], cache: Path, log: Path) -> None:
        self.side, self.log = side, log
        env = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CACHE_ROOT": str(cache / side),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if side == "stock":
            env["VLLM_PLUGINS"] = "none"
        read, write = os.pipe()
        command = [sys.executable, "-m", "benchmarks.engine_worker", str(write), str(model), json.dumps(options)]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, env=env, stdin=subprocess.PIPE, stdout=output, stderr=output, pass_fds=(write,), text=True
            )
        os.close(write)
        self.answers = os.fdopen(read)

    def answer(self) -> dict[str, Any]:
        line = self.answers.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
            raise SystemExit(f"the {self.side} engine ended, exit code {self.process.wait()}; log {self.log}:\n{tail}")
        return json.loads(line)

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def main() -> int:
    arguments = parse_arguments()
    work = Path(tempfile.mkdtemp(prefix="serve_ab_"))
    model = write_model(arguments.model, work, arguments.layers)
    cache = Path(arguments.cache_dir).expanduser()
    options = {
        "input_len": arguments.input_len,
        "max_model_len": 4096,
        "max_num_seqs": max(arguments.batch),
        "kv_cache_memory_bytes": 8 << 30,
        "compilation_config": {"cudagraph_capture_sizes": sorted(set(arguments.batch))},
    }
    logs = Path(arguments.log_dir or work)
    logs.mkdir(parents=True, exist_ok=True)
    engines = {side: Engine(side, model, dict(options), cache, logs / f"{side}.log") for side in SIDES}
    try:
        lines = measure(arguments, engines)
    finally:
        for engine in engines.values():
            engine.stop()
    print("\n".join(sorted(set(selection_lines(engines["plugin"].log)))))
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return 0


def measure(arguments: argparse.Namespace, engines: dict[str, Engine]) -> list[dict[str, Any]]:
    startup = {side: engine.answer()["startup_s"] for side, engine in engines.items()}
    lines: list[dict[str, Any]] = [{"env": environment() | {"layers": arguments.layers}}]
    for batch in arguments.batch:
        tpot: dict[str, list[float]] = {side: [] for side in SIDES}
        ttft: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(arguments.rounds):
            for side, engine in engines.items():
                answer = engine.ask(batch=batch, rounds=1)
                tpot[side] += answer["tpot_ms"]
                ttft[side] += answer["ttft_ms"]
        for side in SIDES:
            median = statistics.median(tpot[side])
            lines.append(
                {
                    "model": arguments.model,
                    "batch": batch,
                    "side": side,
                    "features": os.environ.get("VLLM_B200_DISABLE", "") and "not " + os.environ["VLLM_B200_DISABLE"],
                    "tpot_ms": round(median, 4),
                    "tpot_spread": round(max(tpot[side]) - min(tpot[side]), 4),
                    "ttft_ms": round(statistics.median(ttft[side]), 3),
                    "tokens_per_s": round(batch / median * 1e3, 1),
                    "startup_s": round(startup[side], 1),
                }
            )
            print(json.dumps(lines[-1]), flush=True)
        ratio = statistics.median(tpot["stock"]) / statistics.median(tpot["plugin"])
        lines.append({"model": arguments.model, "batch": batch, "tpot_ratio": round(ratio, 4)})
        print(json.dumps(lines[-1]), flush=True)
    for batch in arguments.profile:
        for side, engine in engines.items():
            profile = engine.ask(profile=batch, steps=16)
            lines.append({"model": arguments.model, "side": side, "profile": profile})
            print(f"\n{arguments.model}, {side}, batch {batch}: kernels of one decode step")
            for kernel in profile["kernels"][:30]:
                print(f"  {kernel['us']:9.1f} us {kernel['launches']:6.1f} launches  {kernel['kernel'][:100]}")
    return lines


def selection_lines(log: Path) -> list[str]:
    """What the plugin said it chose, without vLLM's prefix."""
    return [line[line.index("[b200] ") :] for line in log.read_text(errors="replace").splitlines() if "[b200] " in line]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_ab", description=__doc__)
    parser.add_argument("model", choices=MODEL_SHAPES, metavar="MODEL_SHAPE", help=f"one of {', '.join(MODEL_SHAPES)}")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, help="cut the model to this many layers")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--profile", type=int, nargs="*", default=[], metavar="BATCH")
    parser.add_argument("--cache-dir", default="~/.cache/vllm_b200_serve_ab", help="kept between runs, per side")
    parser.add_argument("--log-dir", help="where the engines' logs go")
    parser.add_argument("--out", help="write JSON lines to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
