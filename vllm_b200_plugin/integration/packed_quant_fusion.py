"""Feature packed_quant_fusion: RMSNorm or silu_and_mul, and the quantisation to packed UE8M0 scales behind it, in one
kernel; of RMSNorm with the addition of the residual, too.

With DeepGEMM on Blackwell the scales are packed powers of two. vLLM's own passes fuse what writes fp32 scales alone, so
there the two stay apart. This pass runs behind them, on the same functionalised graphs, and finds both vLLM's
quantisation op and our FP8 block-scaled linear layer, which quantises inside: that becomes the fused kernel and the
GEMM.
"""

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor import pattern_matcher

import vllm_b200_plugin.ops.gated_quant
import vllm_b200_plugin.ops.norm_quant  # noqa: F401 - both define the ops
from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.integration import fusion_pass, op_override
from vllm_b200_plugin.integration.fp8_block_op import Engine, machine
from vllm_b200_plugin.ops.gated_quant import ACTIVATIONS
from vllm_b200_plugin.ops.norm_quant import MAX_HIDDEN_SIZE
from vllm_b200_plugin.ops.quant import ScaleLayout, empty_scale

GROUP_SIZE, BLOCK = 128, [128, 128]
QUANT_EPS, QUANT_MAX = 1e-10, 448.0  # as vLLM calls its op
NORM_EPS = (1e-5, 1e-6)  # those that vLLM's passes know

_GROUPS = {"group_size": GROUP_SIZE, "eps": QUANT_EPS, "ue8m0": True, "pad": True}

_ours: Any = torch.ops.vllm_b200
_Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Producer:
    """What comes before a quantisation.

    inputs: names of tensors. compute: as vLLM's graphs have it, the first result is quantised. fused: the same with the
    quantisation into q and scale, and the rest of the results.
    """

    inputs: tuple[str, ...]
    compute: Callable[..., _Tensors]
    fused: Callable[..., _Tensors]


@dataclass(frozen=True)
class Consumer:
    """What quantises. inputs: names of tensors besides the one to quantise. quantised: results, from q and scale."""

    inputs: tuple[str, ...]
    compute: Callable[..., _Tensors]
    places: Callable[..., _Tensors]
    quantised: Callable[..., _Tensors]


def norm(eps: float) -> Producer:
    def compute(x: torch.Tensor, norm_weight: torch.Tensor) -> _Tensors:
        return (vllm_compat.IR_OPS.get().rms_norm(x, norm_weight, eps),)

    def fused(q: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, norm_weight: torch.Tensor) -> _Tensors:
        return auto_functionalized(
            _ours.rms_norm_group_quant.default, x=x, residual=None, weight=norm_weight, q=q, scale=scale, norm_eps=eps,
            **_GROUPS, gemma=False, pdl=False,
        )[2:]  # fmt: skip

    return Producer(("x", "norm_weight"), compute, fused)


def add_norm(eps: float) -> Producer:
    def compute(x: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor) -> _Tensors:
        return vllm_compat.IR_OPS.get().fused_add_rms_norm(x, residual, norm_weight, eps)

    def fused(
        q: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor
    ) -> _Tensors:
        # The sum gets a tensor of its own: where the residual is an input of the graph, inductor would copy it first.
        _, total, q, scale = auto_functionalized(
            _ours.add_rms_norm_group_quant.default, x=x, residual=residual, weight=norm_weight,
            total=torch.empty_like(residual), q=q, scale=scale, norm_eps=eps, **_GROUPS, gemma=False, pdl=False,
        )  # fmt: skip
        return q, scale, total

    return Producer(("x", "residual", "norm_weight"), compute, fused)


def silu_native(x: torch.Tensor) -> _Tensors:
    hidden_size = x.shape[-1] // 2
    return (torch.nn.functional.silu(x[..., :hidden_size]) * x[..., hidden_size:],)


def silu_op(x: torch.Tensor) -> _Tensors:
    out = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    return (auto_functionalized(torch.ops._C.silu_and_mul.default, result=out, input=x)[1],)


