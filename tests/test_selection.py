"""Which kernel class vLLM's own selection picks: on CPU, and on GPUs that are pretended."""

import functools

import pytest
from child import answer

pytest.importorskip("vllm")

FLASHINFER = "B200FlashInferDeepGemmFp8BlockKernel"
DEEP_GEMM = "B200DeepGemmFp8BlockKernel"
CUTLASS = "B200CutlassFp8BlockKernel"
TRITON = "B200TritonFp8BlockKernel"
VLLM_CUTLASS = "CutlassFp8BlockScaledMMKernel"
INT8 = "B200CutlassInt8Kernel"
VLLM_INT8, VLLM_TRITON_INT8 = "CutlassInt8ScaledMMLinearKernel", "TritonInt8ScaledMMLinearKernel"

CODE = """
import json, logging, os, sys
from contextlib import contextmanager
import torch
from fake_cuda import pretend, select, select_int8
pretend({capability}, deep_gemm={deep_gemm}, flashinfer={flashinfer})
from vllm_b200_plugin import dispatch
dispatch.TABLE |= {{((9, 0), "int8"): {{(4096, 4096): ((8, (1, 8, 1, 0), False),)}}}}
from vllm import plugins
plugins.load_general_plugins()
import vllm.model_executor.kernels.linear
from vllm_b200_plugin import plugin

lines = []
logging.getLogger("vllm.b200").addHandler(logging.Handler())
logging.getLogger("vllm.b200").handlers[-1].emit = lambda record: lines.append(record.getMessage())
logging.getLogger("vllm.b200").setLevel("INFO")

@contextmanager
def environment(**variables):
    os.environ.update(variables)
    yield
    for name in variables:
        del os.environ[name]

def disabled(*names, **settings):
    with environment(VLLM_DISABLED_KERNELS=",".join(names)):
        return select((2112, 7168), **settings)

shape = (2112, 7168)
picks = {{
    "2112x7168": select(shape), "576x7168": select((576, 7168)), "96x64": select((96, 64)),
    "96x128": select((96, 128)), "8x128": select((8, 128)), "2112x7100": select((2112, 7100)),
    "float16": select(shape, torch.float16), "float32": select(shape, torch.float32),
    "excluded model": select(shape, model_type="qwen3_5_text"),
    "block 64": select(shape, block=64),
    "--linear-backend deep_gemm": select(shape, linear_backend="deep_gemm"),
    "--linear-backend cutlass": select(shape, linear_backend="cutlass"),
    "--linear-backend triton": select(shape, linear_backend="triton"),
    "--linear-backend marlin": select(shape, linear_backend="marlin"),
    "no DeepGemm of vLLM's": disabled("DeepGemmFp8BlockScaledMMKernel"),
    "no FlashInfer of vLLM's": disabled("FlashInferFp8DeepGEMMDynamicBlockScaledKernel"),
    "none of ours": disabled(*[f"B200{{n}}Fp8BlockKernel" for n in
        ("FlashInferDeepGemm", "DeepGemm", "Cutlass", "Triton")]),
    "no FlashInferDeepGemm of ours": disabled("B200FlashInferDeepGemmFp8BlockKernel"),
    "no Cutlass of ours": disabled("B200CutlassFp8BlockKernel", linear_backend="cutlass"),
}}
with environment(VLLM_DISABLED_KERNELS="B200CutlassFp8BlockKernel"):
    picks["96x128 without our Cutlass"] = select((96, 128))
with environment(VLLM_BATCH_INVARIANT="1"):
    picks["batch invariant"] = select(shape)
    picks["int8, batch invariant"] = select_int8()

def int8_disabled(name):
    with environment(VLLM_DISABLED_KERNELS=name):
        return select_int8()

picks |= {{
    "int8": select_int8(), "int8, tensor": select_int8(channel=False), "int8, static": select_int8(static=True),
    "int8, zero point": select_int8(symmetric=False),
    "int8, static zero point": select_int8(static=True, symmetric=False),
    "int8 --linear-backend cutlass": select_int8(linear_backend="cutlass"),
    "int8 --linear-backend triton": select_int8(linear_backend="triton"),
    "int8, none of ours": int8_disabled("B200CutlassInt8Kernel"),
    "int8, no Cutlass of vLLM's": int8_disabled("CutlassInt8ScaledMMLinearKernel"),
}}
from vllm.model_executor.kernels.linear import _POSSIBLE_FP8_BLOCK_KERNELS as lists
from vllm.platforms import PlatformEnum
plugin._results.clear()
plugin.register()
order = [k.__name__ for k in lists[PlatformEnum.CUDA]]
int8_order = [k.__name__ for k in vllm.model_executor.kernels.linear._POSSIBLE_INT8_KERNELS[PlatformEnum.CUDA]]
from vllm_b200_plugin.integration.fp8_block_op import machine
scales = [machine().layout.value, machine().ue8m0]
print(json.dumps([picks, plugin.results(), lines, [order, int8_order], torch.cuda.is_initialized(), scales]))
"""


