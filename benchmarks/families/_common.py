"""What the families share: finding peers, operands, float64 references, and runs out of the ordinary."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import families
from benchmarks.families import Missing, Run
from vllm_b200_plugin.ops.quant import ScaleLayout, empty_scale

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
GROUP = 128
EPS = 1e-10
CHECKED_ROWS = 256
FP8_LIMIT = 1e-3  # of error_of against the same quantised operands

# --- peers


def import_peer(module: str) -> Any:
    """A module of another package whose kernels are to be timed. Raises Missing off a GPU, or where there is none."""
    package = module.split(".")[0]
    if families.device.type != "cuda":
        raise Missing(f"{package}'s kernels run on a GPU")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{package} is not installed ({error})") from None


def peer(module: str, attribute: str) -> Any:
    """A function or class of another package. Raises Missing as import_peer does, or where the module has none."""
    found = getattr(import_peer(module), attribute, None)
    if found is None:
        raise Missing(f"this {module.split('.')[0]} has no {module}.{attribute}")
    return found


def vllm_op(name: str, namespace: str = "_C") -> Any:
    """One of vLLM's compiled CUDA ops. Raises Missing as import_peer does, or where this vLLM has no such op."""
    import_peer("vllm._custom_ops")
    try:
        return getattr(getattr(torch.ops, namespace), name)
    except AttributeError:
        raise Missing(f"this vLLM has no op {namespace}::{name}") from None


@functools.cache
def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """`function` as torch.compile makes it on a GPU, for all sizes; as it is on a CPU."""
    if families.device.type != "cuda":
        return function
    # One token, many tokens and each dtype are compiled apart; past the limit dynamo would run eagerly, unsaid.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=True)


def vllm_group_quant(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, layout: ScaleLayout, ue8m0: bool = False
) -> Callable[[], object]:
    """vLLM's CUDA quantiser, e4m3 in groups of 128, writing q and scale."""
    if layout is ScaleLayout.PACKED_UE8M0:
        packed = vllm_op("per_token_group_fp8_quant_packed")
        return lambda: packed(x, q, scale, GROUP, EPS, -E4M3_MAX, E4M3_MAX)
    op = vllm_op("per_token_group_fp8_quant")
    column, tma = layout is not ScaleLayout.ROW, layout is ScaleLayout.COLUMN_TMA
    return lambda: op(x, q, scale, GROUP, EPS, -E4M3_MAX, E4M3_MAX, ue8m0, column, tma)


# --- runs


@dataclass(frozen=True)
class Updating(Run):
    """A run whose outputs after the first `num_poisoned` are inputs as well, so that they cannot be poisoned."""

    num_poisoned: int = 0

    def poison(self) -> None:
        Run(self.call, self.outputs[: self.num_poisoned]).poison()


class Returned(Run):
    """A run of a function that allocates what it returns."""

    def __init__(self, function: Callable[[], Any]) -> None:
        last: list[Any] = [()]

        def call() -> None:
            last[0] = function()

        object.__setattr__(self, "call", call)
        object.__setattr__(self, "_last", last)

    @property
    def outputs(self) -> tuple[torch.Tensor, ...]:
        last = self._last[0]  # type: ignore[attr-defined]
        return (last,) if isinstance(last, torch.Tensor) else tuple(last)

    def poison(self) -> None:
        """Call once, spoil what came back and let it go: the allocator hands the same memory out again."""
        self.call()
        super().poison()
        self._last[0] = ()  # type: ignore[attr-defined]


# --- operands, the same for every implementation of a case and seed


def generator(seed: int) -> torch.Generator:
    return torch.Generator(families.device).manual_seed(seed)


def normal(shape: tuple[int, ...], rng: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=rng, device=families.device, dtype=torch.float32).to(dtype)


def e4m3_values(shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    """Normal values that use the format's range."""
    return torch.randn(shape, generator=rng, device=families.device).mul_(64).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)


def powers_of_two(shape: tuple[int, ...], low: int, high: int, rng: torch.Generator) -> torch.Tensor:
    """2^low to 2^high: scales that every engine takes as they are, those that want UE8M0 as well."""
    return torch.exp2(torch.randint(low, high + 1, shape, generator=rng, device=families.device).float())


def fp8_activation(num_tokens: int, width: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """q [num_tokens, width] e4m3 and scale [num_tokens, width / 128] fp32, values of about 1."""
    return e4m3_values((num_tokens, width), rng), powers_of_two((num_tokens, width // GROUP), -7, -5, rng)


def fp8_block_weight(shape: tuple[int, ...], rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """q [..., N, K] e4m3 and scale [..., ceil(N / 128), K / 128] fp32, values of about 1 / sqrt(K)."""
    *batch, n, k = shape
    return e4m3_values(shape, rng), powers_of_two((*batch, -(-n // GROUP), k // GROUP), -13, -11, rng)


def in_layout(scale: torch.Tensor, like: torch.Tensor, layout: ScaleLayout) -> torch.Tensor:
    """A copy of scale [num_tokens, groups] with the strides of `layout`."""
    return empty_scale(like, GROUP, layout).copy_(scale)


# --- references


def quantise_groups(x: torch.Tensor, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] in e4m3 and the scales of its groups of 128, fp32 arithmetic, on any device."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=EPS) / E4M3_MAX
    if ue8m0:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    q = (groups / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).flatten(-2)
    return q, scale.squeeze(-1)


def unpack_scale(scale: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Scales in float64; int32 holds four UE8M0 exponents, the lowest byte first."""
    if scale.dtype != torch.int32:
        return scale.double()
    exponent = torch.stack([(scale >> shift) & 0xFF for shift in (0, 8, 16, 24)], -1).flatten(-2)
    return torch.exp2(exponent[..., :num_groups].double() - 127)


def dequantise(q: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = (1, GROUP)) -> torch.Tensor:
    """q [..., rows, columns] times the scale of its block, in float64."""
    rows, columns = q.shape[-2:]
    wide = scale.double().repeat_interleave(block[0], -2)[..., :rows, :]
    return q.double() * wide.repeat_interleave(block[1], -1)[..., :columns]


def error_of(x: torch.Tensor, reference: torch.Tensor) -> float:
    """1 - 2<x,y> / (|x|^2 + |y|^2) in float64: 0 for equal tensors, nan where one holds a nan."""
    x, y = x.double(), reference.double()
    norms = float(x.square().sum() + y.square().sum())
    return 1 - 2 * float((x * y).sum()) / norms if norms else 0.0


def verdict(error: float, limit: float, **details: Any) -> tuple[bool, dict[str, Any]]:
    """(correct, details); details that are False make it wrong too."""
    right = error == error and abs(error) < limit and not any(value is False for value in details.values())
    return right, {"error": error, **details}


def some_rows(num_rows: int, at_most: int = CHECKED_ROWS) -> torch.Tensor:
    """Row indices from the first to the last, all of them where they are few."""
    steps = min(num_rows, at_most)
    return torch.linspace(0, num_rows - 1, steps, dtype=torch.float64).round().long().to(families.device)


def check_product(out: torch.Tensor, reference: Callable[[torch.Tensor], torch.Tensor], limit: float) -> Any:
    """The verdict on a matrix product [M, N]; `reference` gives the float64 rows that it is asked for."""
    rows = some_rows(out.shape[0])
    return verdict(error_of(out[rows], reference(rows)), limit, finite=bool(out.isfinite().all()))
