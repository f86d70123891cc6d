"""The register of every vLLM name that we touch and that vLLM does not promise to keep.

Nothing else in this package names them. Each is looked up when it is needed, so that importing this module imports no
vLLM, and a name that a vLLM version lacks switches one feature off, with the name in the reason.
"""

import importlib
from dataclasses import dataclass
from typing import Any

from vllm_b200_plugin.features import FeatureUnavailable

_LINEAR = "vllm.model_executor.kernels.linear"
_MOE_ORACLE = "vllm.model_executor.layers.fused_moe.oracle.fp8"
_LINEAR_LIST = "register_linear_kernel() that can put a kernel first"
_OOT_MOE = "registration of MoE backends from outside (a TODO in vLLM's oracle/fp8.py)"
_STABLE_GEMM = "a documented function for the GEMM alone"


@dataclass(frozen=True)
class Private:
    """One name: where it is, what it is, why we need it, and which change in vLLM would make it unnecessary."""

    module: str
    attribute: str
    what: str
    why: str
    until: str

    def get(self) -> Any:
        """The object, importing its module. Raises FeatureUnavailable where this vLLM has no such name."""
        try:
            return getattr(importlib.import_module(self.module), self.attribute)
        except (ImportError, AttributeError) as error:
            message = f"this vLLM has no {self.module}.{self.attribute} ({self.what}): {error}"
            raise FeatureUnavailable(message) from error

    def replace(self, value: Any) -> None:
        """Bind the name in its module to `value`."""
        setattr(importlib.import_module(self.module), self.attribute, value)


ENVIRONMENT_VARIABLES = Private(
    "vllm.envs",
    "environment_variables",
    "dict of variable name -> function that reads it; all go into the compile-cache key",
    "to make our version and features part of that key, and to make our variables known ones",
    "a hook for plugins in vLLM's compile-cache key",
)
ENVS = Private(
    "vllm", "envs", "lazy environment variables", "VLLM_BATCH_INVARIANT, VLLM_DISABLED_KERNELS, grouped top-k", "-"
)
CURRENT_PLATFORM = Private(
    "vllm.platforms", "current_platform", "the device vLLM runs on", "CPU or CUDA, and which", "-"
)
PLATFORM_ENUM = Private("vllm.platforms", "PlatformEnum", "kinds of device", "key of the kernel lists", "-")

FP8_BLOCK_KERNELS = Private(
    _LINEAR,
    "_POSSIBLE_FP8_BLOCK_KERNELS",
    "dict of platform -> list of kernel classes, in order of preference",
    "to put ours before vLLM's",
    _LINEAR_LIST,
)
FP8_KERNELS = Private(
    _LINEAR,
    "_POSSIBLE_FP8_KERNELS",
    "the same for FP8 with a scale per tensor, or per channel and token",
    "to put ours before vLLM's",
    _LINEAR_LIST,
)
CUTLASS_FP8_KERNEL = Private(
    _LINEAR,
    "CutlassFP8ScaledMMLinearKernel",
    "vLLM's CUTLASS kernel class for these",
    "base of ours",
    _LINEAR_LIST,
)
INT8_KERNELS = Private(
    _LINEAR, "_POSSIBLE_INT8_KERNELS", "the same for INT8", "to put ours before vLLM's", _LINEAR_LIST
)
CUTLASS_INT8_KERNEL = Private(
    _LINEAR,
    "CutlassInt8ScaledMMLinearKernel",
    "vLLM's CUTLASS kernel class for these",
    "base of ours",
    _LINEAR_LIST,
)
INT8_QUANT = Private(
    "vllm._custom_ops",
    "scaled_int8_quant",
    "function: an activation in INT8, with a scale for each token or a given one",
    "the activation of our INT8 layers before CUTLASS",
    "a documented function for it",
)
FP8_QUANT = Private(
    "vllm._custom_ops",
    "scaled_fp8_quant",
    "function: an activation in FP8, with a scale for each token or a given one",
    "the activation of our FP8 layers before CUTLASS",
    "a documented function for it",
)
LINEAR_BACKENDS = Private(
    _LINEAR,
    "_LINEAR_BACKEND_KERNEL_MAP",
    "dict of --linear-backend value -> set of kernel classes",
    "to keep ours where the user asks for the GEMM that ours runs",
    _LINEAR_LIST + " and name its backend",
)
LINEAR_BACKEND = Private(
    _LINEAR,
    "_get_linear_backend",
    "function: the --linear-backend in force for a quantisation",
    "to give way to CUTLASS except where the user asks for Triton",
    _LINEAR_LIST,
)
FP8_BLOCK_BASE = Private(
    _LINEAR,
    "Fp8BlockScaledMMLinearKernel",
    "base class of FP8 block-scaled linear kernels",
    "base of our CPU kernel",
    "documented base classes",
)
DEEP_GEMM_KERNEL = Private(
    _LINEAR,
    "DeepGemmFp8BlockScaledMMKernel",
    "vLLM's DeepGEMM kernel class",
    "base of ours: its conditions, weight conversion and warm-up (chosen by isinstance) stay in force",
    "a DeepGEMM warm-up that asks for a method, not for a class",
)
FLASHINFER_DEEP_GEMM_KERNEL = Private(
    _LINEAR,
    "FlashInferFp8DeepGEMMDynamicBlockScaledKernel",
    "vLLM's kernel class for Hopper: FlashInfer below 32 tokens, else DeepGEMM",
    "its name in VLLM_DISABLED_KERNELS",
    "-",
)
CUTLASS_KERNEL = Private(
    _LINEAR,
    "CutlassFp8BlockScaledMMKernel",
    "vLLM's CUTLASS kernel class",
    "base of ours",
    _LINEAR_LIST,
)
TRITON_KERNEL = Private(
    _LINEAR,
    "TritonFp8BlockScaledMMKernel",
    "vLLM's Triton kernel class",
    "base of ours",
    _LINEAR_LIST,
)

