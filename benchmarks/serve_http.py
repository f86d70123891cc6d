"""`vllm bench serve` against `vllm serve` of one model shape, with and without the plugin, taking turns."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.made_up_tokenizer import write_tokenizer
from benchmarks.model_size import GPU_BYTES, weight_bytes
from benchmarks.serve_engine import CPU_ENVIRONMENT, EngineFailed, log_tail, selection_lines
from benchmarks.serve_measure import Line, Record
from benchmarks.serve_variants import STOCK, Variant
from vllm_b200_plugin.demo.server import MODEL_NAME, Server, ServerFailed, free_port
from vllm_b200_plugin.environment import CannotRun

RESERVED_BYTES = 8e9  # of each server: activations, CUDA graphs, the context
METRICS = {"ttft_ms": "median_ttft_ms", "tpot_ms": "median_tpot_ms", "tokens_per_s": "output_throughput"}


@dataclass(frozen=True)
class Preset:
    """What vllm bench serve sends: random prompts, max_concurrency at once (all of them where that is None)."""

    input_len: int
    output_len: int
    num_prompts: int
    max_concurrency: int | None = None

    @property
    def most_running(self) -> int:
        return min(self.num_prompts, self.max_concurrency or self.num_prompts)


PRESETS = {
    "low-latency": Preset(input_len=128, output_len=2048, num_prompts=16, max_concurrency=8),
    "short": Preset(input_len=100, output_len=100, num_prompts=8),
    "burst": Preset(input_len=100, output_len=100, num_prompts=512),
    "prefill-free": Preset(input_len=4, output_len=1024, num_prompts=1024),
}


def run(
    arguments: argparse.Namespace,
    chosen: Variant,
    model: Path,
    config: dict[str, Any],
    cache: Path,
    logs: Path,
    record: Record,
) -> None:
    """Both servers up, then a benchmark of the one and of the other in every round; lines into `record`."""
    preset = PRESETS[arguments.server]
    preset = replace(
        preset,
        output_len=arguments.output_len or preset.output_len,
        num_prompts=arguments.num_prompts or preset.num_prompts,
    )
    head = {"model": arguments.model, "preset": arguments.server, "batch": preset.most_running}
    write_tokenizer(model, config["max_position_embeddings"])
    cpu = arguments.device == "cpu"
    kv_bytes = None if cpu else kv_cache_bytes(weight_bytes(config))
    results: dict[Variant, list[Line]] = {STOCK: [], chosen: []}
    with ExitStack() as stack:
        servers: dict[Variant, Server] = {}
        for variant in results:
            env = (CPU_ENVIRONMENT if cpu else {}) | {"VLLM_CACHE_ROOT": str(cache.absolute() / variant.side)}
            env |= variant.environment()
            log, options = (logs / f"server-{variant.side}.log").absolute(), server_options(preset, kv_bytes)
            servers[variant] = Server(model, log, free_port(), eager=cpu, cpu=cpu, options=options, env=env)
            stack.enter_context(servers[variant])
            servers[variant].start()
        startup = wait(servers, arguments.timeout)
        for number in range(1, (arguments.rounds or 3) + 1):
            for variant, server in servers.items():
                metrics = bench(server, preset, model, logs / f"bench-{variant.side}-{number}", seed=number)
                results[variant].append(metrics)
                record.add({**head, "side": variant.side, "round": number, **metrics})
    for variant, metrics in results.items():
        tpot = [line["tpot_ms"] for line in metrics]
        record.add(
            {
                **head,
                **asdict(preset),
                "side": variant.side,
                "features": list(variant.features),
                **medians(metrics),
                "tpot_spread": round(max(tpot) - min(tpot), 4),
                "startup_s": round(startup[variant], 1),
                "kv_cache_bytes": kv_bytes,
            }
        )
    record.add({**head, **ratios(medians(results[STOCK]), medians(results[chosen]))})
    print("\n".join(selection_lines(servers[chosen].log)))


def server_options(preset: Preset, kv_bytes: int | None) -> list[str]:
    """Options of vllm serve; kv_bytes: None on a CPU."""
    options = ["--load-format", "dummy", "--no-enable-prefix-caching", "--seed", "0"]
    options += ["--max-model-len", str(max(512, preset.input_len + preset.output_len))]
    options += ["--max-num-seqs", str(preset.most_running)]
    if kv_bytes is not None:
        sizes = sorted({min(1 << power, preset.most_running) for power in range(11)})
        options += ["--kv-cache-memory-bytes", str(kv_bytes), "--gpu-memory-utilization", "0.3"]
        options += ["--compilation-config", json.dumps({"cudagraph_capture_sizes": sizes})]
    return options


def kv_cache_bytes(weights: float, total: int | None = None) -> int:
    """What the GPU has left for the KV cache of each of two servers, in whole GiB; raises CannotRun below one."""
    total = gpu_memory_bytes() if total is None else total
    each = int((0.95 * (total or GPU_BYTES) / 2 - weights - RESERVED_BYTES) // (1 << 30))
    if each < 1:
        raise CannotRun(f"two servers with {weights / 1e9:.0f} GB of weights do not fit: cut the model with --layers.")
    return each << 30


def gpu_memory_bytes() -> int | None:
    """Of the first GPU, as nvidia-smi reports it; None where it does not."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return int(output.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def wait(servers: dict[Variant, Server], timeout: float) -> dict[Variant, float]:
    """Seconds until each server answers, from now; raises EngineFailed with the last lines of a log."""
    pool = ThreadPoolExecutor(len(servers))
    waiting = {variant: pool.submit(server.wait, timeout, lambda *_: None) for variant, server in servers.items()}
    pool.shutdown(wait=False)  # whoever is interrupted stops the servers, which ends the threads
    wait_for(waiting.values(), return_when=FIRST_EXCEPTION)
    for variant, done in waiting.items():
        if done.done() and isinstance(error := done.exception(), ServerFailed):
            raise EngineFailed(f"{variant.side}: {error} {log_tail(servers[variant].log)}")
    return {variant: done.result() for variant, done in waiting.items()}


