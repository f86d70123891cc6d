"""Layers of vLLM's FP8 and INT8 schemes with a kernel of ours before CUTLASS's: what the tests of both features set up.

test_fp8_linear.py and test_int8_linear.py say how their scheme is made, and what its layers have to give.
"""

import pytest
import torch
from fake_cuda import config

from vllm_b200_plugin.ops import small_m_gemm, token_quant

HOPPER, N, K, MOST = (9, 0), 192, 256, 32
CUT = (1, 4, 1, 0)
TABLE = {(N, K): ((MOST, CUT, False),), (1040, 1296): ((MOST, CUT, False),)}
FUSED = (96, 64, 32)  # q, k and v
BF16, FP16, E4M3, INT8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def product(q, x_scale, weight, weight_scale, bias):
    """In float64, where sums of products of int8 are exact."""
    y = (q.double() @ weight.double().t()) * x_scale.double().view(-1, 1) * weight_scale.double().view(1, -1)
    return y if bias is None else y + bias.double()


class Calls(list):
    """The kernels that run, in order: "ours" (", early" with PDL), vLLM's quantisation and CUTLASS's product."""

    def __init__(self, monkeypatch, dtype, ours, theirs):
        """Ours before theirs, a class of vLLM's for CUTLASS; on a CPU references stand for vLLM's CUDA ops."""
        import vllm.model_executor.kernels.linear as linear
        from vllm import _custom_ops
        from vllm.model_executor import parameter
        from vllm.platforms import current_platform

        super().__init__()
        name = {E4M3: "fp8", INT8: "int8"}[dtype]
        self.dtype, self.their_quant = dtype, getattr(_custom_ops, f"scaled_{name}_quant")
        their_product, our_product = _custom_ops.cutlass_scaled_mm, small_m_gemm.scaled_linear

        def cutlass(a, b, scale_a, scale_b, out_dtype, bias=None):
            self.append("cutlass")
            if a.is_cuda:
                return their_product(a, b, scale_a, scale_b, out_dtype, bias)
            return product(a, scale_a, b.t(), scale_b, bias).to(out_dtype)

        def small_m(*arguments, **options):
            self.append("ours, early" if options["pdl"] else "ours")
            return our_product(*arguments, **options)

        def quantise(*arguments, **options):
            self.append("quantised")
            return self.quantise(*arguments, **options)

        registry = getattr(linear, f"_POSSIBLE_{name.upper()}_KERNELS")
        monkeypatch.setitem(registry, current_platform._enum, [ours, theirs])
        monkeypatch.setattr(theirs, "is_supported", classmethod(lambda cls, capability=None: (True, None)))
        monkeypatch.setattr(_custom_ops, "cutlass_scaled_mm", cutlass)
        monkeypatch.setattr(_custom_ops, f"scaled_{name}_quant", quantise)
        monkeypatch.setattr(small_m_gemm, "scaled_linear", small_m)
        monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)

    def quantise(self, x, scale=None, *rest, **options):
        """vLLM's, which is not noted here."""
        if x.is_cuda:
            return self.their_quant(x, scale, *rest, **options)
        if scale is not None:
            found = token_quant.per_tensor_quant(x, scale, self.dtype), scale, None
        else:
            found = token_quant.per_token_quant(x, self.dtype, scale_ub=options.get("scale_ub"))
        return found[:2] if self.dtype == E4M3 else found


class Layer:
    """One of a scheme of vLLM's, loaded with random weights. A subclass has make_scheme, value and expected_rows."""

    def __init__(self, calls, device="cpu", strategy="channel", static=False, widths=(N,), k=K):
        self.calls, self.static, self.widths = calls, static, widths
        self.layer = torch.nn.Module()
        torch.set_default_dtype(BF16)
        try:
            with config(), torch.device(device):
                self.scheme = self.make_scheme(strategy, static)
                self.scheme.create_weights(
                    self.layer,
                    input_size=k,
                    output_size=sum(widths),
                    input_size_per_partition=k,
                    output_partition_sizes=list(widths),
                    params_dtype=BF16,
                    weight_loader=lambda *arguments: None,
                )
        finally:
            torch.set_default_dtype(torch.float32)
        self.layer.scheme = self.scheme
        self.created = dict(self.layer.named_parameters())
        self.load()

    def load(self):
        """Also again, as a reload does: into parameters as they were created, before the kernel lays them out."""
        for name, parameter in self.created.items():
            value = self.value(name, parameter.shape).to(parameter)
            setattr(self.layer, name, torch.nn.Parameter(value, requires_grad=False))
        self.loaded = {name: parameter.data.clone() for name, parameter in self.layer.named_parameters()}
        self.scheme.process_weights_after_loading(self.layer)

    def value(self, name, shape):
        return torch.rand(shape) / 100 + 1e-3

    def __call__(self, x, bias=None):
        return self.scheme.apply_weights(self.layer, x, bias)

    def expected(self, x, bias=None):
        """In float64, from operands quantised alike."""
        if not x.numel():  # vLLM's quantisation does not take it
            return x.new_empty(*x.shape[:-1], sum(self.widths), dtype=torch.float64)
        rows = self.expected_rows(x.reshape(-1, x.shape[-1]).contiguous(), bias)
        return rows.view(*x.shape[:-1], sum(self.widths))