UNQUANTIZED_GEMM = Private(
    "vllm.model_executor.layers.utils",
    "default_unquantized_gemm",
    "function (layer, x, weight, bias) of every unquantised linear layer and lm_head on CUDA",
    "to put our kernel for few tokens before it",
    "kernel classes for unquantised linear layers, as the quantised ones have",
)
SCALE_FORMAT = Private(
    "vllm.utils.deep_gemm",
    "DeepGemmQuantScaleFMT",
    "which scales DeepGEMM wants on this GPU: fp32, fp32 powers of two, or packed UE8M0",
    "our quantisation writes them",
    "a GEMM that takes any of them",
)
FP8_GEMM_NT = Private(
    "vllm.utils.deep_gemm", "fp8_gemm_nt", "DeepGEMM, installed or vendored", "the GEMM of our op", _STABLE_GEMM
)
FLASHINFER_GEMM = Private(
    "vllm.utils.flashinfer",
    "flashinfer_fp8_blockscale_gemm",
    "flashinfer.gemm.fp8_blockscale_gemm_sm90, imported when called",
    "the GEMM of our op below 32 tokens on Hopper",
    _STABLE_GEMM,
)
FLASHINFER_GEMM_SUPPORTED = Private(
    "vllm.utils.flashinfer",
    "is_flashinfer_fp8_blockscale_gemm_supported",
    "whether it is installed, for this GPU, and not switched off",
    "condition of our kernel class for Hopper",
    _STABLE_GEMM,
)
CUTLASS_GEMM = Private(
    "vllm._custom_ops",
    "cutlass_scaled_mm",
    "vLLM's CUTLASS GEMM",
    "the GEMM of our op",
    _STABLE_GEMM,
)
TRITON_GEMM = Private(
    "vllm.model_executor.layers.quantization.utils.fp8_utils",
    "w8a8_triton_block_scaled_mm",
    "vLLM's Triton GEMM",
    "the GEMM of our op",
    _STABLE_GEMM,
)

