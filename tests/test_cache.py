"""Writing into a paged KV cache: the reference against a loop over tokens, the CUDA kernel against the reference."""

import pytest
import torch

from benchmarks.cases.kv_cache import ROPE_SIZE, CacheLayoutCase
from benchmarks.cases.kv_cache import tests as cache_cases
from vllm_b200_plugin.ops.cache import concat_and_cache_mla, reshape_and_cache_flash

CASES = list(cache_cases())


def inputs(case: CacheLayoutCase, device: str = "cpu") -> list[torch.Tensor]:
    """The sources, the caches poisoned, the slots with every fifth one skipped, and the scales."""
    generator = torch.Generator().manual_seed(0)
    blocks = case.num_tokens // case.block_size + 3
    slots = torch.randperm(blocks * case.block_size, generator=generator)[: case.num_tokens]
    slots[4::5] = -1
    tokens, value_size = case.num_tokens + case.extra_tokens, case.value_size or case.head_size
    if case.num_heads == 0:
        sources = [torch.randn(tokens, n, generator=generator) for n in (case.head_size, ROPE_SIZE)]
        caches = [torch.empty(blocks, case.block_size, case.head_size + ROPE_SIZE, dtype=case.dtype)]
        scales = [torch.tensor([0.3])]
    else:
        # As slices of one projection.
        qkv = torch.randn(tokens, case.num_heads * (case.head_size + value_size) + 64, generator=generator)
        qkv = qkv.to(case.input_dtype)
        split = qkv.split((64, case.num_heads * case.head_size, case.num_heads * value_size), dim=-1)
        sources = [split[1].unflatten(-1, (-1, case.head_size)), split[2].unflatten(-1, (-1, value_size))]
        heads, size = case.num_heads, case.block_size
        if case.layout == "combined":
            whole = torch.empty(blocks, heads, size, case.head_size + value_size, dtype=case.dtype)
            caches = list(whole.transpose(1, 2).split((case.head_size, value_size), dim=-1))
        elif case.layout == "hnd":
            caches = [
                torch.empty(blocks, heads, size, n, dtype=case.dtype).transpose(1, 2)
                for n in (case.head_size, value_size)
            ]
        else:
            caches = [torch.empty(blocks, size, heads, n, dtype=case.dtype) for n in (case.head_size, value_size)]
        scales = [torch.rand(heads if case.per_head else 1, generator=generator) + 0.1 for _ in range(2)]
    sources = [s if s.dtype == case.input_dtype else s.to(case.input_dtype) for s in sources]
    for source in sources:
        source[0].flatten()[:3] = torch.tensor([float("nan"), float("inf"), 1e4])
    for cache in caches:
        cache.view(torch.uint8).fill_(0xA5)
    if device != "cpu":
        sources, caches = [on(s, device) for s in sources], [on(c, device) for c in caches]
        slots, scales = slots.to(device), [s.to(device) for s in scales]
    return [*sources, *caches, slots, *scales]


