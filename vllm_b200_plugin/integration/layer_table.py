"""What a built vLLM model runs: one row for each kind of layer, with the kernel for several numbers of tokens and why.

Reads the model alone, by the attributes that vLLM's layers have, so that the same code serves `vllm-b200 explain`,
whose model has no weights, and the report of a server that has just loaded its model.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_b200_plugin.dispatch import Choice
from vllm_b200_plugin.features import FEATURES
from vllm_b200_plugin.integration import report, vllm_branches

TOKENS = (1, 16, 256, 8192)
_OP_NAMESPACES = ("_C::", "_moe_C::", "_C_cache_ops::")


@dataclass
class Row:
    """A kind of layer of one rank.

    name: of its modules, "*" for the number of the layer. shape: in words. weights: their format.
    kernel: the class, or the function, that does the work. choices: number of tokens -> what that runs, and why.
    quantiser: what quantises the activation; empty where nothing does. weight_bytes: of one layer, as created, before
    a kernel lays them out its own way. experts: (in all, on this rank, chosen for a token), for experts only.
    cache_bytes: of the KV cache, for a token, read by attention. window: the most tokens that it looks back.
    passed_over: candidate that vLLM asked before -> why not.
    """

    kind: str
    name: str
    shape: str
    weights: str
    kernel: str
    choices: dict[int, Choice]
    quantiser: str = ""
    weight_bytes: int = 0
    experts: tuple[int, int, int] | None = None
    cache_bytes: int = 0
    window: int | None = None
    passed_over: dict[str, str] = field(default_factory=dict)
    count: int = 1

    def key(self) -> tuple[Any, ...]:
        """Layers with the same key are of one kind."""
        return (self.kind, self.name, self.shape, self.weights, self.kernel, str(self.choices), self.quantiser)


def rows(model: torch.nn.Module, passed_over: dict[int, dict[str, str]] | None = None) -> list[Row]:
    """The rows of a model in the order of its layers; passed_over: id of a module -> candidates that were refused."""
    found: dict[tuple[Any, ...], Row] = {}
    overridden = overridden_ops()
    for name, module in model.named_modules():
        row = _row(re.sub(r"\.\d+(?=\.|$)", ".*", name), module, overridden)
        if row is None:
            continue
        row.passed_over = (passed_over or {}).get(id(module), {})
        known = found.setdefault(row.key(), row)
        if known is not row:
            known.count += 1
    return list(found.values())


def overridden_ops() -> list[str]:
    """vLLM's CUDA ops for which another kernel than vLLM's own is registered."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(_OP_NAMESPACES)]
    return sorted(name for name in names if "CUDA (inactive)" in torch._C._dispatch_dump(name))


def _row(name: str, module: torch.nn.Module, overridden: list[str]) -> Row | None:
    method = getattr(module, "quant_method", None)
    if hasattr(module, "attn_backend") and hasattr(module, "kv_cache_dtype"):
        return _attention(name, module, overridden)
    if hasattr(module, "router") and hasattr(module, "routed_experts"):
        return _top_k(f"{name}.router", module)
    if hasattr(method, "experts_cls") or hasattr(module, "w13_weight"):
        return _experts(name, module, method, overridden)
    if method is not None and hasattr(module, "num_embeddings_per_partition"):
        is_head = any(base.__name__ == "ParallelLMHead" for base in type(module).__mro__)
        return _linear("lm_head" if is_head else "embedding", name, module, method, overridden)
    if method is not None and hasattr(module, "input_size") and hasattr(module, "output_size"):
        return _linear("router" if _is_gate(module) else "linear", name, module, method, overridden)
    return None


def _is_gate(module: torch.nn.Module) -> bool:
    return any(base.__name__ == "GateLinear" for base in type(module).__mro__)


def _linear(kind: str, name: str, module: torch.nn.Module, method: Any, overridden: list[str]) -> Row:
    kernel = report.linear_kernel(module)
    n, k = _linear_shape(module)
    scheme = getattr(module, "scheme", None)
    plain = "gather" if kind == "embedding" else "F.linear"
    title = type(kernel).__name__ if kernel is not None else plain
    return Row(
        kind=kind,
        name=name,
        shape=f"N={n} K={k}",
        weights=_weights(module, type(scheme or method).__name__),
        kernel=title,
        choices=_choices(module, title, kernel is not None),
        quantiser=vllm_branches.quantiser(kernel, overridden) if kernel is not None else "",
        weight_bytes=_bytes(module),
    )


