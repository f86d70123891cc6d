"""Feature norm_linear_fusion: (residual addition and) RMSNorm, or silu_and_mul, and the FP8 or INT8 linear layer behind
it in one op, whose first kernel does the former and quantises (fused_linear_ops.py).

Of FP8 block-scaled layers those with DeepGEMM on Hopper; on Blackwell packed_quant_fusion finds them. Of the other FP8
and of INT8 layers those of the features fp8_linear and int8_linear.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor import pattern_matcher

import vllm_b200_plugin.integration.fused_linear_ops  # noqa: F401 - defines the ops
from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.features import FeatureUnavailable
from vllm_b200_plugin.integration import fusion_pass, op_override, packed_quant_fusion
from vllm_b200_plugin.integration.fp8_block_op import Engine, machine
from vllm_b200_plugin.integration.packed_quant_fusion import BLOCK, NORM_EPS
from vllm_b200_plugin.ops.token_quant import MAX_HIDDEN_SIZE

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
    modules = (packed_quant_fusion.__name__,)

    def __init__(self, dtype: torch.dtype) -> None:
        """dtype: of the model's activations."""
        super().__init__()
        vllm_compat.ENABLE_FAKE_MODE.get()(self._register)(dtype)

    def _register(self, dtype: torch.dtype) -> None:
        for before, layer in itertools.product(_befores(), _layers(dtype)):
            if "x_scale" in before.inputs and "x_scale" not in layer.inputs:
                continue
            search, replace = _functions(before, layer)
            examples = [_example(name, layer, dtype) for name in inspect.signature(search).parameters]
            pattern_matcher.register_replacement(
                search, replace, examples, pattern_matcher.fwd_only, self.patterns, extra_check=_is_ours,
                skip_duplicates=True,
            )  # fmt: skip


def _functions(before: _Before, layer: _Layer) -> tuple[Callable[..., Any], Callable[..., Any]]:
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

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    for function in (search, replace):
        function.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    return search, replace


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


def apply() -> None:
    """Have vLLM run the pass behind its own, once. Raises FeatureUnavailable where that cannot be done."""
    op_override.require_cuda()
    if (capability := vllm_compat.capability()) != (9, 0):
        raise FeatureUnavailable(
            f"for compute capability 9.0, where scales and GEMM go by the number of tokens; this GPU has {capability}"
        )
    fusion_pass.add(_make)


def _make(config: Any) -> NormLinearFusion:
    machine()
    return NormLinearFusion(config.model_config.dtype)
