"""How far two sides' distributions of the next token are apart, told from their top-k log-probabilities.

Exact: the log-probability of the token that comes (both sides always give it), which token is first.
Approximated: the KL divergence, as a lower bound on the true one. Tokens that both sides give count each for itself.
A token that only p gives has a probability under q of at most q's k-th; these tokens together are one event, all
others together are another, and what is not known of q is taken as it makes the divergence least. With k the size of
the vocabulary the bound is exact. Pure functions, standard library only.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Log-probabilities come as float32, so that a sum over the vocabulary misses 1 by this much.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Position:
    """One position of a text: what the model made of the next token.

    token: the one that comes. top: log-probabilities by token, of the k most likely ones and of `token`.
    """

    token: int
    top: Mapping[int, float]

    @property
    def first(self) -> int:
        return max(self.top, key=lambda token: (self.top[token], -token))


@dataclass(frozen=True)
class Difference:
    """Over all positions compared. KL in nats; top1: share of positions with the same first token.

    largest: the largest difference of the coming token's log-probability, in nats, at position `where` of those given.
    """

    positions: int
    mean_kl: float
    p99_kl: float
    top1: float
    largest: float
    where: int


def compare(reference: Sequence[Position], other: Sequence[Position], k: int) -> Difference:
    """Differences of `other` from `reference`, both at the same positions, from the top k.

    Raises ValueError where they are not the same texts.
    """
    if not reference or [position.token for position in reference] != [position.token for position in other]:
        raise ValueError("other: takes the positions of the same texts, one at least")
    pairs = list(zip(reference, other, strict=True))
    kl = [kl_at_least(p, q, k) for p, q in pairs]
    logprobs = [abs(p.top[p.token] - q.top[q.token]) for p, q in pairs]
    where = max(range(len(pairs)), key=logprobs.__getitem__)
    return Difference(
        positions=len(pairs),
        mean_kl=math.fsum(kl) / len(kl),
        p99_kl=percentile(kl, 99),
        top1=sum(p.first == q.first for p, q in pairs) / len(pairs),
        largest=logprobs[where],
        where=where,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of them do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def kl_at_least(p: Position, q: Position, k: int) -> float:
    """Lower bound on KL(p || q) in nats, as the module says; rounding apart."""
    both = p.top.keys() & q.top.keys()
    only_p = [math.exp(p.top[token]) for token in p.top.keys() - both]
    kth = math.exp(sorted(q.top.values(), reverse=True)[min(k, len(q.top)) - 1])
    shared = math.fsum(math.exp(p.top[token]) * (p.top[token] - q.top[token]) for token in both)

    p_event = math.fsum(only_p)
    p_rest = 1 - p_event - math.fsum(math.exp(p.top[token]) for token in both)
    q_unshared = 1 - math.fsum(math.exp(q.top[token]) for token in both)
    q_only = math.fsum(math.exp(q.top[token]) for token in q.top.keys() - both)
    p_rest, q_unshared = max(p_rest, 0.0), max(q_unshared, 0.0)
    # The least divergence splits what is left of q as p splits its own, as far as q's k-th allows.
    at_most = min(len(only_p) * kth, max(q_unshared - q_only, 0.0))
    q_event = min(q_unshared * p_event / (p_event + p_rest), at_most) if p_event else 0.0
    return max(0.0, shared + _term(p_event, q_event) + _term(p_rest, q_unshared - q_event))


def _term(p: float, q: float) -> float:
    p, q = max(p, _ROUNDING), max(q, _ROUNDING)
    return p * math.log(p / q)
