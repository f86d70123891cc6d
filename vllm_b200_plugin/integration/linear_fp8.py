"""Feature fp8_block_linear: kernel classes that stand before vLLM's for FP8 block-scaled linear layers.

Each takes a layer under the conditions of the vLLM class that it stands before, and those of dispatch.py, decided
before the weights are loaded: a layer that DeepGEMM refuses never meets scales converted for it. Nothing that
apply_weights needs is made in process_weights_after_loading, which vLLM skips for weights already processed.
"""

from typing import Any, ClassVar

import torch

from vllm_b200_plugin import dispatch, vllm_compat
from vllm_b200_plugin.features import NotForThisPlatform
from vllm_b200_plugin.integration import library, report
from vllm_b200_plugin.integration.fp8_block_op import Engine, fp8_block_linear, machine, small_m_choice
from vllm_b200_plugin.ops.quant import GROUP_SIZES

_LAYER_KIND = "FP8 block linear"

_Base: Any = vllm_compat.FP8_BLOCK_BASE.get()
_DeepGemm: Any = vllm_compat.DEEP_GEMM_KERNEL.get()
_FlashInferDeepGemm: Any = vllm_compat.FLASHINFER_DEEP_GEMM_KERNEL.get()
_Cutlass: Any = vllm_compat.CUTLASS_KERNEL.get()
_Triton: Any = vllm_compat.TRITON_KERNEL.get()


class _OneOp:
    """Mixin before a vLLM kernel class: quantisation and GEMM in one op, and a line in the log.

    engine: what the op runs. kernel: its GEMM's name in dispatch.py. runs: the same in words.
    """

    quantiser: ClassVar[str] = "vllm_b200::per_token_group_quant"
    engine: ClassVar[Engine]
    kernel: ClassVar[str]
    runs: ClassVar[str]
    config: Any
    weight_group_shape: Any
    _get_layer_params: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        report.chosen(_LAYER_KIND, type(self).__name__, f"{self.runs}; {_reason(self.kernel, config)}")

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """x [..., K] -> [..., N] in the config's out_dtype; bias [N]."""
        params = self._get_layer_params(layer)
        block_shape = (self.weight_group_shape.row, self.weight_group_shape.col)
        out = fp8_block_linear(
            x.reshape(-1, x.shape[-1]),
            params.weight,
            params.block_scale,
            block_shape,
            self.config.out_dtype,
            self.engine,
        )
        if bias is not None:
            out = (out + bias).to(out.dtype)
        return out.view(*x.shape[:-1], params.weight.shape[0])

    def choice(self, num_tokens: int) -> dispatch.Choice:
        """What the op runs for so many tokens of bfloat16."""
        few = small_m_choice(num_tokens, *self.config.weight_shape) if self.engine != Engine.REFERENCE else None
        if few is None or few.kernel != dispatch.SMALL_M:
            return self.gemm_choice(num_tokens)
        return dispatch.Choice(f"{self.quantiser} + {few.kernel}" if few.quantise_first else few.kernel, few.reason)

    def gemm_choice(self, num_tokens: int) -> dispatch.Choice:
        """The GEMM where ours for few tokens does not take them."""
        return dispatch.Choice(self.kernel, _reason(self.kernel, self.config))


def _shapes(config: Any) -> tuple[torch.dtype, tuple[int, int], tuple[int, int]]:
    """Arguments of the rules in dispatch.py. vLLM gives the weight's shape on this rank."""
    n, k = config.weight_shape
    block = config.weight_quant_key.scale.group_shape
    return config.out_dtype, (n, k), (block.row, block.col)


def _reason(kernel: str, config: Any) -> str:
    if kernel == dispatch.REFERENCE:
        return dispatch.FITS[kernel]
    choice = dispatch.fp8_block_linear(*_shapes(config))
    if choice.kernel == kernel:
        return choice.reason
    return f"{dispatch.FITS[kernel]}; {choice.kernel} would come first but is missing, excluded or switched off"


class _InPlaceOf(_OneOp):
    """Takes the layers that `theirs`, the vLLM class that ours stands before, and the rule in dispatch.py allow."""

    theirs: ClassVar[Any]

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        if vllm_compat.is_disabled(cls.theirs):
            return False, f"VLLM_DISABLED_KERNELS names {cls.theirs.__name__}, which this is in place of"
        if refusal := dispatch.fp8_block_refusal(cls.kernel, *_shapes(config)):
            return False, refusal
        return super().can_implement(config)  # type: ignore[misc]


class B200DeepGemmFp8BlockKernel(_InPlaceOf, _DeepGemm):
    """Our quantisation, then DeepGEMM, with scales as vLLM's oracle wants them on this GPU."""

    engine, kernel, theirs = Engine.DEEP_GEMM, dispatch.DEEP_GEMM, _DeepGemm
    runs = "our group quant + DeepGEMM"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        machine()


