"""The experts of a mixture-of-experts layer for few tokens: two kernels and their reference."""

from collections.abc import Callable, Sequence
from enum import IntEnum

import torch

from vllm_b200_plugin.ops import _library
from vllm_b200_plugin.ops._library import torch_library
from vllm_b200_plugin.ops.gated_quant import ACTIVATIONS, activate_and_multiply
from vllm_b200_plugin.ops.moe import check_experts
from vllm_b200_plugin.ops.nvfp4_experts import unpack_w2, unpack_w13, unpacked_shape
from vllm_b200_plugin.ops.nvfp4_quant import GROUP_SIZE, e2m1_to_float
from vllm_b200_plugin.ops.quant import QUANT_MAX, per_token_group_quant
from vllm_b200_plugin.ops.token_quant import check_number, per_tensor_quant, per_token_quant

BLOCK_SHAPE = (128, 128)
MAX_ASSIGNMENTS = 512  # num_tokens * topk
MAX_EXPERTS = 1024
MAX_HIDDEN_SIZE = 8192
MAX_TOKENS_OF_ONE_SCALE = 16
_TILE = 8  # columns of the hidden activations that have one entry in the maxima


class ExpertFormat(IntEnum):
    """What the weights of experts are, and how activations are quantised for both products."""

    BF16 = 0  # bf16 weights; activations as they are
    FP8_BLOCK = 1  # e4m3 in blocks of 128x128; activations in groups of 128
    FP8_BLOCK_POW2 = 2  # the same, activation scales rounded up to powers of two, as DeepGEMM's scale format wants
    FP8_TOKEN = 3  # e4m3 with a scale for each output channel or expert; activations with one for each token
    FP8_TENSOR = 4  # the same; activations with one scale, given or that of the largest
    INT8_TOKEN = 5  # as FP8_TOKEN, in int8
    # e2m1 with an e4m3 scale for each 16 and one for each expert, in tiles; activations as they are. Silu, no biases.
    NVFP4 = 6

    @property
    def weight_dtype(self) -> torch.dtype:
        if self == ExpertFormat.BF16:
            return torch.bfloat16
        if self == ExpertFormat.NVFP4:
            return torch.uint8
        return torch.int8 if self == ExpertFormat.INT8_TOKEN else torch.float8_e4m3fn

    @property
    def quantises(self) -> bool:
        """The activations."""
        return self not in (ExpertFormat.BF16, ExpertFormat.NVFP4)

    @property
    def has_blocks(self) -> bool:
        return self in (ExpertFormat.FP8_BLOCK, ExpertFormat.FP8_BLOCK_POW2)

    @property
    def multiple(self) -> int:
        """Of hidden and intermediate size."""
        return 128 // self.weight_dtype.itemsize


