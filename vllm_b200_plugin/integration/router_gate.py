"""Feature router_gate: the router of MoE layers for few tokens, the gate and, where vLLM's runner lets it, with it the
selection of experts, in one kernel or in two that overlap.

The gate is vLLM's GateLinear, replaced through vLLM's registry of pluggable layers. It hands its router the experts of
every token along with the logits, as an attribute of the tensor: vLLM's runner calls the gate and the router one after
the other in one op that torch.compile does not look into. Logits that went another way (through a dispatch to other
ranks, or to a kernel that routes by itself) come without, and vLLM selects as before.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from vllm_b200_plugin import dispatch, vllm_compat
from vllm_b200_plugin.features import NotForThisPlatform
from vllm_b200_plugin.integration import library, report
from vllm_b200_plugin.ops import router as router_ops
from vllm_b200_plugin.ops._library import torch_library
from vllm_b200_plugin.ops.topk import Scoring, Selection, select_experts

_LAYER_KIND = "MoE router gate"
_CARRIED, _GATE = "_b200_selected", "_b200_gate"

_Base: Any = vllm_compat.GATE_LINEAR.get()
_Unquantized: Any = vllm_compat.UNQUANTIZED_LINEAR.get()
_Router: Any = vllm_compat.FUSED_TOPK_ROUTER.get()
_padding_mask: Any = vllm_compat.PADDING_MASK.get()


@dataclass(frozen=True)
class Selected:
    """The experts that came with the logits, and the router that they are for."""

    router: Any
    weights: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True)
class Consumer:
    """The router that selects by a gate's logits, as it asked the first time."""

    router: Any
    selection: Selection
    ids_dtype: torch.dtype


