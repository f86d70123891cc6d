"""What can be switched: the features of this plugin, each with what it changes and what it needs.

Importing this module imports neither torch nor vLLM.
"""

import logging
import os
from dataclasses import dataclass

_logger = logging.getLogger("vllm.b200")


class FeatureUnavailable(RuntimeError):
    """Why a feature cannot be applied here and, where there is something to do, what; vLLM keeps its own kernels."""


class NotForThisPlatform(FeatureUnavailable):
    """The feature is for another kind of device. Nothing is missing, so VLLM_B200_STRICT does not mind."""


@dataclass(frozen=True)
class Feature:
    """One switch.

    module: integration module whose apply() puts the feature in place, or raises FeatureUnavailable.
    after: vLLM module that apply() changes; the feature waits until vLLM has imported it.
    in_graphs: whether what vLLM compiles depends on it, so that it is part of the compile-cache key.
    """

    name: str
    changes: str
    needs: str
    module: str
    after: str
    in_graphs: bool = True


FEATURES: tuple[Feature, ...] = (
    Feature(
        name="fp8_block_linear",
        changes="FP8 block-scaled linear layers: our activation quantisation in one op with DeepGEMM, CUTLASS or "
        "Triton; on CPU the reference with real W8A8 arithmetic",
        needs="on a GPU: the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0",
        module="vllm_b200_plugin.integration.linear_fp8",
        after="vllm.model_executor.kernels.linear",
    ),
    Feature(
        name="group_quant_ops",
        changes="vLLM's own per-token-group quantisation ops (fp8, fp8 packed, int8), wherever vLLM calls them",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0",
        module="vllm_b200_plugin.integration.quant_ops",
        after="vllm._custom_ops",
    ),
    Feature(
        name="cpu_fp8_moe",
        changes="FP8 block-scaled experts on CPU: the reference with real W8A8 arithmetic, on any processor",
        needs="vLLM's CPU platform",
        module="vllm_b200_plugin.integration.moe_fp8",
        after="vllm.model_executor.layers.fused_moe.oracle.fp8",
    ),
    Feature(
        name="startup_report",
        changes="nothing that runs: once a model is loaded, the log has a line for each kind of layer with its kernel, "
        "and VLLM_B200_REPORT=FILE gets the same as JSON",
        needs="nothing",
        module="vllm_b200_plugin.integration.startup_report",
        after="vllm.model_executor.model_loader.base_loader",
        in_graphs=False,
    ),
)


def strict() -> bool:
    """Whether VLLM_B200_STRICT makes an error of every reason for which a feature cannot be applied."""
    return os.environ.get("VLLM_B200_STRICT", "").strip().lower() not in ("", "0", "false", "no", "off")


def enabled() -> tuple[Feature, ...]:
    """The features that VLLM_B200_DISABLE (comma-separated names) leaves on.

    Raises ValueError for a name that is no feature's when strict(); otherwise warns and ignores it.
    """
    disabled = {name.strip() for name in os.environ.get("VLLM_B200_DISABLE", "").split(",")} - {""}
    if unknown := disabled - {feature.name for feature in FEATURES}:
        message = (
            f"VLLM_B200_DISABLE names no feature of vllm-b200-plugin: {', '.join(sorted(unknown))}; "
            f"the features are {', '.join(feature.name for feature in FEATURES)}"
        )
        if strict():
            raise ValueError(message)
        _logger.warning("[b200] %s", message)
    return tuple(feature for feature in FEATURES if feature.name not in disabled)
