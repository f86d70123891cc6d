"""Branches of vLLM's own layers that depend on the number of tokens, and the quantisers that go with its kernels.

What ours do is not here: each feature answers for its own layers (report.choices).
"""

from collections.abc import Collection
from typing import Any

import torch

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.dispatch import Choice

SWAP_AB_BELOW = 32  # FlashInferFp8DeepGEMMDynamicBlockScaledKernel
FUSED_A_UP_TO = 16  # min_latency_fused_qkv_a_proj
TRITON_EXPERTS_UP_TO = 8  # TritonOrCutlassExperts on capability 10.x
LL_FP32_UP_TO = 32  # GateLinear, tiers 2 and 3


def choice(module: torch.nn.Module, kernel: str, num_tokens: int) -> Choice | None:
    """What a layer of vLLM's runs for so many tokens, where that depends on them; None where it does not."""
    if kernel == "FlashInferFp8DeepGEMMDynamicBlockScaledKernel":
        if num_tokens < SWAP_AB_BELOW:
            return Choice("FlashInfer swap-AB", f"vLLM's kernel below {SWAP_AB_BELOW} tokens")
        return Choice("DeepGEMM", f"vLLM's kernel from {SWAP_AB_BELOW} tokens on")
    if getattr(module, "_use_min_latency_gemm", False):
        if num_tokens <= FUSED_A_UP_TO:
            return Choice("_C::dsv3_fused_a_gemm", f"vLLM's for bf16 2112x7168, up to {FUSED_A_UP_TO} tokens")
        return Choice("F.linear", f"more than {FUSED_A_UP_TO} tokens")
    if hasattr(module, "allow_cublas_router_gemm"):
        return _gate(module, num_tokens)
    if kernel == "TritonOrCutlassExperts":
        small = _family_100() and num_tokens <= TRITON_EXPERTS_UP_TO
        name = "TritonExperts" if small else "CutlassExpertsFp8"
        return Choice(name, f"vLLM takes Triton on 10.x up to {TRITON_EXPERTS_UP_TO} tokens, else CUTLASS")
    if kernel == "TritonOrDeepGemmExperts":
        return _deep_gemm_experts(module, num_tokens)
    return None


def _family_100() -> bool:
    capability = vllm_compat.capability()
    return capability is not None and capability[0] == 10


def _gate(module: Any, num_tokens: int) -> Choice:
    """The tiers of vLLM's GateLinear that run on CUDA, in its order."""
    most = getattr(module, "LL_BF16_MAX_TOKENS", 16)
    if module.allow_ll_bf16_gemm and num_tokens <= most:
        return Choice("CuteDSL ll_bf16_gemm", f"vLLM's for up to {most} tokens")
    few = num_tokens <= LL_FP32_UP_TO
    if module.allow_fp32_router_gemm and few:
        return Choice(
            "_C::fp32_router_gemm", f"fp32 weight of a shape that vLLM has a kernel for, up to {LL_FP32_UP_TO}"
        )
    if getattr(module, "allow_ll_fp32w_gemm", False) and few:
        return Choice("CuteDSL ll_fp32w_gemm", f"fp32 weight, up to {LL_FP32_UP_TO} tokens")
    if getattr(module, "allow_bf16x3_router_gemm", False):
        return Choice("CuteDSL bf16x3", "fp32 weight, capability 10.x")
    if module.allow_cublas_router_gemm:
        return Choice("torch.mm to fp32", "cuBLAS with an fp32 result")
    return Choice("F.linear", "no special kernel of vLLM's takes this gate")


def _deep_gemm_experts(module: Any, num_tokens: int) -> Choice:
    """Asks vLLM's own condition with tensors that have a shape and nothing else."""
    if vllm_compat.DEEP_GEMM_E8M0.get()():
        return Choice("DeepGemmExperts", "UE8M0 scales, which Triton does not take")
    w1, w2 = module.w13_weight, module.w2_weight
    hidden = torch.empty((num_tokens, w1.shape[2]), device="meta", dtype=torch.bfloat16)
    if vllm_compat.VALID_DEEP_GEMM_EXPERTS.get()(hidden, w1, w2):
        return Choice("DeepGemmExperts", "tokens and sizes fit DeepGEMM's alignment")
    return Choice("TritonExperts", "tokens or sizes do not fit DeepGEMM's alignment")


def quantiser(kernel: Any, overridden: Collection[str]) -> str:
    """What quantises the activation of a linear layer, and whether that is vLLM's kernel still."""
    if (own := getattr(kernel, "quantiser", None)) is not None:
        return own
    name = type(kernel).__name__
    if any(word in name for word in ("Marlin", "A16", "Humming", "WNA16")):
        return "none, 16-bit activation"
    if "NvFp4" in name:
        return _op("_C::scaled_fp4_quant", overridden) if "FlashInfer" not in name else "scaled_fp4_quant (FlashInfer)"
    if "Int8" in name:
        return _op("_C::dynamic_scaled_int8_quant", overridden)
    quant = getattr(kernel, "quant_fp8", None)
    if quant is None:
        return ""
    group = quant.group_shape
    if getattr(quant, "static", False):
        return _op("_C::static_scaled_fp8_quant", overridden)
    if group.is_per_token():
        return _op("_C::dynamic_per_token_scaled_fp8_quant", overridden)
    if group.is_per_tensor():
        return _op("_C::dynamic_scaled_fp8_quant", overridden)
    packed = "DeepGemm" in name and "FlashInfer" not in name and vllm_compat.DEEP_GEMM_E8M0.get()() and _is_packed()
    return _op("_C::per_token_group_fp8_quant" + ("_packed" if packed else ""), overridden)


def _is_packed() -> bool:
    formats = vllm_compat.SCALE_FORMAT.get()
    return formats.from_oracle() == formats.UE8M0


def expert_quantiser(method: Any, experts: str, overridden: Collection[str]) -> str:
    """The same for experts whose kernel takes quantised activations; empty where it quantises by itself."""
    if "Fp8" not in type(method).__name__ and "W8A8Fp8" not in type(method).__name__:
        return ""
    if any(word in experts for word in ("TrtLlm", "Marlin", "Humming", "FlashInfer")):
        return ""
    if getattr(method, "block_quant", False) or getattr(method, "weight_block_size", None):
        return _op("_C::per_token_group_fp8_quant", overridden)
    return _op("_C::dynamic_per_token_scaled_fp8_quant", overridden)


def kv_cache_write(module: Any, backend: str, overridden: Collection[str]) -> str:
    """What writes the KV cache."""
    if "MLA" in backend:
        return _op("_C_cache_ops::concat_and_cache_mla", overridden)
    if getattr(module.attn_backend, "forward_includes_kv_cache_update", False):
        return "in the attention kernel"
    if "Triton" in backend:
        return "Triton reshape_and_cache"
    return _op("_C_cache_ops::reshape_and_cache_flash", overridden)


def _op(name: str, overridden: Collection[str]) -> str:
    return f"{name} (our kernel)" if name in overridden else name