class B200GateLinear(_Base):
    """Our kernels up to 32 tokens, vLLM's beyond, and for layers that ours do not take."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._consumer: Consumer | None = None
        self._asked = False
        problem = _refusal(self)
        self._candidate = problem is None
        # A LoRA of the gate changes the logits in place, and what was selected by them would not follow.
        config = vllm_compat.CURRENT_CONFIG.get()()
        self._may_carry = config is not None and config.lora_config is None
        kernel = "our gate up to 32 tokens" if problem is None else "vLLM's GateLinear"
        report.chosen(_LAYER_KIND, kernel, problem or "{}x{} bfloat16".format(*self.weight.shape))

    def forward(self, x: torch.Tensor) -> Any:
        """x [num_tokens, hidden_size] -> logits [num_tokens, num_experts], with None where vLLM wants a bias."""
        out_dtype = x.dtype if self.out_dtype is None else self.out_dtype
        if not self._candidate or x.dim() != 2 or x.dtype != torch.bfloat16 or out_dtype not in router_ops.OUT_DTYPES:
            return super().forward(x)
        if torch.compiler.is_compiling():
            # What is traced must not depend on the number of tokens.
            return self._in_vllm_form(torch.ops.vllm_b200.gate_linear(x, self.weight, out_dtype))
        if _takes(x, self.weight, out_dtype) and self._is_faster(x.shape[0], out_dtype):
            logits = self._route(x, out_dtype)
            result = self._in_vllm_form(logits)
        else:
            result = super().forward(x)
            logits = result[0] if isinstance(result, tuple) else result
        if self._may_carry and not self._asked:
            setattr(logits, _GATE, self)
        return result

    def _is_faster(self, num_tokens: int, out_dtype: torch.dtype) -> bool:
        """Whether ours is, the gate alone or with the selection in one kernel, than what vLLM would run."""
        low_latency = (
            out_dtype == torch.float32
            and getattr(self, "allow_ll_bf16_gemm", False)
            and num_tokens <= self.LL_BF16_MAX_TOKENS
        )
        num_experts, hidden_size = self.weight.shape
        fused = self._consumer and dispatch.fused_router(num_tokens, num_experts, hidden_size).kernel == dispatch.ROUTER
        return bool(fused) or dispatch.gate(num_tokens, num_experts, hidden_size, low_latency).kernel == dispatch.GATE

    def wanted_by(self, consumer: Consumer) -> None:
        """From now on the router's selection is made along with the logits, where ours can."""
        self._asked = True
        num_experts, hidden_size = self.weight.shape
        problem = consumer.selection.refusal(num_experts)
        self._consumer = consumer if problem is None else None
        reason = problem or dispatch.fused_router(router_ops.MAX_TOKENS, num_experts, hidden_size).reason
        report.chosen("MoE selection behind the gate", "ours" if problem is None else "the router's own", reason)

    def _route(self, x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        consumer = self._consumer
        if consumer is None:
            return router_ops.router_gate(x, self.weight, out_dtype, pdl=True)
        selection = consumer.selection
        extra = {"ids_dtype": consumer.ids_dtype, "is_padding": _padding_mask(x.shape[0]), "pdl": True}
        choice = dispatch.fused_router(x.shape[0], *self.weight.shape)
        if choice.kernel == dispatch.ROUTER and router_ops.fused_refusal(self.weight.shape[0], selection) is None:
            logits, weights, ids = router_ops.router(x, self.weight, selection, logits_dtype=out_dtype, **extra)
        else:
            logits = router_ops.router_gate(x, self.weight, out_dtype, pdl=True)
            weights, ids = select_experts(logits, selection, **extra)
        setattr(logits, _CARRIED, Selected(consumer.router, weights, ids))
        return logits

    def _in_vllm_form(self, logits: torch.Tensor) -> Any:
        return (logits, None) if self.return_bias else logits


def _takes(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> bool:
    """Whether our kernels take these rows."""
    if x.shape[0] > router_ops.MAX_TOKENS:
        return False
    rows = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return rows and router_ops.refusal(x.shape[0], weight, out_dtype) is None


def _refusal(layer: Any) -> str | None:
    """Why a gate stays vLLM's, or None."""
    if vllm_compat.ENVS.get().VLLM_BATCH_INVARIANT:
        return "batch invariance rules out a choice by the number of tokens"
    if not isinstance(layer.quant_method, _Unquantized):
        return "the gate is quantised"
    if layer.bias is not None:
        return "the gate has a bias"
    return router_ops.refusal(1, layer.weight, torch.float32)


torch_library.define("gate_linear(Tensor x, Tensor weight, ScalarType out_dtype) -> Tensor")


@torch.library.register_fake("vllm_b200::gate_linear", lib=torch_library)
def _gate_linear_fake(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


@torch.library.impl(torch_library, "gate_linear", "CPU")
@torch.library.impl(torch_library, "gate_linear", "CUDA")
def _gate_linear(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    if _takes(x, weight, out_dtype) and dispatch.gate(x.shape[0], *weight.shape).kernel == dispatch.GATE:
        return router_ops.router_gate(x, weight, out_dtype, pdl=True)
    if out_dtype == x.dtype or x.device.type == "cpu":
        return torch.nn.functional.linear(x, weight).to(out_dtype)
    return torch.mm(x, weight.t(), out_dtype=out_dtype)


def _selection(router: Any) -> Selection | None:
    """What a router does, in our terms; None for a subclass, which may do more."""
    if type(router) is not _Router or router.scoring_func not in ("softmax", "sigmoid"):
        return None
    scoring = Scoring.SOFTMAX if router.scoring_func == "softmax" else Scoring.SIGMOID
    return Selection(router.top_k, scoring, renormalize=router.renormalize)


def _carry(compute_routing: Any) -> Any:
    """vLLM's FusedTopKRouter._compute_routing, but for logits that come with their experts."""

    @functools.wraps(compute_routing)
    def carried(
        self: Any,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids_dtype = torch.int32 if indices_type is None else indices_type
        selected = getattr(router_logits, _CARRIED, None)
        if selected is not None and selected.router is self and selected.ids.dtype == ids_dtype:
            return selected.weights, selected.ids
        gate = getattr(router_logits, _GATE, None)
        if gate is not None and (selection := _selection(self)) is not None:
            gate.wanted_by(Consumer(self, selection, ids_dtype))
        return compute_routing(self, hidden_states, router_logits, indices_type, **kwargs)

    carried.b200_original = compute_routing  # type: ignore[attr-defined]
    return carried


def choice(layer: torch.nn.Module, num_tokens: int) -> dispatch.Choice | None:
    """What a gate of ours runs for so many tokens; None where that is vLLM's."""
    if not isinstance(layer, B200GateLinear) or not layer._candidate:
        return None
    out_dtype = layer.out_dtype or torch.bfloat16
    if router_ops.refusal(num_tokens, layer.weight, out_dtype) is not None:
        return None
    fused = dispatch.fused_router(num_tokens, *layer.weight.shape)
    if layer._may_carry and fused.kernel == dispatch.ROUTER:
        return dispatch.Choice(fused.kernel, "with the selection where vLLM's runner lets it, else the gate alone")
    if not layer._is_faster(num_tokens, out_dtype):
        return None
    return dispatch.gate(num_tokens, *layer.weight.shape)


def apply() -> None:
    """Put our gate in place of vLLM's, once. Raises FeatureUnavailable where that cannot be done."""
    platform = vllm_compat.CURRENT_PLATFORM.get()
    if not platform.is_cuda():
        raise NotForThisPlatform(f"for CUDA, vLLM runs on {platform.device_name}")
    library.require()
    replace()


def replace() -> None:
    """Register our gate with vLLM's registry of layers, and let its router take what the gate hands it."""
    registry = vllm_compat.PLUGGABLE_LAYERS.get()
    if registry.get("GateLinear") is not B200GateLinear:
        vllm_compat.PLUGGABLE_LAYER.get().register_oot(B200GateLinear, name="GateLinear")
    if not hasattr(_Router._compute_routing, "b200_original"):
        _Router._compute_routing = _carry(_Router._compute_routing)
