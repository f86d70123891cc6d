"""Every op of ours as a step from hidden states to hidden states, so that a chain of them in any order is one in which
each kernel needs what the one before wrote, into memory that others used before."""

from collections.abc import Callable

import torch

from vllm_b200_plugin.ops import small_m_gemm
from vllm_b200_plugin.ops.cache import concat_and_cache_mla, reshape_and_cache_flash
from vllm_b200_plugin.ops.gated_quant import (
    gated_group_quant,
    gated_tensor_quant,
    gated_token_quant,
    masked_silu_group_quant,
)
from vllm_b200_plugin.ops.moe_align import batched_moe_align_block_size, moe_align_block_size
from vllm_b200_plugin.ops.moe_few_tokens import ExpertFormat, few_tokens_moe
from vllm_b200_plugin.ops.moe_sum import moe_sum
from vllm_b200_plugin.ops.norm_quant import rms_norm_group_quant, rms_norm_tensor_quant, rms_norm_token_quant
from vllm_b200_plugin.ops.nvfp4_experts import pack_w2, pack_w13
from vllm_b200_plugin.ops.nvfp4_quant import nvfp4_quant
from vllm_b200_plugin.ops.quant import ScaleLayout, empty_scale, per_token_group_quant
from vllm_b200_plugin.ops.router import router, router_gate, split_router
from vllm_b200_plugin.ops.small_m_gemm import Config
from vllm_b200_plugin.ops.token_quant import per_tensor_quant, per_token_quant, static_group_quant
from vllm_b200_plugin.ops.topk import Scoring, Selection, select_experts

NUM_TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOPK = 6, 512, 256, 32, 4
BF16, E4M3, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8
EPS = 1e-6


