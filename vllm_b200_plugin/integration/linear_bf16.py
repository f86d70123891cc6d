"""Feature bf16_linear: our GEMM for few tokens in unquantised linear layers, router gates and lm_head.

vLLM sends all of these through one function. A layer whose shape our kernel never wins keeps vLLM's path, untouched;
for the others one op, opaque to torch.compile, branches on the number of tokens.
"""

from typing import Any

import torch

from vllm_b200_plugin import dispatch, vllm_compat
from vllm_b200_plugin.features import NotForThisPlatform
from vllm_b200_plugin.integration import library, report
from vllm_b200_plugin.ops import small_m_gemm
from vllm_b200_plugin.ops._library import torch_library

_KIND = "bf16"


def choice(layer: Any, num_tokens: int) -> dispatch.Choice | None:
    """What a layer runs for so many tokens where we send it through our op; None for all others."""
    methods = vllm_compat.UNQUANTIZED_LINEAR.get(), vllm_compat.UNQUANTIZED_EMBEDDING.get()
    multiplies = hasattr(layer, "output_size") or isinstance(layer, vllm_compat.LM_HEAD.get())
    if not isinstance(getattr(layer, "quant_method", None), methods) or not multiplies:
        return None
    if vllm_compat.ENVS.get().VLLM_BATCH_INVARIANT:  # vLLM asks for a product of its own before it comes to ours
        return None
    shape: tuple[int, int] = tuple(layer.weight.shape)
    if layer.weight.dtype != torch.bfloat16 or not dispatch.small_m_limit(_KIND, *shape, library.capability()):
        return None
    few = dispatch.small_m_gemm(_KIND, num_tokens, *shape, library.capability())
    return dispatch.Choice(few.kernel if few.kernel == dispatch.SMALL_M else "F.linear", few.reason)


def apply() -> None:
    """Put our function in the place of vLLM's, once. Raises FeatureUnavailable where there is nothing to run it."""
    platform = vllm_compat.CURRENT_PLATFORM.get()
    if not platform.is_cuda():
        raise NotForThisPlatform(f"for CUDA, vLLM runs on {platform.device_name}")
    library.require()
    if vllm_compat.UNQUANTIZED_GEMM.get() is not unquantized_gemm:
        vllm_compat.UNQUANTIZED_GEMM.replace(unquantized_gemm)


def unquantized_gemm(
    layer: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., K] @ weight [N, K].T + bias [N], in x's dtype."""
    dtypes = {x.dtype, weight.dtype} | ({bias.dtype} if bias is not None else set())
    if dtypes == {torch.bfloat16} and weight.dim() == 2 and _takes(weight.shape[0], weight.shape[1]):
        # Outside compiled graphs, as router gates are, the op would only cost the host's time.
        op = torch.ops.vllm_b200.bf16_linear if torch.compiler.is_compiling() else _implementation
        return op(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


# A constant for torch.compile, which would otherwise trace the table's look-up.
@torch.compiler.assume_constant_result
def _takes(n: int, k: int) -> bool:
    limit = dispatch.small_m_limit(_KIND, n, k, library.capability())
    if limit:
        report.chosen("bfloat16 linear", dispatch.SMALL_M, f"{n}x{k}: up to {limit} tokens, else vLLM's")
    return limit > 0


torch_library.define("bf16_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.register_fake("vllm_b200::bf16_linear", lib=torch_library)
def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.impl(torch_library, "bf16_linear", "CPU")
@torch.library.impl(torch_library, "bf16_linear", "CUDA")
def _implementation(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    num_tokens = x.numel() // x.shape[-1]
    if 0 < num_tokens < dispatch.SMALL_M_BELOW:
        choice = dispatch.small_m_gemm(_KIND, num_tokens, *weight.shape, library.capability())
        if choice.kernel == dispatch.SMALL_M and _rows_aligned(weight):
            rows: Any = x.reshape(num_tokens, x.shape[-1])
            if not _rows_aligned(rows):
                rows = rows.clone(memory_format=torch.contiguous_format)
            out = small_m_gemm.linear(rows, weight, bias=bias, config=small_m_gemm.Config(*choice.config))
            return out.view(*x.shape[:-1], weight.shape[0])
    return torch.nn.functional.linear(x, weight, bias)


def _rows_aligned(tensor: torch.Tensor) -> bool:
    return tensor.stride(1) == 1 and tensor.stride(0) % 8 == 0 and tensor.data_ptr() % 16 == 0
