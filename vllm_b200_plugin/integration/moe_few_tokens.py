"""Feature moe_few_tokens: FP8 block-scaled experts with few tokens run our two kernels. The features for experts of
other formats share what is here.

vLLM chooses an experts class for the layer as before. Ours is a class made from the chosen one: it takes the calls
with few tokens and hands the others to an object of the chosen class, with the quantisation that vLLM would have done
before. Layers that our kernels cannot do get that object itself. The branch on the number of tokens runs inside vLLM's
MoE op, which torch.compile does not look into.
"""

import functools
from collections.abc import Collection
from typing import Any

import torch

from vllm_b200_plugin import dispatch, vllm_compat
from vllm_b200_plugin.features import NotForThisPlatform
from vllm_b200_plugin.integration import library, report, vllm_branches
from vllm_b200_plugin.integration.moe_activation import activation_arguments, bias_refusal
from vllm_b200_plugin.ops.moe_few_tokens import (
    BLOCK_SHAPE,
    ExpertFormat,
    few_tokens_moe,
    few_tokens_refusal,
    scale_shapes,
    scratch_elements,
)
from vllm_b200_plugin.ops.nvfp4_experts import unpacked_shape

FORMATS = (ExpertFormat.FP8_BLOCK, ExpertFormat.FP8_BLOCK_POW2)
_applied: set[ExpertFormat] = set()  # those of the features in place
_NAME = "B200FewTokensExperts"  # for VLLM_DISABLED_KERNELS
KEPT = ("b200_w13", "b200_w13_scale", "b200_w2", "b200_w2_scale")  # buffers of an NVFP4 layer


class B200FewTokensExperts:
    """Mixin before `theirs`, the experts class that vLLM chose; subclass_of() makes the classes.

    up_first: whether vLLM reorders w13 for `theirs` so that the gate's rows come second. nvfp4: whether these are the
    experts of NVFP4 layers, whose weights we keep in a layout of our own.
    """

    theirs: Any
    up_first: bool
    nvfp4: bool
    _kept: tuple[torch.Tensor, ...] | None = None
    moe_config: Any
    quant_config: Any

    def __new__(cls, moe_config: Any, quant_config: Any, *args: Any, **kwargs: Any) -> Any:
        if reason := refusal(moe_config, quant_config, cls.up_first, cls.nvfp4):
            report.chosen(_layer_kind(format_of(quant_config, cls.nvfp4)), cls.theirs.__name__, f"vLLM's own: {reason}")
            return cls.theirs(moe_config, quant_config, *args, **kwargs)
        return super().__new__(cls)

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        super().__init__(moe_config, quant_config)  # type: ignore[call-arg]
        self._theirs = self.theirs(moe_config, quant_config)
        format = format_of(quant_config, self.nvfp4)
        assert format is not None  # or __new__ had refused
        self._format: ExpertFormat = format
        # FlashInfer's CUTLASS experts quantise by themselves, with plain scales.
        if self._format == ExpertFormat.FP8_BLOCK and not self.up_first and vllm_compat.UE8M0_SCALES.get()():
            self._format = ExpertFormat.FP8_BLOCK_POW2
        self._limit = _limit(moe_config, self._format)
        activation = activation_arguments(moe_config, quant_config)
        assert activation is not None  # likewise
        self._activation: dict[str, Any] = activation
        self._quantize_input = vllm_compat.MOE_QUANTIZE_INPUT.get()
        report.chosen(
            _layer_kind(self._format),
            _NAME,
            f"our two kernels up to {self._limit} tokens, else {self.theirs.__name__}, vLLM's choice",
        )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self._theirs.process_weights_after_loading(layer)
        self._kept = kept(layer)

    def _operands(self, w1: torch.Tensor, w2: torch.Tensor) -> tuple[Any, ...] | None:
        """w13 and w2 for our kernels, each with its scale; None where a layer has none."""
        if self.nvfp4:
            return self._kept
        w1_scale, w2_scale = _weight_scales(self.quant_config, self._format)
        return w1, w1_scale, w2, w2_scale

    @property
    def expects_unquantized_inputs(self) -> bool:
        """Ours quantises in the kernel; for theirs, apply() does what vLLM's prepare step would have done."""
        return True

    @property
    def post_gemm2_hook(self) -> Any:
        """What a model puts in place of the sum over experts, in vLLM 0.33: theirs runs it, and all calls then."""
        return getattr(self._theirs, "post_gemm2_hook", None)

    @post_gemm2_hook.setter
    def post_gemm2_hook(self, hook: Any) -> None:
        self._theirs.post_gemm2_hook = hook

    def workspace_shapes(self, *args: Any, **kwargs: Any) -> Any:
        return self._theirs.workspace_shapes(*args, **kwargs)

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> Any:
        """Write the layer's result, [num_tokens, hidden_size], to `output`."""
        num_tokens, topk = topk_ids.shape
        ours = num_tokens <= self._limit and self.post_gemm2_hook is None
        operands = self._operands(w1, w2) if ours else None
        if operands is not None and _takes(
            hidden_states, topk_weights, topk_ids, expert_map, operands[0].shape[0], global_num_experts
        ):
            up, up_scale, down, down_scale = operands
            one_scale = self._format == ExpertFormat.FP8_TENSOR
            intermediate_size = unpacked_shape(down)[2] if self.nvfp4 else down.shape[2]
            size = scratch_elements(num_tokens * topk, intermediate_size)
            few_tokens_moe(
                hidden_states,
                up,
                up_scale,
                down,
                down_scale,
                None if apply_router_weight_on_input else topk_weights,
                topk_ids,
                format=self._format,
                expert_map=expert_map,
                x_scale=self.quant_config.a1_scale if one_scale else None,
                hidden_scale=self.quant_config.a2_scale if one_scale else None,
                w13_bias=self.quant_config.w1_bias,
                w2_bias=self.quant_config.w2_bias,
                **self._activation,
                up_first=self.up_first,
                scratch=_scratch(workspace13, size, hidden_states),
                out=output,
            )
            return None
        if not self._theirs.expects_unquantized_inputs:
            hidden_states, a1q_scale = self._quantize_input(hidden_states, self.quant_config)
        return self._theirs.apply(
            output=output,
            hidden_states=hidden_states,
            w1=w1,
            w2=w2,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=activation,
            global_num_experts=global_num_experts,
            expert_map=expert_map,
            a1q_scale=a1q_scale,
            a2_scale=a2_scale,
            workspace13=workspace13,
            workspace2=workspace2,
            expert_tokens_meta=expert_tokens_meta,
            apply_router_weight_on_input=apply_router_weight_on_input,
        )


