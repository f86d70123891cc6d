"""Skips GPU tests, with the reason, where they cannot run; holds the process that engines of evals' tests fork from."""

import functools
import os

import preloaded_worker
import pytest

# No test may look for a model on a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@functools.cache
def _why_no_gpu_tests() -> str:
    """Empty where GPU tests can run."""
    import torch

    from vllm_b200_plugin.ops import _library

    if not torch.cuda.is_available():
        return "no NVIDIA GPU, or a CPU build of torch"
    status = _library.status()
    if not status.loaded:
        return status.reason
    capability = torch.cuda.get_device_capability()
    if not status.covers(capability):
        return f"the CUDA library is built for {', '.join(status.archs)}, not for compute capability {capability}"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := _why_no_gpu_tests()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def dispatch_table(monkeypatch):
    """Takes the table of shapes for our GEMM that dispatch reads during a test."""
    from vllm_b200_plugin import dispatch

    def forget() -> None:
        dispatch.small_m_gemm.cache_clear()
        dispatch.small_m_limit.cache_clear()

    def use(table: dict) -> None:
        monkeypatch.setattr(dispatch, "TABLE", table)
        forget()

    yield use
    forget()


@pytest.fixture(scope="session")
def preloaded():
    """A stand-in for evals.processes.Worker."""
    pytest.importorskip("vllm")
    pytest.importorskip("lm_eval")
    with preloaded_worker.preloaded() as worker:
        yield worker
