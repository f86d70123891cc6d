"""What vLLM calls through the entry point group vllm.general_plugins."""

import importlib
import logging
import threading

from vllm_b200_plugin import __version__, features, post_import
from vllm_b200_plugin.features import Feature, FeatureUnavailable, NotForThisPlatform

_logger = logging.getLogger("vllm.b200")
_lock = threading.RLock()
_results: dict[str, str] = {}

APPLIED, PENDING, DISABLED = "applied", "pending", "disabled"
# Ours, so that vLLM neither warns of them nor refuses them as unknown variables of its own.
_ENVIRONMENT = ("VLLM_B200_DISABLE", "VLLM_B200_ENABLE", "VLLM_B200_STRICT", "VLLM_B200_CUDA_ARCHS", "VLLM_B200_REPORT")
_COMPILE_KEY = "VLLM_B200_PLUGIN"


def register() -> None:
    """Put every enabled feature in place, or let it wait for the vLLM module that it changes.

    Runs in every vLLM process, any number of times; starts no CUDA. Raises only with VLLM_B200_STRICT=1.
    """
    with _lock:
        try:
            enabled = features.enabled()
            for feature in features.FEATURES:
                if feature not in enabled:
                    _results.setdefault(feature.name, DISABLED)
            _join_compile_key()
            for feature in enabled:
                if feature.name not in _results:
                    _results[feature.name] = PENDING
                    post_import.when_imported(feature.after, lambda feature=feature: _apply(feature))  # type: ignore[misc]
        except Exception as error:
            if features.strict():
                raise
            _logger.warning("[b200] the plugin is off: %s", _in_words(error))


def results() -> dict[str, str]:
    """Feature -> "applied", "pending" (vLLM has not imported what it changes), "disabled", or why it is not applied."""
    return dict(_results)


def compile_key() -> str:
    """Plugin version and the features that may have changed what vLLM compiles."""
    in_graphs = {feature.name for feature in features.FEATURES if feature.in_graphs}
    names = sorted(name for name, state in _results.items() if state in (APPLIED, PENDING) and name in in_graphs)
    return f"{__version__}:{','.join(names)}"


def _apply(feature: Feature) -> None:
    try:
        module = importlib.import_module(feature.module)
        module.apply()
    except NotForThisPlatform as reason:
        _results[feature.name] = str(reason)
        _logger.debug("[b200] %s: %s", feature.name, reason)
    except Exception as error:
        _results[feature.name] = _in_words(error)
        if features.strict():
            raise
        _logger.warning("[b200] %s is off, vLLM keeps its own kernels: %s", feature.name, _in_words(error))
    else:
        _results[feature.name] = APPLIED
        if choice := getattr(module, "choice", None):
            importlib.import_module("vllm_b200_plugin.integration.report").choices[feature.name] = choice


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, FeatureUnavailable) else f"{type(error).__name__}: {error}"


def _join_compile_key() -> None:
    """vLLM's caches of compiled graphs know nothing of plugins: a graph that calls our ops must not outlive them."""
    from vllm_b200_plugin import vllm_compat

    variables = vllm_compat.ENVIRONMENT_VARIABLES.get()
    variables[_COMPILE_KEY] = compile_key
    for name in _ENVIRONMENT:
        variables.setdefault(name, lambda: None)
