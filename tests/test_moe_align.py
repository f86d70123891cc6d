"""Sorting routed tokens by expert: the reference against vLLM's documented examples and a sort, CUDA bit for bit."""

import itertools

import pytest
import torch

from vllm_b200_plugin.ops.moe_align import batched_moe_align_block_size, moe_align_block_size, worst_case

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# tokens, topk, experts, block size
SIZES = [
    (1, 8, 128, 16),
    (3, 2, 8, 4),
    (16, 8, 256, 64),
    (33, 1, 1, 16),
    (64, 4, 32, 5),
    (100, 8, 60, 1),
    (256, 8, 128, 16),
    (257, 8, 512, 64),
]
LARGE = [(1024, 8, 256, 16), (4096, 8, 128, 64), (5001, 6, 160, 16), (16384, 8, 512, 128), (40000, 8, 128, 64)]
# On either side of each change of launch.
EDGES = [(m + n, 1, 300 if n else 128, 16) for m in (256, 512, 2048, 4096, 8192, 16384, 32768) for n in (-1, 0, 1)]


def routing(num_tokens: int, topk: int, num_experts: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens + num_experts)
    if kind == "one":
        return torch.full((num_tokens, topk), num_experts // 2, dtype=torch.int32)
    ids = torch.randint(num_experts, (num_tokens, topk), generator=generator, dtype=torch.int32)
    if kind == "some_missing":
        ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
        ids[::7] = num_experts + 3
    return ids


def half_map(num_experts: int, device: str) -> torch.Tensor:
    """The upper half of the experts are here, as 0, 1, 2 and on."""
    expert_map = torch.full((num_experts,), -1, dtype=torch.int32, device=device)
    here = num_experts - num_experts // 2
    expert_map[num_experts // 2 :] = torch.arange(here, dtype=torch.int32, device=device)
    return expert_map


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["random", "one", "some_missing"])
@pytest.mark.parametrize("num_tokens, topk, num_experts, block_size", SIZES)
@pytest.mark.parametrize("mapped", [False, True])
def test_blocks(
    device: str, kind: str, num_tokens: int, topk: int, num_experts: int, block_size: int, mapped: bool
) -> None:
    ids = routing(num_tokens, topk, num_experts, kind).to(device)
    expert_map = half_map(num_experts, device) if mapped else None
    sorted_ids, block_experts, num_sorted = moe_align_block_size(ids, num_experts, block_size, expert_map)
    padding, experts = ids.numel(), [int(e) if 0 <= e < num_experts else -1 for e in ids.flatten().tolist()]
    if expert_map is not None:
        experts = [expert_map[e].item() if e >= 0 else -1 for e in experts]
    expected_ids, expected_experts = [], []
    for expert in range(num_experts):
        mine = [i for i, e in enumerate(experts) if e == expert]
        mine += [padding] * (-len(mine) % block_size)
        expected_ids += mine
        expected_experts += [expert] * (len(mine) // block_size)
    room = worst_case(padding, num_experts, block_size)
    assert len(sorted_ids) == room and len(block_experts) == -(-room // block_size)
    assert num_sorted.tolist() == [len(expected_ids)]
    assert sorted_ids.tolist() == expected_ids + [padding] * (room - len(expected_ids))
    assert block_experts.tolist() == expected_experts + [-1] * (len(block_experts) - len(expected_experts))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens, topk, num_experts, block_size", [*SIZES, *LARGE, *EDGES])
@pytest.mark.parametrize(
    "kind, dtype",
    [("plain", torch.int32), ("random", torch.int64), ("one", torch.int32), ("some_missing", torch.int32)],
)
def test_cuda_is_the_reference(
    num_tokens: int, topk: int, num_experts: int, block_size: int, kind: str, dtype: torch.dtype
) -> None:
    ids = routing(num_tokens, topk, num_experts, kind).to(dtype)
    room = worst_case(ids.numel(), num_experts, block_size)
    expert_map = half_map(num_experts, "cpu") if kind == "some_missing" else None
    results = []
    for device in ("cpu", "cuda"):
        # Off by one element, so that the rows are not aligned to 16 bytes; a longer buffer than the worst case.
        outputs = [
            torch.full((size + 4,), -77, dtype=torch.int32, device=device)[1:-1]
            for size in (room + 1, -(-room // block_size) + 1)
        ]
        outputs.append(torch.empty(1, dtype=torch.int32, device=device))
        scatter = None if kind == "plain" else torch.empty(ids.numel(), dtype=torch.int32, device=device)
        mapped = None if expert_map is None else expert_map.to(device)
        torch.ops.vllm_b200.moe_align_block_size(ids.to(device), num_experts, block_size, *outputs, mapped, scatter)
        results.append([tensor.cpu() for tensor in (*outputs, scatter) if tensor is not None])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device: str) -> None:
    _, _, num_sorted = moe_align_block_size(torch.empty(0, 8, dtype=torch.int32, device=device), 128, 16)
    assert num_sorted.tolist() == [0]


@pytest.mark.gpu
def test_cuda_graph_and_two_streams() -> None:
    ids = [routing(n, 8, 128, "random").cuda() for n in (4096, 2048)]
    expected = [moe_align_block_size(i, 128, 64) for i in ids]
    streams = [torch.cuda.Stream() for _ in ids]
    for _ in range(20):
        results = []
        for i, stream in zip(ids, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(moe_align_block_size(i, 128, 64, pdl=True))
        torch.cuda.synchronize()
        for result, right in zip(results, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(result, right, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moe_align_block_size(ids[0], 128, 64)
    captured[0].fill_(-7)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected[0], strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_batched_as_documented_in_vllm(device: str) -> None:
    counts = torch.tensor([2, 3, 0, 6, 8], dtype=torch.int32, device=device)
    sorted_ids, block_experts, num_sorted = batched_moe_align_block_size(8, 4, counts)
    blocks = [[0, 1, 40, 40], [8, 9, 10, 40], [24, 25, 26, 27], [28, 29, 40, 40], [32, 33, 34, 35], [36, 37, 38, 39]]
    assert sorted_ids.tolist() == list(itertools.chain(*blocks)) + [40] * 16
    assert block_experts.tolist() == [0, 1, 3, 3, 4, 4, -1, -1, -1, -1]
    assert num_sorted.tolist() == [24]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "batches, most, block_size", [(1, 1, 16), (5, 9, 4), (128, 1000, 64), (1024, 33, 16), (3, 0, 8)]
)
def test_batched_cuda_is_the_reference(batches: int, most: int, block_size: int) -> None:
    counts = torch.randint(most + 1, (batches,), dtype=torch.int32)
    counts[::3] = 0
    expected = batched_moe_align_block_size(most, block_size, counts)
    for a, b in zip(batched_moe_align_block_size(most, block_size, counts.cuda()), expected, strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"topk_ids": torch.zeros(4, 2)}, "topk_ids: takes contiguous int32 or int64, got torch.float32"),
        ({"topk_ids": torch.zeros(2, 4, dtype=torch.int32).t()}, "topk_ids: takes contiguous int32 or int64"),
        ({"num_experts": 513}, "num_experts: takes 1 to 512, got 513"),
        ({"block_size": 0}, "block_size: takes at least 1, got 0"),
        ({"expert_map": torch.zeros(7, dtype=torch.int32)}, r"expert_map: takes int32 \[8\], got torch.int32 \(7,\)"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe_align_block_size(
            **{"topk_ids": torch.zeros(4, 2, dtype=torch.int32), "num_experts": 8, "block_size": 4, **change}
        )
