"""Feature router_gate: the router of MoE layers for few tokens, the gate and, where vLLM's runner lets it, with it the
selection of experts, in one kernel or in two that overlap.

The gate is vLLM's GateLinear, replaced through vLLM's registry of pluggable layers. It hands its router the experts of
every token along with the logits, as an attribute of the tensor: vLLM's runner calls the gate and the router one after
the other in one op that torch.compile does not look into. Logits that went another way (through a dispatch to other
ranks, or to a kernel that routes by itself) come without, and vLLM selects as before.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_b200_plugin import dispatch, vllm_compat
from vllm_b200_plugin.features import NotForThisPlatform
from vllm_b200_plugin.integration import library, report
from vllm_b200_plugin.ops import router as router_ops
from vllm_b200_plugin.ops._library import torch_library
from vllm_b200_plugin.ops.topk import LOGITS_DTYPES, Scoring, Selection, select_experts

_LAYER_KIND = "MoE router gate"
_CARRIED, _GATE = "_b200_selected", "_b200_gate"

_Base: Any = vllm_compat.GATE_LINEAR.get()
_Unquantized: Any = vllm_compat.UNQUANTIZED_LINEAR.get()
_Router: Any = vllm_compat.FUSED_TOPK_ROUTER.get()
_BiasRouter: Any = vllm_compat.FUSED_TOPK_BIAS_ROUTER.get()
_GroupedRouter: Any = vllm_compat.GROUPED_TOPK_ROUTER.get()
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

    @property
    def bias(self) -> torch.Tensor | None:
        """e_score_correction_bias, as it is now."""
        bias = getattr(self.router, "e_score_correction_bias", None)
        return None if bias is None else bias.data

    def padding(self, num_tokens: int) -> torch.Tensor | None:
        """The rows that get no experts, where the router leaves out any."""
        return _padding_mask(num_tokens) if getattr(self.router, "skip_padding", True) else None


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
        kernel = dispatch.VLLM
        if _takes(x, self.weight, out_dtype):
            selection = None if self._consumer is None else self._consumer.selection
            kernel = self._plan(x.shape[0], out_dtype, selection).kernel
        if kernel != dispatch.VLLM:
            logits = self._route(x, out_dtype, kernel)
            result = self._in_vllm_form(logits)
        else:
            result = super().forward(x)
            logits = result[0] if isinstance(result, tuple) else result
        if self._may_carry and not self._asked:
            setattr(logits, _GATE, self)
        return result

    def _plan(self, num_tokens: int, out_dtype: torch.dtype, selection: Selection | None) -> dispatch.Choice:
        """What runs for so many tokens, with the selection if there is one; dispatch.VLLM: vLLM's gate."""
        low_latency = (
            out_dtype == torch.float32
            and getattr(self, "allow_ll_bf16_gemm", False)
            and num_tokens <= self.LL_BF16_MAX_TOKENS
        )
        if selection is not None:
            together = _together(num_tokens, self.weight, selection)
            # The split router was not compared with vLLM's low-latency kernel.
            if together.kernel == dispatch.ROUTER or (together.kernel == dispatch.SPLIT_ROUTER and not low_latency):
                return together
        num_experts, hidden_size = self.weight.shape
        return dispatch.gate(num_tokens, num_experts, hidden_size, low_latency)

    def wanted_by(self, consumer: Consumer | None) -> None:
        """From now on a router's selection is made along with the logits; None: by the router itself."""
        self._asked, self._consumer = True, consumer
        if consumer is None:
            report.chosen("MoE selection behind the gate", "the router's own", "it does what our kernels do not")
        else:
            reason = _together(router_ops.MAX_TOKENS, self.weight, consumer.selection).reason
            report.chosen("MoE selection behind the gate", "ours", reason)

    def _route(self, x: torch.Tensor, out_dtype: torch.dtype, kernel: str) -> torch.Tensor:
        consumer = self._consumer
        if consumer is None:
            return router_ops.router_gate(x, self.weight, out_dtype, pdl=True)
        selection, bias = consumer.selection, consumer.bias
        extra = {"ids_dtype": consumer.ids_dtype, "is_padding": consumer.padding(x.shape[0]), "pdl": True}
        if kernel == dispatch.GATE:
            logits = router_ops.router_gate(x, self.weight, out_dtype, pdl=True)
            weights, ids = select_experts(logits, selection, bias, **extra)
        else:
            router = router_ops.router if kernel == dispatch.ROUTER else router_ops.split_router
            logits, weights, ids = router(x, self.weight, selection, bias, logits_dtype=out_dtype, **extra)
        setattr(logits, _CARRIED, Selected(consumer.router, weights, ids))
        return logits

    def _in_vllm_form(self, logits: torch.Tensor) -> Any:
        return (logits, None) if self.return_bias else logits


def _together(num_tokens: int, weight: torch.Tensor, selection: Selection) -> dispatch.Choice:
    """The kernels of a gate [num_experts, hidden_size] and the selection; GATE: one for each."""
    num_experts, hidden_size = weight.shape
    one_cluster, split = (
        refusal(num_experts, selection) is None for refusal in (router_ops.fused_refusal, router_ops.split_refusal)
    )
    return dispatch.fused_router(num_tokens, num_experts, hidden_size, one_cluster, split)


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


