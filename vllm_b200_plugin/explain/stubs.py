"""Lets the CUDA build of vLLM be imported on a machine without an NVIDIA driver, and with a CPU build of torch."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from vllm_b200_plugin.environment import CannotRun

# No function of these is called while kernels are selected: names are bound when they are called, see
# pretend.load_lazily. The few that libraries call when they are loaded or asked for a device say that there is none.
_NO_DEVICE = ("cuInit", "cuDriverGetVersion", "cuGetProcAddress_v2", "cuDeviceGetCount", "cuDeviceGet")
_SOURCES = {
    "libcuda.so.1": "".join(f"int {name}(void) {{ return 100; }}\n" for name in _NO_DEVICE),
    "libtorch_cuda.so": (
        "int aoti_torch_get_current_cuda_stream(int device, void** stream) { *stream = 0; return 1; }\n"
        "int torch_get_current_cuda_blas_handle(void** handle) { *handle = 0; return 1; }\n"
        "int torch_c10_cuda_check_msg(int e, const char* f, const char* g, unsigned l, _Bool b, char** m)"
        " { *m = 0; return 0; }\n"
        "void torch_c10_cuda_free_error_msg(char* m) {}\n"
    ),
    "libc10_cuda.so": "int vllm_b200_stub;\n",
}


def library_path(cache: Path | None = None) -> list[str]:
    """Folders for LD_LIBRARY_PATH with what this machine lacks. Raises CannotRun where it cannot be made."""
    missing = [name for name in _SOURCES if not _exists(name)]
    folders = [str(_compiled(missing, cache or _cache()))] if missing else []
    runtime = _cuda_runtime()
    if runtime is None:
        raise CannotRun(
            "libcudart.so.13, which vLLM's CUDA build links, was not found: pip install nvidia-cuda-runtime, or set "
            "CUDA_HOME to a CUDA 13 toolkit."
        )
    return [*folders, str(runtime)]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_b200_plugin" / "stubs"


def _exists(name: str) -> bool:
    """Whether the loader will find it; libcuda among the system's libraries, torch's in torch."""
    if name == "libcuda.so.1":
        ldconfig = shutil.which("ldconfig") or "/sbin/ldconfig"
        try:
            return name in subprocess.run([ldconfig, "-p"], capture_output=True, text=True, timeout=30).stdout
        except (OSError, subprocess.SubprocessError):
            return False
    spec = importlib.util.find_spec("torch")
    return spec is not None and (Path(spec.origin or "").parent / "lib" / name).is_file()


def _cuda_runtime() -> Path | None:
    """The folder of libcudart.so.13: pip's, or the toolkit's."""
    folders = [Path(entry, "nvidia", "cu13", "lib") for entry in sys.path]
    folders += [Path(entry, "nvidia", "cuda_runtime", "lib") for entry in sys.path]
    folders += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), sub) for sub in ("lib64", "lib")]
    return next((folder for folder in folders if (folder / "libcudart.so.13").is_file()), None)


def _compiled(names: list[str], cache: Path) -> Path:
    """A folder with these libraries, compiled once; its name tells their sources."""
    text = "".join(name + _SOURCES[name] for name in names)
    folder = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise CannotRun(
            "explain needs a C compiler (cc, gcc or clang) to make stand-ins for the CUDA driver's libraries."
        )
    cache.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=cache))
    for name in names:
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{name}", "-o", str(fresh / name)]
        done = subprocess.run(command, input=_SOURCES[name], capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(fresh)
            raise CannotRun(f"{compiler} could not make a stand-in for {name}: {done.stderr.strip()[-300:]}")
    try:
        fresh.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(fresh)
    return folder
