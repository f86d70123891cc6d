"""The sum of a token's expert outputs: ours, vLLM's CUDA op and PyTorch's."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import families
from benchmarks.cases.moe import TOP_K, MoeSumCase, sum_benchmarks
from benchmarks.families import Run
from benchmarks.families._common import error_of, generator, normal, peer, verdict
from vllm_b200_plugin.ops import moe_sum as _  # noqa: F401  registers our op

OP = "moe_sum"
cases = sum_benchmarks


def record(case: MoeSumCase) -> dict[str, Any]:
    return {
        "m": case.num_tokens,
        "n": case.hidden_size,
        "k": TOP_K * case.hidden_size,
        "dtype": "bf16",
        "layout": f"k{TOP_K}",
        "bytes": case.num_bytes,
        "flops": 0,
    }


def _input(case: MoeSumCase, seed: int) -> torch.Tensor:
    return normal((case.num_tokens, TOP_K, case.hidden_size), generator(seed))


def _output(case: MoeSumCase) -> torch.Tensor:
    return torch.empty(case.num_tokens, case.hidden_size, dtype=torch.bfloat16, device=families.device)


def ours(case: MoeSumCase, seed: int, pdl: bool = True) -> Run:
    op, x, out = torch.ops.vllm_b200.moe_sum, _input(case, seed), _output(case)
    return Run(lambda: op(x, out, None, None, pdl), (out,))


def ours_no_pdl(case: MoeSumCase, seed: int) -> Run:
    """As vLLM's op runs it, which knows nothing of the kernel before."""
    return ours(case, seed, pdl=False)


def vllm(case: MoeSumCase, seed: int) -> Run:
    op = peer("vllm._custom_ops", "moe_sum")
    x, out = _input(case, seed), _output(case)
    return Run(lambda: op(x, out), (out,))


def torch_sum(case: MoeSumCase, seed: int) -> Run:
    x, out = _input(case, seed), _output(case)
    return Run(lambda: torch.sum(x, dim=1, out=out), (out,))


IMPLEMENTATIONS: dict[str, Callable[[MoeSumCase, int], Run]] = {
    "ours": ours,
    "ours_no_pdl": ours_no_pdl,
    "vllm": vllm,
    "torch": torch_sum,
}


def check(case: MoeSumCase, seed: int, outputs: tuple[torch.Tensor, ...]) -> tuple[bool, dict[str, Any]]:
    # Loose enough for sums taken in bf16.
    return verdict(error_of(outputs[0], _input(case, seed).double().sum(1)), 1e-4)
