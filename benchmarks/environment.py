"""What a result was measured on."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch


def environment() -> dict[str, str]:
    """GPU, driver, clocks, package versions, commit and command."""
    packages = ("torch", "triton", "vllm", "flashinfer-python", "vllm-b200-plugin")
    env = {name.replace("-", "_"): _version(name) for name in packages}
    env |= {"python": platform.python_version(), "cuda": torch.version.cuda or "", "commit": _commit()}
    env["command"] = " ".join(["python", *sys.orig_argv[1:]])
    if torch.cuda.is_available():
        fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
        values = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").partition("\n")[0].split(", ")
        env |= dict(zip(("gpu", "driver", *(f.replace(".", "_") for f in fields.split(",")[2:])), values, strict=False))
    return env


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _commit() -> str:
    """The commit, from git or, in a copy without its repository, from the file COMMIT."""
    commit = _output("git", "rev-parse", "--short", "HEAD")
    if not commit:
        try:
            with open("COMMIT") as file:
                return file.read().strip()
        except OSError:
            return "unknown"
    return commit + ("+changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