def few_tokens_moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor | None,
    w2: torch.Tensor,
    w2_scale: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    *,
    format: ExpertFormat = ExpertFormat.FP8_BLOCK,
    expert_map: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    hidden_scale: torch.Tensor | None = None,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    activation: str = "silu",
    limit: float = 0.0,
    alpha: float = 1.0,
    beta: float = 0.0,
    up_first: bool = False,
    interleaved: bool = False,
    scratch: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = True,
) -> torch.Tensor:
    """For every token the weighted sum over its experts of activation(x @ w13.T + w13_bias) @ w2.T + w2_bias, for few
    tokens: two kernels that read the weights of each expert once for 16 tokens, without sorting, padding or quantising
    launches.

    The activations of both products are quantised as vLLM does: in groups as `per_token_group_quant`, by token as
    `per_token_quant`, by a given scale as `per_tensor_quant`, or by the scale max|x| / 448 of all that are numbers; in
    int8 as vLLM's Triton kernel: x * (127 / max(max|x|, 1e-10)) to the nearest, ties away from zero.
    The halves of the first product, with their biases, are rounded to bfloat16, and so is what the activation, in fp32,
    makes of both; the weighted sum, of fp32 products and biases, is fp32. vLLM's `swigluoai_and_mul` rounds like that,
    its other activations round one factor besides. A row of the result depends on no other, except through that last
    scale.

    Args:
        x: [num_tokens, hidden_size] bfloat16; rows may be strided, at multiples of 16 bytes.
        w13: [num_experts, 2 * intermediate_size, hidden_size] bfloat16, float8_e4m3fn or int8, as `format` says; with
            NVFP4 as `ops.nvfp4_experts.pack_w13` returns it.
        w13_scale: float32. Blocks: [num_experts, 2 * intermediate_size / 128, hidden_size / 128]; channels:
            [num_experts, 2 * intermediate_size]; experts, and NVFP4's global scales: [num_experts], what the values
            are multiplied by; None with BF16.
        w2: [num_experts, hidden_size, intermediate_size] in the dtype of w13; with NVFP4 as `pack_w2` returns it.
        w2_scale: [num_experts, hidden_size / 128, intermediate_size / 128], [num_experts, hidden_size],
            [num_experts] or None likewise, of as many dimensions as w13_scale.
        topk_weights: [num_tokens, topk] float32; None: the experts are summed as they are.
        topk_ids: [num_tokens, topk] int32 or int64; ids that are no expert's, such as -1, add nothing.
        format: see ExpertFormat.
        expert_map: [num_global_experts] int32, the index in w13 of an id's expert, or -1 where it is not here.
        x_scale, hidden_scale: one float32 each, the scales of both products' activations with FP8_TENSOR; None: that
            of the largest, for 16 tokens at most.
        w13_bias, w2_bias: [num_experts, 2 * intermediate_size], rows as those of w13, and [num_experts, hidden_size]
            bfloat16, contiguous.
        activation: one of gated_quant.ACTIVATIONS. limit, alpha, beta: of silu_clamped; gpt-oss has 7, 1.702 and 1.
        up_first: the first half of w13's rows is the one without the activation function, not the gate's. Not with
            NVFP4.
        interleaved: w13's rows take turns, one of the gate's and one of the other half, as in gpt-oss; with BF16.
        scratch: bfloat16, contiguous, of scratch_elements() elements at least.
        out: [num_tokens, hidden_size] bfloat16: where to write the result.
        pdl: launch the first kernel with programmatic stream serialization.

    Returns:
        [num_tokens, hidden_size] bfloat16.

    Raises:
        ValueError: an argument is not as above; few_tokens_refusal() says for which sizes.
    """
    w13_shape, w2_shape = (unpacked_shape(w) if format == ExpertFormat.NVFP4 else tuple(w.shape) for w in (w13, w2))
    check_experts(x, w13_shape, w2_shape, topk_ids if topk_weights is None else topk_weights, topk_ids)
    num_tokens, topk = topk_ids.shape
    plain = not up_first and activation == "silu" and w13_bias is None and w2_bias is None
    if format == ExpertFormat.NVFP4 and not plain:
        raise ValueError("up_first, activation, w13_bias, w2_bias: NVFP4 takes the gate's rows first, silu, no biases")
    if x.dtype != torch.bfloat16:
        raise ValueError(f"x: takes bfloat16, got {x.dtype}")
    sizes = (w13_shape[0], w13_shape[2], w13_shape[1] // 2)
    if refusal := few_tokens_refusal(num_tokens * topk, *sizes, format):
        raise ValueError(refusal)
    _check_scales(w13, w13_scale, w2, w2_scale, w13_shape, format)
    _check_given(x_scale, hidden_scale, num_tokens, format)
    for name, bias, shape in (("w13_bias", w13_bias, w13.shape[:2]), ("w2_bias", w2_bias, w2.shape[:2])):
        if bias is not None and (bias.dtype != torch.bfloat16 or bias.shape != shape or not bias.is_contiguous()):
            raise ValueError(f"{name}: takes bfloat16 {list(shape)}, contiguous, got {bias.dtype} {list(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: takes one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if activation == "silu_clamped" and not limit > 0:
        raise ValueError(f"limit: silu_clamped takes one above 0, got {limit}")
    if interleaved and format != ExpertFormat.BF16:
        raise ValueError(f"interleaved: goes with BF16, got {format.name}")
    if scratch is None:
        scratch = x.new_empty(scratch_elements(num_tokens * topk, sizes[2]))
    if out is None:
        out = x.new_empty(x.shape)
    torch.ops.vllm_b200.few_tokens_moe(
        x, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, expert_map, x_scale, hidden_scale, w13_bias, w2_bias,
        scratch, out, up_first, interleaved, int(format), ACTIVATIONS.index(activation), limit, alpha, beta, pdl,
    )  # fmt: skip
    return out


def scratch_elements(num_assignments: int, intermediate_size: int) -> int:
    """Of the scratch tensor: the hidden activations, and the maxima of every 8 of them."""
    return num_assignments * (intermediate_size + intermediate_size // _TILE)


def few_tokens_refusal(
    num_assignments: int, num_experts: int, hidden_size: int, intermediate_size: int,
    format: ExpertFormat = ExpertFormat.FP8_BLOCK,
) -> str | None:  # fmt: skip
    """Why few_tokens_moe cannot do a layer, or None where it can.

    Args:
        num_assignments: num_tokens * topk.
        num_experts: on this GPU.
        hidden_size, intermediate_size: on this GPU.
        format: of the experts.
    """
    if num_assignments > MAX_ASSIGNMENTS:
        return f"num_tokens * topk: takes {MAX_ASSIGNMENTS} at most, got {num_assignments}"
    if not 0 < num_experts <= MAX_EXPERTS:
        return f"num_experts: takes 1 to {MAX_EXPERTS}, got {num_experts}"
    for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if size == 0 or size % format.multiple:
            return f"{name}: takes multiples of {format.multiple}, got {size}"
    if hidden_size > MAX_HIDDEN_SIZE:
        return f"hidden_size: takes {MAX_HIDDEN_SIZE} at most, got {hidden_size}"
    return None


def scale_shapes(w13_shape: Sequence[int], format: ExpertFormat) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes that w13_scale and w2_scale may have; none with BF16. w13_shape: in elements."""
    experts, rows, hidden_size = w13_shape
    if format.has_blocks:
        return [((experts, rows // 128, hidden_size // 128), (experts, hidden_size // 128, rows // 2 // 128))]
    if format in (ExpertFormat.BF16, ExpertFormat.NVFP4):
        return [((experts,), (experts,))] if format == ExpertFormat.NVFP4 else []
    return [((experts, rows), (experts, hidden_size)), ((experts,), (experts,))]


def _check_scales(
    w13: torch.Tensor, w13_scale: torch.Tensor | None, w2: torch.Tensor, w2_scale: torch.Tensor | None,
    w13_shape: Sequence[int], format: ExpertFormat,
) -> None:  # fmt: skip
    for name, weight in (("w13", w13), ("w2", w2)):
        if weight.dtype != format.weight_dtype:
            raise ValueError(f"{name}: takes {format.weight_dtype} with {format.name}, got {weight.dtype}")
    if w13_scale is None or w2_scale is None:
        if format != ExpertFormat.BF16 or w13_scale is not w2_scale:
            raise ValueError(f"w13_scale, w2_scale: {format.name} takes {scale_shapes(w13_shape, format)}, got None")
        return
    if (got := (tuple(w13_scale.shape), tuple(w2_scale.shape))) not in scale_shapes(w13_shape, format):
        raise ValueError(f"w13_scale, w2_scale: {format.name} takes {scale_shapes(w13_shape, format)}, got {got}")


def _check_given(
    x_scale: torch.Tensor | None, hidden_scale: torch.Tensor | None, num_tokens: int, format: ExpertFormat
) -> None:
    for name, scale in (("x_scale", x_scale), ("hidden_scale", hidden_scale)):
        if scale is None:
            if format == ExpertFormat.FP8_TENSOR and num_tokens > MAX_TOKENS_OF_ONE_SCALE:
                raise ValueError(
                    f"{name}: takes a scale for more than {MAX_TOKENS_OF_ONE_SCALE} tokens, got None for {num_tokens}"
                )
        elif format != ExpertFormat.FP8_TENSOR:
            raise ValueError(f"{name}: goes with FP8_TENSOR, got {format.name}")
        else:
            check_number(name, scale, torch.float32)


torch_library.define(
    "few_tokens_moe(Tensor x, Tensor w13, Tensor? w13_scale, Tensor w2, Tensor? w2_scale, Tensor? topk_weights, "
    "Tensor topk_ids, Tensor? expert_map, Tensor? x_scale, Tensor? hidden_scale, Tensor? w13_bias, Tensor? w2_bias, "
    "Tensor(a!) scratch, Tensor(b!) out, bool up_first, bool interleaved, int format, int activation, float limit, "
    "float alpha, float beta, bool pdl) -> ()"
)


@torch.library.register_fake("vllm_b200::few_tokens_moe", lib=torch_library)
def _fake(*args: object) -> None:
    return None


@torch.library.impl(torch_library, "few_tokens_moe", "CPU")
def _reference(
    x: torch.Tensor, w13: torch.Tensor, w13_scale: torch.Tensor | None, w2: torch.Tensor,
    w2_scale: torch.Tensor | None, topk_weights: torch.Tensor | None, topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None, x_scale: torch.Tensor | None, hidden_scale: torch.Tensor | None,
    w13_bias: torch.Tensor | None, w2_bias: torch.Tensor | None, scratch: torch.Tensor, out: torch.Tensor,
    up_first: bool, interleaved: bool, format: int, activation: int, limit: float, alpha: float, beta: float, pdl: bool,
) -> None:  # fmt: skip
    """The same values in PyTorch; leaves `scratch` alone."""
    scheme = ExpertFormat(format)
    ids = _experts_here(topk_ids, w13.shape[0], expert_map)
    routed = [(expert, (ids == expert).nonzero(as_tuple=True)) for expert in ids[ids >= 0].unique().tolist()]
    values = _quantised(x, scheme, x_scale)
    hidden = x.new_zeros(*ids.shape, unpacked_shape(w2)[2] if scheme == ExpertFormat.NVFP4 else w2.shape[2])
    for expert, (tokens, slots) in routed:
        product = values[tokens] @ _weight(w13, w13_scale, expert, scheme, unpack_w13).t()
        if w13_bias is not None:
            product += w13_bias[expert].float()
        product = product.bfloat16().float()
        halves = (product[:, ::2], product[:, 1::2]) if interleaved else product.chunk(2, dim=-1)
        gate_up = torch.cat(halves[::-1] if up_first else halves, dim=-1)
        hidden[tokens, slots] = activate_and_multiply(gate_up, ACTIVATIONS[activation], limit, alpha, beta).bfloat16()
    values = _quantised(hidden.flatten(0, 1), scheme, hidden_scale).view(hidden.shape)
    total = torch.zeros(x.shape)
    for expert, (tokens, slots) in routed:
        product = values[tokens, slots] @ _weight(w2, w2_scale, expert, scheme, unpack_w2).t()
        if w2_bias is not None:
            product += w2_bias[expert].float()
        weight = 1.0 if topk_weights is None else topk_weights[tokens, slots].unsqueeze(-1)
        total.index_add_(0, tokens, product * weight)
    out.copy_(total)


def _experts_here(topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None) -> torch.Tensor:
    """Indices of experts, -1 for ids that have none here."""
    known = topk_ids < (num_experts if expert_map is None else expert_map.shape[0])
    ids = topk_ids.where(known, -1).long()
    return ids if expert_map is None else ids.where(ids < 0, expert_map[ids.clamp(min=0)].long())


def _quantised(x: torch.Tensor, format: ExpertFormat, scale: torch.Tensor | None) -> torch.Tensor:
    """The values that rows of bf16 stand for after quantisation, in fp32."""
    if not format.quantises:
        return x.float()
    if format.has_blocks:
        q, group_scale = per_token_group_quant(x, 128, ue8m0=format == ExpertFormat.FP8_BLOCK_POW2)
        return q.float() * group_scale.repeat_interleave(128, -1)
    if format == ExpertFormat.FP8_TOKEN:
        q, token_scale, _ = per_token_quant(x)
        return q.float() * token_scale
    if format == ExpertFormat.INT8_TOKEN:
        largest = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10)
        scaled = x.float() * (torch.tensor(127.0) / largest)
        return torch.trunc(scaled + torch.copysign(torch.tensor(0.5), scaled)).nan_to_num(nan=0.0) * (largest / 127)
    if scale is None:
        numbers = x.float().abs().nan_to_num(nan=0.0, posinf=torch.inf)
        scale = (numbers.max() if x.numel() else numbers.sum()) / QUANT_MAX[torch.float8_e4m3fn]
    return per_tensor_quant(x, scale).float() * scale


def _weight(
    w: torch.Tensor, scale: torch.Tensor | None, expert: int, format: ExpertFormat,
    unpack: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:  # fmt: skip
    """One expert's weights in fp32, times their scales. unpack: those of NVFP4."""
    if scale is None:
        return w[expert].float()
    own = scale[expert]
    if format == ExpertFormat.NVFP4:
        (q,), (group_scale,) = unpack(w[expert : expert + 1])
        return e2m1_to_float(q) * group_scale.float().repeat_interleave(GROUP_SIZE, 1) * own
    if format.has_blocks:
        own = own.repeat_interleave(128, 0).repeat_interleave(128, 1)
    elif own.dim() == 1:
        own = own.unsqueeze(-1)
    return w[expert].float() * own


_library.status()
