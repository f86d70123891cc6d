"""`vllm serve` end to end, as a user starts it: the plugin is found by its entry point, nothing is passed."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from child import take_interrupts

pytest.importorskip("vllm")
psutil = pytest.importorskip("psutil")

pytestmark = pytest.mark.serve

COMMAND = [str(Path(sys.executable).with_name("vllm-b200")), "demo"]


def descendants_of(pid: int) -> "list[psutil.Process]":
    return psutil.Process(pid).children(recursive=True)


def assert_gone(processes: "list[psutil.Process]") -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive, [process.cmdline() for process in alive]


def test_fp8_demo_answers_right_with_our_kernels(tmp_path):
    command = [*COMMAND, "--format", "fp8", "--model-dir", str(tmp_path / "model"), "--timeout", "400"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    output = result.stdout
    assert result.returncode == 0, output + result.stderr
    assert re.search(r"^question +\S.+\?$", output, re.MULTILINE), output
    assert re.search(r"^ +#### 88$", output, re.MULTILINE), output
    assert re.search(r"^  \[b200\] .+ -> .+: .+", output, re.MULTILINE), output
    assert re.search(r"^versions +plugin \S+, vllm 0\.\d+", output, re.MULTILINE), output
    assert output.rstrip().endswith("server stopped")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def shared_memory() -> "set[Path]":
    return set(Path("/dev/shm").glob("psm_*"))


def test_interrupt_stops_every_process(tmp_path):
    before = shared_memory()
    log = tmp_path / "out"
    with log.open("w") as out:
        demo = subprocess.Popen(
            [*COMMAND, "--format", "bf16", "--eager"],
            cwd=tmp_path,
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=take_interrupts,
        )
        try:
            deadline = time.monotonic() + 200
            while "starting the engine" not in log.read_text():
                assert time.monotonic() < deadline, log.read_text()
                assert demo.poll() is None, log.read_text()
                time.sleep(0.5)
            started = descendants_of(demo.pid)
            assert started
            demo.send_signal(signal.SIGINT)
            assert demo.wait(60) == 130
        finally:
            demo.kill()
    assert_gone(started)
    assert shared_memory() <= before
    assert "server stopped" in log.read_text()
    assert "Traceback" not in log.read_text()