def _fused_silu(q: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> _Tensors:
    return auto_functionalized(
        _ours.gated_group_quant.default, x=x, q=q, scale=scale, **_GROUPS,
        activation=ACTIVATIONS.index("silu"), limit=0.0, alpha=1.0, beta=0.0, pdl=False,
    )[1:]  # fmt: skip


def _quant_op(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> _Tensors:
    name = "per_token_group_fp8_quant_packed"
    values = (x, q, scale, GROUP_SIZE, QUANT_EPS, -QUANT_MAX, QUANT_MAX)
    arguments = dict(zip(vllm_compat.QUANT_OPS[name], values, strict=True))
    return auto_functionalized(getattr(torch.ops._C, name).default, **arguments)[1:]


def _linear(dtype: torch.dtype) -> Consumer:
    def compute(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> _Tensors:
        engine = Engine.DEEP_GEMM.value
        return (_ours.fp8_block_linear.default(x, weight, weight_scale, BLOCK, dtype, engine),)

    def places(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> _Tensors:
        q = torch.empty((x.shape[0], weight.shape[1]), dtype=torch.float8_e4m3fn, device=x.device)
        return q, empty_scale(q, GROUP_SIZE, ScaleLayout.PACKED_UE8M0)

    def quantised(q: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> _Tensors:
        return (_ours.fp8_block_gemm_packed.default(q, scale, weight, weight_scale, dtype),)

    return Consumer(("weight", "weight_scale"), compute, places, quantised)


_QUANT_OP = Consumer(
    ("q", "scale"), _quant_op, places=lambda x, q, scale: (q, scale), quantised=lambda q, scale, *places: (q, scale)
)


class PackedQuantFusion(fusion_pass.FusionPass):
    """The pass."""

    line = "RMSNorm or silu_and_mul, and packed quantisation", "our fused kernels", "vLLM's passes leave them apart"

    def __init__(self, dtype: torch.dtype, norms: bool, activations: bool) -> None:
        """dtype: of the model's activations. norms, activations: which of the two to fuse."""
        super().__init__()
        producers: list[Producer] = []
        if norms:
            producers += [make(eps) for make, eps in itertools.product((add_norm, norm), NORM_EPS)]
        if activations:
            producers += [Producer(("x",), compute, _fused_silu) for compute in (silu_native, silu_op)]
        consumers = [_QUANT_OP]
        if machine().layout is ScaleLayout.PACKED_UE8M0:
            consumers.append(_linear(dtype))
        vllm_compat.ENABLE_FAKE_MODE.get()(self._register)(list(itertools.product(producers, consumers)), dtype)

    def _register(self, pairs: Sequence[tuple[Producer, Consumer]], dtype: torch.dtype) -> None:
        for producer, consumer in pairs:
            search, replace = _functions(producer, consumer)
            examples = [_example(name, dtype) for name in inspect.signature(search).parameters]
            pattern_matcher.register_replacement(
                search, replace, examples, pattern_matcher.fwd_only, self.patterns, extra_check=norm_is_ours
            )


def _functions(producer: Producer, consumer: Consumer) -> tuple[Callable[..., _Tensors], Callable[..., _Tensors]]:
    """What to look for and what to put in its place, with the inputs of both as parameters."""
    count = len(producer.inputs)

    def search(*tensors: torch.Tensor) -> _Tensors:
        x, *rest = producer.compute(*tensors[:count])
        return (*consumer.compute(x, *tensors[count:]), *rest)

    def replace(*tensors: torch.Tensor) -> _Tensors:
        q, scale, *rest = producer.fused(*consumer.places(tensors[0], *tensors[count:]), *tensors[:count])
        return (*consumer.quantised(q, scale, *tensors[count:]), *rest)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = (*producer.inputs, *consumer.inputs)
    for function in (search, replace):
        function.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    return search, replace


def _example(name: str, dtype: torch.dtype) -> torch.Tensor:
    shapes = {"norm_weight": (512,), "weight": (64, 512), "weight_scale": (64, 1), "scale": (8, 1)}
    types = {"q": torch.float8_e4m3fn, "weight": torch.float8_e4m3fn, "weight_scale": torch.int32, "scale": torch.int32}
    return torch.empty(shapes.get(name, (8, 512)), dtype=types.get(name, dtype))


def norm_is_ours(match: Any) -> bool:
    """Whether our kernels take what was found."""
    tensors = {name: node.meta["val"] for name, node in match.kwargs.items() if isinstance(node, torch.fx.Node)}
    x = tensors["x"]
    rows = [x, *(tensors[name] for name in ("residual",) if name in tensors)]
    if x.dtype not in (torch.bfloat16, torch.float16) or any(t.dtype != x.dtype or not _has_rows(t) for t in rows):
        return False
    if "norm_weight" in tensors:
        return tensors["norm_weight"].dtype == x.dtype and x.shape[1] <= MAX_HIDDEN_SIZE
    return True


def _has_rows(x: torch.Tensor) -> bool:
    """[num_tokens, columns], rows at multiples of 16 bytes."""
    return x.dim() == 2 and x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.storage_offset() % 8 == 0


def apply() -> None:
    """Have vLLM run the pass behind its own, once. Raises FeatureUnavailable where that cannot be done."""
    op_override.require_cuda()
    fusion_pass.add(_make)


def _make(config: Any) -> PackedQuantFusion | None:
    passes = config.compilation_config.pass_config
    if not (passes.fuse_norm_quant or passes.fuse_act_quant):
        return None
    dtype = config.model_config.dtype
    return PackedQuantFusion(dtype, norms=passes.fuse_norm_quant, activations=passes.fuse_act_quant)