def _takes(
    hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None,
    num_experts: int, global_num_experts: int,
) -> bool:  # fmt: skip
    """Whether a call's tensors are as our kernels read them; vLLM's routers and maps are."""
    return (
        hidden_states.dtype == torch.bfloat16
        and hidden_states.stride(-1) == 1
        and hidden_states.stride(0) % 8 == 0
        and hidden_states.data_ptr() % 16 == 0
        and topk_weights.dtype == torch.float32
        and topk_weights.is_contiguous()
        and topk_ids.dtype in (torch.int32, torch.int64)
        and topk_ids.is_contiguous()
        and (expert_map is None or (expert_map.dtype == torch.int32 and expert_map.is_contiguous()))
        and (expert_map is not None or global_num_experts == num_experts)
    )


def _scratch(workspace: torch.Tensor, size: int, like: torch.Tensor) -> torch.Tensor:
    """vLLM's workspace where it is large enough, as that of its Triton experts is."""
    if workspace.dtype == like.dtype and workspace.is_contiguous() and workspace.numel() >= size:
        return workspace.view(-1)[:size]
    return like.new_empty(size)


def _sizes(moe_config: Any) -> tuple[int, int, int, int]:
    """Arguments of the rules in dispatch.py: topk, experts, hidden and intermediate size, of this rank."""
    return (
        moe_config.experts_per_token,
        moe_config.num_local_experts,
        moe_config.hidden_dim,
        moe_config.intermediate_size_per_partition,
    )


def _limit(moe_config: Any, format: ExpertFormat | None) -> int:
    return dispatch.few_tokens_limit(*_sizes(moe_config), vllm_compat.capability() or (0, 0), _name(format))


def _name(format: ExpertFormat | None) -> str:
    """In dispatch.py; both block formats have one rule."""
    return "" if format is None else format.name.lower().removesuffix("_pow2")


def _layer_kind(format: ExpertFormat | None) -> str:
    if format is None:
        return "experts"
    return "FP8 block experts" if format.has_blocks else f"{format.name.split('_')[0].replace('BF', 'bf')} experts"


def kept(layer: torch.nn.Module) -> tuple[torch.Tensor, ...] | None:
    """The copy of a layer's weights that keep() made, in the order of few_tokens_moe's arguments."""
    tensors = tuple(getattr(layer, name, None) for name in KEPT)
    return None if any(tensor is None for tensor in tensors) else tensors


