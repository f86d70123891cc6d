"""The tiles of NVFP4 experts: every byte has one place, which is where the kernels' lanes look for it."""

import pytest
import torch

from vllm_b200_plugin.ops.nvfp4_experts import TILE_BYTES, pack_w2, pack_w13, unpack_w2, unpack_w13

EXPERTS, ROWS, COLUMNS = 3, 256, 384


def made(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shape = (EXPERTS, rows, COLUMNS)
    weight, scale = (
        torch.randint(0, 256, (*shape[:2], shape[2] // n), generator=rng, dtype=torch.uint8) for n in (2, 16)
    )
    return weight, scale.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("pack, unpack", [(pack_w13, unpack_w13), (pack_w2, unpack_w2)])
def test_there_and_back(pack, unpack):
    weight, scale = made()
    tiles = pack(weight, scale)
    assert tiles.shape == (EXPERTS, ROWS // 16, COLUMNS // 128, TILE_BYTES) and tiles.is_contiguous()
    for expert in (slice(0, EXPERTS), slice(1, 2)):
        back = unpack(tiles[expert])
        assert torch.equal(back[0], weight[expert])
        assert torch.equal(back[1].view(torch.uint8), scale.view(torch.uint8)[expert])


@pytest.mark.parametrize("pack", [pack_w13, pack_w2])
def test_where_a_lane_looks(pack):
    weight, scale = made()
    tiles, scale = pack(weight, scale), scale.view(torch.uint8)
    expert, tile, block = 2, 5, 1
    bytes_of_tile = tiles[expert, tile, block]
    for lane in (0, 3, 4, 18, 31):
        row, quad = divmod(lane, 4)
        rows = (
            (8 * tile + row, ROWS // 2 + 8 * tile + row) if pack is pack_w13 else (16 * tile + row, 16 * tile + row + 8)
        )
        for half, own in enumerate(rows):
            first = (128 * block + 32 * quad) // 2
            at = 512 * half + 16 * lane
            assert torch.equal(bytes_of_tile[at : at + 16], weight[expert, own, first : first + 16])
            first, at = first // 8, 1024 + 4 * lane + 2 * half
            assert torch.equal(bytes_of_tile[at : at + 2], scale[expert, own, first : first + 2])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w, s: (w[:, :200], s), "w13: takes"),
        (lambda w, s: (w.float(), s), "w13: takes"),
        (lambda w, s: (w, s[:, :, 1:]), "w13_scale: takes"),
        (lambda w, s: (w, s.view(torch.uint8)), "w13_scale: takes"),
    ],
)
def test_errors_name_the_argument(change, words):
    with pytest.raises(ValueError, match=words):
        pack_w13(*change(*made()))
