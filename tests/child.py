"""Runs Python in a process of its own, for what changes a process for good: loading the plugin, faking a platform."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def take_interrupts() -> None:
    """In a child that is to be interrupted: what a shell runs in the background ignores SIGINT, as do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The finished process; `env` on top of ours, in which VLLM_* variables are left out."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    paths = [str(TESTS), *filter(None, [clean.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**clean, "PYTHONPATH": os.pathsep.join(paths), "VLLM_NO_USAGE_STATS": "1", **env},
    )


def answer(code: str, **env: str) -> Any:
    """What `code` prints last, as JSON. What it logs is on the error of the test that fails."""
    done = run(code, **env)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stderr[-4000:])
    return json.loads(done.stdout.strip().splitlines()[-1])
