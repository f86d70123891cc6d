"""Choosing the experts of every token from its router logits.

The arithmetic is that of vLLM's `topk_softmax`, `topk_sigmoid` and `grouped_topk`, in fp32:

    score  = softmax(logits) or sigmoid(logits), or the logits themselves
    choice = score + bias                                 of the topk largest, ties to the lower expert
    weight = score / sum of the chosen scores * scale     the division with renormalize only

With groups, a group of neighbouring experts is worth the sum of its two largest choices, and only the experts of the
topk_group best groups are candidates; ties to the lower group.

What vLLM's kernels do beyond that, and ours with them:

- SOFTMAX and SIGMOID (topk_softmax, topk_sigmoid): a score that is NaN or Inf counts as 0. So a row with a NaN gets
  experts 0 to topk - 1 at weight 0 from a softmax. A sum of 0 divides as 1.
- TANH_SIGMOID and NONE (grouped_topk): with groups a NaN is the largest choice there is, without it is passed over (it
  counts as -Inf). The sum gets 1e-20 added.
- Rows that are padding get expert -1; their weights are what the logits say, with TANH_SIGMOID and NONE 0.

The biases have to be finite: with -Inf, which of the experts without a chance is chosen is left open.
"""

import enum
from dataclasses import dataclass
from typing import Any

import torch

from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops._library import torch_library

MAX_EXPERTS = 512
MAX_TOPK = 32
GROUP_SIZES = (4, 8, 16, 32)
LOGITS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ID_DTYPES = (torch.int32, torch.uint32, torch.int64)

_OP = "topk"


class Scoring(enum.IntEnum):
    """How logits become scores; the values are those of the C++ enum."""

    SOFTMAX = 0
    SIGMOID = 1  # 1 / (1 + exp(-x)), as topk_sigmoid has it
    TANH_SIGMOID = 2  # tanh(x / 2) / 2 + 1 / 2: the same function, as grouped_topk has it
    NONE = 3


@dataclass(frozen=True)
class Selection:
    """How many experts a token gets, and by what.

    num_groups: groups of equally many experts, 4, 8, 16 or 32 each, for TANH_SIGMOID and NONE; 1 for no groups.
    scale: routed_scaling_factor.
    """

    topk: int
    scoring: Scoring = Scoring.SOFTMAX
    renormalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    topk_group: int = 1

    def refusal(self, num_experts: int) -> str | None:
        """Why the kernel cannot do it, or None where it can."""
        if not 1 <= num_experts <= MAX_EXPERTS:
            return f"num_experts: takes 1 to {MAX_EXPERTS}, got {num_experts}"
        if not 1 <= self.topk <= min(MAX_TOPK, num_experts):
            return f"topk: takes 1 to {min(MAX_TOPK, num_experts)} of {num_experts} experts, got {self.topk}"
        if self.num_groups == 1:
            return None if self.topk_group == 1 else f"topk_group: takes 1 of 1 group, got {self.topk_group}"
        if self.scoring < Scoring.TANH_SIGMOID:
            return f"num_groups: takes 1 with {self.scoring.name}, got {self.num_groups}"
        if not 1 <= self.topk_group <= self.num_groups:
            return f"topk_group: takes 1 to {self.num_groups} of {self.num_groups} groups, got {self.topk_group}"
        size, rest = divmod(num_experts, self.num_groups) if self.num_groups > 0 else (0, 1)
        if rest or size not in GROUP_SIZES:
            return f"num_groups: takes groups of {GROUP_SIZES} experts, got {self.num_groups} of {num_experts}"
        if self.topk > self.topk_group * size:
            return f"topk: takes up to {self.topk_group * size}, all of {self.topk_group} groups, got {self.topk}"
        return None

    def schema_values(self) -> tuple[int, int, bool, float, int, int]:
        """The arguments of our ops that describe a selection, in their order."""
        return self.topk, int(self.scoring), self.renormalize, self.scale, self.num_groups, self.topk_group


# What our ops take for a Selection.
SELECTION_SCHEMA = (
    "int topk, int scoring, bool renormalize, float scale, int num_groups, int topk_group, "
    "Tensor? bias, Tensor? is_padding"
)


