"""Finds and loads the compiled CUDA library. Loading it registers the CUDA kernels of our torch ops."""

import ctypes
import functools
import json
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import torch

import vllm_b200_plugin

_NAME = "_C.abi3.so"
_HOW_TO_BUILD = (
    "install the CUDA 13 toolkit (nvcc) and run `pip install --no-build-isolation --force-reinstall --no-deps` "
    "on the source of vllm-b200-plugin"
)

# Schemas are defined here and not in C++, so that the CPU references work without the library.
torch_library = torch.library.Library("vllm_b200", "FRAGMENT")


@dataclass(frozen=True)
class LibraryStatus:
    """What became of the CUDA library.

    archs: the compute capabilities it holds code for, as nvcc names them ("90a").
    reason: why it is not loaded and what to do; empty when it is.
    """

    path: Path | None
    loaded: bool
    reason: str
    archs: tuple[str, ...] = ()
    cuda: str = ""
    torch: str = ""

    def covers(self, capability: tuple[int, int]) -> bool:
        """Whether the library has code for a GPU of this compute capability, for example (9, 0)."""
        return self.loaded and f"{capability[0]}{capability[1]}a" in self.archs


def _find() -> Path | None:
    """The library beside the modules, or, when a source tree hides the installed package, in the latter."""
    installed = Path(str(distribution("vllm-b200-plugin").locate_file("vllm_b200_plugin")))
    directories = (Path(vllm_b200_plugin.__file__).parent, installed)
    return next((path for directory in directories if (path := directory / _NAME).is_file()), None)


@functools.cache
def status() -> LibraryStatus:
    """Load the library, once in a process, and say how that went. Initialises no CUDA context."""
    path = _find()
    if path is None:
        return LibraryStatus(None, False, f"the CUDA library was not built: {_HOW_TO_BUILD}")
    info = json.loads((path.parent / "_build_info.json").read_text())
    built = {"archs": tuple(info["archs"]), "cuda": info["cuda"], "torch": info["torch"]}
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return LibraryStatus(path, False, f"the CUDA library does not load ({error}): {_HOW_TO_BUILD}", **built)
    return LibraryStatus(path, True, "", **built)


def override_op(namespace: str, op: str, dispatch_key: str) -> None:
    """Put our kernel before that of one of vLLM's ops; csrc/torch/overrides.cpp.

    Raises RuntimeError where the library is not loaded, or has nothing for the op.
    """
    if not status().loaded:
        raise RuntimeError(status().reason)
    if ctypes.CDLL(str(status().path)).vllm_b200_override_op(namespace.encode(), op.encode(), dispatch_key.encode()):
        raise RuntimeError(f"the CUDA library has no kernel for {op}")