class B200FlashInferDeepGemmFp8BlockKernel(B200DeepGemmFp8BlockKernel):
    """For Hopper: for few tokens FlashInfer's GEMM with swapped operands, fed with what our quantisation wrote."""

    engine, theirs = Engine.FLASHINFER_DEEP_GEMM, _FlashInferDeepGemm
    runs = "our group quant + FlashInfer's swap-AB GEMM for few tokens, else DeepGEMM"

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        if not vllm_compat.FLASHINFER_GEMM_SUPPORTED.get()():
            return False, "FlashInfer's fp8_blockscale_gemm_sm90 is for Hopper, and is not available or switched off"
        if vllm_compat.ENVS.get().VLLM_BATCH_INVARIANT:
            return False, "VLLM_BATCH_INVARIANT rules out a choice by the number of tokens"
        return super().can_implement(config)

    def gemm_choice(self, num_tokens: int) -> dispatch.Choice:
        here = machine()
        return dispatch.fp8_block_gemm(
            num_tokens,
            self.config.weight_shape[0],
            here.capability,
            flashinfer=True,
            batch_invariant=here.batch_invariant,
        )


class B200CutlassFp8BlockKernel(_InPlaceOf, _Cutlass):
    """Our quantisation, then vLLM's CUTLASS GEMM: for layers that DeepGEMM does not take."""

    engine, kernel, theirs = Engine.CUTLASS, dispatch.CUTLASS, _Cutlass
    runs = "our group quant + vLLM's CUTLASS GEMM"


class B200TritonFp8BlockKernel(_InPlaceOf, _Triton):
    """Our quantisation, then vLLM's Triton GEMM: for layers that neither DeepGEMM nor CUTLASS takes."""

    engine, kernel, theirs = Engine.TRITON, dispatch.TRITON, _Triton
    runs = "our group quant + vLLM's Triton GEMM"

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        # It stands before vLLM's CUTLASS class, which takes layers that its GEMM cannot do, but must not outdo it.
        backend = vllm_compat.LINEAR_BACKEND.get()(quantization="fp8_block_w8a8")
        if (
            backend != "triton"
            and not vllm_compat.is_disabled(_Cutlass)
            and _Cutlass.is_supported()[0]
            and dispatch.fp8_block_refusal(dispatch.CUTLASS, *_shapes(config)) is None
        ):
            return False, "CUTLASS takes the layer and comes first"
        return super().can_implement(config)


class B200CpuFp8BlockKernel(_OneOp, _Base):
    """The reference, with the arithmetic of the GPU kernels. vLLM's own on CPU keeps the activation in bf16."""

    engine, kernel = Engine.REFERENCE, dispatch.REFERENCE
    runs = "reference with W8A8 arithmetic"

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        if not vllm_compat.CURRENT_PLATFORM.get().is_cpu():
            return False, "is for CPU"
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        group = config.activation_quant_key.scale.group_shape
        block = config.weight_quant_key.scale.group_shape
        if group.row != 1 or group.col not in GROUP_SIZES or block.col != group.col:
            return False, (
                "needs activation groups of 1x32, 1x64 or 1x128 as wide as the weight's blocks, "
                f"got {group} and {block}"
            )
        if config.weight_shape[1] % group.col:
            return False, f"needs K % {group.col} == 0, got K={config.weight_shape[1]}"
        return super().can_implement(config)

    def apply_block_scaled_mm(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError("apply_weights does it all")


def choice(layer: torch.nn.Module, num_tokens: int) -> dispatch.Choice | None:
    """What a layer of ours runs for so many tokens."""
    kernel = report.linear_kernel(layer)
    return kernel.choice(num_tokens) if isinstance(kernel, _OneOp) else None


def apply() -> None:
    """Put our classes into vLLM's lists, once. Raises FeatureUnavailable where there is nothing to run them."""
    platform = vllm_compat.CURRENT_PLATFORM.get()
    platforms = vllm_compat.PLATFORM_ENUM.get()
    if platform.is_cpu():
        _insert(platforms.CPU, B200CpuFp8BlockKernel, before=None, backend="torch")
        return
    if not platform.is_cuda():
        raise NotForThisPlatform(f"for CUDA and CPU, vLLM runs on {platform.device_name}")
    library.require()
    _insert(platforms.CUDA, B200CutlassFp8BlockKernel, before=_Cutlass, backend="cutlass")
    _insert(platforms.CUDA, B200TritonFp8BlockKernel, before=_Cutlass, backend="triton")
    _insert(platforms.CUDA, B200DeepGemmFp8BlockKernel, before=None, backend="deep_gemm")
    _insert(platforms.CUDA, B200FlashInferDeepGemmFp8BlockKernel, before=None, backend="flashinfer_cutlass")


def _insert(platform: Any, kernel: type, before: type | None, backend: str) -> None:
    """Into the platform's list, before one of vLLM's classes or first, and into the set of --linear-backend=backend."""
    kernels = vllm_compat.FP8_BLOCK_KERNELS.get().setdefault(platform, [])
    if kernel not in kernels:
        kernels.insert(kernels.index(before) if before in kernels else 0, kernel)
    vllm_compat.LINEAR_BACKENDS.get().setdefault(backend, set()).add(kernel)
