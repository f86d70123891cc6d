"""Runs `vllm serve` as a child: start, wait, one completion, what its log says, stop."""

import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_b200_plugin.environment import ENTRY_POINT, CannotRun

if TYPE_CHECKING:
    from typing_extensions import Self

HOST = "127.0.0.1"
MODEL_NAME = "demo"

# Text in vLLM's log -> what the server is doing from then on. The last match counts.
_STAGES = (
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Starting to load model", "loading the weights"),
    ("Loading safetensors checkpoint", "loading the weights"),
    ("Model loading took", "profiling memory"),
    ("Start compiling", "compiling the model"),
    ("Dynamo bytecode transform", "compiling the model"),
    ("Compiling a graph", "compiling the model"),
    ("torch.compile took", "warming up"),
    ("Warming up", "warming up"),
    ("Capturing CUDA graphs", "capturing CUDA graphs"),
    ("init engine", "starting the HTTP server"),
    ("Starting vLLM server", "starting the HTTP server"),
)
PLUGIN_FAILED = f"Failed to load plugin {ENTRY_POINT}"
_OURS = "[b200] "
_THEIRS = re.compile(r"(Selected \S+ for .+|Using .*(?:MoE|attention) backend)\b", re.IGNORECASE)
_ERROR = re.compile(r"\b\w*(?:Error|Exception): .*\S")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class ServerFailed(Exception):
    """The server ended, or did not answer. The message is one sentence."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def check_port(port: int) -> None:
    """Raises CannotRun where a server cannot listen on `port`."""
    if not 0 < port < 65536:
        raise CannotRun(f"--port takes a number from 1 to 65535; got {port}.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise CannotRun(f"port {port} {why}: choose another with --port, or leave it out for a free one.") from None


def stage(line: str) -> str | None:
    """What the server does after it logged `line`, where that changes."""
    return next((doing for text, doing in reversed(_STAGES) if text in line), None)


def kernels_chosen(log: Iterable[str]) -> tuple[list[str], list[str]]:
    """(our lines, vLLM's lines) about the kernels that the engine chose, each once, in the order they came."""
    ours: dict[str, None] = {}
    theirs: dict[str, None] = {}
    for raw in log:
        line = _ANSI.sub("", raw).strip()
        if _OURS in line:
            ours.setdefault(line[line.index(_OURS) :])
        elif found := _THEIRS.search(line):
            theirs.setdefault(found.group(1))
    return list(ours), list(theirs)


def root_cause(log: Iterable[str]) -> str | None:
    """The last exception in the log that says more than that an earlier one happened."""
    lines = [_ANSI.sub("", line) for line in log]
    found = [match.group(0) for line in lines if "WARNING" not in line and (match := _ERROR.search(line))]
    telling = [text for text in found if "initialization failed" not in text]
    return next(reversed(telling or found), None)


class Child:
    """A command in its own process group, its output in `log`. Use as a context manager: leaving it stops the group.

    env: variables on top of ours.
    """

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None):
        self.log = log
        self.process: subprocess.Popen | None = None
        self._command = list(command)
        self._env = {**os.environ, **(env or {})}

    def start(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self.log.parent,  # python -m puts the working directory first: never a source tree
                start_new_session=True,
            )

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines() if self.log.exists() else []

    def exit_code(self) -> int | None:
        """None while it runs. Leaves it to stop() to reap, which needs its group number."""
        assert self.process is not None, "start() first"
        ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def stop(self, grace: float | None = None) -> None:
        """Ask it to end, and after `grace` seconds (4 by default) end whatever of its process group is left."""
        if self.process is None or self.process.returncode is not None:
            return
        group = self.process.pid
        if self.exit_code() is None:
            self.process.terminate()
            _wait_until(lambda: self.exit_code() is not None, 4 if grace is None else grace)
        # The leader is not reaped yet, so the number cannot belong to another group. Python's resource
        # tracker removes the shared memory of the killed ones, and ends when the last of them has.
        for pid, command in _members(group).items():
            if "resource_tracker" not in command:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        _wait_until(lambda: not _members(group), 5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        self.process.wait()
        _wait_until(lambda: not _members(group), 5)


class Server(Child):
    """`vllm serve`, for requests under the name MODEL_NAME.

    options: vllm serve's, instead of those that keep the demo small. env: variables on top of ours.
    """

    def __init__(
        self,
        model: Path | str,
        log: Path,
        port: int,
        *,
        eager: bool = False,
        cpu: bool = False,
        options: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
    ):
        self.model, self.port = model, port
        self.url = f"http://{HOST}:{port}"
        self._ready = False
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
        command += ["--host", HOST, "--port", str(port), "--served-model-name", MODEL_NAME]
        if options is None:
            options = ["--max-model-len", "512", "--max-num-batched-tokens", "512", "--max-num-seqs", "8"]
            options += [] if cpu else ["--gpu-memory-utilization", "0.2"]
        command += options
        if eager:
            command.append("--enforce-eager")
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        super().__init__(command, log, {**quiet, **(env or {})})
        self._env.setdefault("VLLM_LOGGING_LEVEL", "INFO")
        if cpu:
            self._env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

    @property
    def command(self) -> str:
        """The command as a user would type it."""
        return " ".join(["vllm", *self._command[3:]])

    def wait(self, timeout: float, progress: Callable[[float, str], None]) -> float:
        """Wait until the server answers; seconds that took. Calls progress(seconds, what the server is doing).

        Raises ServerFailed where it ends or `timeout` seconds pass.
        """
        began = time.monotonic()
        doing, seen = "importing vLLM", 0
        while True:
            lines = self.lines()
            for line in lines[seen:]:
                doing = stage(line) or doing
            seen = len(lines)
            elapsed = time.monotonic() - began
            progress(elapsed, doing)
            if (code := self.exit_code()) is not None:
                raise ServerFailed(f"the server ended while {doing}, with exit code {code}.")
            if self._healthy():
                self._ready = True
                return elapsed
            if elapsed > timeout:
                raise ServerFailed(f"the server was not ready after {timeout:.0f} s (it was {doing}); see --timeout.")
            time.sleep(0.25)

    def complete(self, prompt: str, max_tokens: int = 160, timeout: float = 120) -> str:
        """One greedy completion through the OpenAI API. Raises ServerFailed."""
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with _open(request, timeout) as answer:
                return json.load(answer)["choices"][0]["text"]
        except urllib.error.HTTPError as error:
            detail = error.read().decode(errors="replace")[:500]
            raise ServerFailed(f"the completion failed with HTTP {error.code}: {detail}") from None
        except (OSError, ValueError, LookupError) as error:
            raise ServerFailed(f"the completion failed: {error!r}.") from None

    def stop(self, grace: float | None = None) -> None:
        """As Child.stop. A server that is starting does not listen, so it gets 4 s by default, a ready one 20 s."""
        super().stop((20 if self._ready else 4) if grace is None else grace)

    def _healthy(self) -> bool:
        try:
            with _open(f"{self.url}/health", 2) as answer:
                return answer.status == 200
        except OSError:
            return False


def _members(group: int) -> dict[int, str]:
    """The processes of a group that still run: id -> command line."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            state, _, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found[int(folder.name)] = (
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
    return found


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def _open(request: "urllib.request.Request | str", timeout: float):  # type: ignore[no-untyped-def]
    """Like urlopen, but never through a proxy: the server is on this machine."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout)
