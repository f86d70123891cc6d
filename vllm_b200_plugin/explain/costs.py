"""Bytes, launches and the bandwidth floor of a decode step: arithmetic from shapes, not measurement."""

from dataclasses import dataclass
from typing import Any

from vllm_b200_plugin.dispatch import FEW_TOKENS, SMALL_M
from vllm_b200_plugin.explain.gpus import Gpu

# Kernels of experts that take a layer apart: align (2), quantise, GEMM, activation, quantise, GEMM, sum.
_EXPERT_LAUNCHES = {"TritonExperts": (6, 8), FEW_TOKENS: (2, 2)}  # (without quantisation, with it)


@dataclass(frozen=True)
class Cost:
    """Of one layer. bytes: read. launches: None where their number is not known. floor_us: bytes / bandwidth."""

    bytes: int
    launches: int | None
    floor_us: float


def cost(row: dict[str, Any], gpu: Gpu, num_tokens: int = 1, context: int = 4096) -> Cost:
    """Of one layer in a step that decodes num_tokens sequences of `context` tokens each.

    Experts: the expected number of different ones that so many tokens reach on this rank where all are equally likely.
    """
    read = _bytes(row, num_tokens, context)
    return Cost(read, _launches(row, num_tokens), read / gpu.bandwidth * 1e6)


def total(rows: list[dict[str, Any]], gpu: Gpu, num_tokens: int = 1, context: int = 4096) -> Cost:
    """Of all layers; launches: of those whose number is known."""
    costs = [(row["count"], cost(row, gpu, num_tokens, context)) for row in rows]
    read = sum(count * c.bytes for count, c in costs)
    return Cost(read, sum(count * (c.launches or 0) for count, c in costs), read / gpu.bandwidth * 1e6)


def _bytes(row: dict[str, Any], num_tokens: int, context: int) -> int:
    if row["kind"] == "embedding":
        n, _k = (int(part.split("=")[1]) for part in row["shape"].split())
        return num_tokens * row["weight_bytes"] // n
    if row["kind"] == "experts":
        experts, _local, chosen = row["experts"]
        return int(row["weight_bytes"] * (1 - (1 - chosen / experts) ** num_tokens))
    if row["kind"] == "attention":
        return num_tokens * min(context, row["window"] or context) * row["cache_bytes"]
    return row["weight_bytes"]


def _launches(row: dict[str, Any], num_tokens: int) -> int | None:
    quantises = bool(row["quantiser"]) and not row["quantiser"].startswith("none")
    if row["kind"] == "experts":
        kernel = _nearest(row["choices"], num_tokens)["kernel"]
        known = _EXPERT_LAUNCHES.get(kernel)
        return known[quantises] if known else None
    if row["kind"] == "attention":
        return 1 + (row["quantiser"] != "in the attention kernel")
    # Ours takes a 16-bit activation under block scales as it comes.
    takes_it = "Fp8Block" in row["kernel"] and _nearest(row["choices"], num_tokens)["kernel"] == SMALL_M
    return 1 + (quantises and not takes_it)


def _nearest(choices: dict[str, Any], num_tokens: int) -> Any:
    """The choice for the largest listed number of tokens that is not more than num_tokens."""
    return choices[str(max(int(tokens) for tokens in choices if int(tokens) <= num_tokens))]
