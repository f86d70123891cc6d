"""Feature group_quant_ops: vLLM's per-token-group quantisation ops run our kernel.

The ops keep their names, so that vLLM's MoE layers and fused passes, which call or match them, profit too. vLLM's own
kernel stays behind for the arguments that ours does not take.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from vllm_b200_plugin import vllm_compat
from vllm_b200_plugin.features import FeatureUnavailable, NotForThisPlatform
from vllm_b200_plugin.integration import library, report
from vllm_b200_plugin.ops import quant

# Destroying a Library takes its kernels out again.
_libraries: dict[str, torch.library.Library] = {}


def apply() -> None:
    """Override the ops for CUDA, once. Raises FeatureUnavailable where that cannot be done."""
    platform = vllm_compat.CURRENT_PLATFORM.get()
    if not platform.is_cuda():
        raise NotForThisPlatform(f"for CUDA, vLLM runs on {platform.device_name}")
    library.require()
    override("_C", "CUDA")


def override(namespace: str, dispatch_key: str) -> None:
    """Put ours before the kernels that the three ops in `namespace` have for `dispatch_key`.

    Raises FeatureUnavailable, with nothing changed, where an op is missing or has other arguments than we know.
    """
    if namespace in _libraries:
        return
    if not hasattr(torch.library, "get_kernel"):
        raise FeatureUnavailable(f"torch {torch.__version__} lacks torch.library.get_kernel, to keep vLLM's kernel by")
    originals = {name: _original(namespace, name, dispatch_key) for name in vllm_compat.QUANT_OPS}
    ours = torch.library.Library(namespace, "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that a kernel is overridden, which is what we want
        for name, original in originals.items():
            ours.impl(name, _instead_of(name, original, _TAKES[name]), dispatch_key, with_keyset=True)
    _libraries[namespace] = ours


def _original(namespace: str, name: str, dispatch_key: str) -> Any:
    try:
        schema = getattr(getattr(torch.ops, namespace), name).default._schema
    except AttributeError as error:
        raise FeatureUnavailable(f"this vLLM has no op {namespace}::{name}") from error
    arguments = tuple(argument.name for argument in schema.arguments)
    if arguments != vllm_compat.QUANT_OPS[name]:
        raise FeatureUnavailable(f"{namespace}::{name} takes ({', '.join(arguments)}) in this vLLM, which is new to us")
    try:
        return torch.library.get_kernel(f"{namespace}::{name}", dispatch_key)
    except RuntimeError as error:
        raise FeatureUnavailable(f"{namespace}::{name} has no kernel for {dispatch_key}: {error}") from error


def _instead_of(name: str, original: Any, takes: Callable[..., bool]) -> Callable[..., None]:
    def kernel(keyset: Any, *args: Any) -> None:
        if takes(*args):
            report.chosen(name, "our group quant", "vLLM's op, with arguments that ours takes")
        else:
            original.call_boxed(keyset, *args)
            report.chosen(name, "vLLM's kernel", "vLLM's op, with arguments that ours does not take")

    return kernel


def _fp8(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, group_size: int, eps: float, low: float, high: float,
    ue8m0: bool, is_scale_transposed: bool = False, is_tma_aligned: bool = False,
) -> bool:  # fmt: skip
    # The two flags repeat what the strides of `scale` say; vLLM's kernel ignores them, too.
    in_range = (low, high) == (-448.0, 448.0)
    return in_range and _quantise(x, q, scale, group_size, eps, ue8m0, torch.float8_e4m3fn, torch.float32)


def _fp8_packed(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, group_size: int, eps: float, low: float, high: float
) -> bool:
    in_range = (low, high) == (-448.0, 448.0)
    return in_range and _quantise(x, q, scale, group_size, eps, True, torch.float8_e4m3fn, torch.int32)


def _int8(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, group_size: int, eps: float, low: float, high: float
) -> bool:
    in_range = (low, high) == (-128.0, 127.0)
    return in_range and _quantise(x, q, scale, group_size, eps, False, torch.int8, torch.float32)


_TAKES: dict[str, Callable[..., bool]] = {
    "per_token_group_fp8_quant": _fp8,
    "per_token_group_fp8_quant_packed": _fp8_packed,
    "per_token_group_quant_int8": _int8,
}


def _quantise(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, group_size: int, eps: float, ue8m0: bool,
    q_dtype: torch.dtype, scale_dtype: torch.dtype,
) -> bool:  # fmt: skip
    """Quantise x into q and scale; False, with nothing written, for arguments that our op does not take."""
    if (
        x.dim() == 0
        or x.dtype not in quant.INPUT_DTYPES
        or q.dtype != q_dtype
        or scale.dtype != scale_dtype
        or q.shape != x.shape
        or group_size not in quant.GROUP_SIZES
        or x.shape[-1] % group_size
        or not quant.MIN_EPS <= eps <= 1.0
    ):
        return False
    if x.numel() == 0:
        return True
    columns = x.shape[-1] // group_size
    if scale_dtype == torch.int32:
        columns = -(-columns // 4)
    if x.dim() not in (2, 3) or scale.shape != (*x.shape[:-1], columns):
        # As vLLM's kernels see it: a list of rows.
        rows = x.numel() // x.shape[-1]
        if not (x.is_contiguous() and q.is_contiguous()):
            return False
        x, q = x.view(rows, -1), q.view(rows, -1)
        if scale.shape != (rows, columns):
            if not scale.is_contiguous() or scale.numel() != rows * columns:
                return False
            scale = scale.view(rows, columns)
    if x.stride(-1) != 1 or q.stride(-1) != 1 or q.data_ptr() % 16 or any(s % 16 for s in q.stride()[:-1]):
        return False
    # Not the padding rows of fp32 scales: vLLM's MLA passes the leading rows of a larger tensor, and what looks like
    # padding may be the scales of further tokens. Packed scales are always whole tensors.
    pad = scale.dtype == torch.int32
    torch.ops.vllm_b200.per_token_group_quant(x, q, scale, group_size, eps, ue8m0, pad)
    return True