def format_of(quant_config: Any, nvfp4: bool = False) -> ExpertFormat | None:
    """The format of a layer's experts, None for one that our kernels do not have. nvfp4: as of the class."""
    if nvfp4:
        return ExpertFormat.NVFP4 if quant_config.quant_dtype is None else None
    if quant_config.quant_dtype is None and quant_config.weight_quant_dtype is None:
        return ExpertFormat.BF16
    if quant_config.use_int8_w8a8 and quant_config.block_shape is None and quant_config.per_act_token_quant:
        return ExpertFormat.INT8_TOKEN
    if not quant_config.use_fp8_w8a8:
        return None
    if quant_config.block_shape is not None:
        return ExpertFormat.FP8_BLOCK if list(quant_config.block_shape) == list(BLOCK_SHAPE) else None
    return ExpertFormat.FP8_TOKEN if quant_config.per_act_token_quant else ExpertFormat.FP8_TENSOR


def _format_before_loading(method: Any) -> ExpertFormat | None:
    """The same from vLLM's method of a layer whose weights are not there yet."""
    if method.experts_cls.nvfp4:
        return ExpertFormat.NVFP4
    if hasattr(method, "unquantized_backend"):
        return ExpertFormat.BF16
    if block_shape := getattr(method, "weight_block_size", None):
        return ExpertFormat.FP8_BLOCK if list(block_shape) == list(BLOCK_SHAPE) else None
    if hasattr(method, "int8_backend"):
        return ExpertFormat.INT8_TOKEN
    if not hasattr(method, "fp8_backend"):
        return None
    by_token = getattr(getattr(method, "input_quant", None), "strategy", None) == "token"
    return ExpertFormat.FP8_TOKEN if by_token else ExpertFormat.FP8_TENSOR


def _weight_scales(quant_config: Any, format: ExpertFormat) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """As our op takes them; vLLM's for channels have a dimension of one behind."""
    if format == ExpertFormat.BF16:
        return None, None
    w1_scale, w2_scale = quant_config.w1_scale, quant_config.w2_scale
    if format.has_blocks:
        return w1_scale, w2_scale
    return tuple(s.squeeze(-1) if s.dim() > 1 else s for s in (w1_scale, w2_scale))


def refusal(moe_config: Any, quant_config: Any, up_first: bool = False, nvfp4: bool = False) -> str | None:
    """Why our kernels cannot do a layer, or None where they can. up_first, nvfp4: as of the class."""
    topk, num_experts, hidden_size, intermediate_size = _sizes(moe_config)
    format = format_of(quant_config, nvfp4)
    if reason := _config_refusal(moe_config, format, up_first, quant_config):
        return reason
    assert format is not None
    if reason := bias_refusal(moe_config, quant_config, (2 * intermediate_size, hidden_size)):
        return reason
    if format not in (ExpertFormat.BF16, ExpertFormat.NVFP4):  # whose scales are ours
        scales = (quant_config.w1_scale, quant_config.w2_scale)
        if any(scale is None or scale.dtype != torch.float32 or not scale.is_contiguous() for scale in scales):
            return "ours need float32 scales of the weights"
        w1_scale, w2_scale = _weight_scales(quant_config, format)
        got = (tuple(w1_scale.shape), tuple(w2_scale.shape))  # type: ignore[union-attr]
        expected = scale_shapes(torch.Size((num_experts, 2 * intermediate_size, hidden_size)), format)
        if got not in expected:
            return f"ours need scales of the shapes {' or '.join(map(str, expected))}, got {got}"
    given = (quant_config.a1_scale, quant_config.a2_scale) if format == ExpertFormat.FP8_TENSOR else ()
    if any(scale is not None and (scale.numel() != 1 or scale.dtype != torch.float32) for scale in given):
        return "ours need one float32 scale of the activations"
    return few_tokens_refusal(_limit(moe_config, format) * topk, num_experts, hidden_size, intermediate_size, format)


