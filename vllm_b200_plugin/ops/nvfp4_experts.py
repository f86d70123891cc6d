"""NVFP4 weights of experts in the tiles that our kernels for few tokens read.

A tile is 16 rows by 128 columns in 1152 bytes: for each lane of a warp 16 bytes of row lane / 4 and columns
lane % 4 * 32 on, the same of the row 8 on, and then the four scales of these 64 elements. In w13 the first 8 rows of a
tile are the gate's and the others those of the same columns of the other half, so that one lane has both factors of
silu(gate) * up.
"""

import torch

from vllm_b200_plugin.ops.nvfp4_quant import GROUP_SIZE

TILE_ROWS, TILE_COLUMNS = 16, 128
TILE_BYTES = TILE_ROWS * (TILE_COLUMNS // 2 + TILE_COLUMNS // GROUP_SIZE)
_ROWS, _LANES = TILE_ROWS // 2, 4  # of a half; that share a row


def pack_w13(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The up projections, of both factors.

    Args:
        weight: [num_experts, 2 * intermediate_size, hidden_size / 2] uint8, the gate's rows first, two e2m1 each, the
            first in the lower four bits. Both sizes are multiples of 128.
        scale: [num_experts, 2 * intermediate_size, hidden_size / 16] float8_e4m3fn.

    Returns:
        [num_experts, intermediate_size / 8, hidden_size / 128, 1152] uint8.

    Raises:
        ValueError: an argument is not as above; the message names it, what came and what is taken.
    """
    _check("w13", weight, scale)
    halves = (tensor.unflatten(1, (2, -1, _ROWS)).transpose(1, 2) for tensor in (weight, scale.view(torch.uint8)))
    return _pack(*halves)


def pack_w2(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The down projections: [num_experts, hidden_size, intermediate_size / 2] and its scales, as for pack_w13.

    Returns:
        [num_experts, hidden_size / 16, intermediate_size / 128, 1152] uint8.
    """
    _check("w2", weight, scale)
    return _pack(*(tensor.unflatten(1, (-1, 2, _ROWS)) for tensor in (weight, scale.view(torch.uint8))))


def unpack_w13(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What pack_w13 took, of any number of experts."""
    weight, scale = (tensor.transpose(1, 2).flatten(1, 3) for tensor in _unpack(tiles))
    return weight, scale.view(torch.float8_e4m3fn)


def unpack_w2(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What pack_w2 took, of any number of experts."""
    weight, scale = (tensor.flatten(1, 3) for tensor in _unpack(tiles))
    return weight, scale.view(torch.float8_e4m3fn)


def unpacked_shape(tiles: torch.Tensor) -> tuple[int, int, int]:
    """(num_experts, rows, columns) of the weights in tiles. Raises ValueError where there are none."""
    if tiles.dim() != 4 or tiles.shape[3] != TILE_BYTES or tiles.dtype != torch.uint8:
        raise ValueError(
            f"w13, w2: NVFP4 takes [num_experts, rows / {TILE_ROWS}, columns / {TILE_COLUMNS}, {TILE_BYTES}] uint8, "
            f"got {tuple(tiles.shape)} of {tiles.dtype}"
        )
    return tiles.shape[0], tiles.shape[1] * TILE_ROWS, tiles.shape[2] * TILE_COLUMNS


def _check(name: str, weight: torch.Tensor, scale: torch.Tensor) -> None:
    if weight.dtype != torch.uint8 or weight.dim() != 3 or weight.shape[1] % 128 or weight.shape[2] % 64:
        raise ValueError(
            f"{name}: takes [num_experts, rows, columns / 2] uint8, rows and columns in multiples of 128, "
            f"got {tuple(weight.shape)} of {weight.dtype}"
        )
    expected = (*weight.shape[:2], 2 * weight.shape[2] // GROUP_SIZE)
    if scale.dtype != torch.float8_e4m3fn or tuple(scale.shape) != expected:
        raise ValueError(f"{name}_scale: takes {expected} of float8_e4m3fn, got {tuple(scale.shape)} of {scale.dtype}")


def _pack(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Both [experts, tiles, halves, rows, bytes of a row]."""
    weight, scale = (tensor.unflatten(-1, (-1, _LANES, n)) for tensor, n in ((weight, 16), (scale, 2)))
    return torch.cat((weight.permute(0, 1, 4, 2, 3, 5, 6).flatten(3), scale.permute(0, 1, 4, 3, 5, 2, 6).flatten(3)), 3)


def _unpack(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight, scale = tiles.split((TILE_ROWS * TILE_COLUMNS // 2, TILE_ROWS * TILE_COLUMNS // GROUP_SIZE), 3)
    wide = weight.unflatten(3, (2, _ROWS, _LANES, 16)).permute(0, 1, 3, 4, 2, 5, 6).flatten(4)
    return wide, scale.unflatten(3, (_ROWS, _LANES, 2, 2)).permute(0, 1, 5, 3, 2, 4, 6).flatten(4)
