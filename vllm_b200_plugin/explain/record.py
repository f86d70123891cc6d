"""Notes which candidates vLLM asks while it builds a layer, and why it passes them over."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from vllm_b200_plugin import vllm_compat

# id of the layer under construction -> {candidate: reason}; the layers stay alive as long as the model does
passed_over: dict[int, dict[str, str]] = {}


def install(platform: Any) -> None:
    """Listen to vLLM's linear kernels, experts and attention backends."""
    from vllm.model_executor.kernels import linear

    experts_base = vllm_compat.EXPERTS_BASE.get()
    lists = [value for name, value in vars(linear).items() if name.startswith("_POSSIBLE_") and isinstance(value, dict)]
    kernels = {kernel for by_platform in lists for kernel in by_platform.get(platform._enum, [])}
    for base in {base for kernel in kernels for base in kernel.__mro__ if base is not object}:
        for question in ("is_supported", "can_implement"):
            if question in vars(base):
                setattr(base, question, _classmethod(vars(base)[question], kernels))
    experts_base.__init_subclass__ = classmethod(_listen_to_experts)
    for experts in _with_subclasses(experts_base):
        _listen_to_experts(experts)
    backends = type(platform).get_valid_backends
    type(platform).get_valid_backends = classmethod(lambda cls, *args, **kwargs: _attention(backends(*args, **kwargs)))


def _with_subclasses(cls: Any) -> list[Any]:
    below: list[Any] = cls.__subclasses__()
    return [cls, *(found for sub in below for found in _with_subclasses(sub))]


def _classmethod(original: Any, kernels: set[type]) -> Any:
    function: Callable[..., Any] = original.__func__

    def ask(cls: type, *args: Any, **kwargs: Any) -> Any:
        answer = function(cls, *args, **kwargs)
        if cls in kernels and not answer[0]:
            _note(cls.__name__, answer[1])
        return answer

    return type(original)(ask) if isinstance(original, classmethod) else original


def _listen_to_experts(cls: Any, **kwargs: Any) -> None:
    original = vars(cls).get("is_supported_config")
    if original is None or getattr(original.__func__, "_listens", False):
        return
    function = original.__func__

    def ask(asked: type, *args: Any, **kwargs: Any) -> Any:
        answer = function(asked, *args, **kwargs)
        if not answer[0]:
            _note(asked.__name__, answer[1])
        return answer

    ask._listens = True  # type: ignore[attr-defined]
    cls.is_supported_config = staticmethod(ask)


def _attention(answer: Any) -> Any:
    valid, invalid = answer
    best = min((candidate.priority for candidate in valid), default=len(invalid))
    for backend, (priority, reasons) in sorted(invalid.items(), key=lambda item: item[1][0]):
        if priority < best:
            _note(backend.name, ", ".join(reasons))
    return answer


def _note(candidate: str, reason: Any) -> None:
    layer = _layer_under_construction(sys._getframe(1))
    # A class that asks its base is noted twice; the last answer is its own.
    passed_over.setdefault(id(layer), {})[candidate] = " ".join(str(reason or "gave no reason").split()).rstrip(".")


def _layer_under_construction(frame: FrameType | None) -> torch.nn.Module | None:
    """The innermost module whose method is running: kernels are chosen while a layer's __init__ runs."""
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module):
            return owner
        frame = frame.f_back
    return None
