"""Builds models for pretended GPUs and prints their tables: `python -m vllm_b200_plugin.explain.child`, with jobs on
standard input and one JSON line for each on standard output.

vLLM is imported once. Each GPU gets a fork of that, as vLLM decides much while it is imported; each side, with the
plugin and without, a fork of that before plugins are loaded; and each model one of that, so that no build sees what
another left behind.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.explain import pretend
from vllm_b200_plugin.explain.gpus import Gpu, gpu

# What every model needs, imported once for all of them.
_SHARED = (
    "vllm.model_executor.kernels.linear",
    "vllm.model_executor.layers.fused_moe.oracle.fp8",
    "vllm.model_executor.layers.fused_moe.oracle.nvfp4",
    "vllm.model_executor.layers.fused_moe.oracle.unquantized",
    "vllm.model_executor.model_loader.utils",
    "vllm.model_executor.models.qwen3_moe",
    "vllm.model_executor.models.deepseek_v2",
    "vllm.compilation.backends",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.flashinfer",
    "vllm.v1.attention.backends.triton_attn",
    "vllm.v1.attention.backends.flex_attention",
    "vllm.v1.attention.backends.mla.flashmla",
    "vllm.v1.attention.backends.mla.flashinfer_mla",
    "vllm.v1.attention.backends.mla.triton_mla",
)


def build(job: dict[str, Any]) -> dict[str, Any]:
    """The rows of one model; runs once in a process. job: see explain.Job."""
    from vllm_b200_plugin import plugin
    from vllm_b200_plugin.explain import record
    from vllm_b200_plugin.integration import layer_table

    config = _engine_config(job)

    import vllm
    from vllm.platforms import current_platform

    record.install(current_platform)
    model = _model(config, job["tp"])
    table = layer_table.rows(model, record.passed_over)
    return {
        "vllm": vllm.__version__,
        "rows": [dataclasses.asdict(row) for row in table],
        "overridden_ops": layer_table.overridden_ops(),
        "features": {} if job["stock"] else plugin.results(),
        "quantised": config.model_config.quantization,
        "architecture": type(model).__name__,
    }


def _engine_config(job: dict[str, Any]) -> Any:
    """vLLM's configuration, as `vllm serve` makes it; the class of the model is looked at here, not in a child."""
    from vllm.engine.arg_utils import EngineArgs

    info = vllm_compat.MODEL_INFO.get()
    vllm_compat.LAZY_MODEL.get().inspect_model_cls = lambda self: info.from_model_cls(self.load_model_cls())
    arguments = EngineArgs(
        model=job["model"],
        load_format="dummy",
        skip_tokenizer_init=True,
        tensor_parallel_size=job["tp"],
        enable_expert_parallel=job["ep"],
        distributed_executor_backend="mp" if job["tp"] > 1 else None,
    )
    return arguments.create_engine_config()


def _model(config: Any, ranks: int) -> Any:
    """The model of rank 0 without weights; process groups are torch's fake ones, of which nothing is sent."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.config import set_current_vllm_config

    parallel_state = vllm_compat.PARALLEL_STATE.get()
    new_group = dist.new_group
    dist.new_group = lambda ranks=None, **kwargs: new_group(ranks, backend="fake")
    vllm_compat.MESSAGE_QUEUE.get().create_from_process_group = staticmethod(lambda *args, **kwargs: None)
    with set_current_vllm_config(config):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        parallel_state.init_distributed_environment(ranks, 0, "", 0, "fake")
        parallel_state.initialize_model_parallel(ranks, 1)
        vllm_compat.INIT_WORKSPACE.get()(torch.device("meta"))
        _expert_map_with_data()
        torch.set_default_dtype(config.model_config.dtype)
        with torch.device("meta"), pretend.to_meta():
            return vllm_compat.INITIALIZE_MODEL.get()(config)


def _expert_map_with_data() -> None:
    """vLLM reads the table of a rank's experts while it builds the model."""
    import torch

    determine = vllm_compat.EXPERT_MAP.get()

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return determine(*args, **kwargs)

    vllm_compat.EXPERT_MAP.replace(on_cpu)


