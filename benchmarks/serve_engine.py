"""An engine in a process of its own, as the parent sees it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.serve_variants import Variant
from vllm_b200_plugin.demo.server import root_cause
from vllm_b200_plugin.environment import torch_is_cpu_only

LOG_LINES_SHOWN = 25
# Two engines share the cores: threads that wait for each other's turn by spinning would take them from the other one.
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}


class EngineFailed(RuntimeError):
    """An engine or a server ended; the message has the last lines of its log."""


def log_tail(log: Path) -> str:
    """The last lines of a log and, where it is not among them, the exception that tells most."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    tail = lines[-LOG_LINES_SHOWN:]
    cause = root_cause(lines)
    head = [f"cause: {cause}"] if cause and not any(cause in line for line in tail) else []
    return "\n".join([f"last lines of {log}:", *(f"  | {line}" for line in tail), *head])


def selection_lines(log: Path) -> list[str]:
    """What the plugin said it chose, without vLLM's prefix, each line once."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return sorted({line[line.index("[b200] ") :] for line in lines if "[b200] " in line})


class Engine:
    """A benchmarks.engine_worker process. Its first answer is that it is ready."""

    def __init__(self, variant: Variant, model: Path, options: dict[str, Any], cache: Path, log: Path) -> None:
        self.variant, self.log = variant, log
        self.ready: dict[str, Any] = {}
        env = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CACHE_ROOT": str(cache / variant.side),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **variant.environment(),
        }
        if torch_is_cpu_only():
            env = CPU_ENVIRONMENT | env
        read, write = os.pipe()
        command = [sys.executable, "-m", "benchmarks.engine_worker", str(write), str(model), json.dumps(options)]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(write,),
                text=True,
                start_new_session=True,  # Ctrl-C is for us: stop() ends the engine
            )
        os.close(write)
        self.answers = os.fdopen(read)

    def wait_ready(self) -> None:
        if not self.ready:
            self.ready = self.answer()

    def answer(self) -> dict[str, Any]:
        line = self.answers.readline()
        if not line:
            code = self.process.wait()
            raise EngineFailed(f"the {self.variant.name} engine ended, exit code {code}; {log_tail(self.log)}")
        return json.loads(line)

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # answer() says why
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        """End the engine: one that is ready may finish what it does, one that starts is killed."""
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30 if self.ready else 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.answers.close()