MOE_BACKENDS = Private(_MOE_ORACLE, "Fp8MoeBackend", "enum of FP8 MoE backends", "a value for our experts", _OOT_MOE)
MOE_PRIORITY = Private(
    _MOE_ORACLE, "_get_priority_backends", "function: backends in order of preference", "to put ours first", _OOT_MOE
)
MOE_EXPERTS = Private(
    _MOE_ORACLE, "backend_to_kernel_cls", "function: backend -> experts classes", "to name our class", _OOT_MOE
)
_BF16_MOE_ORACLE = "vllm.model_executor.layers.fused_moe.oracle.unquantized"
BF16_MOE_BACKENDS = Private(
    _BF16_MOE_ORACLE, "UnquantizedMoeBackend", "enum of backends of unquantised MoE layers", "those we know", _OOT_MOE
)
BF16_MOE_EXPERTS = Private(
    _BF16_MOE_ORACLE, "backend_to_kernel_cls", "function: backend -> experts classes", "to name our class", _OOT_MOE
)
_INT8_MOE_ORACLE = "vllm.model_executor.layers.fused_moe.oracle.int8"
INT8_MOE_BACKENDS = Private(
    _INT8_MOE_ORACLE, "Int8MoeBackend", "enum of backends of INT8 MoE layers", "those we know", _OOT_MOE
)
INT8_MOE_EXPERTS = Private(
    _INT8_MOE_ORACLE, "backend_to_kernel_cls", "function: backend -> experts classes", "to name our class", _OOT_MOE
)
MOE_QUANTIZE_INPUT = Private(
    "vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep",
    "_quantize_input",
    "function: quantises a layer's input as its quant_config says",
    "ours take the input unquantised; before vLLM's experts we do what vLLM would have done",
    "a choice of experts for each call (its own experts need one too)",
)
UE8M0_SCALES = Private(
    "vllm.utils.deep_gemm",
    "is_deep_gemm_e8m0_used",
    "function: whether vLLM rounds the scales of activations up to powers of two",
    "our experts quantise as vLLM's do",
    "-",
)
CPU_FP8_EXPERTS = Private(
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe",
    "CPUExpertsFp8",
    "vLLM's FP8 experts on CPU (AMX only)",
    "base of ours: formats, shapes and conditions",
    "documented base classes",
)

_NVFP4_MOE_ORACLE = "vllm.model_executor.layers.fused_moe.oracle.nvfp4"
_NVFP4_EMULATION = "vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils"
_CPU_EMULATION = "an NVFP4 emulation that vLLM offers on CPUs too"
NVFP4_KERNELS = Private(
    _LINEAR,
    "_POSSIBLE_NVFP4_KERNELS",
    "dict of platform -> list of NVFP4 kernel classes, in order of preference",
    "there is none for CPUs",
    _CPU_EMULATION,
)
NVFP4_EMULATION_KERNEL = Private(
    _LINEAR, "EmulationNvFp4LinearKernel", "vLLM's NVFP4 emulation", "base of ours on CPU", _CPU_EMULATION
)
NVFP4_MARLIN_KERNEL = Private(
    _LINEAR,
    "MarlinNvFp4LinearKernel",
    "vLLM's W4A16 kernel class for GPUs, which it takes by this name wherever there is no better one",
    "on CPU the name has to be that of a class that runs there",
    "W4A16 kernels from the list of the platform",
)
NVFP4_MARLIN_GEMM = Private(
    "vllm.model_executor.layers.quantization.utils.marlin_utils_fp4",
    "apply_fp4_marlin_linear",
    "function: Marlin on a layer's tensors",
    "the GEMM of our op for more tokens",
    _STABLE_GEMM,
)
NVFP4_QUANT_DEQUANT = Private(
    _NVFP4_EMULATION,
    "ref_nvfp4_quant_dequant",
    "function: rounds an activation to NVFP4 values",
    "arithmetic of our CPU layers",
    _CPU_EMULATION,
)
NVFP4_DEQUANTISE = Private(
    _NVFP4_EMULATION,
    "dequantize_to_dtype",
    "function: NVFP4 to 16 bits",
    "arithmetic of our CPU layers",
    _CPU_EMULATION,
)
NVFP4_MOE_BACKENDS = Private(
    _NVFP4_MOE_ORACLE, "NvFp4MoeBackend", "enum of NVFP4 MoE backends", "a value for our experts", _OOT_MOE
)
NVFP4_MOE_EXPERTS = Private(
    _NVFP4_MOE_ORACLE, "backend_to_kernel_cls", "function: backend -> experts classes", "to name our class", _OOT_MOE
)
NVFP4_MOE_CONVERT = Private(
    _NVFP4_MOE_ORACLE,
    "convert_to_nvfp4_moe_kernel_format",
    "function: a layer's weights in the form that a backend's experts take",
    "ours take them in another, made of what it gets",
    "experts that are given the weights as they were loaded",
)
NVFP4_MOE_PREPARE = Private(
    _NVFP4_MOE_ORACLE,
    "prepare_nvfp4_moe_layer_for_fi_or_cutlass",
    "function: the weights of NVFP4 experts as FlashInfer and CUTLASS take them",
    "it refuses gated experts that need padding",
    "padding of gated experts for every back end",
)
NVFP4_MOE_ALIGN = Private(
    "vllm.model_executor.layers.quantization.utils.flashinfer_utils",
    "align_fp4_moe_weights_for_fi",
    "function: pads gate, up and the down projection, each by itself",
    "to pad for the other back ends, too",
    "padding of gated experts for every back end",
)
NVFP4_DYNAMIC = Private(
    "vllm.model_executor.layers.quantization.utils.quant_utils",
    "kNvfp4Dynamic",
    "key of an activation in NVFP4",
    "experts that take NVFP4 weights with such an activation take them without, too, on CPU",
    _CPU_EMULATION,
)
NVFP4_EMULATION_EXPERTS = Private(
    "vllm.model_executor.layers.fused_moe.experts.nvfp4_emulation_moe",
    "Nvfp4QuantizationEmulationTritonExperts",
    "vLLM's emulated NVFP4 experts, in Triton",
    "base of ours: formats, shapes and conditions",
    _CPU_EMULATION,
)