def _forked(task: Callable[[], Any]) -> tuple[int, int]:
    """Runs task in a fork that writes its result as JSON; (process id, file to read from)."""
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return process, reader
    os.close(reader)
    try:
        result = task()
    except BaseException as error:
        result = {"error": _in_words(error), "traceback": traceback.format_exc()}
    with os.fdopen(writer, "w") as out:
        json.dump(result, out)
    os._exit(0)


def _in_words(error: BaseException) -> str:
    """What went wrong in one line; of pydantic's errors what vLLM put into them."""
    text = " ".join(str(error).split())
    if "Value error, " in text:
        text = text.split("Value error, ", 1)[1].split(" [type=")[0]
    text = text.split(" Supported architectures:")[0]
    kind = "" if "Value error, " in str(error) else f"{type(error).__name__}: "
    return f"{kind}{text[:600]}"


def _collect(tasks: list[Callable[[], Any]], parallel: int) -> list[Any]:
    """The results of tasks, each in a fork, `parallel` at a time."""
    results: list[Any] = [None] * len(tasks)
    for start in range(0, len(tasks), parallel):
        batch = list(enumerate(tasks[start : start + parallel], start))
        running = [(index, *_forked(task)) for index, task in batch]
        for index, process, reader in running:
            result, code = _ended(process, reader)
            if result is None:  # a fork of a process that has threads may, now and then
                result, code = _ended(*_forked(tasks[index]))
            results[index] = result or {"error": f"the process that built the model died, exit code {code}"}
    return results


def _ended(process: int, reader: int) -> tuple[Any, int]:
    """What a fork wrote, None where it died before that, and its exit code; of a signal less than 0."""
    with os.fdopen(reader) as source:
        text = source.read()
    _, status = os.waitpid(process, 0)
    return json.loads(text) if text else None, os.waitstatus_to_exitcode(status)


def _for_gpu(pretended: Gpu, jobs: list[dict[str, Any]]) -> list[Any]:
    """All jobs for one GPU, in a process that has not decided yet what vLLM runs on; both sides at once."""
    pretend.pretend(pretended, max(job["tp"] for job in jobs))
    import vllm.engine.arg_utils  # noqa: F401  as `vllm serve` does before it loads plugins

    sides = [[job for job in jobs if job["stock"] == stock] for stock in (False, True)]
    answers = iter(_collect([lambda side=side: _for_side(pretended, side) for side in sides if side], 2))  # type: ignore[misc]
    by_side = [next(answers) if side else [] for side in sides]
    left = [iter(found if isinstance(found, list) else [found] * len(jobs)) for found in by_side]
    return [next(left[job["stock"]]) for job in jobs]


def _for_side(pretended: Gpu, jobs: list[dict[str, Any]]) -> list[Any]:
    """All jobs for one GPU with the plugin, or all without, in a process that has loaded no plugin yet."""
    pretend.assume_deep_gemm()
    assumption = ""
    if jobs[0]["stock"]:
        os.environ["VLLM_B200_DISABLE"] = jobs[0]["features"]
    else:
        assumption = pretend.assume_library(pretended)
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    for module in _SHARED:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    from vllm.model_executor.layers import quantization

    for method in quantization.QUANTIZATION_METHODS:  # a model's configuration imports them all
        with contextlib.suppress(Exception):
            quantization.get_quantization_config(method)

    def run(job: dict[str, Any]) -> dict[str, Any]:
        pretend.pretend(pretended, job["tp"])
        started = time.monotonic()
        return {**build(job), "assumption": assumption, "seconds": round(time.monotonic() - started, 1)}

    return _collect([lambda job=job: run(job) for job in jobs], 1)  # type: ignore[misc]


def main() -> None:
    jobs: list[dict[str, Any]] = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM and its libraries print
    pretend.load_lazily()
    import torch._inductor  # noqa: F401
    import transformers.models.auto  # noqa: F401
    import vllm  # noqa: F401

    for capability in dict.fromkeys(job["capability"] for job in jobs):
        mine = [job for job in jobs if job["capability"] == capability]
        (result,) = _collect([lambda c=capability, mine=mine: _for_gpu(gpu(c), mine)], 1)  # type: ignore[misc]
        results = result if isinstance(result, list) else [result] * len(mine)
        for job, answer in zip(mine, results, strict=True):
            print(json.dumps({"job": job, **answer}), file=out, flush=True)


if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if entry != str(Path.cwd())]
    main()
