"""Our ops one after another: with programmatic dependent launch they give what they give without, also captured,
replayed and on two streams at once. Every replay gets another input, so what a replay before left is never right."""

import random

import pytest
import torch
from every_op import HIDDEN, NUM_TOKENS, STEPS, Model, run

REPLAYS = 1000
INPUTS = 8
NORMS = [name for name in STEPS if name.startswith("rms_norm")]


def inputs(device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(NUM_TOKENS, HIDDEN, generator=generator).bfloat16().to(device) for _ in range(INPUTS)]


def one_of_each(seed: int) -> list[str]:
    """In random order, with a norm after every second one, since gated activations square what is small."""
    rng = random.Random(seed)
    order = rng.sample(list(STEPS), len(STEPS))
    return [name for i, step in enumerate(order) for name in ([step, rng.choice(NORMS)] if i % 2 else [step])]


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.contiguous().flatten().view(torch.uint8) for t in tensors])


class Captured:
    """A chain as a graph, and what it has to write for each input."""

    def __init__(self, names: list[str], pdl: bool):
        self.model, self.inputs = Model("cuda"), inputs("cuda")
        self.expected = [flat(run(self.model, names, x, False)) for x in self.inputs]
        self.x = torch.empty_like(self.inputs[0])
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            self.results = run(self.model, names, self.x, pdl)

    def replay(self, i: int) -> None:
        """On the current stream; counts wrong results without waiting for them."""
        self.x.copy_(self.inputs[i % INPUTS])
        self.graph.replay()
        self.wrong += (flat(self.results) != self.expected[i % INPUTS]).any()


def test_the_chain_stays_in_range() -> None:
    """Of what a replay writes, something must depend on its input."""
    model, xs = Model("cpu"), inputs("cpu")
    first, second = (run(model, one_of_each(0), x, False)[0] for x in xs[:2])
    assert first.isfinite().all() and 1e-3 < first.float().std() < 1e3
    assert not torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("name", STEPS)
def test_every_op_is_captured_and_replayed(name: str) -> None:
    captured = Captured([name], pdl=True)
    for i in range(2 * INPUTS):
        captured.replay(i)
    assert captured.wrong.item() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(4))
def test_pdl_chains_are_those_without(seed: int) -> None:
    captured = Captured(one_of_each(seed) + one_of_each(seed + 100), pdl=True)
    for i in range(REPLAYS):
        captured.replay(i)
    assert captured.wrong.item() == 0


@pytest.mark.gpu
def test_two_streams_at_once() -> None:
    chains = [Captured(one_of_each(seed), pdl=True) for seed in (10, 11)]
    streams = [torch.cuda.Stream() for _ in chains]
    torch.cuda.synchronize()
    for i in range(200):
        for chain, stream in zip(chains, streams, strict=True):
            with torch.cuda.stream(stream):
                chain.replay(i + 3 * chains.index(chain))
    torch.cuda.synchronize()
    assert [chain.wrong.item() for chain in chains] == [0, 0]
