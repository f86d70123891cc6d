"""Runs the scripts of workers/, one or several at once, and shows how far they are.

A worker has a folder of its own: request.json says what to do, status.json how far it is, log what its processes wrote.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_b200_plugin import environment
from vllm_b200_plugin.demo.server import Child, root_cause
from vllm_b200_plugin.environment import CannotRun

if TYPE_CHECKING:
    from typing_extensions import Self

_WORKERS = Path(__file__).parent / "workers"


class SideFailed(Exception):
    """A side ended without a result. The message is one sentence; cause: the part of it that vLLM said."""

    def __init__(self, message: str, cause: str | None = None):
        super().__init__(message)
        self.cause = cause or message


@dataclass(frozen=True)
class Task:
    """script: of workers/. env: on top of ours. label: what it is, for people."""

    script: str
    request: Mapping[str, Any]
    folder: Path
    env: Mapping[str, str]
    label: str


class Worker:
    """A task at work, from entering the block on; leaving it ends what is left of its processes.

    It runs as a file of its own folder, so that vLLM gets the installed plugin, never this source tree.
    """

    def __init__(self, task: Task):
        self.task = task
        env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false", **task.env}
        if environment.torch_is_cpu_only():
            env.setdefault("VLLM_CPU_KVCACHE_SPACE", os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"))
        command = [sys.executable, str(_WORKERS / f"{task.script}.py"), str(task.folder)]
        self._child = Child(command, task.folder / "log", env)

    def __enter__(self) -> "Self":
        prepare(self.task)
        self._child.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._child.stop()

    def status(self) -> dict[str, Any]:
        """What the worker said last; empty before that."""
        try:
            return json.loads((self.task.folder / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._child.exit_code()

    def check(self) -> None:
        """Raises SideFailed, or CannotRun where the worker found that it was asked for the impossible."""
        code, last, log = self.exit_code(), self.status(), self.task.folder / "log"
        if problem := last.get("cannot"):
            raise CannotRun(problem)
        if code or not last.get("finished"):
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            cause = cause_of(lines) or f"exit code {code}"
            doing = last.get("doing", "starting")
            raise SideFailed(f"{self.task.label} failed while {doing}: {cause} (see {log}).", cause)


def cause_of(log: Sequence[str]) -> str | None:
    """The root cause in a log, with the lines that a colon at its end announces: vLLM's reasons, kernel by kernel."""
    cause = root_cause(log)
    index = next((i for i in reversed(range(len(log))) if cause and cause in log[i]), None)
    if cause is None or index is None or not cause.endswith(":"):
        return cause
    prefix = log[index].partition(cause)[0]
    reasons = itertools.takewhile(
        lambda line: line.startswith(prefix) and line[len(prefix) :].strip(), log[index + 1 :]
    )
    return " ".join([cause, *(line[len(prefix) :].strip() for line in itertools.islice(reasons, 20))])


def prepare(task: Task) -> None:
    """Write the request, and forget an earlier status."""
    (task.folder / "status.json").unlink(missing_ok=True)
    (task.folder / "request.json").write_text(json.dumps(task.request, indent=2) + "\n")


def run(task: Task) -> None:
    """Run one task to its end. Raises as Worker.check."""
    with Worker(task) as worker, Progress(task.label) as progress, ended_by_signals():
        while worker.exit_code() is None:
            progress.show(worker.status())
            time.sleep(0.2)
        progress.show(worker.status())
        worker.check()


def run_all(
    tasks: Sequence[Task],
    jobs: int,
    label: str,
    limit: float = math.inf,
    ended: Callable[[Mapping[int, SideFailed]], object] = lambda failed: None,
) -> dict[int, SideFailed]:
    """Run tasks, up to `jobs` of them at once; the errors of those that failed, by index in `tasks`.

    limit: seconds after which those that are not done are ended, and have failed. ended: called with the errors so far
    whenever a task has ended. Raises CannotRun, with all others
    ended, where a worker found that it was asked for the impossible: what is missing for one is missing for all.
    """
    waiting = list(enumerate(tasks))
    running: dict[int, tuple[Worker, contextlib.ExitStack]] = {}
    failed: dict[int, SideFailed] = {}
    began = time.monotonic()
    with Progress(label) as progress, ended_by_signals(), contextlib.ExitStack() as everything:
        while waiting or running:
            if time.monotonic() - began > limit:
                late = f"ended after {limit:g} s, as asked"
                left = [*waiting, *((index, worker.task) for index, (worker, _) in running.items())]
                return failed | {index: SideFailed(f"{task.label} was {late}.", late) for index, task in left}
            while waiting and len(running) < jobs:
                index, task = waiting.pop(0)
                own = everything.enter_context(contextlib.ExitStack())
                running[index] = own.enter_context(Worker(task)), own
            for index, (worker, own) in list(running.items()):
                if worker.exit_code() is not None:
                    try:
                        worker.check()
                    except SideFailed as error:
                        failed[index] = error
                    own.close()
                    del running[index]
                    ended(failed)
            at = ", ".join(f"{worker.task.label} {_brief(worker.status())}" for worker, _ in running.values())
            done = len(tasks) - len(waiting) - len(running)
            progress.show({"doing": "running", "done": done, "total": len(tasks), "more": at})
            time.sleep(0.2)
    return failed


def exit_code(run: Callable[[], int], goes_on: str) -> int:
    """What run() returns, 2 with one sentence where it could not run, 130 where it was interrupted.

    goes_on: with what the same command goes on after that, in words.
    """
    try:
        return run()
    except (CannotRun, SideFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on {goes_on}", file=sys.stderr)
        return 130


def _brief(status: Mapping[str, Any]) -> str:
    return f"{status.get('done', 0)}/{status['total']}" if status.get("total") else status.get("doing", "starting")


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that what it started is stopped."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class Progress:
    """One line that follows what is done: rewritten on a terminal, else a new one now and then."""

    def __init__(self, label: str):
        self._label, self._last = label, ""
        self._terminal = sys.stderr.isatty()
        self._began = self._printed = time.monotonic()

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            print(file=sys.stderr, flush=True)

    def show(self, status: Mapping[str, Any]) -> None:
        """doing, done and total as a worker's status has them; more: what to say behind them."""
        doing = text = status.get("doing", "starting")
        now = time.monotonic()
        done, total = status.get("done", 0), status.get("total")
        if total:
            filled = 20 * done // total
            text += f" [{'#' * filled}{'.' * (20 - filled)}] {done}/{total}"
        more = f" {status['more']}" if status.get("more") else ""
        if self._terminal:
            seconds = int(now - self._began)
            line = f"{self._label}: {text}, {seconds // 60}:{seconds % 60:02d}{more}"
            print(f"\r{line[: shutil.get_terminal_size().columns - 1]:<79}", end="", file=sys.stderr, flush=True)
        elif text != self._last and (now - self._printed > 10 or not self._last.startswith(doing) or done == total):
            print(f"{self._label}: {text}{more}", file=sys.stderr, flush=True)
            self._last, self._printed = text, now
