"""One op for an FP8 block-scaled linear layer: activation quantisation and GEMM, opaque to torch.compile.

One op, because vLLM drops dynamo's guards, so that a branch on the number of tokens outside it would be frozen as
traced, and because vLLM's fused rms_norm + quantisation, which it substitutes for a visible quantisation op, is
slower than the two apart.
"""

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_b200_plugin import dispatch, vllm_compat
from vllm_b200_plugin.ops import small_m_gemm
from vllm_b200_plugin.ops._library import torch_library
from vllm_b200_plugin.ops.gemm import fp8_block_scaled_mm
from vllm_b200_plugin.ops.quant import ScaleLayout, per_token_group_quant


class Engine(str, enum.Enum):
    """Which GEMM the op runs; a plain string in the op's schema."""

    DEEP_GEMM = "deep_gemm"
    FLASHINFER_DEEP_GEMM = "flashinfer_deep_gemm"  # by number of tokens: dispatch.fp8_block_gemm
    CUTLASS = "cutlass"
    TRITON = "triton"
    REFERENCE = "reference"


def fp8_block_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, block_shape: tuple[int, int],
    out_dtype: torch.dtype, engine: Engine,
) -> torch.Tensor:  # fmt: skip
    """x @ weight.T with x quantised to e4m3 in groups of block_shape[1] elements of a row.

    Args:
        x: [num_tokens, K] bfloat16, float16 or float32; rows may be strided.
        weight: [N, K] float8_e4m3fn.
        weight_scale: what `engine` takes: for DeepGEMM as vLLM's conversion leaves it, else one float32 (for
            REFERENCE also UE8M0) per block, [ceil(N / block_shape[0]), ceil(K / block_shape[1])].
        block_shape: (rows, columns) of weight that share a scale.
        out_dtype: dtype of the result.
        engine: the GEMM.

    Returns:
        [num_tokens, N] in out_dtype.
    """
    return torch.ops.vllm_b200.fp8_block_linear(x, weight, weight_scale, list(block_shape), out_dtype, engine.value)


torch_library.define(
    "fp8_block_linear(Tensor x, Tensor weight, Tensor weight_scale, int[] block_shape, ScalarType out_dtype, "
    "str engine) -> Tensor"
)


