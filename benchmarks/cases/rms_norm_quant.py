"""Cases of RMSNorm, with or without the addition of a residual, followed by quantisation: in groups,
per token, per tensor or to NVFP4."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from vllm_b200_plugin.ops.quant import ScaleLayout

HIDDEN_SIZES = (2048, 4096, 7168)  # Qwen3-30B-A3B, Llama-3.1-8B, DeepSeek-V3
NUM_TOKENS = (1, 16, 128, 1024, 8192)


@dataclass(frozen=True)
class RmsNormQuantCase:
    num_tokens: int
    hidden_size: int
    residual: bool = True
    layout: ScaleLayout = ScaleLayout.ROW
    kind: str = "group"  # or "token", "tensor": one scale for each; or "nvfp4" and "nvfp4_swizzled"
    dtype: torch.dtype = torch.float8_e4m3fn
    group_size: int = 128
    ue8m0: bool = False
    gemma: bool = False
    input_dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        name = f"{self.num_tokens}x{self.hidden_size}-{self.layout_name}"
        name += "" if self.group_size == 128 else f"-g{self.group_size}"
        name += ("-gemma" if self.gemma else "") + ("" if self.dtype == torch.float8_e4m3fn else "-int8")
        return name + ("" if self.input_dtype == torch.bfloat16 else "-fp16")

    @property
    def layout_name(self) -> str:
        name = self.kind if self.kind.startswith("nvfp4") else f"per_{self.kind}"
        if self.kind == "group":
            name = self.layout.value + ("_ue8m0" if self.ue8m0 else "")
        return name + ("_residual" if self.residual else "")

    @property
    def num_bytes(self) -> int:
        """bf16 in, the result and the scales out, the weight, and the residual in and out."""
        elements = self.num_tokens * self.hidden_size
        if self.kind.startswith("nvfp4"):
            return elements * (6 if self.residual else 2) + elements * 9 // 16 + 2 * self.hidden_size
        scale = 1 if self.layout is ScaleLayout.PACKED_UE8M0 else 4
        scales = {"group": elements // self.group_size, "token": self.num_tokens, "tensor": 1}[self.kind]
        return elements * (7 if self.residual else 3) + scales * scale + 2 * self.hidden_size

    def make_inputs(
        self, device: torch.device | str, seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """x, residual or None, and weight."""
        rng = torch.Generator(device).manual_seed(seed)
        shape = (self.num_tokens, self.hidden_size)
        x, residual = (torch.randn(shape, generator=rng, device=device) for _ in range(2))
        weight = torch.randn(self.hidden_size, generator=rng, device=device) * 0.1 + (0 if self.gemma else 1)
        x, residual, weight = (t.to(self.input_dtype) for t in (x, residual, weight))
        return x, residual if self.residual else None, weight


def tests() -> Iterator[RmsNormQuantCase]:
    """Every kernel instance, widths on either side of each change of launch, odd multiples of the group."""
    for input_dtype, residual, gemma, num_tokens in product(
        (torch.bfloat16, torch.float16), (False, True), (False, True), (5, 133)
    ):
        common = {"input_dtype": input_dtype, "residual": residual, "gemma": gemma}
        for group_size in (64, 128):
            shape = (num_tokens, 1152)
            yield RmsNormQuantCase(*shape, group_size=group_size, **common)
            yield RmsNormQuantCase(*shape, group_size=group_size, ue8m0=True, **common)
            yield RmsNormQuantCase(*shape, layout=ScaleLayout.PACKED_UE8M0, group_size=group_size, **common)
            yield RmsNormQuantCase(*shape, group_size=group_size, dtype=torch.int8, **common)
        for kind, dtype in product(("token", "tensor"), (torch.float8_e4m3fn, torch.int8)):
            yield RmsNormQuantCase(*shape, kind=kind, dtype=dtype, **common)
    for num_tokens, hidden_size in [(1, 128), (2, 2048), (3, 4096), (7, 7168), (2, 16384), (140, 7168), (133, 16384)]:
        for layout in ScaleLayout:
            yield RmsNormQuantCase(num_tokens, hidden_size, layout=layout)
        yield RmsNormQuantCase(num_tokens, hidden_size, kind="token")
    yield RmsNormQuantCase(9, 2896, kind="token")
    yield RmsNormQuantCase(9, 48, kind="tensor")
    for kind, input_dtype in product(("nvfp4", "nvfp4_swizzled"), (torch.bfloat16, torch.float16)):
        for num_tokens, hidden_size in [(1, 7168), (5, 1040), (133, 1152), (140, 7168), (133, 16384)]:
            yield RmsNormQuantCase(num_tokens, hidden_size, kind=kind, input_dtype=input_dtype)
        yield RmsNormQuantCase(9, 48, False, kind=kind, gemma=True, input_dtype=input_dtype)


def benchmarks() -> Iterator[RmsNormQuantCase]:
    for shape in product(NUM_TOKENS, HIDDEN_SIZES):
        yield RmsNormQuantCase(*shape)
        yield RmsNormQuantCase(*shape, layout=ScaleLayout.COLUMN_TMA)
        yield RmsNormQuantCase(*shape, residual=False)
        yield RmsNormQuantCase(*shape, layout=ScaleLayout.PACKED_UE8M0)
    for shape in product((1, 16, 1024, 8192), HIDDEN_SIZES):
        yield RmsNormQuantCase(*shape, kind="token")
        yield RmsNormQuantCase(*shape, kind="tensor")
        yield RmsNormQuantCase(*shape, kind="nvfp4_swizzled")
