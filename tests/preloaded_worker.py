"""Runs workers of evals in forks of one process that has imported vLLM, which takes far longer than a tiny model does.

As a script: a JSON line on stdin for each worker to run ({"script", "folder", "env", "path"}), its exit code on stdout.
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evals import processes

WORKERS = Path(processes.__file__).parent / "workers"
PRELOADED = (
    "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen3_moe",
    "vllm.model_executor.layers.quantization.quark.quark",
    "lm_eval.models.vllm_causallms",
    "lm_eval.tasks",
    "worker_common",
)
# Small and without compiled graphs; an engine in the worker's own process, which so has the preloaded modules.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


@contextlib.contextmanager
def preloaded() -> Iterator[type[processes.Worker]]:
    """A stand-in for processes.Worker, whose tasks run one after the other.

    A task's env["EXTRA_PATH"] names folders to be on sys.path besides, separated by colons.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    env = {**clean, "PYTHONPATH": str(WORKERS.parents[1]), "VLLM_NO_USAGE_STATS": "1", **ENVIRONMENT}
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as host:
        assert host.stdin and host.stdout
        pipe_in, pipe_out = host.stdin, host.stdout

        class Worker(processes.Worker):
            def __enter__(self) -> "Worker":
                processes.prepare(self.task)
                order = {"script": self.task.script, "folder": str(self.task.folder), "env": dict(self.task.env)}
                print(json.dumps(order), file=pipe_in, flush=True)
                self._code = int(pipe_out.readline())
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def exit_code(self) -> int:
                return self._code

        yield Worker
        pipe_in.close()


def _run(order: dict[str, Any]) -> None:
    """Never returns."""
    with open(Path(order["folder"]) / "log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    env = order["env"]
    os.environ.update(env)
    sys.path += filter(None, env.get("EXTRA_PATH", "").split(os.pathsep))
    sys.argv = [order["script"], order["folder"]]
    import worker_common

    worker_common.run(__import__(order["script"]).work)


def main() -> None:
    sys.path.insert(0, str(WORKERS))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the imports print is no answer
    for module in PRELOADED:
        __import__(module)
    gc.collect()
    gc.freeze()  # vLLM collects garbage several times, and each would look at all that is preloaded
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                _run(json.loads(line))
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=out, flush=True)


if __name__ == "__main__":
    main()
