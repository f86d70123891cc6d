"""A vLLM plugin that breaks a kernel of ours in one way, for tests of what must notice: PLANTED_FAULT=name.

It is found where this folder is on PYTHONPATH.
"""

import importlib
import os

import torch

from vllm_b200_plugin import post_import

LINEAR = "vllm_b200_plugin.integration.fp8_block_op"
EXPERTS = "vllm_b200_plugin.integration.moe_fp8"
EXPERTS_OP = "vllm_b200_plugin.ops.moe"


def scales_of_two_groups_swapped() -> None:
    module = importlib.import_module(LINEAR)
    right = module.per_token_group_quant

    def wrong(*args, **kwargs):
        q, scale = right(*args, **kwargs)
        scale[..., :2] = scale[..., :2].flip(-1)
        return q, scale

    module.per_token_group_quant = wrong


def last_column_dropped(every: int | None = None) -> None:
    """Of the output, or of every so many columns of it, as of a tile; in linear layers and in experts."""
    for name in (LINEAR, EXPERTS_OP):
        module = importlib.import_module(name)

        def wrong(*args, right=module.fp8_block_scaled_mm, **kwargs):
            out = right(*args, **kwargs)
            width = every or out.shape[1]
            out[:, width - 1 :: width] = 0
            return out

        module.fp8_block_scaled_mm = wrong


def two_experts_swapped() -> None:
    module = importlib.import_module(EXPERTS)
    right = module.fp8_block_scaled_moe

    def wrong(x, w1, *args, **kwargs):
        order = torch.arange(w1.shape[0])
        order[:2] = order[:2].flip(0)
        return right(x, w1[order], *args, **kwargs)

    module.fp8_block_scaled_moe = wrong


FAULTS = {
    "scales of two groups swapped": (LINEAR, scales_of_two_groups_swapped),
    "last column dropped": (LINEAR, last_column_dropped),
    "last column of every MMA tile dropped": (LINEAR, lambda: last_column_dropped(8)),
    "two experts swapped": (EXPERTS, two_experts_swapped),
}


def register() -> None:
    module, plant = FAULTS[os.environ["PLANTED_FAULT"]]
    post_import.when_imported(module, plant)
