"""In which batches the same texts are scored. Kernels are chosen by the number of tokens in a batch."""

# Lengths of the starts of texts that are scored by themselves: from decoding one sequence to a small batch.
SHORT = (2, 4, 8, 16, 32, 64)


def compositions(texts: list[list[int]]) -> dict[str, list[list[list[int]]]]:
    """Composition -> batches of prompts, each a list of token ids, in the order of `texts`.

    together: all at once. alone: one after the other. short: only the first tokens of each, one after the other.
    """
    return {
        "together": [texts],
        "alone": [[ids] for ids in texts],
        "short": [[ids[: SHORT[i % len(SHORT)]]] for i, ids in enumerate(texts)],
    }