@torch.library.register_fake("vllm_b200::fp8_block_linear", lib=torch_library)
def _fake(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, block_shape: list[int], out_dtype: torch.dtype,
    engine: str,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


@torch.library.impl(torch_library, "fp8_block_linear", "CPU")
@torch.library.impl(torch_library, "fp8_block_linear", "CUDA")
def _implementation(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, block_shape: list[int], out_dtype: torch.dtype,
    engine: str,
) -> torch.Tensor:  # fmt: skip
    if x.shape[0] == 0:
        return x.new_empty((0, weight.shape[0]), dtype=out_dtype)
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.shape[0] < dispatch.SMALL_M_BELOW and engine != Engine.REFERENCE and x.dtype == torch.bfloat16:
        out = _small_m(x, weight, weight_scale, out_dtype, engine)
        if out is not None:
            return out
    return _ENGINES[engine](x, weight, weight_scale, block_shape, out_dtype)


@dataclass(frozen=True)
class Machine:
    """What the op's branches depend on besides its arguments.

    layout, ue8m0: how DeepGEMM wants the activation's scales.
    """

    capability: tuple[int, int]
    batch_invariant: bool
    layout: ScaleLayout
    ue8m0: bool


@functools.cache
def machine() -> Machine:
    """Found once in a process, when a kernel is made for the first layer, so never in a captured call."""
    formats = vllm_compat.SCALE_FORMAT.get()
    scale_format = formats.from_oracle()
    return Machine(
        capability=vllm_compat.capability() or (0, 0),
        batch_invariant=vllm_compat.ENVS.get().VLLM_BATCH_INVARIANT,
        layout=ScaleLayout.PACKED_UE8M0 if scale_format == formats.UE8M0 else ScaleLayout.COLUMN_TMA,
        ue8m0=scale_format != formats.FLOAT32,
    )


def small_m_choice(num_tokens: int, n: int, k: int) -> dispatch.SmallMChoice:
    """Whether our GEMM for few tokens takes a layer with a weight [n, k]."""
    here = machine()
    return dispatch.small_m_gemm("fp8_block", num_tokens, n, k, here.capability, batch_invariant=here.batch_invariant)


def _small_m(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, out_dtype: torch.dtype, engine: str
) -> torch.Tensor | None:
    """Our GEMM for few tokens, with the activation's scales as `engine` has them; None where it is not the fastest."""
    num_tokens = x.shape[0]
    choice = small_m_choice(num_tokens, *weight.shape)
    if choice.kernel != dispatch.SMALL_M:
        return None
    ue8m0 = engine in (Engine.DEEP_GEMM, Engine.FLASHINFER_DEEP_GEMM) and scales_of(engine, num_tokens)[1]
    scale = None
    if choice.quantise_first:
        x, scale = per_token_group_quant(x, layout=ScaleLayout.COLUMN, ue8m0=ue8m0)
    elif x.data_ptr() % 16 or x.stride(0) % 8:
        x = x.clone(memory_format=torch.contiguous_format)
    config = small_m_gemm.Config(*choice.config)
    # Behind our quantisation, which lets its successor start early, PDL saves about 1 us; behind what vLLM has there,
    # which does not, it costs 0.2 us.
    return small_m_gemm.fp8_block_linear(
        x, weight, weight_scale, scale, out_dtype=out_dtype, ue8m0=ue8m0, config=config, pdl=choice.quantise_first
    )


def _quantise_and_deep_gemm(
    engine: Engine, x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, block_shape: list[int],
    out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    layout, ue8m0 = scales_of(engine, x.shape[0])
    q, scale = per_token_group_quant(x, block_shape[1], layout=layout, ue8m0=ue8m0)
    return _deep_gemm(q, scale, weight, weight_scale, out_dtype, engine, ue8m0)


def _deep_gemm(
    q: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, out_dtype: torch.dtype,
    engine: str, ue8m0: bool,
) -> torch.Tensor:  # fmt: skip
    """DeepGEMM or, where `engine` has it and the rule says so, FlashInfer's kernel."""
    here, (n, _) = machine(), weight.shape
    if engine == Engine.FLASHINFER_DEEP_GEMM:
        choice = dispatch.fp8_block_gemm(
            q.shape[0], n, here.capability, flashinfer=True, batch_invariant=here.batch_invariant
        )
        if choice.kernel == dispatch.FLASHINFER_SWAP_AB:
            flashinfer = vllm_compat.FLASHINFER_GEMM.get()
            return flashinfer(input=q, weight=weight, input_scale=scale, weight_scale=weight_scale, out_dtype=out_dtype)
    out = torch.empty((q.shape[0], n), dtype=out_dtype, device=q.device)
    vllm_compat.FP8_GEMM_NT.get()((q, scale), (weight, weight_scale), out, is_deep_gemm_e8m0_used=ue8m0)
    return out


# What fp8_block_linear does with DeepGEMM behind its quantisation, where the scales are packed UE8M0: for a kernel that
# has quantised before (packed_quant_fusion). q [num_tokens, K] e4m3, scale [num_tokens, ceil(K / 512)] int32.
torch_library.define(
    "fp8_block_gemm_packed(Tensor q, Tensor scale, Tensor weight, Tensor weight_scale, ScalarType out_dtype) -> Tensor"
)


@torch.library.register_fake("vllm_b200::fp8_block_gemm_packed", lib=torch_library)
def _fake_gemm(
    q: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    return q.new_empty((q.shape[0], weight.shape[0]), dtype=out_dtype)


@torch.library.impl(torch_library, "fp8_block_gemm_packed", "CPU")
@torch.library.impl(torch_library, "fp8_block_gemm_packed", "CUDA")
def _gemm(
    q: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    return gemm(q, scale, weight, weight_scale, out_dtype, Engine.DEEP_GEMM, True)


def scales_of(engine: str, num_tokens: int) -> tuple[ScaleLayout, bool]:
    """How a DeepGEMM engine wants the activation's scales, and whether as powers of two."""
    here = machine()
    if engine == Engine.FLASHINFER_DEEP_GEMM and num_tokens < dispatch.PLAIN_SCALES_BELOW and not here.batch_invariant:
        return ScaleLayout.COLUMN_TMA, False
    return here.layout, here.ue8m0


def gemm(
    q: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, out_dtype: torch.dtype,
    engine: str, ue8m0: bool,
) -> torch.Tensor:  # fmt: skip
    """fp8_block_linear for an activation that one of our kernels, which lets this one start early, has quantised.

    q [num_tokens, K] e4m3, scale as scales_of() says, which gave ue8m0, too. engine: one with DeepGEMM.
    """
    if q.shape[0] == 0:
        return q.new_empty((0, weight.shape[0]), dtype=out_dtype)
    few = small_m_choice(q.shape[0], *weight.shape)
    if few.kernel == dispatch.SMALL_M:
        config = small_m_gemm.Config(*few.config)
        return small_m_gemm.fp8_block_linear(
            q, weight, weight_scale, scale, out_dtype=out_dtype, config=config, pdl=True
        )
    return _deep_gemm(q, scale, weight, weight_scale, out_dtype, engine, ue8m0)


def _cutlass(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, block_shape: list[int], out_dtype: torch.dtype
) -> torch.Tensor:
    q, scale = per_token_group_quant(x, block_shape[1], layout=ScaleLayout.COLUMN)
    return vllm_compat.CUTLASS_GEMM.get()(q, weight.T, out_dtype=out_dtype, scale_a=scale, scale_b=weight_scale.T)


def _triton(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, block_shape: list[int], out_dtype: torch.dtype
) -> torch.Tensor:
    q, scale = per_token_group_quant(x, block_shape[1])
    return vllm_compat.TRITON_GEMM.get()(q, weight, scale, weight_scale, block_shape, out_dtype)


def _reference(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, block_shape: list[int], out_dtype: torch.dtype
) -> torch.Tensor:
    if weight_scale.dtype == torch.uint8:
        weight_scale = weight_scale.view(torch.float8_e8m0fnu)
    q, scale = per_token_group_quant(x, block_shape[1])
    return fp8_block_scaled_mm(q, scale, weight, weight_scale.float(), (block_shape[0], block_shape[1]), out_dtype)


_ENGINES: dict[str, Callable[..., torch.Tensor]] = {
    **{
        engine: functools.partial(_quantise_and_deep_gemm, engine)
        for engine in (Engine.DEEP_GEMM, Engine.FLASHINFER_DEEP_GEMM)
    },
    Engine.CUTLASS: _cutlass,
    Engine.TRITON: _triton,
    Engine.REFERENCE: _reference,
}
