"""NVFP4 linear layers with a bf16 activation (W4A16) for few tokens: ours, and what vLLM runs on Hopper."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.gemm import GemmCase, nvfp4_benchmarks
from benchmarks.families import Missing, Run
from benchmarks.families._common import Returned, check_product, generator, normal, peer
from vllm_b200_plugin import dispatch
from vllm_b200_plugin.ops.nvfp4_gemm import nvfp4_linear
from vllm_b200_plugin.ops.nvfp4_quant import GROUP_SIZE, e2m1_to_float
from vllm_b200_plugin.ops.small_m_gemm import Config

OP = "nvfp4_linear"
LIMIT = 1e-3  # of error_of; the activation stays bf16
KERNELS = "vllm.model_executor.kernels.linear"
cases = nvfp4_benchmarks


def record(case: GemmCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": case.n,
        "k": case.k,
        "dtype": "bf16_e2m1",
        "layout": "group16",
        "bytes": case.num_bytes(16, 4, case.n * case.k // GROUP_SIZE),
        "flops": case.flops,
    }


def _operands(case: GemmCase, seed: int) -> tuple[torch.Tensor, ...]:
    """x [M, K], weight [N, K / 2], weight_scale [N, K / 16], weight_global_scale [1]; weights of about 1 / sqrt(K)."""
    rng = generator(seed)
    weight = torch.randint(0, 256, (case.n, case.k // 2), generator=rng, device=families.device, dtype=torch.uint8)
    scale = torch.rand((case.n, case.k // GROUP_SIZE), generator=rng, device=families.device).mul_(384).add_(64)
    global_scale = torch.full((1,), 1e-3 / case.k**0.5, device=families.device)
    return normal((case.num_tokens, case.k), rng), weight, scale.to(torch.float8_e4m3fn), global_scale


def ours(case: GemmCase, seed: int) -> Run:
    """With the cut that dispatch takes."""
    operands = _operands(case, seed)
    if families.device.type != "cuda":
        return Returned(lambda: nvfp4_linear(*operands))
    capability = torch.cuda.get_device_capability()
    choice = dispatch.small_m_gemm("nvfp4", case.num_tokens, case.n, case.k, capability)
    if choice.kernel != dispatch.SMALL_M:
        raise Missing(choice.reason)
    config = Config(*choice.config)
    return Returned(lambda: nvfp4_linear(*operands, config=config, pdl=True))


def vllm_marlin(case: GemmCase, seed: int) -> Run:
    return _vllm("MarlinNvFp4LinearKernel", case, seed)


def vllm_humming(case: GemmCase, seed: int) -> Run:
    """What vLLM prefers on Hopper where humming-kernels is installed."""
    return _vllm("HummingNvFp4LinearKernel", case, seed)


def _vllm(name: str, case: GemmCase, seed: int) -> Run:
    """One of vLLM's kernel classes, on a layer with the attributes of a W4A16 checkpoint's."""
    kernel_class = peer(KERNELS, name)
    supported, reason = kernel_class.is_supported()
    if not supported:
        raise Missing(reason)
    x, weight, scale, global_scale = _operands(case, seed)
    layer = torch.nn.Module()
    tensors = {"weight": weight, "weight_scale": scale, "weight_global_scale": global_scale}
    for key, tensor in tensors.items():
        layer.register_parameter(key, torch.nn.Parameter(tensor, requires_grad=False))
    layer.input_size_per_partition, layer.output_size_per_partition = case.k, case.n
    layer.output_partition_sizes, layer.params_dtype, layer.has_bias = [case.n], torch.bfloat16, False
    config = peer("vllm.config", "VllmConfig")()
    with peer("vllm.config", "set_current_vllm_config")(config):
        kernel = kernel_class(peer(f"{KERNELS}.nvfp4", "NvFp4LinearLayerConfig")())
        kernel.process_weights_after_loading(layer)
    return Returned(lambda: kernel.apply_weights(layer, x))


IMPLEMENTATIONS: dict[str, Callable[[GemmCase, int], Run]] = {
    "ours": ours,
    "vllm_marlin": vllm_marlin,
    "vllm_humming": vllm_humming,
}


def check(case: GemmCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    x, weight, scale, global_scale = _operands(case, seed)

    def reference(rows: torch.Tensor) -> torch.Tensor:
        wide = e2m1_to_float(weight).double() * scale.double().repeat_interleave(GROUP_SIZE, 1)
        return x[rows].double() @ wide.t() * global_scale.double()

    return check_product(outputs[0], reference, LIMIT)
