"""The model in plain PyTorch: what transformers and vLLM call Qwen3MoeForCausalLM, with all experts in one matrix."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# Called with the name of a linear layer and its input, or "weight" and its weight; what it returns is multiplied.
Operand = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """vocab_size: a multiple of 128. hidden_size, moe_intermediate_size: multiples of 128, for 128x128 blocks."""

    vocab_size: int
    hidden_size: int = 256
    moe_intermediate_size: int = 256
    num_layers: int = 2
    num_experts: int = 8
    num_experts_per_tok: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    max_positions: int = 2048
    rope_theta: float = 10000.0
    eps: float = 1e-6

    def config(self, eos_token_id: int) -> dict:
        """config.json of the model in bfloat16."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.moe_intermediate_size * self.num_experts_per_tok,
            "moe_intermediate_size": self.moe_intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "attention_bias": False,
            "tie_word_embeddings": True,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "eos_token_id": eos_token_id,
            "pad_token_id": eos_token_id,
        }

    @classmethod
    def of_config(cls, config: dict) -> "Sizes":
        """From a config.json that config() made."""
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            moe_intermediate_size=config["moe_intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_experts=config["num_experts"],
            num_experts_per_tok=config["num_experts_per_tok"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            max_positions=config["max_position_embeddings"],
            rope_theta=config["rope_theta"],
            eps=config["rms_norm_eps"],
        )


def as_is(name: str, operand: torch.Tensor) -> torch.Tensor:
    return operand


def nvfp4(name: str, operand: torch.Tensor) -> torch.Tensor:
    """What NVFP4 leaves of it. [..., K], K a multiple of 16.

    e2m1 values with an e4m3 scale per 16 of K, and one fp32 scale of the tensor that takes its largest to 6 * 448.
    """
    groups = operand.float().unflatten(-1, (-1, 16))
    largest = groups.abs().amax(-1, keepdim=True)
    tensor_scale = (largest.amax() / (6 * 448)).clamp_min(1e-30)
    scale = (largest / 6 / tensor_scale).to(torch.float8_e4m3fn).float() * tensor_scale
    values = (groups / scale.clamp_min(1e-30)).clamp(-6, 6)
    # The grid 0 .5 1 1.5 2 3 4 6: its step is .5 to 2, 1 to 4, then 2. round() takes ties to even, as e2m1 does.
    size = values.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return ((values / step).round() * step * scale).flatten(-2).to(operand.dtype)


class Norm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def _matrix(rows: int, columns: int, scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * (scale / math.sqrt(columns)))


class Block(nn.Module):
    """One layer. gate, up [num_experts * intermediate, hidden] and down [hidden, num_experts * intermediate] hold
    the experts one after the other; all are computed, and those that a token is not routed to count with weight 0."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        hidden, wide = sizes.hidden_size, sizes.num_experts * sizes.moe_intermediate_size
        queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        out = (2 * sizes.num_layers) ** -0.5
        self.sizes = sizes
        self.input_layernorm = Norm(hidden, sizes.eps)
        self.post_attention_layernorm = Norm(hidden, sizes.eps)
        self.q_norm = Norm(sizes.head_dim, sizes.eps)
        self.k_norm = Norm(sizes.head_dim, sizes.eps)
        self.q_proj = _matrix(queries, hidden)
        self.k_proj = _matrix(keys, hidden)
        self.v_proj = _matrix(keys, hidden)
        self.o_proj = _matrix(hidden, queries, out)
        self.router = _matrix(sizes.num_experts, hidden)
        self.gate = _matrix(wide, hidden)
        self.up = _matrix(wide, hidden)
        self.down = nn.Parameter(torch.randn(hidden, wide) * (out / math.sqrt(sizes.moe_intermediate_size)))

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, operand: Operand
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [rows, length, hidden]; cos, sin [length, head_dim]. The layer's output and its load-balancing loss."""
        s = self.sizes
        h = operand("qkv", self.input_layernorm(x))
        q = F.linear(h, operand("weight", self.q_proj)).unflatten(-1, (-1, s.head_dim))
        k = F.linear(h, operand("weight", self.k_proj)).unflatten(-1, (-1, s.head_dim))
        v = F.linear(h, operand("weight", self.v_proj)).unflatten(-1, (-1, s.head_dim))
        q = _rotate(self.q_norm(q), cos, sin)
        k = _rotate(self.k_norm(k), cos, sin)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        mixed = operand("o_proj", mixed.transpose(1, 2).flatten(-2))
        x = x + F.linear(mixed, operand("weight", self.o_proj))

        h = self.post_attention_layernorm(x)
        probabilities = F.linear(h, self.router).float().softmax(-1)
        top, chosen = probabilities.topk(s.num_experts_per_tok, dim=-1)
        weights = torch.zeros_like(probabilities).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
        h = operand("gate_up", h)
        a = F.silu(F.linear(h, operand("weight", self.gate))) * F.linear(h, operand("weight", self.up))
        a = a.unflatten(-1, (s.num_experts, -1)) * (weights > 0).to(a.dtype)[..., None]
        a = operand("down_proj", a) * weights.to(a.dtype)[..., None]
        x = x + F.linear(a.flatten(-2), operand("weight", self.down))

        share = (weights > 0).float().mean((0, 1)) / s.num_experts_per_tok
        balance = s.num_experts * (share * probabilities.mean((0, 1))).sum()
        return x, balance


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [rows, length, heads, head_dim]"""
    first, second = x.float().chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (x.float() * cos[:, None] + turned * sin[:, None]).to(x.dtype)


class Model(nn.Module):
    """The output layer is the embedding."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Parameter(torch.randn(sizes.vocab_size, sizes.hidden_size) * 0.02)
        self.layers = nn.ModuleList(Block(sizes) for _ in range(sizes.num_layers))
        self.norm = Norm(sizes.hidden_size, sizes.eps)

    def hidden(
        self, ids: torch.Tensor, operand: Operand = as_is, dtype: torch.dtype = torch.bfloat16
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [rows, length] -> [rows, length, hidden] in `dtype` before the last norm, and the load-balancing loss."""
        s = self.sizes
        steps = torch.arange(0, s.head_dim, 2, device=ids.device).float() / s.head_dim
        angles = torch.outer(torch.arange(ids.shape[1], device=ids.device).float(), s.rope_theta**-steps).repeat(1, 2)
        x, balance = F.embedding(ids, self.embedding).to(dtype), torch.zeros((), device=ids.device)
        for layer in self.layers:
            x, loss = layer(x, angles.cos(), angles.sin(), operand)
            balance = balance + loss
        return x, balance / s.num_layers

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(hidden), self.embedding)

    def tensors(self) -> dict[str, torch.Tensor]:
        """In bfloat16, by the names of a checkpoint of Qwen3MoeForCausalLM."""
        return {name: source.detach().bfloat16().contiguous().clone() for name, source in self._views().items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """The reverse of tensors(). Raises KeyError where one is missing."""
        with torch.no_grad():
            for name, target in self._views().items():
                target.copy_(tensors[name])

    def _views(self) -> dict[str, torch.Tensor]:
        """Checkpoint name -> the parameter, or the part of it, that this is."""
        views: dict[str, torch.Tensor] = {
            "model.embed_tokens.weight": self.embedding,
            "model.norm.weight": self.norm.weight,
        }
        size = self.sizes.moe_intermediate_size
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Block)
            prefix = f"model.layers.{index}"
            for name in ("input_layernorm", "post_attention_layernorm"):
                views[f"{prefix}.{name}.weight"] = getattr(layer, name).weight
            for name in ("q_norm", "k_norm"):
                views[f"{prefix}.self_attn.{name}.weight"] = getattr(layer, name).weight
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                views[f"{prefix}.self_attn.{name}.weight"] = getattr(layer, name)
            views[f"{prefix}.mlp.gate.weight"] = layer.router
            for expert in range(self.sizes.num_experts):
                part = slice(expert * size, (expert + 1) * size)
                views[f"{prefix}.mlp.experts.{expert}.gate_proj.weight"] = layer.gate[part]
                views[f"{prefix}.mlp.experts.{expert}.up_proj.weight"] = layer.up[part]
                views[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = layer.down[:, part]
        return views
