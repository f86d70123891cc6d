"""Feature norm_linear_fusion: (residual addition and) RMSNorm, or silu_and_mul, and the FP8 or INT8 linear layer behind
it in one op, whose first kernel does the former and quantises (fused_linear_ops.py).

Of FP8 block-scaled layers those with DeepGEMM on Hopper; on Blackwell packed_quant_fusion finds them. Of the other FP8
and of INT8 layers those of the features fp8_linear and int8_linear.

An FP8 layer behind something else that inductor makes a kernel of, a norm that others read for example, gets its
quantisation back as vLLM has it: inductor takes that into its kernel, which saves a prefill the way through memory.
Behind attention, which is no kernel of inductor's, the layer's op goes on quantising.

With few_token_graphs the graph of more tokens has nothing of this: FP8 layers become vLLM's quantisation and CUTLASS.
"""

import inspect
import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor import pattern_matcher

import vllm_b200_plugin.integration.fused_linear_ops  # noqa: F401 - defines the ops
from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.features import NotForThisPlatform
from vllm_b200_plugin.integration import few_token_graphs, fusion_pass, op_override, packed_quant_fusion
from vllm_b200_plugin.integration.fp8_block_op import Engine, machine
from vllm_b200_plugin.integration.packed_quant_fusion import BLOCK, NORM_EPS
from vllm_b200_plugin.ops.quant import QUANT_MAX
from vllm_b200_plugin.ops.token_quant import MAX_HIDDEN_SIZE, MIN_E4M3_SCALE

E4M3_MAX = QUANT_MAX[torch.float8_e4m3fn]
ENGINES = (Engine.FLASHINFER_DEEP_GEMM, Engine.DEEP_GEMM)
_ours: Any = torch.ops.vllm_b200
_Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _Before:
    """What comes before a layer.

    prefix: of the op for both. takes: names of the tensors that this op takes. numbers: what it takes behind them.
    inputs: names of tensors. compute: as vLLM's graphs have it; the layer takes the first result.
    """

    prefix: str
    takes: tuple[str, ...]
    numbers: tuple[float, ...]
    inputs: tuple[str, ...]
    compute: Callable[..., _Tensors]


@dataclass(frozen=True)
class _Layer:
    """A linear layer.

    op: its name. inputs: names of tensors besides x. alone, fused: the op's arguments behind x, without and with what
    comes before it; a string is the name of a tensor.
    """

    op: str
    inputs: tuple[str, ...]
    alone: tuple[Any, ...]
    fused: tuple[Any, ...]


def _befores() -> Iterator[_Before]:
    for eps in NORM_EPS:
        for prefix, producer in (
            ("norm", packed_quant_fusion.norm(eps)),
            ("add_norm", packed_quant_fusion.add_norm(eps)),
        ):
            yield _Before(prefix, producer.inputs, (eps,), producer.inputs, producer.compute)
    for silu in (packed_quant_fusion.silu_native, packed_quant_fusion.silu_op):
        yield _Before("silu", ("x",), (), ("x",), silu)
    yield _Before("silu", ("x",), (), ("x", "x_scale"), _silu_quant)


