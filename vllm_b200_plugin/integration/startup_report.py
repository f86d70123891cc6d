"""Feature startup_report: once a model is loaded, its table of kernels in the log, and as JSON where that is asked for.

It changes nothing of what vLLM runs.
"""

import dataclasses
import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from vllm_b200_plugin import __version__, features, vllm_compat
from vllm_b200_plugin.integration import layer_table
from vllm_b200_plugin.integration.layer_table import Row

_logger = logging.getLogger("vllm.b200")
_FILE = "VLLM_B200_REPORT"
# All models of this process, a drafter after its target.
_models: list[dict[str, Any]] = []


def apply() -> None:
    """Wrap the method by which vLLM's loaders load a model, once."""
    loader = vllm_compat.BASE_LOADER.get()
    original = loader.load_model
    if hasattr(original, "_vllm_b200"):
        return

    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(self, *args, **kwargs)
        try:
            report(model)
        except Exception as error:
            if features.strict():
                raise
            _logger.warning("[b200] no table of kernels: %s: %s", type(error).__name__, error)
        return model

    load_model._vllm_b200 = True  # type: ignore[attr-defined]
    loader.load_model = load_model


def report(model: torch.nn.Module) -> None:
    """Log one line for each kind of layer; with VLLM_B200_REPORT=FILE, rank 0 also writes them there."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    rows = layer_table.rows(model)
    for row in rows:
        _logger.info("[b200] %s", line(row))
    _models.append(
        {
            "architecture": type(model).__name__,
            "capability": vllm_compat.capability(),
            "plugin": __version__,
            "rows": [dataclasses.asdict(row) for row in rows],
            "overridden_ops": layer_table.overridden_ops(),
        }
    )
    if path := os.environ.get(_FILE):
        Path(path).write_text(json.dumps({"models": _models}, indent=1) + "\n")


def line(row: Row) -> str:
    """For example: 48 x model.layers.*.self_attn.o_proj N=2048 K=4096: Class (1: flashinfer_swap_ab, 16: deep_gemm)."""
    parts: list[tuple[int, str]] = []
    for tokens, choice in row.choices.items():
        if not parts or parts[-1][1] != choice.kernel:
            parts.append((tokens, choice.kernel))
    branches = ", ".join(f"{tokens}: {kernel}" if len(parts) > 1 else kernel for tokens, kernel in parts)
    if branches == row.kernel:
        branches = ""
    text = f"{row.count} x {row.name} {row.shape}: {row.kernel}" + (f" ({branches})" if branches else "")
    return text + (f", {row.quantiser}" if row.quantiser else "")