def bench(server: Server, preset: Preset, model: Path, stem: Path, seed: int) -> dict[str, Any]:
    """One run of vllm bench serve; METRICS of it. Its output is in stem.log, its own record in stem.json."""
    result, log = stem.with_suffix(".json").absolute(), stem.with_suffix(".log")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "vllm"]
    command += ["--base-url", server.url, "--model", MODEL_NAME, "--tokenizer", str(model.absolute())]
    command += ["--dataset-name", "random", "--seed", str(seed), "--temperature", "0"]
    command += ["--input-len", str(preset.input_len), "--output-len", str(preset.output_len)]
    command += ["--num-prompts", str(preset.num_prompts), "--disable-tqdm"]
    command += ["--num-warmups", str(min(8, preset.most_running))]
    if preset.max_concurrency:
        command += ["--max-concurrency", str(preset.max_concurrency)]
    command += ["--save-result", "--result-dir", str(result.parent), "--result-filename", result.name]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "none", "NO_PROXY": "*"}
    result.unlink(missing_ok=True)
    with log.open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=output, env=env, cwd=result.parent)
    if done.returncode or not result.exists():
        raise EngineFailed(f"vllm bench serve ended with exit code {done.returncode}; {log_tail(log)}")
    found = json.loads(result.read_text())
    if found["completed"] < preset.num_prompts:
        raise EngineFailed(
            f"the server answered {found['completed']} of {preset.num_prompts} prompts; {log_tail(server.log)}"
        )
    return {key: round(found[name], 4) for key, name in METRICS.items()}


def medians(rounds: list[Line]) -> Line:
    return {key: round(statistics.median(line[key] for line in rounds), 4) for key in METRICS}


def ratios(stock: Line, plugin: Line) -> Line:
    """Above 1 the plugin is better: times are stock / plugin, tokens per second plugin / stock."""
    return {
        "tpot_ratio": round(stock["tpot_ms"] / plugin["tpot_ms"], 4),
        "ttft_ratio": round(stock["ttft_ms"] / plugin["ttft_ms"], 4),
        "tokens_per_s_ratio": round(plugin["tokens_per_s"] / stock["tokens_per_s"], 4),
    }