_ROUTER = "vllm.model_executor.layers.fused_moe.router"
_FUSED_ROUTER = "a router that gets the hidden states and the gate, instead of logits"
CURRENT_CONFIG = Private(
    "vllm.config.vllm",
    "get_current_vllm_config_or_none",
    "function: the configuration of the model that is being made",
    "a gate that may get a LoRA hands on logits alone; whether vLLM's own passes have to see a quantisation",
    "-",
)
GATE_LINEAR = Private(
    f"{_ROUTER}.gate_linear", "GateLinear", "the gate of MoE layers", "base of ours", "documented base classes"
)
PLUGGABLE_LAYER = Private(
    "vllm.model_executor.custom_op", "PluggableLayer", "base class of replaceable layers", "to replace the gate", "-"
)
PLUGGABLE_LAYERS = Private(
    "vllm.model_executor.custom_op",
    "op_registry_oot",
    "dict of in-tree class name -> class to make instead",
    "to see whether the gate is ours already",
    "a registration that may be repeated",
)
UNQUANTIZED_LINEAR = Private(
    "vllm.model_executor.layers.linear",
    "UnquantizedLinearMethod",
    "how a linear layer without quantisation multiplies",
    "to leave quantised gates alone, and to tell the layers of UNQUANTIZED_GEMM",
    "-",
)
UNQUANTIZED_EMBEDDING = Private(
    "vllm.model_executor.layers.vocab_parallel_embedding",
    "UnquantizedEmbeddingMethod",
    "how an lm_head without quantisation multiplies",
    "to tell the layers of UNQUANTIZED_GEMM",
    "-",
)
LM_HEAD = Private(
    "vllm.model_executor.layers.vocab_parallel_embedding",
    "ParallelLMHead",
    "the output layer",
    "to tell it from the embedding, which multiplies nothing",
    "-",
)
FUSED_TOPK_ROUTER = Private(
    f"{_ROUTER}.fused_topk_router",
    "FusedTopKRouter",
    "router by softmax or sigmoid; _compute_routing makes weights and ids of logits",
    "to take those that our gate made along with the logits",
    _FUSED_ROUTER,
)
FUSED_TOPK_BIAS_ROUTER = Private(
    f"{_ROUTER}.fused_topk_bias_router",
    "FusedTopKBiasRouter",
    "the same with e_score_correction_bias",
    "to take those that our gate made along with the logits",
    _FUSED_ROUTER,
)
GROUPED_TOPK_ROUTER = Private(
    f"{_ROUTER}.grouped_topk_router",
    "GroupedTopKRouter",
    "the same from the best groups of experts, DeepSeek's router",
    "to take those that our gate made along with the logits",
    _FUSED_ROUTER,
)
PADDING_MASK = Private(
    f"{_ROUTER}.fused_topk_router",
    "_get_padding_mask",
    "function: which of the rows of this forward pass are padding, or None",
    "our gate selects for the router, which asks it",
    _FUSED_ROUTER,
)
DEEP_GEMM_E8M0 = Private(
    "vllm.utils.deep_gemm",
    "is_deep_gemm_e8m0_used",
    "function: whether DeepGEMM gets scales that are powers of two",
    "explain: what quantises, and which experts run",
    "-",
)
VALID_DEEP_GEMM_EXPERTS = Private(
    "vllm.model_executor.layers.fused_moe.experts.deep_gemm_moe",
    "_valid_deep_gemm",
    "function: whether DeepGEMM's experts take these tokens and weights",
    "explain: a branch on the number of tokens that vLLM takes in every call",
    "-",
)
PROCESS_WEIGHTS = Private(
    "vllm.model_executor.model_loader.base_loader",
    "process_weights_after_loading",
    "function: has every layer bring its loaded weights into the form that its kernel takes",
    "global scales of the parts of a fused layer are there before it, and one for all of them afterwards",
    "kernels that take a global scale for each part",
)
BASE_LOADER = Private(
    "vllm.model_executor.model_loader.base_loader",
    "BaseModelLoader",
    "base class of model loaders; load_model() returns the model, ready to run",
    "the table of kernels in the log of a server",
    "a hook for plugins after the model is loaded",
)