def _selection(router: Any, num_experts: int) -> Selection | None:
    """What a router does by vLLM's CUDA kernels, in our terms; None where it does more, as a subclass may."""
    rule = _RULES.get(type(router))
    selection = None if rule is None else rule(router, num_experts)
    return selection if selection is not None and selection.refusal(num_experts) is None else None


def _plain(router: Any, num_experts: int) -> Selection | None:
    scoring = {"softmax": Scoring.SOFTMAX, "sigmoid": Scoring.SIGMOID}.get(router.scoring_func)
    return None if scoring is None else Selection(router.top_k, scoring, renormalize=router.renormalize)


def _biased(router: Any, num_experts: int) -> Selection | None:
    more = router._hash_indices_table is not None or router.bias_vl is not None or router.num_fused_shared_experts
    bias, selection = router.e_score_correction_bias, _plain(router, num_experts)
    if more or selection is None or bias is None or bias.dtype != torch.float32:
        return None
    if selection.scoring is Scoring.SOFTMAX and router.routed_scaling_factor != 1.0:
        return None  # vLLM rounds the weights once more
    return replace(selection, scale=router.routed_scaling_factor)


def _grouped(router: Any, num_experts: int) -> Selection | None:
    """Where vLLM's kernel for few experts runs: its other one rounds scores to the dtype of the logits."""
    bias, groups, kept, topk = (
        router.e_score_correction_bias,
        router.num_expert_group,
        router.topk_group,
        router.top_k,
    )
    enabled = vllm_compat.ENVS.get().VLLM_USE_FUSED_MOE_GROUPED_TOPK and router.scoring_func == "sigmoid"
    if not enabled or bias is None or bias.dtype not in LOGITS_DTYPES or num_experts % groups or topk > 8:
        return None
    size = num_experts // groups
    if groups > 1 and (num_experts > 256 or size > 32 or kept > 4 or kept * size > 128):
        return None
    return Selection(topk, Scoring.TANH_SIGMOID, router.renormalize, router.routed_scaling_factor, groups, kept)


_RULES = {_Router: _plain, _BiasRouter: _biased, _GroupedRouter: _grouped}


def _carry(compute_routing: Any) -> Any:
    """A router's _compute_routing, but for logits that come with their experts."""

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
        if gate is not None:
            selection = _selection(self, router_logits.shape[1])
            gate.wanted_by(None if selection is None else Consumer(self, selection, ids_dtype))
        return compute_routing(self, hidden_states, router_logits, indices_type, **kwargs)

    carried.b200_original = compute_routing  # type: ignore[attr-defined]
    return carried


def choice(layer: torch.nn.Module, num_tokens: int) -> dispatch.Choice | None:
    """What a gate of ours runs for so many tokens, or the router behind one; None where that is vLLM's."""
    gate = layer if isinstance(layer, B200GateLinear) else getattr(layer, "gate", None)
    if not isinstance(gate, B200GateLinear) or not gate._candidate:
        return None
    out_dtype = gate.out_dtype or torch.bfloat16
    if router_ops.refusal(num_tokens, gate.weight, out_dtype) is not None:
        return None
    if gate is layer:
        return _gate_choice(gate, num_tokens, out_dtype)
    selection = _selection(getattr(layer, "router", None), gate.weight.shape[0])
    if selection is None or not gate._may_carry:
        return None
    plan = gate._plan(num_tokens, out_dtype, selection)
    return None if plan.kernel == dispatch.VLLM else _behind_the_gate(plan)


def _gate_choice(gate: B200GateLinear, num_tokens: int, out_dtype: torch.dtype) -> dispatch.Choice | None:
    """Of the gate on its own, which does not know its router."""
    fused = dispatch.fused_router(num_tokens, *gate.weight.shape)
    if gate._may_carry and fused.kernel == dispatch.ROUTER:
        return dispatch.Choice(fused.kernel, "with the selection where vLLM's runner lets it, else the gate alone")
    plan = gate._plan(num_tokens, out_dtype, None)
    return None if plan.kernel == dispatch.VLLM else plan


def _behind_the_gate(plan: dispatch.Choice) -> dispatch.Choice:
    """The router's part of a plan."""
    kernel = dispatch.TOPK if plan.kernel == dispatch.GATE else plan.kernel
    return dispatch.Choice(kernel, f"ours with the gate: {plan.reason}")


def apply() -> None:
    """Put our gate in place of vLLM's, once. Raises FeatureUnavailable where that cannot be done."""
    platform = vllm_compat.CURRENT_PLATFORM.get()
    if not platform.is_cuda():
        raise NotForThisPlatform(f"for CUDA, vLLM runs on {platform.device_name}")
    library.require()
    put_in_place()


def put_in_place() -> None:
    """Register our gate with vLLM's registry of layers, and let its routers take what the gate hands them."""
    registry = vllm_compat.PLUGGABLE_LAYERS.get()
    if registry.get("GateLinear") is not B200GateLinear:
        vllm_compat.PLUGGABLE_LAYER.get().register_oot(B200GateLinear, name="GateLinear")
    for router in _RULES:
        if not hasattr(router._compute_routing, "b200_original"):
            router._compute_routing = _carry(router._compute_routing)