def _config_refusal(
    moe_config: Any, format: ExpertFormat | None, up_first: bool, quant_config: Any = None
) -> str | None:
    """The part of refusal() that is known before the weights are, when quant_config is None."""
    parallel = moe_config.moe_parallel_config
    activation = activation_arguments(moe_config, quant_config)
    if vllm_compat.ENVS.get().VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT rules out a choice by the number of tokens"
    if _NAME in vllm_compat.ENVS.get().VLLM_DISABLED_KERNELS:
        return f"VLLM_DISABLED_KERNELS names {_NAME}"
    if format is None:
        return (
            "ours need bfloat16, 8 bits with scales of blocks of 128x128, of channels or of experts, or NVFP4 with "
            "activations that are not quantised"
        )
    if format not in _applied:
        return f"the feature for {format.name} is off"
    if up_first and not format.has_blocks:
        return f"ours were not measured beside FlashInfer's experts in {format.name}"
    if moe_config.in_dtype != torch.bfloat16:
        return f"ours need bfloat16 activations, got {moe_config.in_dtype}"
    if activation is None:
        return (
            "ours need silu, with a limit or without, gelu, gelu_tanh or a form of swigluoai, "
            f"got {getattr(moe_config.activation, 'value', moe_config.activation)}"
        )
    if "interleaved" in activation and format != ExpertFormat.BF16:
        return "ours take rows of gate and up in turns in bfloat16 alone"
    if (up_first or format == ExpertFormat.NVFP4) and (activation != {"activation": "silu"} or moe_config.has_bias):
        return "beside FlashInfer's experts and in NVFP4 ours need silu without a limit or biases"
    if moe_config.is_lora_enabled:
        return "LoRA needs the products apart"
    if format == ExpertFormat.NVFP4 and parallel.enable_eplb:
        return "moving experts between ranks would leave our copy of the weights behind"
    if parallel.use_all2all_kernels or parallel.dp_size > 1:
        return "tokens are sent between ranks in vLLM's own quantisation"
    choice = dispatch.few_tokens_moe(1, *_sizes(moe_config), vllm_compat.capability() or (0, 0), _name(format))
    return None if choice.kernel == dispatch.FEW_TOKENS else choice.reason


def refusal_before_loading(method: Any) -> str | None:
    """The same from vLLM's method of a layer whose experts class is one of ours."""
    topk, num_experts, hidden_size, intermediate_size = _sizes(method.moe)
    format = _format_before_loading(method)
    if reason := _config_refusal(method.moe, format, method.experts_cls.up_first):
        return reason
    assert format is not None
    count = _limit(method.moe, format) * topk
    return few_tokens_refusal(count, num_experts, hidden_size, intermediate_size, format)


def choice(layer: Any, num_tokens: int) -> dispatch.Choice | None:
    """What a layer of ours runs for so many tokens."""
    method: Any = getattr(layer, "quant_method", None)
    experts = getattr(method, "experts_cls", None)
    if not (isinstance(experts, type) and issubclass(experts, B200FewTokensExperts)):
        return None
    reason = refusal_before_loading(method)
    if reason is None:
        format = _format_before_loading(method)
        few = dispatch.few_tokens_moe(
            num_tokens, *_sizes(method.moe), vllm_compat.capability() or (0, 0), _name(format)
        )
        if few.kernel == dispatch.FEW_TOKENS:
            return few
        reason = few.reason
    theirs = experts.theirs.__name__
    return vllm_branches.choice(layer, theirs, num_tokens) or dispatch.Choice(theirs, f"vLLM's choice: {reason}")


@functools.cache
def subclass_of(theirs: type, up_first: bool, nvfp4: bool = False) -> type:
    """B200FewTokensExperts before `theirs`, an experts class of vLLM's in the modular, not batched, form."""
    name = f"B200FewTokens{theirs.__name__}"
    return type(name, (B200FewTokensExperts, theirs), {"theirs": theirs, "up_first": up_first, "nvfp4": nvfp4})


def apply() -> None:
    install(vllm_compat.MOE_BACKENDS, vllm_compat.MOE_EXPERTS, FORMATS)


def allow(*formats: ExpertFormat) -> None:
    """Let our classes take them."""
    _applied.update(formats)


def require() -> None:
    """Raises FeatureUnavailable where our kernels do not run."""
    platform = vllm_compat.CURRENT_PLATFORM.get()
    if not platform.is_cuda():
        raise NotForThisPlatform(f"for CUDA, vLLM runs on {platform.device_name}")
    library.require()


def install(
    backend_names: vllm_compat.Private, classes_of: vllm_compat.Private, formats: Collection[ExpertFormat]
) -> None:
    """Put our classes in place of those that an oracle of vLLM's offers, once, and let them take `formats`."""
    require()
    backends, experts = backend_names.get(), classes_of.get()
    vllm_compat.MOE_QUANTIZE_INPUT.get()
    vllm_compat.UE8M0_SCALES.get()
    allow(*formats)
    if getattr(experts, "_vllm_b200", False):
        return
    # The backends that leave the weights as the checkpoint has them, but for the order of w13's halves.
    up_first = {
        getattr(backends, name): name == "FLASHINFER_CUTLASS"
        for name in ("TRITON", "DEEPGEMM", "VLLM_CUTLASS", "FLASHINFER_CUTLASS")
        if hasattr(backends, name)
    }

    def classes(backend: Any) -> list[type]:
        found = experts(backend)
        return [subclass_of(cls, up_first[backend]) for cls in found] if backend in up_first else found

    classes._vllm_b200 = True  # type: ignore[attr-defined]
    classes_of.replace(classes)