class Model:
    """Weights that are read, and what persists between steps: the residual and the caches."""

    def __init__(self, device: str):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

        def blocks(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
            scales = torch.rand(*shape[:-2], shape[-2] // 128, shape[-1] // 128, generator=generator)
            return (normal(*shape) * 100).to(E4M3).to(device), ((scales + 0.5) / 100).to(device)

        def nvfp4(pack: Callable[..., torch.Tensor], *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
            q, scale = nvfp4_quant(normal(*shape).flatten(0, 1), torch.tensor(1e4))
            tiles = pack(q.unflatten(0, shape[:2]), scale.unflatten(0, shape[:2]))
            return tiles.to(device), torch.full(shape[:1], 1e-4, device=device)

        self.device = device
        self.square, self.square_scale = blocks(HIDDEN, HIDDEN)
        self.down, self.down_scale = blocks(HIDDEN, INTERMEDIATE)
        experts = (EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE)
        self.w13, self.w2 = (blocks(*shape) for shape in experts)
        self.square_int8 = (normal(HIDDEN, HIDDEN) * 1000).to(INT8).to(device)
        self.plain = {
            columns: normal(rows, columns).to(BF16).to(device)
            for rows, columns in ((HIDDEN, HIDDEN), (HIDDEN, INTERMEDIATE))
        }
        self.wide = (normal(3 * HIDDEN, HIDDEN) / 3**0.5).to(BF16).to(device)
        self.gate = normal(EXPERTS, HIDDEN).to(BF16).to(device) * 8
        self.norm = (torch.rand(HIDDEN, generator=generator) + 0.5).to(BF16).to(device)
        self.scale = torch.tensor([0.04], device=device)
        self.hundredth, self.thousandth = (torch.tensor([s], device=device) for s in (0.01, 0.001))
        self.counts = torch.tensor([3, 2], dtype=torch.int32, device=device)
        self.azp = torch.tensor([-7], dtype=torch.int32, device=device)
        self.slots = torch.arange(NUM_TOKENS, device=device)
        self.plain_experts = [normal(*shape).to(BF16).to(device) for shape in experts]
        self.channels = [torch.rand(shape[:2], generator=generator).to(device) / 50 for shape in experts]
        self.nvfp4_experts = [*nvfp4(pack_w13, *experts[0]), *nvfp4(pack_w2, *experts[1])]
        self.residual = torch.zeros(NUM_TOKENS, HIDDEN, dtype=BF16, device=device)
        self.keys, self.values = (torch.zeros(2, 16, 2, 128, dtype=BF16, device=device) for _ in range(2))
        self.latents = torch.zeros(2, 16, HIDDEN, dtype=BF16, device=device)
        self.fp8_keys, self.fp8_values = (torch.zeros(2, 2, 16, 128, dtype=torch.uint8, device=device) for _ in "kv")
        self.fp8_latents = torch.zeros(2, 16, HIDDEN, dtype=torch.uint8, device=device)
        self.masked = torch.zeros(2, 3, INTERMEDIATE, dtype=torch.uint8, device=device).view(E4M3)

    def state(self) -> list[torch.Tensor]:
        caches = [self.keys, self.values, self.latents, self.fp8_keys, self.fp8_values, self.fp8_latents]
        return [self.residual, *caches, self.masked]


Step = Callable[[Model, torch.Tensor, bool, list[torch.Tensor]], torch.Tensor]


def _block(m: Model, q: torch.Tensor, scale: torch.Tensor, pdl: bool, config: Config = Config()) -> torch.Tensor:  # noqa: B008
    weight, weight_scale = (m.square, m.square_scale) if q.shape[1] == HIDDEN else (m.down, m.down_scale)
    return small_m_gemm.fp8_block_linear(q, weight, weight_scale, scale, config=config, pdl=pdl)


def _scaled(m: Model, q: torch.Tensor, scale: torch.Tensor, pdl: bool) -> torch.Tensor:
    weight = m.square_int8 if q.dtype == INT8 else m.square if q.shape[1] == HIDDEN else m.down
    weight_scale = m.thousandth if q.dtype == INT8 else m.hundredth
    return small_m_gemm.scaled_linear(q, scale, weight, weight_scale, config=Config(1, 4, 2, 0), pdl=pdl)


def _wide(m: Model, h: torch.Tensor, rows: int, pdl: bool) -> torch.Tensor:
    return small_m_gemm.linear(h, m.wide[:rows], pdl=pdl)


def _group_quant(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    seen += per_token_group_quant(h, 64, INT8, pdl=pdl)
    seen += per_token_group_quant(h, layout=ScaleLayout.PACKED_UE8M0, pdl=pdl)
    q, scale = per_token_group_quant(h, layout=ScaleLayout.COLUMN_TMA, pdl=pdl)
    return _block(m, q, scale, pdl)


def _token_quant(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    seen += [t for t in per_token_quant(h, INT8, asymmetric=True, pdl=pdl) if t is not None]
    q, scale, _ = per_token_quant(h, pdl=pdl)
    return _scaled(m, q, scale, pdl)


def _int8(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    q, scale, _ = per_token_quant(h, INT8, pdl=pdl)
    return _scaled(m, q, scale, pdl)


def _tensor_quant(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    seen.append(per_tensor_quant(h, m.scale, INT8, azp=m.azp, pdl=pdl))
    seen.append(static_group_quant(h, m.norm.float(), pdl=pdl))
    return _scaled(m, per_tensor_quant(h, m.scale, pdl=pdl), m.scale, pdl)


def _gated_group(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    wide = _wide(m, h, 2 * INTERMEDIATE, pdl)
    seen += gated_group_quant(wide, layout=ScaleLayout.PACKED_UE8M0, pdl=pdl)
    return _block(m, *gated_group_quant(wide, pdl=pdl), pdl)


def _gated_token(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    wide = _wide(m, h, 2 * INTERMEDIATE, pdl)
    return _scaled(m, *gated_token_quant(wide, activation="gelu_tanh", pdl=pdl), pdl)


def _gated_tensor(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    wide = _wide(m, h, 2 * INTERMEDIATE, pdl)
    return _scaled(m, gated_tensor_quant(wide, m.scale, pdl=pdl), m.scale, pdl)


def _masked(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    scale = empty_scale(m.masked, 128, ScaleLayout.COLUMN)
    masked_silu_group_quant(h.view(2, 3, 2 * INTERMEDIATE), m.counts, m.masked, scale, pdl=pdl)
    return _block(m, m.masked[0], scale[0], pdl).repeat(2, 1)


def _norm_group(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    total = torch.empty_like(h)
    packed = ScaleLayout.PACKED_UE8M0
    seen += [total, *rms_norm_group_quant(h, m.norm, EPS, residual=m.residual, total=total, layout=packed, pdl=pdl)]
    q, scale = rms_norm_group_quant(h, m.norm, EPS, residual=m.residual, pdl=pdl)
    return _block(m, q, scale, pdl, Config(2, 8, stages=3))


def _norm_token(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    total = torch.empty_like(h)
    seen += [total, *rms_norm_token_quant(h, m.norm, EPS, residual=m.residual, total=total, pdl=pdl)]
    return _scaled(m, *rms_norm_token_quant(h, m.norm, EPS, residual=m.residual, pdl=pdl), pdl)


def _norm_tensor(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    total = torch.empty_like(h)
    seen += [total, rms_norm_tensor_quant(h, m.norm, m.scale, EPS, residual=m.residual, total=total, pdl=pdl)]
    return _scaled(m, rms_norm_tensor_quant(h, m.norm, m.scale, EPS, residual=m.residual, pdl=pdl), m.scale, pdl)


def _cache(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    key, value = h.view(NUM_TOKENS, 2, 2, 128).unbind(1)
    fp8 = m.fp8_keys.transpose(1, 2), m.fp8_values.transpose(1, 2)
    reshape_and_cache_flash(key, value, *fp8, m.slots, m.scale, m.scale, pdl=pdl)
    reshape_and_cache_flash(key, value, m.keys, m.values, m.slots, m.scale, m.scale, pdl=pdl)
    return small_m_gemm.linear(m.values[0, :NUM_TOKENS].flatten(1), m.plain[INTERMEDIATE], pdl=pdl)


def _mla_cache(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    concat_and_cache_mla(h[:, :448], h[:, 448:], m.fp8_latents, m.slots, m.scale, pdl=pdl)
    concat_and_cache_mla(h[:, :448], h[:, 448:], m.latents, m.slots, m.scale, pdl=pdl)
    return small_m_gemm.linear(m.latents[0, :NUM_TOKENS], m.plain[HIDDEN], config=Config(1, 8, 1, 2), pdl=pdl)


def _experts(m: Model, h: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, pdl: bool) -> torch.Tensor:
    return few_tokens_moe(h, *m.w13, *m.w2, weights, ids, pdl=pdl)


def _plain_experts(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    weights, ids = select_experts(router_gate(h, m.gate, pdl=pdl), Selection(TOPK), pdl=pdl)
    w13, w2 = m.plain_experts
    return few_tokens_moe(h, w13, None, w2, None, weights, ids, format=ExpertFormat.BF16, pdl=pdl)


def _token_experts(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    weights, ids = select_experts(router_gate(h, m.gate, pdl=pdl), Selection(TOPK), pdl=pdl)
    operands = (m.w13[0], m.channels[0], m.w2[0], m.channels[1])
    return few_tokens_moe(h, *operands, weights, ids, format=ExpertFormat.FP8_TOKEN, pdl=pdl)


def _nvfp4_experts(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    weights, ids = select_experts(router_gate(h, m.gate, pdl=pdl), Selection(TOPK), pdl=pdl)
    return few_tokens_moe(h, *m.nvfp4_experts, weights, ids, format=ExpertFormat.NVFP4, pdl=pdl)


def _router(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    _, weights, ids = router(h, m.gate, Selection(TOPK), pdl=pdl)
    return _experts(m, h, weights, ids, pdl)


def _split_router(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    grouped = Selection(TOPK, Scoring.TANH_SIGMOID, True, 2.5, 4, 2)
    logits, weights, ids = split_router(h, m.gate, grouped, pdl=pdl)
    seen += [logits, *split_router(h[:2], m.gate, grouped, pdl=pdl)]
    return _experts(m, h, weights, ids, pdl)


def _gate_and_topk(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    logits = router_gate(h, m.gate, pdl=pdl)
    seen += select_experts(logits, Selection(TOPK, Scoring.TANH_SIGMOID, True, 2.5, 4, 2), pdl=pdl)
    weights, ids = select_experts(logits, Selection(TOPK, Scoring.SIGMOID), pdl=pdl)
    return _experts(m, h, weights, ids, pdl)


def _align(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    _, ids = select_experts(router_gate(h, m.gate, pdl=pdl), Selection(TOPK), pdl=pdl)
    sorted_ids, block_experts, num_sorted = moe_align_block_size(ids, EXPERTS, 16, pdl=pdl)
    seen += [sorted_ids, block_experts, num_sorted, *batched_moe_align_block_size(EXPERTS, 4, ids.flatten(), pdl=pdl)]
    return h


def _sum(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    return moe_sum(_wide(m, h, 3 * HIDDEN, pdl).view(NUM_TOKENS, 3, HIDDEN), pdl=pdl)


def _gemm(m: Model, h: torch.Tensor, pdl: bool, seen: list[torch.Tensor]) -> torch.Tensor:
    h = small_m_gemm.fp8_block_linear(h, m.square, m.square_scale, config=Config(1, 8, 1, 2), pdl=pdl)
    return small_m_gemm.linear(h, m.plain[HIDDEN], config=Config(4, 4, 4, 0), pdl=pdl)


# Each: (model, hidden states [NUM_TOKENS, HIDDEN], pdl, list that takes results of no further use) -> hidden states.
STEPS: dict[str, Step] = {
    "group_quant": _group_quant,
    "token_quant": _token_quant,
    "int8": _int8,
    "tensor_quant": _tensor_quant,
    "gated_group_quant": _gated_group,
    "gated_token_quant": _gated_token,
    "gated_tensor_quant": _gated_tensor,
    "masked_silu_group_quant": _masked,
    "rms_norm_group_quant": _norm_group,
    "rms_norm_token_quant": _norm_token,
    "rms_norm_tensor_quant": _norm_tensor,
    "reshape_and_cache_flash": _cache,
    "concat_and_cache_mla": _mla_cache,
    "router": _router,
    "split_router": _split_router,
    "select_experts": _gate_and_topk,
    "bf16_experts": _plain_experts,
    "fp8_token_experts": _token_experts,
    "nvfp4_experts": _nvfp4_experts,
    "moe_align": _align,
    "moe_sum": _sum,
    "small_m_gemm": _gemm,
}


def run(model: Model, names: list[str], x: torch.Tensor, pdl: bool) -> list[torch.Tensor]:
    """The chain's result and everything else that it wrote and nobody read."""
    model.residual.zero_()
    h, seen = x, []
    for name in names:
        h = STEPS[name](model, h, pdl, seen)
    return [h, *seen, *model.state()]