def select_experts(
    logits: torch.Tensor,
    selection: Selection,
    bias: torch.Tensor | None = None,
    *,
    ids_dtype: torch.dtype = torch.int32,
    is_padding: torch.Tensor | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of every token, the best first, and their weights.

    Args:
        logits: [num_tokens, num_experts] fp32, fp16 or bf16, up to 512 experts; last stride 1.
        selection: what is chosen, and by what.
        bias: [num_experts] fp32, fp16 or bf16, added to the scores for the choice alone (e_score_correction_bias).
        ids_dtype: int32, uint32 (-1 becomes 2^32 - 1) or int64.
        is_padding: [num_tokens] bool; rows that get expert -1.
        pdl: launch with programmatic stream serialization. Pays behind a kernel that lets its successor start early.

    Returns:
        weights [num_tokens, topk] fp32 and ids [num_tokens, topk].

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    check_logits(logits)
    if refusal := selection.refusal(logits.shape[1]):
        raise ValueError(refusal)
    check_row_inputs(bias, is_padding, logits.shape[0], logits.shape[1], logits.device)
    weights, ids = empty_outputs(logits, selection.topk, ids_dtype)
    torch.ops.vllm_b200.topk(logits, weights, ids, None, *selection.schema_values(), bias, is_padding, pdl)
    return weights, ids


def empty_outputs(like: torch.Tensor, topk: int, ids_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Unwritten weights and ids for the rows of `like`. Raises ValueError for an ids_dtype that we do not write."""
    if ids_dtype not in ID_DTYPES:
        raise ValueError(f"ids_dtype: takes int32, uint32 or int64, got {ids_dtype}")
    shape = (like.shape[0], topk)
    weights = torch.empty(shape, dtype=torch.float32, device=like.device)
    return weights, torch.empty(shape, dtype=ids_dtype, device=like.device)


def check_logits(logits: torch.Tensor) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits: takes [num_tokens, num_experts], got shape {tuple(logits.shape)}")
    if logits.dtype not in LOGITS_DTYPES:
        raise ValueError(f"logits: takes float32, float16 or bfloat16, got {logits.dtype}")
    if logits.numel() and logits.stride(1) != 1:
        raise ValueError(f"logits: takes a last stride of 1, got strides {logits.stride()}")


def check_row_inputs(
    bias: torch.Tensor | None,
    is_padding: torch.Tensor | None,
    num_tokens: int,
    num_experts: int,
    device: torch.device,
) -> None:
    for name, tensor, size, dtypes in (
        ("bias", bias, num_experts, LOGITS_DTYPES),
        ("is_padding", is_padding, num_tokens, (torch.bool,)),
    ):
        if tensor is None:
            continue
        if tensor.shape != (size,) or tensor.dtype not in dtypes or tensor.device != device:
            raise ValueError(
                f"{name}: takes {' or '.join(str(d).removeprefix('torch.') for d in dtypes)} [{size}] on {device}, "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: takes a contiguous tensor, got strides {tensor.stride()}")


def select_reference(
    logits: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    source_rows: torch.Tensor | None,
    topk: int,
    scoring: int,
    renormalize: bool,
    scale: float,
    num_groups: int,
    topk_group: int,
    bias: torch.Tensor | None,
    is_padding: torch.Tensor | None,
) -> None:
    """The definition, in PyTorch; in the dtype of the logits where that is float64, else in fp32."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    num_tokens = x.shape[0]
    score, plain = scores(x, Scoring(scoring)), scoring < Scoring.TANH_SIGMOID
    if plain:
        score = score.masked_fill(~score.isfinite(), 0.0)
    elif num_groups == 1:
        score = score.masked_fill(score.isnan(), -torch.inf)
    choice = score if bias is None else score + bias.to(score.dtype)
    if num_groups > 1:
        groups = choice.view(num_tokens, num_groups, -1)
        group_score = groups.topk(2, dim=-1).values.sum(-1)
        kept = _best(group_score, topk_group)
        left_out = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, kept, False)
        choice = groups.masked_fill(left_out.unsqueeze(-1), -torch.inf).flatten(1)
    chosen = _best(choice, topk)
    weight = score.gather(1, chosen)
    if renormalize:
        total = weight.sum(1, keepdim=True)
        weight = weight / (total.masked_fill(total <= 0, 1.0) if plain else total + 1e-20)
    weight = weight * scale
    if is_padding is not None:
        chosen = chosen.masked_fill(is_padding.unsqueeze(1), -1)
        weight = weight if plain else weight.masked_fill(is_padding.unsqueeze(1), 0.0)
    weights.copy_(weight)
    if ids.dtype == torch.uint32:
        ids.view(torch.int32).copy_(chosen)
    else:
        ids.copy_(chosen)
    if source_rows is not None:
        source_rows.copy_(torch.arange(topk) * num_tokens + torch.arange(num_tokens).unsqueeze(1))


def scores(x: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """[num_tokens, num_experts] logits -> scores, in their dtype."""
    if scoring is Scoring.SOFTMAX:
        exponentials = (x - x.amax(1, keepdim=True)).exp()
        return exponentials * (1.0 / exponentials.sum(1, keepdim=True))
    return x if scoring is Scoring.NONE else x.sigmoid()


def _best(choice: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest of each row, NaN above all, ties to the lower index."""
    return choice.sort(dim=1, descending=True, stable=True).indices[:, :count]


torch_library.define(
    f"{_OP}(Tensor logits, Tensor(a!) weights, Tensor(b!) ids, Tensor(c!)? source_rows, {SELECTION_SCHEMA}, "
    "bool pdl=False) -> ()"
)


@torch.library.register_fake(f"vllm_b200::{_OP}", lib=torch_library)
def _topk_fake(*args: object, **kwargs: object) -> None:
    return None


@torch.library.impl(torch_library, _OP, "CPU")
def _topk_cpu(
    logits: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    source_rows: torch.Tensor | None,
    *rule: Any,
) -> None:
    """rule: what select_reference takes after these, and maybe pdl."""
    select_reference(logits, weights, ids, source_rows, *rule[:8])


_library.status()
