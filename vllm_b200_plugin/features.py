"""What can be switched: the features of this plugin, each with what it changes and what it needs.

Importing this module imports neither torch nor vLLM.
"""

import logging
import os
from dataclasses import dataclass

_logger = logging.getLogger("vllm.b200")


class FeatureUnavailable(RuntimeError):
    """Why a feature cannot be applied here and, where there is something to do, what; vLLM keeps its own kernels."""


class NotForThisPlatform(FeatureUnavailable):
    """The feature is for another kind of device. Nothing is missing, so VLLM_B200_STRICT does not mind."""


@dataclass(frozen=True)
class Feature:
    """One switch.

    module: integration module whose apply() puts the feature in place, or raises FeatureUnavailable.
    after: vLLM module that apply() changes; the feature waits until vLLM has imported it.
    in_graphs: whether what vLLM compiles depends on it, so that it is part of the compile-cache key.
    trial: its kernels are tested, but no served model has been compared with and without it: off until asked for.
    """

    name: str
    changes: str
    needs: str
    module: str
    after: str
    in_graphs: bool = True
    trial: bool = False


FEATURES: tuple[Feature, ...] = (
    Feature(
        name="fp8_block_linear",
        changes="FP8 block-scaled linear layers: our activation quantisation in one op with DeepGEMM, CUTLASS or "
        "Triton; on CPU the reference with real W8A8 arithmetic",
        needs="on a GPU: the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0",
        module="vllm_b200_plugin.integration.linear_fp8",
        after="vllm.model_executor.kernels.linear",
    ),
    Feature(
        name="group_quant_ops",
        changes="vLLM's own per-token-group quantisation ops (fp8, fp8 packed, int8), wherever vLLM calls them",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0",
        module="vllm_b200_plugin.integration.quant_ops",
        after="vllm._custom_ops",
    ),
    Feature(
        name="token_quant_ops",
        changes="vLLM's own quantisation ops with one scale per token or per tensor (fp8, int8)",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0",
        module="vllm_b200_plugin.integration.token_quant_ops",
        after="vllm._custom_ops",
    ),
    Feature(
        name="gated_quant_ops",
        changes="vLLM's own fused ops of silu_and_mul and quantisation, that of the batched experts among them",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0",
        module="vllm_b200_plugin.integration.gated_quant_ops",
        after="vllm._custom_ops",
    ),
    Feature(
        name="norm_quant_ops",
        changes="vLLM's own fused ops of (residual addition,) RMSNorm and quantisation",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0",
        module="vllm_b200_plugin.integration.norm_quant_ops",
        after="vllm._custom_ops",
    ),
    Feature(
        name="cache_ops",
        changes="writing keys and values, or MLA's latents, into the paged KV cache, 16-bit and e4m3",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0",
        module="vllm_b200_plugin.integration.cache_ops",
        after="vllm._custom_ops",
    ),
    Feature(
        name="topk_ops",
        changes="vLLM's own ops that choose a token's experts (softmax, sigmoid, grouped), wherever vLLM calls them",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0",
        module="vllm_b200_plugin.integration.topk_ops",
        after="vllm._custom_ops",
    ),
    Feature(
        name="moe_align_ops",
        changes="vLLM's own ops that sort tokens by expert, wherever vLLM calls them",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0",
        module="vllm_b200_plugin.integration.moe_align_ops",
        after="vllm._custom_ops",
    ),
    Feature(
        name="router_gate",
        changes="the gate of MoE layers up to 32 tokens, and the selection of experts with it where possible",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0; a bf16 gate without bias",
        module="vllm_b200_plugin.integration.router_gate",
        after="vllm.model_executor.layers.fused_moe.router.fused_topk_router",
    ),
    Feature(
        name="moe_few_tokens",
        changes="FP8 block-scaled experts with few tokens: two kernels in place of vLLM's chain of ten; more tokens "
        "go to the experts that vLLM chose",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0",
        module="vllm_b200_plugin.integration.moe_few_tokens",
        after="vllm.model_executor.layers.fused_moe.oracle.fp8",
    ),
    Feature(
        name="fp8_moe_few_tokens",
        changes="the same for FP8 experts without block scales: one for each channel and token, or for each expert and "
        "all activations",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0",
        module="vllm_b200_plugin.integration.moe_few_tokens_fp8",
        after="vllm.model_executor.layers.fused_moe.oracle.fp8",
        trial=True,
    ),
    Feature(
        name="bf16_moe_few_tokens",
        changes="the same for unquantised bfloat16 experts",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0",
        module="vllm_b200_plugin.integration.moe_few_tokens_bf16",
        after="vllm.model_executor.layers.fused_moe.oracle.unquantized",
        trial=True,
    ),
    Feature(
        name="int8_moe_few_tokens",
        changes="the same for INT8 experts with a scale for each channel and token",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0",
        module="vllm_b200_plugin.integration.moe_few_tokens_int8",
        after="vllm.model_executor.layers.fused_moe.oracle.int8",
        trial=True,
    ),
    Feature(
        name="fp8_linear",
        changes="FP8 linear layers with a scale per tensor, or per channel and token: our GEMM for few tokens where it "
        "is faster than CUTLASS, in one op with our quantisation where norm_linear_fusion is on",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0",
        module="vllm_b200_plugin.integration.linear_fp8_scaled",
        after="vllm.model_executor.kernels.linear",
    ),
    Feature(
        name="int8_linear",
        changes="INT8 linear layers with symmetric activations: our quantisation and GEMM in one op for few "
        "tokens, where that is faster than CUTLASS",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0",
        module="vllm_b200_plugin.integration.linear_int8_scaled",
        after="vllm.model_executor.kernels.linear",
        trial=True,
    ),
    Feature(
        name="bf16_linear",
        changes="unquantised bfloat16 linear layers and router gates: our GEMM for few tokens where it is faster",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0",
        module="vllm_b200_plugin.integration.linear_bf16",
        after="vllm.model_executor.layers.utils",
    ),
    Feature(
        name="packed_quant_fusion",
        changes="compiled graphs with packed UE8M0 scales (DeepGEMM on Blackwell): RMSNorm or silu_and_mul and the "
        "quantisation behind it become one kernel",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0; vLLM's passes norm_quant or act_quant on",
        module="vllm_b200_plugin.integration.packed_quant_fusion",
        after="vllm.compilation.passes.pass_manager",
        trial=True,
    ),
    Feature(
        name="norm_linear_fusion",
        changes="compiled graphs on Hopper: RMSNorm or silu_and_mul, and the FP8 or INT8 linear layer of ours behind "
        "it become one op, whose first kernel quantises, too",
        needs="the CUDA library, compute capability 9.0; fp8_block_linear, fp8_linear or int8_linear",
        module="vllm_b200_plugin.integration.norm_linear_fusion",
        after="vllm.compilation.passes.pass_manager",
    ),
    Feature(
        name="few_token_graphs",
        changes="FP8 and INT8 models on Hopper: a compiled graph of its own for steps of up to 16 tokens, to which "
        "norm_linear_fusion then keeps",
        needs="compute capability 9.0; a second compilation when a model starts for the first time",
        module="vllm_b200_plugin.integration.few_token_graphs",
        after="vllm.config.vllm",
    ),
    Feature(
        name="cpu_fp8_moe",
        changes="FP8 block-scaled experts on CPU: the reference with real W8A8 arithmetic, on any processor",
        needs="vLLM's CPU platform",
        module="vllm_b200_plugin.integration.moe_fp8",
        after="vllm.model_executor.layers.fused_moe.oracle.fp8",
    ),
    Feature(
        name="nvfp4_linear",
        changes="NVFP4 linear layers with a bf16 activation, beside Marlin: our GEMM for few tokens where it is faster",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0; memory for a second copy of these weights",
        module="vllm_b200_plugin.integration.linear_nvfp4",
        after="vllm.model_executor.kernels.linear",
        trial=True,
    ),
    Feature(
        name="nvfp4_moe_few_tokens",
        changes="NVFP4 experts whose activations stay bf16, beside Marlin: two kernels of ours for few tokens",
        needs="the CUDA library, compute capability 9.0, 10.0, 10.3 or 12.0; memory for a second copy of these weights",
        module="vllm_b200_plugin.integration.moe_few_tokens_nvfp4",
        after="vllm.model_executor.layers.fused_moe.oracle.nvfp4",
        trial=True,
    ),
    Feature(
        name="nvfp4_shard_scales",
        changes="NVFP4 layers that vLLM fuses from parts with global scales of their own (q, k and v; gate and up): "
        "each part with its scale, where vLLM takes one for all",
        needs="nothing",
        module="vllm_b200_plugin.integration.nvfp4_shards",
        after="vllm.model_executor.model_loader.base_loader",
    ),
    Feature(
        name="nvfp4_moe_padding",
        changes="NVFP4 experts whose share of a tensor-parallel rank needs padding, on vLLM's CUTLASS back end and "
        "FlashInfer's, where vLLM refuses the model",
        needs="nothing",
        module="vllm_b200_plugin.integration.nvfp4_moe_padding",
        after="vllm.model_executor.layers.fused_moe.oracle.nvfp4",
    ),
    Feature(
        name="cpu_nvfp4_linear",
        changes="NVFP4 linear layers on CPU: vLLM's emulation, which it offers on GPUs alone",
        needs="vLLM's CPU platform",
        module="vllm_b200_plugin.integration.linear_nvfp4_cpu",
        after="vllm.model_executor.kernels.linear",
    ),
    Feature(
        name="cpu_nvfp4_moe",
        changes="NVFP4 experts on CPU: the arithmetic of vLLM's emulation, which is in Triton",
        needs="vLLM's CPU platform",
        module="vllm_b200_plugin.integration.moe_nvfp4_cpu",
        after="vllm.model_executor.layers.fused_moe.oracle.nvfp4",
    ),
    Feature(
        name="startup_report",
        changes="nothing that runs: once a model is loaded, the log has a line for each kind of layer with its kernel, "
        "and VLLM_B200_REPORT=FILE gets the same as JSON",
        needs="nothing",
        module="vllm_b200_plugin.integration.startup_report",
        after="vllm.model_executor.model_loader.base_loader",
        in_graphs=False,
    ),
)


def strict() -> bool:
    """Whether VLLM_B200_STRICT makes an error of every reason for which a feature cannot be applied."""
    return os.environ.get("VLLM_B200_STRICT", "").strip().lower() not in ("", "0", "false", "no", "off")


def enabled() -> tuple[Feature, ...]:
    """The features that VLLM_B200_DISABLE leaves on, and those on trial that VLLM_B200_ENABLE names.

    Both are comma-separated names. Raises ValueError for a name that is no feature's when strict(); otherwise warns and
    ignores it.
    """
    disabled, asked_for = _names("VLLM_B200_DISABLE"), _names("VLLM_B200_ENABLE")
    return tuple(
        feature
        for feature in FEATURES
        if feature.name not in disabled and (not feature.trial or feature.name in asked_for)
    )


def _names(variable: str) -> set[str]:
    names = {name.strip() for name in os.environ.get(variable, "").split(",")} - {""}
    if unknown := names - {feature.name for feature in FEATURES}:
        message = (
            f"{variable} names no feature of vllm-b200-plugin: {', '.join(sorted(unknown))}; "
            f"the features are {', '.join(feature.name for feature in FEATURES)}"
        )
        if strict():
            raise ValueError(message)
        _logger.warning("[b200] %s", message)
    return names
