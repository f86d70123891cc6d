"""Makes vLLM's CPU build believe it runs on a GPU, so that its real selection code can be asked what it would choose.

For a child process, before anything of vLLM but its plugin loader is imported:

    from fake_cuda import pretend, select
    pretend((10, 0))
    print(select((2112, 7168)))
"""

import functools
import sys
import types
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fake_moe_ops import define_moe_ops

FLAGS = ", bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned"
ARCHS = ("90a", "100a", "103a", "120a")
# Ops of vLLM's CUDA extension that ours stand in for, besides group quantisation; alike in vLLM 0.32 and 0.33.
MEMORY_OPS = (
    "dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()",
    "dynamic_scaled_int8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor!? azp) -> ()",
    "static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()",
    "static_scaled_int8_quant(Tensor! result, Tensor input, Tensor scale,Tensor? azp) -> ()",
    "silu_and_mul_per_block_quant(Tensor! out, Tensor input, Tensor! scales, int group_size, Tensor? scale_ub=None, "
    "bool is_scale_transposed=False) -> ()",
    "silu_and_mul_quant(Tensor! result, Tensor input, Tensor scale) -> ()",
    "persistent_masked_m_silu_mul_quant(Tensor input, Tensor counts, Tensor! y_q, Tensor! y_s, bool use_ue8m0) -> ()",
    "rms_norm_per_block_quant(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, "
    "Tensor? scale_ub, Tensor!? residual, int group_size, bool is_scale_transposed) -> ()",
    "rms_norm_dynamic_per_token_quant(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, "
    "Tensor? scale_ub, Tensor!? residual) -> ()",
    "fused_add_rms_norm_static_fp8_quant(Tensor! result, Tensor input, Tensor! residual, Tensor weight, Tensor scale, "
    "float epsilon) -> ()",
)
CACHE_OPS = (
    "reshape_and_cache_flash(Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache, Tensor slot_mapping, "
    "str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()",
    "concat_and_cache_mla(Tensor kv_c, Tensor k_pe, Tensor! kv_cache, Tensor slot_mapping, str kv_cache_dtype, "
    "Tensor scale) -> ()",
)
_kept: list[torch.library.Library] = []


def pretend(
    capability: tuple[int, int], *, deep_gemm: bool = True, flashinfer: bool = True, library: bool = True
) -> None:
    """A GPU of this compute capability, with or without DeepGEMM, FlashInfer's FP8 GEMM, and our CUDA library."""
    for name in ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch"):
        sys.modules[name] = types.ModuleType(name)
    attention = types.ModuleType("vllm.vllm_flash_attn")
    attention.__getattr__ = lambda name: None  # its functions are imported by name
    sys.modules[attention.__name__] = attention
    import vllm.platforms
    import vllm.platforms.cuda
    from vllm.platforms.interface import DeviceCapability

    _define_ops(capability)

    class FakeCuda(vllm.platforms.cuda.CudaPlatformBase):
        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(*capability))
        get_device_name = classmethod(lambda cls, device_id=0: f"pretended sm_{capability[0]}{capability[1]}")
        get_device_total_memory = classmethod(lambda cls, device_id=0: 140 << 30)
        num_compute_units = classmethod(lambda cls, device_id=0: 132)

    vllm.platforms._current_platform = FakeCuda()

    import vllm.utils.deep_gemm as dg

    dg.has_deep_gemm = lambda: deep_gemm
    dg._lazy_init = lambda: None
    dg._fp8_gemm_nt_impl = _no_kernel if deep_gemm else None

    import vllm.utils.flashinfer as fi

    fi.has_flashinfer_fp8_blockscale_gemm = lambda: flashinfer and capability == (9, 0)

    from vllm_b200_plugin.ops import _library

    status = _library.LibraryStatus(Path("_C.abi3.so"), library, "" if library else "was not built", ARCHS)
    _library.status = lambda: status  # type: ignore[assignment]
    _library.override_op = lambda namespace, op, dispatch_key: None  # type: ignore[assignment]


