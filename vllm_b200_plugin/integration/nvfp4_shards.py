"""Feature nvfp4_shard_scales: NVFP4 layers that vLLM fuses from parts with global scales of their own, computed right.

vLLM fuses q, k and v, and gate and up, and takes one global scale for all of the fused weight: of a linear layer the
largest number that is stored (a reciprocal in compressed-tensors, so the smallest scale), of experts the gate's. The
other parts are then off by a factor, whichever kernel runs. Here the kernel gets one scale as before, and

- of a linear layer, the columns of the result are multiplied by what their part's scale is of that one: one rounding
  more, in layers that need it alone;
- of experts, silu(gate) * up is linear in up, so that its factor goes into the scales of the down projection.

A fused layer quantises its input once. Where its parts' input scales differ, it takes the one that saturates nowhere.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.integration import report

_KIND = "NVFP4 layers fused from unlike scales"


def apply() -> None:
    """Put our step before vLLM's processing of loaded weights, once."""
    process = vllm_compat.PROCESS_WEIGHTS.get()
    if getattr(process, "_vllm_b200", False):
        return

    @functools.wraps(process)
    def both(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _made_up_weights():
            for module in model.modules():
                prepare(module)
        return process(model, *args, **kwargs)

    both._vllm_b200 = True  # type: ignore[attr-defined]
    vllm_compat.PROCESS_WEIGHTS.replace(both)


def _made_up_weights() -> bool:
    """Whether the weights are noise, for a benchmark, in which every layer's parts would be unlike."""
    config = vllm_compat.CURRENT_CONFIG.get()()
    return config is not None and config.load_config.load_format == "dummy"


def prepare(module: torch.nn.Module) -> None:
    """Give the parts of a layer, as it was loaded, one global scale, and have the results corrected. Others stay."""
    if hasattr(module, "w13_weight_scale_2") or hasattr(module, "w13_weight_global_scale"):
        _prepare_experts(module)
    elif hasattr(module, "weight_scale_2") or hasattr(module, "weight_global_scale"):
        _prepare_linear(module)


def _prepare_linear(layer: Any) -> None:
    # ModelOpt stores what values are multiplied by, compressed-tensors what they were multiplied by.
    stores_factors = hasattr(layer, "weight_scale_2")
    stored = (layer.weight_scale_2 if stores_factors else layer.weight_global_scale).data
    widths = getattr(layer, "logical_widths", None)
    owner = layer.quant_method if stores_factors else getattr(layer, "scheme", None)
    method = "apply" if stores_factors else "apply_weights"
    if not widths or stored.shape != (len(widths),) or not hasattr(owner, method):
        return
    inputs = getattr(layer, "input_global_scale", None)
    if not stores_factors and inputs is not None and inputs.numel() == len(widths):
        inputs.data.fill_(inputs.min())
    if (stored == stored[0]).all() or not _usable(stored):
        return
    factors = stored.float() if stores_factors else 1 / stored.float()
    smallest = factors.min()
    columns = (factors / smallest).repeat_interleave(torch.tensor(widths, device=stored.device))
    layer.register_buffer("b200_column_factor", columns, persistent=False)
    stored.fill_(stored[factors.argmin()])
    setattr(owner, method, _with_columns(getattr(owner, method)))
    report.chosen(_KIND, "linear", "the columns of a part are multiplied by its scale over that of the kernel")


def _usable(scales: torch.Tensor) -> bool:
    """Whether all are scales, so that one may be divided by another."""
    return bool((scales.isfinite() & (scales > 0)).all())


def _with_columns(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def corrected(layer: Any, x: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = run(layer, x, None)
        wide = y.float() * layer.b200_column_factor
        return (wide if bias is None else wide + bias.float()).to(y.dtype)

    return corrected


def _prepare_experts(layer: Any) -> None:
    stores_factors = hasattr(layer, "w13_weight_scale_2")
    names = ("weight_scale_2", "input_scale") if stores_factors else ("weight_global_scale", "input_global_scale")
    w13, w2 = (getattr(layer, f"{part}_{names[0]}").data for part in ("w13", "w2"))
    if w13.dim() != 2 or w13.shape[1] != 2 or torch.equal(w13[:, 0], w13[:, 1]):
        return
    activation = getattr(getattr(layer, "activation", None), "value", None)
    if activation != "silu" or getattr(layer, "swiglu_limit", None) is not None:
        report.chosen(
            _KIND, "vLLM", f"experts with {activation} are not linear in up: the gate's scale is used for both"
        )
        return
    if not _usable(w13):
        return
    gate, up = w13.float().unbind(1)
    factor = up / gate if stores_factors else gate / up
    w2.mul_(factor if stores_factors else 1 / factor)
    if (inputs := getattr(layer, f"w2_{names[1]}", None)) is not None:
        # The kernel sees silu(gate) * up / factor. With the input scales of all ranks, whose experts are not these, all
        # get what saturates nowhere.
        own = factor if inputs.shape == w2.shape else factor.min().clamp(max=1)
        inputs.data.mul_(1 / own if stores_factors else own)
    w13[:, 1] = w13[:, 0]
    report.chosen(_KIND, "experts", "the scale of up over that of gate goes into the down projection")