# What `vllm-b200 explain` builds a model with, in a process that pretends a GPU.
PLATFORMS = Private("vllm", "platforms", "its _current_platform is the device vLLM runs on", "to pretend another", "-")
CUDA_PLATFORM = Private(
    "vllm.platforms.cuda", "CudaPlatformBase", "vLLM's platform for CUDA", "base of the pretended GPU", "-"
)
DEVICE_CAPABILITY = Private(
    "vllm.platforms.interface", "DeviceCapability", "compute capability as a tuple", "answer of the pretended GPU", "-"
)
LAZY_MODEL = Private(
    "vllm.model_executor.models.registry",
    "_LazyRegisteredModel",
    "a model class by name; inspect_model_cls() looks at it in another process",
    "that process would not pretend",
    "-",
)
MODEL_INFO = Private(
    "vllm.model_executor.models.registry", "_ModelInfo", "what vLLM knows of a model class", "as above", "-"
)
INITIALIZE_MODEL = Private(
    "vllm.model_executor.model_loader.utils", "initialize_model", "builds a model without weights", "explain", "-"
)
PARALLEL_STATE = Private(
    "vllm.distributed", "parallel_state", "process groups", "to build one of several ranks without the others", "-"
)
MESSAGE_QUEUE = Private(
    "vllm.distributed.device_communicators.shm_broadcast", "MessageQueue", "between ranks", "there is one rank", "-"
)
EXPERT_MAP = Private(
    "vllm.model_executor.layers.fused_moe.expert_map_manager",
    "determine_expert_map",
    "function: which experts a rank has",
    "explain's models have no data, but vLLM reads this table while it builds one",
    "-",
)
INIT_WORKSPACE = Private(
    "vllm.v1.worker.workspace", "init_workspace_manager", "scratch memory", "some attention asks for it early", "-"
)
EXPERTS_BASE = Private(
    "vllm.model_executor.layers.fused_moe.modular_kernel",
    "FusedMoEExperts",
    "base of experts; is_supported_config() says why one is passed over",
    "the reasons that explain prints",
    "-",
)
HAS_MODULE = Private(
    "vllm.utils.import_utils",
    "_has_module_spec",
    "function: whether a module is installed",
    "DeepGEMM, which vLLM brings, may not load without a driver",
    "-",
)

# The passes over the graphs that vLLM compiles.
_PASSES = "a documented way for plugins to add a pass"
POST_GRAD_PASSES = Private(
    "vllm.compilation.passes.pass_manager",
    "PostGradPassManager",
    "runs the passes, which configure() makes, and names them in the cache key",
    "to add ours behind them",
    _PASSES,
)
INDUCTOR_PASS = Private(
    "vllm.compilation.passes.inductor_pass", "InductorPass", "base class of these passes", "base of ours", _PASSES
)
ENABLE_FAKE_MODE = Private(
    "vllm.compilation.passes.inductor_pass",
    "enable_fake_mode",
    "decorator: tensors without data",
    "patterns are traced while a model is",
    _PASSES,
)
PASS_CONTEXT = Private(
    "vllm.compilation.passes.inductor_pass",
    "get_pass_context",
    "function: for which numbers of tokens the graph is",
    "a pass of few tokens leaves the others alone",
    _PASSES,
)
ENGINE_CONFIG = Private(
    "vllm.config.vllm",
    "VllmConfig",
    "the configuration of an engine; _set_compile_ranges() finds where compile ranges end",
    "to end one behind few tokens",
    "a documented way for plugins to end a compile range",
)
IR_OPS = Private("vllm.ir", "ops", "ops that stand for RMSNorm in graphs", "to find them there", _PASSES)

