"""Model folders with the configurations of vllm_b200_plugin.model_shapes, whole or with fewer layers."""

import copy
import json
from pathlib import Path
from typing import Any

from benchmarks.model_size import default_layers
from vllm_b200_plugin.model_shapes import MODEL_SHAPES


def shape(name: str, num_layers: int | None = None) -> dict[str, Any]:
    """The configuration of MODEL_SHAPES[name] with num_layers layers; without it, as many as let two engines fit.

    A cut model keeps the dense layers that come before its experts, but one at most.
    """
    config = copy.deepcopy(MODEL_SHAPES[name])
    layers = default_layers(config) if num_layers is None else num_layers
    if layers < config["num_hidden_layers"] and "first_k_dense_replace" in config:
        config["first_k_dense_replace"] = min(1, config["first_k_dense_replace"])
        if num_layers is None:
            layers = default_layers(config)
    config["num_hidden_layers"] = layers
    return config


def write_model(name: str, directory: Path, num_layers: int | None = None) -> Path:
    """Write shape(name, num_layers) as config.json and return its folder."""
    path = directory / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(shape(name, num_layers), indent=1))
    return path
