"""What lies between the two products of a layer's experts, in vLLM's configs and as our kernels take it."""

from typing import Any

import torch

# Of vLLM's swigluoai_and_mul, which takes no others.
GPT_OSS: dict[str, Any] = {"activation": "silu_clamped", "limit": 7.0, "alpha": 1.702, "beta": 1.0}


def activation_arguments(moe_config: Any, quant_config: Any = None) -> dict[str, Any] | None:
    """The arguments of few_tokens_moe for a layer's activation, or None for one that it does not have.

    As vLLM's apply_moe_activation: a limit, alpha and beta of quant_config come before those of moe_config, and
    activations that have none in vLLM take no notice of them. quant_config: None before the weights are loaded.
    """
    name = getattr(moe_config.activation, "value", moe_config.activation)
    limit, alpha, beta = (
        _first(getattr(quant_config, f"gemm1_{of_weights}", None), getattr(moe_config, f"swiglu_{of_layer}", None))
        for of_weights, of_layer in (("clamp_limit", "limit"), ("alpha", "alpha"), ("beta", "beta"))
    )
    if name in ("gelu", "gelu_tanh") or (name == "silu" and limit is None):
        return {"activation": name}
    if name == "swigluoai":
        return GPT_OSS | {"interleaved": True}
    if name == "silu":
        alpha, beta = 1.0, 0.0
    elif name != "swigluoai_uninterleave":
        return None
    numbers = {"limit": limit, "alpha": _first(alpha, 1.0), "beta": _first(beta, 0.0)}
    if not all(isinstance(number, int | float) for number in numbers.values()) or not numbers["limit"] > 0:
        return None
    return {"activation": "silu_clamped", **{key: float(number) for key, number in numbers.items()}}


def bias_refusal(moe_config: Any, quant_config: Any, rows: tuple[int, int]) -> str | None:
    """Why our kernels do not take a layer's biases, or None where they do or it has none. rows: of w13 and w2."""
    biases = (quant_config.w1_bias, quant_config.w2_bias)
    if all(bias is None for bias in biases):
        return "the layer's biases are not where ours look for them" if moe_config.has_bias else None
    for bias, size in zip(biases, rows, strict=True):
        if bias is None:
            continue
        shape = (moe_config.num_local_experts, size)
        if bias.dtype != torch.bfloat16 or tuple(bias.shape) != shape or not bias.is_contiguous():
            return f"ours need biases in bfloat16 of the shape {shape}, got {bias.dtype} {tuple(bias.shape)}"
    return None


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
