"""What a side makes of every token of the same texts, and how far two sides are apart, next to the noise floor."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from evals import divergence, sides
from evals.divergence import Difference, Position
from evals.processes import Progress, SideFailed
from evals.small_math import generate
from evals.workers.compositions import compositions

# Composition -> that of the baseline in which the same positions are scored in other batches.
OTHER_BATCHES = {"together": "alone", "alone": "together", "short": "together"}


@dataclass(frozen=True)
class Scores:
    """Of one side. positions: composition -> for every text, what the model made of each token but the first."""

    texts: list[list[int]]
    positions: dict[str, list[list[Position]]]


@dataclass(frozen=True)
class Row:
    """The plugin against the baseline in one composition, and the noise floor of the same positions."""

    composition: str
    difference: Difference
    floor: Difference

    def ratio(self, least: float) -> float:
        """How many times the floor the KL is, mean or 99th percentile, whichever is more; a floor is `least` at least.

        No difference at all is 0.
        """
        mine, noise = self.difference, self.floor
        return max(mine.mean_kl / max(noise.mean_kl, least), mine.p99_kl / max(noise.p99_kl, least))

    def record(self, least: float) -> dict[str, Any]:
        """For JSON."""
        return {
            "composition": self.composition,
            "difference": asdict(self.difference),
            "floor": asdict(self.floor),
            "ratio": self.ratio(least),
        }


def word_problems(count: int) -> list[str]:
    """Texts of a dozen problems with solutions each, about 1000 tokens and more."""
    problems = generate.take(0, generate.TRAIN, 12 * count)
    shown = [f"Question: {problem.question}\nAnswer: {problem.answer}" for problem in problems]
    return ["\n\n".join(shown[i::count]) for i in range(count)]


def ask_server(url: str, model: str, texts: Sequence[str], tokens: int, top: int, progress: Progress) -> dict[str, Any]:
    """What logprobs_worker writes, from a running server: it tokenizes and scores. Raises SideFailed."""

    def score(ids: list[int]) -> Any:
        body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
        entries = sides.get_json(f"{url}/v1/completions", body)["choices"][0]["prompt_logprobs"]
        return [entry and {token: value["logprob"] for token, value in entry.items()} for entry in entries]

    try:
        with progress:
            ids = [sides.get_json(f"{url}/tokenize", {"model": model, "prompt": t})["tokens"][:tokens] for t in texts]
            answers: dict[str, Any] = {}
            for name, batches in compositions(ids).items():
                answers[name] = []
                for batch in batches:
                    with ThreadPoolExecutor(len(batch)) as pool:
                        answers[name] += pool.map(score, batch)
                    progress.show({"doing": f"scoring texts {name}", "done": len(answers[name]), "total": len(ids)})
    except (OSError, ValueError, LookupError, TypeError) as error:
        read = getattr(error, "read", None)
        detail = read().decode(errors="replace")[:300] if read else ""
        raise SideFailed(f"the server at {url} did not score the texts: {error} {detail}") from None
    return {"texts": ids, "answers": answers}


def read(content: Mapping[str, Any]) -> Scores:
    """What a side wrote. Raises SideFailed where it did not score every token."""
    texts = content["texts"]
    positions: dict[str, list[list[Position]]] = {}
    for name, batches in compositions(texts).items():
        prompts = [ids for batch in batches for ids in batch]
        positions[name] = []
        for ids, entries in zip(prompts, content["answers"][name], strict=True):
            if len(entries) != len(ids) or not all(entries[1:]):
                raise SideFailed(f"a text of {len(ids)} tokens came back with {len(entries)} log-probabilities.")
            tops = [{int(token): float(value) for token, value in entry.items()} for entry in entries[1:]]
            positions[name].append([Position(token, top) for token, top in zip(ids[1:], tops, strict=True)])
    return Scores(texts, positions)


def difference(reference: Scores, name: str, other: Scores, other_name: str, top: int) -> Difference:
    """Of one composition from another, at the positions that both have. Raises SideFailed."""
    if reference.texts != other.texts:
        raise SideFailed("the two sides tokenize the texts differently, so they do not run the same model.")
    pairs = list(zip(reference.positions[name], other.positions[other_name], strict=True))
    lengths = [min(len(one), len(two)) for one, two in pairs]  # starts of texts against whole ones
    if not any(lengths):
        raise SideFailed("no text has two tokens.")
    return divergence.compare(
        [position for (one, _), length in zip(pairs, lengths, strict=True) for position in one[:length]],
        [position for (_, two), length in zip(pairs, lengths, strict=True) for position in two[:length]],
        top,
    )


def compare(baseline: Scores, plugin: Scores, top: int) -> list[Row]:
    """A row per composition. Raises SideFailed."""
    return [
        Row(name, difference(baseline, name, plugin, name, top), difference(baseline, name, baseline, other, top))
        for name, other in OTHER_BATCHES.items()
    ]


def own_noise(side: Scores, top: int) -> Difference:
    """How far a side is from itself in other batches."""
    return difference(side, "together", side, "alone", top)


def report(baseline: str, plugin: str, rows: Sequence[Row], own: Difference, least: float) -> str:
    """A table of `rows` and the plugin's `own_noise`, and what its columns are."""
    lines = [f"{'':<26} {'positions':>9} {'mean KL':>9} {'99% KL':>9} {'top-1':>8} {'largest':>9}  x floor"]

    def line(name: str, d: Difference, ratio: str = "") -> None:
        kl = f"{d.mean_kl:>9.2e} {d.p99_kl:>9.2e}"
        lines.append(f"{name:<26} {d.positions:>9} {kl} {d.top1:>8.2%} {d.largest:>9.2e}  {ratio}".rstrip())

    for row in rows:
        line(f"texts {row.composition}", row.difference, f"{row.ratio(least):.3g}")
        line("  noise floor", row.floor)
    line("plugin in other batches", own)
    lines += [
        "",
        f"texts: {plugin} against {baseline}. noise floor: the latter against itself in other batches.",
        "KL in nats, at least. largest: difference of the coming token's log-probability. x floor: mean KL or 99% KL",
        f"over the floor's, whichever is more; a floor counts as {least:g} at least.",
    ]
    return "\n".join(lines)