def on(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A copy with the same strides and offset."""
    storage = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def write(case: CacheLayoutCase, arguments: list[torch.Tensor], pdl: bool = False) -> None:
    (reshape_and_cache_flash if case.num_heads else concat_and_cache_mla)(*arguments, pdl=pdl)


def caches_of(case: CacheLayoutCase, arguments: list[torch.Tensor]) -> list[torch.Tensor]:
    return arguments[2:4] if case.num_heads else arguments[2:3]


@pytest.mark.parametrize("case", [c for c in CASES if c.num_tokens < 100], ids=str)
def test_reference_is_a_loop(case: CacheLayoutCase) -> None:
    arguments = inputs(case)
    write(case, arguments)
    sources, caches = arguments[:2], caches_of(case, arguments)
    slots, scales = arguments[4 if case.num_heads else 3], arguments[5 if case.num_heads else 4 :]
    if case.num_heads == 0:
        caches, scales = list(caches[0].split((case.head_size, ROPE_SIZE), dim=-1)), scales * 2
    for source, cache, scale in zip(sources, caches, scales, strict=True):
        written = torch.zeros(cache.shape[:2], dtype=torch.bool)
        for token, slot in enumerate(slots.tolist()):
            if slot < 0:
                continue
            block, place = divmod(slot, case.block_size)
            written[block, place] = True
            row = cache[block, place]
            if case.dtype == case.input_dtype:
                assert torch.equal(row.view(torch.int16), source[token].view(torch.int16))
                continue
            exact = source[token].double() / scale.double().view(-1, *[1] * (source.dim() - 2))
            got = row.view(torch.float8_e4m3fn).double()
            assert torch.equal(got.isnan(), exact.isnan())
            exact = exact.clamp(-448, 448).nan_to_num()
            assert ((got.nan_to_num() - exact).abs() <= exact.abs() / 16 + 2**-10).all()
        assert (cache.view(torch.uint8)[~written] == 0xA5).all()


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_is_the_reference(case: CacheLayoutCase, pdl: bool) -> None:
    expected, actual = inputs(case), inputs(case, "cuda")
    write(case, expected)
    write(case, actual, pdl)
    for got, want in zip(caches_of(case, actual), caches_of(case, expected), strict=True):
        assert torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 48])
def test_cuda_past_2_to_the_31_elements(block_size: int) -> None:
    blocks = 2**32 // (block_size * 2 * 128) + 2
    cache = torch.zeros(blocks, block_size, 2, 128, dtype=torch.uint8, device="cuda")
    key = torch.ones(2, 2, 128, dtype=torch.bfloat16, device="cuda")
    slots = torch.tensor([0, blocks * block_size - 1], device="cuda")
    one = torch.ones(1, device="cuda")
    reshape_and_cache_flash(key, key, cache, torch.empty_like(cache), slots, one, one)
    assert (cache[0, 0] == 0x38).all() and (cache[-1, -1] == 0x38).all()
    assert int((cache != 0).sum()) == 512


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_cuda_mla_past_2_to_the_31_elements(dtype: torch.dtype) -> None:
    blocks, row = 2**31 // (64 * 576) + 2, 512 + ROPE_SIZE
    cache = torch.zeros(blocks, 64, row, dtype=dtype, device="cuda")
    latent, rope = (torch.ones(2, n, dtype=torch.bfloat16, device="cuda") for n in (512, ROPE_SIZE))
    slots = torch.tensor([0, blocks * 64 - 1], device="cuda")
    concat_and_cache_mla(latent, rope, cache, slots, torch.ones(1, device="cuda"))
    one = 0x38 if dtype == torch.uint8 else 1
    assert (cache[0, 0] == one).all() and (cache[-1, -1] == one).all()
    assert int(cache.count_nonzero()) == 2 * row


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in CASES if c.num_tokens > 30], ids=str)
def test_a_token_is_the_same_in_any_batch(case: CacheLayoutCase) -> None:
    whole, alone = inputs(case, "cuda"), inputs(case, "cuda")
    write(case, whole)
    slots = 4 if case.num_heads else 3
    for rows in (slice(0, 1), slice(1, 4), slice(4, case.num_tokens)):
        part = [t[rows] if i < 2 or i == slots else t for i, t in enumerate(alone)]
        write(case, part)
    for got, want in zip(caches_of(case, alone), caches_of(case, whole), strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_slots(device: str) -> None:
    arguments = inputs(CacheLayoutCase(5, 2), device)
    arguments[4] = arguments[4][:0]
    write(CacheLayoutCase(5, 2), arguments)
    assert (arguments[2].view(torch.uint8) == 0xA5).all()


@pytest.mark.parametrize(
    "index, value, message",
    [
        (0, torch.zeros(5, 2, 128), "key: takes bfloat16 or float16, got torch.float32"),
        (0, torch.zeros(5, 2, 120).half(), "key_cache: takes"),
        (1, torch.zeros(5, 256).half(), r"value: takes \[num_tokens, num_heads, head_size\]"),
        (3, torch.zeros(3, 16, 2, 64).half(), "value_cache: takes"),
        (4, torch.zeros(9, dtype=torch.int64), "slot_mapping: takes int64 of up to 5 tokens"),
        (4, torch.zeros(5, dtype=torch.int32), "slot_mapping: takes int64"),
        (5, torch.zeros(3), "scale of key: takes 1 or 2 float32"),
    ],
)
def test_bad_input_is_named(index: int, value: torch.Tensor, message: str) -> None:
    arguments = inputs(CacheLayoutCase(5, 2))
    arguments[index] = value
    with pytest.raises(ValueError, match=message):
        write(CacheLayoutCase(5, 2), arguments)