# Arguments of vLLM's CUDA ops that we stand in for, as their schemas name them. Needed until vLLM chooses quantisation
# kernels through a registry.
QUANT_OPS = {
    "per_token_group_fp8_quant": (
        "input",
        "output_q",
        "output_s",
        "group_size",
        "eps",
        "fp8_min",
        "fp8_max",
        "scale_ue8m0",
        "dummy_is_scale_transposed",
        "dummy_is_tma_aligned",
    ),
    "per_token_group_fp8_quant_packed": (
        "input",
        "output_q",
        "output_s_packed",
        "group_size",
        "eps",
        "fp8_min",
        "fp8_max",
    ),
    "per_token_group_quant_int8": ("input", "output_q", "output_s", "group_size", "eps", "int8_min", "int8_max"),
}

# The same, until vLLM chooses the kernels of its MoE layers' routing and bookkeeping through a registry.
TOPK_OPS = {
    "topk_softmax": (
        "topk_weights",
        "topk_indices",
        "token_expert_indices",
        "gating_output",
        "renormalize",
        "bias",
        "is_padding",
    ),
    "topk_sigmoid": (
        "topk_weights",
        "topk_indices",
        "token_expert_indices",
        "gating_output",
        "renormalize",
        "bias",
        "routed_scaling_factor",
        "is_padding",
    ),
    "grouped_topk": (
        "scores",
        "n_group",
        "topk_group",
        "topk",
        "renormalize",
        "routed_scaling_factor",
        "bias",
        "scoring_func",
    ),
}
MOE_ALIGN_OPS = {
    "moe_align_block_size": (
        "topk_ids",
        "num_experts",
        "block_size",
        "sorted_token_ids",
        "experts_ids",
        "num_tokens_post_pad",
        "maybe_expert_map",
        "scatter_idx",
    ),
    "batched_moe_align_block_size": (
        "max_tokens_per_batch",
        "block_size",
        "expert_num_tokens",
        "sorted_token_ids",
        "experts_ids",
        "num_tokens_post_pad",
    ),
}
TOKEN_QUANT_OPS = {
    "dynamic_per_token_scaled_fp8_quant": ("result", "input", "scale", "scale_ub"),
    "dynamic_scaled_int8_quant": ("result", "input", "scale", "azp"),
    "static_scaled_fp8_quant": ("result", "input", "scale", "group_shape"),
    "static_scaled_int8_quant": ("result", "input", "scale", "azp"),
}
GATED_QUANT_OPS = {
    "silu_and_mul_per_block_quant": ("out", "input", "scales", "group_size", "scale_ub", "is_scale_transposed"),
    "silu_and_mul_quant": ("result", "input", "scale"),
    "persistent_masked_m_silu_mul_quant": ("input", "counts", "y_q", "y_s", "use_ue8m0"),
}
# Of _C::cutlass_scaled_mm, which a pass of ours puts into graphs.
CUTLASS_ARGUMENTS = ("out", "a", "b", "a_scales", "b_scales", "bias")
_NORM = ("result", "input", "weight", "scale", "epsilon")
NORM_QUANT_OPS = {
    "rms_norm_per_block_quant": (*_NORM, "scale_ub", "residual", "group_size", "is_scale_transposed"),
    "rms_norm_dynamic_per_token_quant": (*_NORM, "scale_ub", "residual"),
    "fused_add_rms_norm_static_fp8_quant": ("result", "input", "residual", "weight", "scale", "epsilon"),
}
CACHE_OPS = {
    "reshape_and_cache_flash": (
        "key",
        "value",
        "key_cache",
        "value_cache",
        "slot_mapping",
        "kv_cache_dtype",
        "k_scale",
        "v_scale",
    ),
    "concat_and_cache_mla": ("kv_c", "k_pe", "kv_cache", "slot_mapping", "kv_cache_dtype", "scale"),
}


def capability() -> tuple[int, int] | None:
    """Compute capability of the GPU, told by NVML without starting CUDA; None on other platforms."""
    platform = CURRENT_PLATFORM.get()
    if not platform.is_cuda():
        return None
    found = platform.get_device_capability()
    return None if found is None else (found[0], found[1])


def is_disabled(kernel: type) -> bool:
    """Whether VLLM_DISABLED_KERNELS names this kernel class."""
    return kernel.__name__ in ENVS.get().VLLM_DISABLED_KERNELS
