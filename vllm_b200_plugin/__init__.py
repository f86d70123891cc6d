"""Faster kernels for vLLM on Hopper and Blackwell GPUs. Importing this package changes nothing."""

from importlib.metadata import version

__version__ = version("vllm-b200-plugin")