def _silu_quant(x: torch.Tensor, x_scale: torch.Tensor) -> _Tensors:
    """vLLM's fused op, which some of its models call by themselves."""
    out = torch.empty((x.shape[0], x.shape[1] // 2), dtype=torch.float8_e4m3fn, device=x.device)
    op = torch.ops._C.silu_and_mul_quant.default
    return (auto_functionalized(op, result=out, input=x, scale=x_scale)[1],)


def _layers(dtype: torch.dtype) -> Iterator[_Layer]:
    for engine in ENGINES:
        weights, rest = ("weight", "weight_scale"), (dtype, engine)
        yield _Layer("fp8_block_linear", weights, (*weights, BLOCK, *rest), (*weights, *rest))
    for x_scale, bias in itertools.product(("x_scale", None), (None, "bias")):
        arguments = ("weight", "weight_scale", x_scale, bias)
        names = tuple(name for name in arguments if name is not None)
        yield _Layer("scaled_linear", names, (*arguments, dtype), (*arguments, dtype))


class NormLinearFusion(fusion_pass.FusionPass):
    """The pass."""

    line = "RMSNorm or silu_and_mul, and a quantised linear layer", "one op of ours", "the former quantises"
    modules = (packed_quant_fusion.__name__, few_token_graphs.__name__)

    def __init__(self, dtype: torch.dtype) -> None:
        """dtype: of the model's activations."""
        super().__init__()
        self.apart = pattern_matcher.PatternMatcherPass(pass_name="quantisation apart")
        self.cutlass = pattern_matcher.PatternMatcherPass(pass_name="vLLM's layers")
        vllm_compat.ENABLE_FAKE_MODE.get()(self._register)(dtype)

    def __call__(self, graph: torch.fx.Graph) -> None:
        if vllm_compat.PASS_CONTEXT.get()().compile_range.start > few_token_graphs.MOST_TOKENS:
            self.cutlass.apply(graph)
            return
        super().__call__(graph)
        self.apart.apply(graph)

    def _register(self, dtype: torch.dtype) -> None:
        for layer in _layers(dtype):
            if layer.op == "scaled_linear":
                self._replace(*_apart(layer), layer, dtype, self.apart, _is_behind_inductor)
                self._replace(*_cutlass(layer), layer, dtype, self.cutlass, _is_cutlass)
        for before, layer in itertools.product(_befores(), _layers(dtype)):
            if "x_scale" in before.inputs and "x_scale" not in layer.inputs:
                continue
            self._replace(*_together(before, layer), layer, dtype, self.patterns, _is_ours)

    @staticmethod
    def _replace(
        search: Callable[..., Any], replace: Callable[..., Any], layer: _Layer, dtype: torch.dtype, patterns: Any,
        check: Callable[[Any], bool],
    ) -> None:  # fmt: skip
        examples = [_example(name, layer, dtype) for name in inspect.signature(search).parameters]
        pattern_matcher.register_replacement(
            search, replace, examples, pattern_matcher.fwd_only, patterns, extra_check=check, skip_duplicates=True
        )


_Pair = tuple[Callable[..., Any], Callable[..., Any]]


def _together(before: _Before, layer: _Layer) -> _Pair:
    """What to look for and what to put in its place, with the inputs of both as parameters."""
    names = tuple(dict.fromkeys((*before.inputs, *layer.inputs)))
    alone = getattr(_ours, layer.op).default
    fused = getattr(_ours, f"{before.prefix}_{layer.op}").default

    def search(*tensors: torch.Tensor) -> Any:
        values = dict(zip(names, tensors, strict=True))
        x, *rest = before.compute(*(values[name] for name in before.inputs))
        return (alone(x, *_given(layer.alone, values)), *rest)

    def replace(*tensors: torch.Tensor) -> Any:
        values = dict(zip(names, tensors, strict=True))
        results = fused(*(values[name] for name in before.takes), *before.numbers, *_given(layer.fused, values))
        return results if isinstance(results, tuple) else (results,)

    return _with_parameters(search, names), _with_parameters(replace, names)


def _apart(layer: _Layer) -> _Pair:
    """The layer as it is, and behind the quantisation of vLLM's QuantFP8 in PyTorch."""

    def replace(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        values = dict(zip(layer.inputs, tensors, strict=True))
        weight, weight_scale, _, *rest = _given(layer.alone, values)
        q, scale = _quantised(x, values.get("x_scale"))
        return _ours.scaled_linear.default(q, weight, weight_scale, scale, *rest)

    return _alone(layer), _with_parameters(replace, ("x", *layer.inputs))


def _cutlass(layer: _Layer) -> _Pair:
    """The layer as it is, and as vLLM has it: its quantisation in PyTorch, where that is not done, and CUTLASS."""

    def replace(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        values = dict(zip(layer.inputs, tensors, strict=True))
        weight, weight_scale, scale, bias, out_dtype = _given(layer.alone, values)
        if x.dtype != weight.dtype:
            x, scale = _quantised(x, scale)
        out = torch.empty((x.shape[0], weight.shape[1]), dtype=out_dtype, device=x.device)
        arguments = zip(vllm_compat.CUTLASS_ARGUMENTS, (out, x, weight, scale, weight_scale, bias), strict=True)
        return auto_functionalized(torch.ops._C.cutlass_scaled_mm.default, **dict(arguments))[1]

    return _alone(layer), _with_parameters(replace, ("x", *layer.inputs))


def _alone(layer: _Layer) -> Callable[..., torch.Tensor]:
    def search(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        values = dict(zip(layer.inputs, tensors, strict=True))
        return _ours.scaled_linear.default(x, *_given(layer.alone, values))

    return _with_parameters(search, ("x", *layer.inputs))


def _quantised(x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """As vLLM's QuantFP8 in PyTorch."""
    if scale is None:
        scale = (x.abs().amax(-1, keepdim=True).float() / E4M3_MAX).clamp(min=MIN_E4M3_SCALE)
    return (x.float() * scale.reciprocal()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def _with_parameters(function: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    return function


def _given(arguments: tuple[Any, ...], values: dict[str, torch.Tensor]) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, Engine):
            yield argument.value
        else:
            yield values[argument] if isinstance(argument, str) else argument


def _example(name: str, layer: _Layer, dtype: torch.dtype) -> torch.Tensor:
    block = layer.op == "fp8_block_linear"
    shapes = {
        "norm_weight": (512,),
        "weight": (64, 512) if block else (512, 64),
        "weight_scale": (1, 4) if block else (64, 1),
        "x_scale": (1,),
        "bias": (64,),
    }
    types = {"weight": torch.float8_e4m3fn, "weight_scale": torch.float32, "x_scale": torch.float32}
    return torch.empty(shapes.get(name, (8, 512)), dtype=types.get(name, dtype))


def _is_ours(match: Any) -> bool:
    """Whether our kernels take what was found."""
    x = match.kwargs["x"].meta["val"]
    return packed_quant_fusion.norm_is_ours(match) and x.shape[1] % 32 == 0 and x.shape[1] <= 2 * MAX_HIDDEN_SIZE


def _is_cutlass(match: Any) -> bool:
    """Whether an FP8 layer is one that vLLM gives to CUTLASS."""
    weight = match.kwargs["weight"].meta["val"]
    return weight.dtype == torch.float8_e4m3fn and weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0


def _is_behind_inductor(match: Any) -> bool:
    """Whether an FP8 layer takes what a kernel of inductor's computes."""
    x, weight = match.kwargs["x"], match.kwargs["weight"]
    if weight.meta["val"].dtype != torch.float8_e4m3fn or x.meta["val"].dtype == torch.float8_e4m3fn:
        return False
    while x.op == "call_function" and (x.target is operator.getitem or _is_view(x.target)):
        x = x.args[0]
    return getattr(x.target, "namespace", "") in ("aten", "prims", "vllm_ir")


def _is_view(target: Any) -> bool:
    return getattr(target, "is_view", False) or target is torch.ops.aten.reshape.default


def apply() -> None:
    """Have vLLM run the pass behind its own, once. Raises FeatureUnavailable where that cannot be done."""
    op_override.require_cuda()
    if (capability := vllm_compat.capability()) != (9, 0):
        raise NotForThisPlatform(
            f"for compute capability 9.0, where scales and GEMM go by the number of tokens; this GPU has {capability}"
        )
    fusion_pass.add(_make)


def _make(config: Any) -> NormLinearFusion:
    machine()
    return NormLinearFusion(config.model_config.dtype)