def _top_k(name: str, module: torch.nn.Module) -> Row | None:
    """The choice of experts, where it is a kernel of its own."""
    experts = getattr(getattr(module.routed_experts, "quant_method", None), "experts_cls", None)
    if experts is not None and experts.is_monolithic():
        return None
    title = type(module.router).__name__
    config = module.moe_config
    return Row(
        kind="top-k",
        name=name,
        shape=f"E={config.num_experts} top-{config.experts_per_token}",
        weights="",
        kernel=title,
        choices=_choices(module, title, True),
    )


def _experts(name: str, module: torch.nn.Module, method: Any, overridden: list[str]) -> Row:
    experts = getattr(method, "experts_cls", None)
    config = method.moe
    title = experts.__name__ if experts is not None else type(method).__name__
    width = getattr(config, "intermediate_size_per_partition", 0)
    chosen = config.experts_per_token
    return Row(
        kind="experts",
        name=name,
        shape=f"E={config.num_local_experts}/{config.num_experts} top-{chosen} N={width} K={config.hidden_dim}",
        weights=_weights(module, type(method).__name__),
        kernel=title,
        choices=_choices(module, title, True),
        quantiser=vllm_branches.expert_quantiser(method, title, overridden),
        weight_bytes=_bytes(module),
        experts=(config.num_experts, config.num_local_experts, chosen),
    )


def _attention(name: str, module: torch.nn.Module, overridden: list[str]) -> Row:
    backend = module.attn_backend
    title = backend.__name__ if isinstance(backend, type) else str(backend)
    heads, kv_heads, size = (
        getattr(module, attribute, None) for attribute in ("num_heads", "num_kv_heads", "head_size")
    )
    extra = " sparse" if getattr(module, "use_sparse", False) else ""
    window = getattr(module, "sliding_window", None)
    return Row(
        kind="attention",
        name=name,
        shape=f"heads={heads} kv_heads={kv_heads} head_size={size}{extra}" + (f" window={window}" if window else ""),
        weights=f"KV cache {module.kv_cache_dtype}",
        kernel=title,
        choices=_choices(module, title, True),
        quantiser=vllm_branches.kv_cache_write(module, title, overridden),
        cache_bytes=_cache_bytes(module, kv_heads, size),
        window=window,
    )


def _cache_bytes(module: Any, kv_heads: int | None, head_size: int | None) -> int:
    element = 1 if "fp8" in str(module.kv_cache_dtype) else 2
    is_latent = hasattr(module, "kv_lora_rank")  # MLA: one vector for keys and values
    return (head_size or 0) * element * (1 if is_latent else 2 * (kv_heads or 0))


def _choices(module: torch.nn.Module, kernel: str, selected: bool) -> dict[int, Choice]:
    """What the layer runs for each of TOKENS: a feature of ours answers first, then vLLM's own branches."""
    plain = Choice(kernel, "the first of vLLM's list that takes the layer" if selected else "not quantised")
    return {
        tokens: next(_answers(module, kernel, tokens), None) or vllm_branches.choice(module, kernel, tokens) or plain
        for tokens in TOKENS
    }


def _answers(module: torch.nn.Module, kernel: str, num_tokens: int) -> Iterator[Choice]:
    # In the order of the features: a gate of ours that leaves the call to vLLM's leaves it to our linear layer.
    order = {feature.name: index for index, feature in enumerate(FEATURES)}
    for name in sorted(report.choices, key=lambda name: order.get(name, len(order))):
        if answer := report.choices[name](module, num_tokens):
            yield answer


def _linear_shape(module: Any) -> tuple[int, int]:
    if hasattr(module, "num_embeddings_per_partition"):
        return module.num_embeddings_per_partition, module.embedding_dim
    n = getattr(module, "output_size_per_partition", module.output_size)
    return n, getattr(module, "input_size_per_partition", module.input_size)


def _weights(module: torch.nn.Module, method: str) -> str:
    """Dtypes of the layer's own parameters, largest first, and the quantisation method."""
    parameters = sorted(module._parameters.items(), key=lambda item: -(item[1].numel() if item[1] is not None else 0))
    dtypes = list(dict.fromkeys(str(p.dtype).removeprefix("torch.") for _, p in parameters if p is not None))
    return f"{'+'.join(dtypes[:2])} ({method})"


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module._parameters.values() if p is not None)
