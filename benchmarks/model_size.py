"""How many parameters and bytes a configuration of benchmarks.model_shapes has, and the depth that fits twice."""

from typing import Any

GPU_BYTES = 141e9
BYTES_PER_ENGINE = 50e9  # weights; leaves room for two KV caches, activations and CUDA graphs

# A byte of scale for 32 values of mxfp4, for 16 of modelopt's NVFP4.
_BYTES = {"fp8": 1.0, "compressed-tensors": 1.0, "mxfp4": 0.53125, "modelopt": 0.5625, None: 2.0}


def parameters(config: dict[str, Any]) -> float:
    """Parameters of all matrices: embeddings, attention, MLP or experts. Norms, biases and routers are left out."""
    outside, layers = _matrices(config)
    return outside + sum(sum(layer.values()) for layer in layers)


def weight_bytes(config: dict[str, Any]) -> float:
    """Bytes of the same on the GPU; embeddings and lm_head are bf16, as is attention where the config says so."""
    outside, layers = _matrices(config)
    quantization = config.get("quantization_config", {})
    method = quantization.get("quant_method")
    excluded = [*quantization.get("modules_to_not_convert", ()), *quantization.get("ignore", ())]
    attention = None if any("self_attn" in pattern for pattern in excluded) else method
    size = {"attention": _BYTES[attention], "mlp": _BYTES[method]}
    return 2 * outside + sum(size[kind] * count for layer in layers for kind, count in layer.items())


def default_layers(config: dict[str, Any]) -> int:
    """The most layers whose weights are no more than BYTES_PER_ENGINE, at least one after the dense ones."""
    least = config.get("first_k_dense_replace", 0) + 1
    for layers in range(config["num_hidden_layers"], least, -1):
        if weight_bytes({**config, "num_hidden_layers": layers}) <= BYTES_PER_ENGINE:
            return layers
    return min(least, config["num_hidden_layers"])


def describe(config: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """For the record: the depth, the depth of the whole model and, where it is cut, that in words."""
    layers, whole = config["num_hidden_layers"], full["num_hidden_layers"]
    record: dict[str, Any] = {
        "layers": layers,
        "model_layers": whole,
        "weights_gb": round(weight_bytes(config) / 1e9, 1),
    }
    if layers < whole:
        record["cut"] = f"{layers} of {whole} layers"
        if config.get("first_k_dense_replace") != full.get("first_k_dense_replace"):
            record["cut"] += f", {config['first_k_dense_replace']} of {full['first_k_dense_replace']} dense ones"
        record["cut"] += "; per-token times are not those of the whole model"
    return record


def _matrices(config: dict[str, Any]) -> tuple[float, list[dict[str, float]]]:
    """(embedding and lm_head, for each layer {"attention": ..., "mlp": ...})."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if rank := config.get("kv_lora_rank"):
        nope, rope, v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        query = config["q_lora_rank"] * (hidden + heads * (nope + rope))
        attention = query + hidden * (rank + rope) + rank * heads * (nope + v) + heads * v * hidden
    else:
        attention = 2 * hidden * config["head_dim"] * (heads + config["num_key_value_heads"])
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    experts = next((config[name] for name in names if name in config), 0)
    dense = 3 * hidden * config["intermediate_size"]
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    sparse = 3 * hidden * width * (experts + config.get("n_shared_experts", 0))
    first = config.get("first_k_dense_replace", 0) if experts else config["num_hidden_layers"]
    kinds = [dense if layer < first else sparse for layer in range(config["num_hidden_layers"])]
    return 2.0 * config["vocab_size"] * hidden, [{"attention": float(attention), "mlp": float(mlp)} for mlp in kinds]
