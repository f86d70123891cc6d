"""Runs a callback once a module has been imported, without importing it."""

import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_Callback = Callable[[], None]
_waiting: dict[str, list[_Callback]] = {}
_lock = threading.RLock()


def when_imported(module: str, callback: _Callback) -> None:
    """Call `callback` now if `module` has been imported, else right after its body has run.

    What the callback raises reaches the importer of `module`.
    """
    with _lock:
        if not _is_imported(module):
            _waiting.setdefault(module, []).append(callback)
            if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
                sys.meta_path.insert(0, _Finder())
            return
    callback()


def _is_imported(name: str) -> bool:
    module = sys.modules.get(name)
    # A module whose body is still running is in sys.modules, too, but what a callback wants may not be there yet.
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: wraps the loader that the other finders give for an awaited module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _waiting:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Finder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """The real loader, which the module gets back before its body runs, and then the callbacks."""

    def __init__(self, loader: Any):
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        with _lock:
            callbacks = _waiting.pop(module.__name__, [])
        for callback in callbacks:
            callback()
