"""Cases of the selection of experts, for the tests of the reference and of the CUDA kernel."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from vllm_b200_plugin.ops.topk import Scoring, Selection

CLEAR = 1e-5  # closer choices than this may fall either way in fp32


@dataclass(frozen=True)
class SelectCase:
    num_tokens: int
    num_experts: int
    selection: Selection
    dtype: torch.dtype = torch.float32
    bias_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        s = self.selection
        bias = f"-bias_{_short(self.bias_dtype)}" if self.bias_dtype else ""
        groups = f"-groups{s.num_groups}of{s.topk_group}" if s.num_groups > 1 else ""
        return (
            f"{self.num_tokens}-E{self.num_experts}-k{s.topk}-{s.scoring.name.lower()}"
            f"{'' if s.renormalize else '-raw'}{groups}-{_short(self.dtype)}{bias}"
        )

    def make_logits(self, device: torch.device | str, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        logits = torch.randn(self.num_tokens, self.num_experts, generator=generator, device=device)
        return (logits * 2).to(self.dtype)

    def make_bias(self, device: torch.device | str, seed: int = 0) -> torch.Tensor | None:
        if self.bias_dtype is None:
            return None
        generator = torch.Generator(device).manual_seed(seed + 1000)
        return (torch.randn(self.num_experts, generator=generator, device=device) / 8).to(self.bias_dtype)


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "fp")


def tests() -> Iterator[SelectCase]:
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    softmax, sigmoid = Selection(8), Selection(8, Scoring.SIGMOID, scale=2.5)
    for num_experts, dtype in product((8, 60, 64, 128, 160, 256, 384, 512), (fp32, bf16)):
        yield SelectCase(9, num_experts, softmax, dtype)
    for num_tokens in (1, 2, 33, 600):
        yield SelectCase(num_tokens, 128, softmax)
    yield SelectCase(5, 128, softmax, fp16)
    yield SelectCase(5, 1, Selection(1))
    yield SelectCase(5, 32, Selection(32))
    yield SelectCase(5, 512, Selection(10, renormalize=False))
    for bias_dtype in (None, fp32, bf16, fp16):
        yield SelectCase(7, 128, sigmoid, fp32, bias_dtype)
        yield SelectCase(7, 320, Selection(6, renormalize=False), bf16, bias_dtype)
    grouped = Scoring.TANH_SIGMOID, True, 2.5
    for num_experts, groups, kept, topk in (
        (256, 8, 4, 8),
        (128, 8, 3, 8),
        (64, 4, 2, 6),
        (64, 16, 4, 4),
        (256, 8, 1, 8),
    ):
        yield SelectCase(9, num_experts, Selection(topk, *grouped, groups, kept), fp32, fp32)
    yield SelectCase(9, 256, Selection(8, *grouped, 8, 4), bf16, bf16)
    yield SelectCase(9, 384, Selection(8, *grouped), bf16, fp32)
    yield SelectCase(9, 512, Selection(22, *grouped), fp32, fp32)
    yield SelectCase(9, 256, Selection(8, Scoring.NONE, False, 1.0, 8, 4), fp32, fp32)
