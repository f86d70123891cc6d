"""One module per vLLM subsystem; each has apply(), which vllm_b200_plugin.plugin calls."""
