"""The statistics of the evals, against values worked out by hand."""

import math
import random

import pytest

from evals import divergence, paired
from evals.divergence import Position

# -- paired answers


@pytest.mark.parametrize(
    "at_least, coins, expected",
    [(0, 0, 1), (5, 5, 1 / 32), (4, 5, 6 / 32), (8, 10, 56 / 1024), (9, 10, 11 / 1024), (0, 7, 1)],
)
def test_tail(at_least, coins, expected):
    assert paired.tail(at_least, coins) == expected


def test_tail_of_thousands():
    assert paired.tail(2000, 4000) == pytest.approx(0.5063, abs=1e-4)  # 1/2 + half of comb(4000, 2000) / 2^4000


def test_standard_error():
    assert paired.standard_error(8, 10) == pytest.approx(math.sqrt(0.8 * 0.2 / 9))
    assert paired.standard_error(1254, 1319) == pytest.approx(0.0060, abs=5e-5)  # lm_eval's 0.9507 +- 0.0060
    assert paired.standard_error(1, 1) == 0


def test_compare():
    #  8 right on both sides, 9 lost, 1 gained, 2 wrong on both
    baseline = [True] * 8 + [True] * 9 + [False] + [False] * 2
    plugin = [True] * 8 + [False] * 9 + [True] + [False] * 2
    result = paired.compare(baseline, plugin)
    assert (result.questions, result.lost, result.gained) == (20, 9, 1)
    assert (result.baseline, result.plugin) == (17 / 20, 9 / 20)
    assert result.p_worse == 11 / 1024
    assert result.p_changed == 22 / 1024
    assert result.significantly_worse
    assert result.smallest_significant == 8 / 20
    turned = paired.compare(plugin, baseline)
    assert turned.p_worse == 1 - 1 / 1024 and not turned.significantly_worse
    assert turned.p_changed == 22 / 1024


def test_nothing_changed():
    result = paired.compare([True, False], [True, False])
    assert (result.p_worse, result.p_changed, result.significantly_worse) == (1, 1, False)


def test_one_sided_and_two_sided_differ():
    result = paired.compare([True] * 5 + [False] * 5, [False] * 10)
    assert result.p_worse == 1 / 32 and result.significantly_worse
    assert result.p_changed == 1 / 16


@pytest.mark.parametrize(
    "questions, changed, expected", [(100, 0, 0.05), (100, 5, 0.05), (100, 6, 0.06), (100, 8, 0.06), (100, 10, 0.08)]
)
def test_smallest_significant_drop(questions, changed, expected):
    assert paired.smallest_significant_drop(questions, changed) == pytest.approx(expected)


def test_detectable_drop():
    # few changes: n d = (1.64485 + 0.84162 sqrt(1 - d))^2
    assert paired.detectable_drop(1000, 0) == pytest.approx(0.00617, abs=1e-5)
    # 131.9 of 1319 changed: d = (1.64485 sqrt(0.1) + 0.84162 sqrt(0.1 - d^2)) / sqrt(1319)
    assert paired.detectable_drop(13190, 1319) == pytest.approx(0.021633 / math.sqrt(10), abs=2e-5)
    assert paired.detectable_drop(1, 0) == 1


def test_unequal_sides_are_refused():
    with pytest.raises(ValueError, match="takes 2 verdicts"):
        paired.compare([True, False], [True])
    with pytest.raises(ValueError, match="at least one"):
        paired.compare([], [])


# -- distributions


def position(token: int, probabilities: dict[int, float], k: int | None = None) -> Position:
    """What a model gives of these probabilities: the k most likely, and the token's."""
    kept = sorted(probabilities, key=lambda t: -probabilities[t])[:k]
    return Position(token, {t: math.log(probabilities[t]) for t in {*kept, token}})


def test_kl_of_whole_distributions_is_exact():
    p = position(0, {0: 0.7, 1: 0.2, 2: 0.1})
    q = position(0, {0: 0.5, 1: 0.3, 2: 0.2})
    by_hand = 0.7 * math.log(1.4) + 0.2 * math.log(2 / 3) + 0.1 * math.log(0.5)
    assert by_hand == pytest.approx(0.08512, abs=1e-5)
    assert divergence.kl_at_least(p, q, 3) == pytest.approx(by_hand, abs=1e-5)
    assert divergence.kl_at_least(p, p, 3) == 0


def test_kl_without_a_common_token_is_not_zero():
    p = position(2, {0: 0.9, 1: 0.05, 2: 0.05}, k=1)
    q = position(2, {0: 0.1, 1: 0.8, 2: 0.1}, k=1)
    assert p.top.keys() == {0, 2} and q.top.keys() == {1, 2}
    # q can have given at most 0.1 to token 0, so the bound is the true value
    by_hand = 0.9 * math.log(9) + 0.05 * math.log(0.05 / 0.8) + 0.05 * math.log(0.5)
    assert divergence.kl_at_least(p, q, 1) == pytest.approx(by_hand, abs=1e-5)


def test_kl_with_the_rest_as_one_event():
    p = position(0, {0: 0.6, 1: 0.2, 2: 0.1, 3: 0.1}, k=2)
    q = position(0, {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1}, k=2)
    by_hand = 0.6 * math.log(1.5) + 0.2 * math.log(2 / 3) + 0.2 * math.log(0.2 / 0.3)
    assert divergence.kl_at_least(p, q, 2) == pytest.approx(by_hand, abs=1e-9)


def test_kl_never_exceeds_the_true_one():
    rng = random.Random(0)
    for _ in range(300):
        size = rng.randint(2, 12)

        def drawn(size: int = size) -> dict[int, float]:
            weights = [rng.expovariate(1) ** 3 + 1e-4 for _ in range(size)]
            return {token: weight / sum(weights) for token, weight in enumerate(weights)}

        p, q, token = drawn(), drawn(), rng.randrange(size)
        true = sum(p[t] * math.log(p[t] / q[t]) for t in p)
        for k in range(1, size + 1):
            bound = divergence.kl_at_least(position(token, p, k), position(token, q, k), k)
            assert 0 <= bound <= true + 1e-5
        assert bound == pytest.approx(true, abs=2e-5)


def test_difference_over_positions():
    same = {0: 0.6, 1: 0.4}
    turned = {0: 0.4, 1: 0.6}
    reference = [position(0, same)] * 99 + [position(1, same)]
    other = [position(0, same)] * 99 + [position(1, turned)]
    result = divergence.compare(reference, other, 2)
    kl = 0.6 * math.log(1.5) + 0.4 * math.log(2 / 3)
    assert result.positions == 100
    assert result.mean_kl == pytest.approx(kl / 100)
    assert result.p99_kl == 0
    assert result.top1 == 0.99
    assert result.largest == pytest.approx(math.log(1.5))
    assert result.where == 99


def test_percentile_is_the_nearest_rank():
    assert divergence.percentile(list(range(1, 101)), 99) == 99
    assert divergence.percentile([3, 1, 2], 99) == 3
    assert divergence.percentile([3, 1, 2], 50) == 2
    assert divergence.percentile([7], 99) == 7


def test_other_texts_are_refused():
    with pytest.raises(ValueError, match="same texts"):
        divergence.compare([position(0, {0: 0.5, 1: 0.5})], [position(1, {0: 0.5, 1: 0.5})], 2)
    with pytest.raises(ValueError, match="one at least"):
        divergence.compare([], [], 2)