@functools.cache
def on(capability: tuple[int, int], deep_gemm: bool = True, flashinfer: bool = True):
    return answer(
        CODE.format(capability=capability, deep_gemm=deep_gemm, flashinfer=flashinfer),
        VLLM_B200_STRICT="1",
        VLLM_B200_ENABLE="int8_linear",
    )


HOPPER = {
    "2112x7168": FLASHINFER,
    "576x7168": FLASHINFER,
    "96x128": CUTLASS,
    "8x128": TRITON,
    "96x64": VLLM_CUTLASS,
    "2112x7100": VLLM_CUTLASS,
    "float16": CUTLASS,
    "float32": TRITON,
    "excluded model": FLASHINFER,
    "--linear-backend deep_gemm": DEEP_GEMM,
    "--linear-backend cutlass": CUTLASS,
    "--linear-backend triton": TRITON,
    "--linear-backend marlin": "MarlinFP8ScaledMMLinearKernel",
    "no DeepGemm of vLLM's": FLASHINFER,
    "no FlashInfer of vLLM's": DEEP_GEMM,
    "none of ours": "FlashInferFp8DeepGEMMDynamicBlockScaledKernel",
    "no FlashInferDeepGemm of ours": DEEP_GEMM,
    "no Cutlass of ours": VLLM_CUTLASS,
    "96x128 without our Cutlass": VLLM_CUTLASS,
    "batch invariant": DEEP_GEMM,
    "int8": INT8,
    "int8, tensor": INT8,
    "int8, static": INT8,
    "int8, zero point": VLLM_INT8,
    "int8, static zero point": VLLM_INT8,
    "int8 --linear-backend cutlass": INT8,
    "int8 --linear-backend triton": VLLM_TRITON_INT8,
    "int8, none of ours": VLLM_INT8,
    "int8, no Cutlass of vLLM's": VLLM_TRITON_INT8,
    "int8, batch invariant": VLLM_INT8,
}
BLACKWELL = {
    **{name: VLLM_INT8 if kernel == INT8 else kernel for name, kernel in HOPPER.items()},  # no row in the table
    "2112x7168": DEEP_GEMM,
    "576x7168": DEEP_GEMM,
    "excluded model": CUTLASS,
    "no DeepGemm of vLLM's": CUTLASS,
    "none of ours": "DeepGemmFp8BlockScaledMMKernel",
}


@pytest.mark.parametrize(
    "capability, expected, scale_layout",
    [
        ((9, 0), HOPPER, "column_tma"),
        ((10, 0), BLACKWELL, "packed_ue8m0"),
        ((10, 3), BLACKWELL, "packed_ue8m0"),
        ((12, 0), BLACKWELL, "packed_ue8m0"),
    ],
)
def test_selection_on_gpu(capability, expected, scale_layout):
    picks, results, _lines, order, cuda, scales = on(capability)
    assert {name: picks[name] for name in expected} == expected
    assert picks["block 64"] not in (FLASHINFER, DEEP_GEMM, CUTLASS, TRITON)
    assert results["fp8_block_linear"] == results["group_quant_ops"] == "applied"
    assert results["topk_ops"] == results["moe_align_ops"] == results["int8_linear"] == "applied"
    assert order[0][:2] == [FLASHINFER, DEEP_GEMM] and order[1][:2] == [INT8, VLLM_INT8]
    assert all(len(set(names)) == len(names) for names in order)
    assert not cuda
    assert scales == [scale_layout, True]


def test_without_flashinfer_hopper_gets_deep_gemm():
    picks, *_ = on((9, 0), flashinfer=False)
    assert picks["2112x7168"] == DEEP_GEMM


def test_without_deep_gemm_cutlass_comes_first():
    picks, _, lines, *_ = on((10, 0), deep_gemm=False)
    assert picks["2112x7168"] == picks["576x7168"] == CUTLASS
    assert any("deep_gemm would come first but is missing, excluded or switched off" in line for line in lines)


def test_one_line_for_each_kind_of_layer_kernel_and_reason():
    _, _, lines, *_ = on((10, 0))
    assert lines.count(
        f"[b200] FP8 block linear -> {DEEP_GEMM}: our group quant + DeepGEMM; "
        "bfloat16 out, N % 64 == 0 and K % 128 == 0"
    ) == 1  # fmt: skip
    assert any(line.startswith(f"[b200] FP8 block linear -> {CUTLASS}: ") and "got N=96" in line for line in lines)
    assert len(set(lines)) == len(lines)
