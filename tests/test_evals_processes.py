"""Workers of evals as processes: several at once, what is left of them, and what they say when they fail."""

import json
import os
import time

import pytest

from evals import processes
from evals.processes import SideFailed, Task
from vllm_b200_plugin.environment import CannotRun

SCRIPT = """
import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
request = json.loads((folder / "request.json").read_text())
(folder / "pid").write_text(str(os.getpid()))
(folder / "began").write_text(str(time.time()))
time.sleep(request["sleep"])
if request["end"] == "raise":
    (folder / "status.json").write_text(json.dumps({"doing": "loading the model"}))
    raise ValueError("no kernel for this layer")
(folder / "status.json").write_text(json.dumps({request["end"]: "ask less"}))
(folder / "ended").write_text(str(time.time()))
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(processes, "_WORKERS", tmp_path)

    def make(name: str, end: str = "finished", sleep: float = 0) -> Task:
        (tmp_path / name).mkdir()
        return Task("script", {"end": end, "sleep": sleep}, tmp_path / name, {}, name)

    return make


def test_several_at_once(task, capsys):
    tasks = [task(str(i), sleep=0.6) for i in range(4)]
    broken = task("broken", end="raise")
    known = []
    failed = processes.run_all(
        [*tasks[:2], broken, *tasks[2:]], jobs=2, label="all", ended=lambda failed: known.append(list(failed))
    )
    assert failed.keys() == {2}
    assert len(known) == 5 and known[-1] == [2]
    assert str(failed[2]).startswith(
        "broken failed while loading the model: ValueError: no kernel for this layer (see "
    )
    assert failed[2].cause == "ValueError: no kernel for this layer"
    spans = [[float((t.folder / name).read_text()) for name in ("began", "ended")] for t in tasks]
    together = [sum(began <= moment < ended for began, ended in spans) for moment, _ in spans]
    assert max(together) == 2
    assert "5/5" in capsys.readouterr().err


def test_one(task):
    processes.run(task("fine"))
    with pytest.raises(SideFailed, match="no kernel"):
        processes.run(task("broken", end="raise"))
    with pytest.raises(CannotRun, match="ask less"):
        processes.run(task("asks", end="cannot"))


def test_what_is_missing_for_all_ends_all(task):
    running = task("running", sleep=60)
    began = time.monotonic()
    with pytest.raises(CannotRun, match="ask less"):
        processes.run_all([running, task("asks", end="cannot", sleep=1)], jobs=2, label="all")
    assert time.monotonic() - began < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((running.folder / "pid").read_text()), 0)


def test_time_limit(task):
    failed = processes.run_all([task("quick"), task("slow", sleep=60), task("later")], jobs=2, label="all", limit=3)
    assert failed.keys() == {1}
    failed = processes.run_all([task("slower", sleep=60), task("last")], jobs=1, label="all", limit=1)
    assert {index: error.cause for index, error in failed.items()} == dict.fromkeys((0, 1), "ended after 1 s, as asked")


def test_interruption_ends_what_runs(task, monkeypatch):
    tasks = [task(str(i), sleep=60) for i in range(2)]

    def show(self, status):
        if all((t.folder / "pid").exists() for t in tasks):
            raise KeyboardInterrupt

    monkeypatch.setattr(processes.Progress, "show", show)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        processes.run_all(tasks, jobs=2, label="all")
    assert time.monotonic() - began < 30
    for t in tasks:
        with pytest.raises(ProcessLookupError):
            os.kill(int((t.folder / "pid").read_text()), 0)


def test_an_earlier_status_is_forgotten(task):
    fine = task("fine")
    (fine.folder / "status.json").write_text(json.dumps({"cannot": "old"}))
    processes.run(fine)


def test_reasons_on_lines_of_their_own():
    worker = "(Worker pid=7) ERROR 11-21 14:28:30 [executor.py:953] "
    log = [
        f"{worker}Traceback (most recent call last):",
        f"{worker}ValueError: Failed to find a kernel. Reasons: ",
        f"{worker}AKernel needs AMX..",
        f"{worker}BKernel is for GPUs.",
        "(EngineCore pid=6) INFO 11-21 14:28:33 [executor.py:479] shutdown",
        "(EngineCore pid=6) ERROR 11-21 14:28:33 [core.py:1] RuntimeError: Engine core initialization failed.",
    ]
    reasons = "AKernel needs AMX.. BKernel is for GPUs."
    assert processes.cause_of(log) == f"ValueError: Failed to find a kernel. Reasons: {reasons}"
    assert processes.cause_of(["ValueError: no."]) == "ValueError: no."
    assert processes.cause_of(["ValueError: none. Reasons:"]) == "ValueError: none. Reasons:"
    assert processes.cause_of(["fine"]) is None