def _no_kernel(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("selection alone runs no kernel")


def _define_ops(capability: tuple[int, int]) -> None:
    """What vLLM asks its CUDA extension at import, and the ops that ours stand in for."""
    import vllm.platforms

    assert vllm.platforms._current_platform is None, "a platform was chosen already"
    lib = torch.library.Library("_C", "FRAGMENT")
    for name, minimum in (
        ("cutlass_scaled_mm_supports_fp8", 89),
        ("cutlass_scaled_mm_supports_block_fp8", 90),
        ("cutlass_scaled_mm_supports_fp4", 100),
        ("cutlass_group_gemm_supported", 90),
    ):
        lib.define(f"{name}(int cuda_device_capability) -> bool")
        lib.impl(name, lambda cc, minimum=minimum: cc >= minimum, "CompositeExplicitAutograd")
    define_quant_ops(lib, "CUDA", lambda *args: None)
    for namespace, schemas in (("_C", MEMORY_OPS), ("_C_cache_ops", CACHE_OPS)):
        fragment = torch.library.Library(namespace, "FRAGMENT")
        for schema in schemas:
            name = schema.split("(")[0]
            if not hasattr(getattr(torch.ops, namespace), name):  # the CPU build has some
                fragment.define(schema)
            fragment.impl(name, lambda *args: None, "CUDA")
        _kept.append(fragment)
    moe_lib = torch.library.Library("_moe_C", "FRAGMENT")
    define_moe_ops(moe_lib, "CUDA", lambda *args: None)
    _kept.extend((lib, moe_lib))


def define_quant_ops(
    library: torch.library.Library, dispatch_key: str, kernel: Callable[..., None], flags: str = FLAGS
) -> None:
    """vLLM's group quantisation ops, each of which calls kernel(its name, *arguments)."""
    for name, scale, kind, extra in (
        ("per_token_group_fp8_quant", "output_s", "fp8", flags),
        ("per_token_group_fp8_quant_packed", "output_s_packed", "fp8", ""),
        ("per_token_group_quant_int8", "output_s", "int8", ""),
    ):
        tensors = f"Tensor input, Tensor! output_q, Tensor! {scale}"  # as vLLM's extension writes them
        library.define(f"{name}({tensors}, int group_size, float eps, float {kind}_min, float {kind}_max{extra}) -> ()")
        library.impl(name, functools.partial(kernel, name), dispatch_key)


@contextmanager
def config(model_type: str = "deepseek_v3", linear_backend: str = "auto"):
    """vLLM's configuration as selection reads it; with a model, as DeepGEMM wants to know its type."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.config.device import DeviceConfig

    current = VllmConfig(device_config=DeviceConfig(device="cpu"))
    current.kernel_config.linear_backend = linear_backend
    current.model_config = types.SimpleNamespace(
        hf_text_config=types.SimpleNamespace(model_type=model_type), quantization_config=None, dtype=torch.bfloat16
    )
    with set_current_vllm_config(current):
        yield


def select(
    weight_shape: tuple[int, int], out_dtype: torch.dtype = torch.bfloat16, *, block: int = 128, **settings: Any
) -> str:
    """Class name of the kernel that vLLM makes for an FP8 block-scaled layer, or the error in words."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, create_fp8_quant_key

    with config(**settings):
        try:
            kernel = linear.init_fp8_linear_kernel(
                activation_quant_key=create_fp8_quant_key(static=False, group_shape=GroupShape(1, block)),
                weight_quant_key=create_fp8_quant_key(static=True, group_shape=GroupShape(block, block)),
                input_dtype=out_dtype,
                out_dtype=out_dtype,
                weight_shape=weight_shape,
            )
        except ValueError as error:
            return str(error)
    return type(kernel).__name__


def select_int8(*, channel: bool = True, static: bool = False, symmetric: bool = True, **settings: Any) -> str:
    """Class name of the kernel that vLLM makes for an INT8 layer."""
    from vllm.model_executor.kernels import linear

    with config(**settings):
        return type(linear.init_int8_linear_kernel(channel, static, symmetric, "a layer")).__name__
