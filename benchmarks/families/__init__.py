"""One module per op family: its cases, every implementation of its op, and the check of a result."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Where the tensors of all families lie; benchmarks.kernels sets it before the first case.
device = torch.device("cuda")


class Missing(Exception):
    """An implementation is not installed, or does not take the case; the message says which and why."""


@dataclass(frozen=True)
class Run:
    """One implementation on one set of tensors: what to time and what it writes."""

    call: Callable[[], object]
    outputs: tuple[torch.Tensor, ...]

    def poison(self) -> None:
        for output in self.outputs:
            output.view(torch.uint8).fill_(0xFF) if output.is_contiguous() else output.copy_(
                torch.full_like(output, -1 if output.dtype == torch.int32 else float("nan"))
            )
