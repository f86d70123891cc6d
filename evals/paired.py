"""Two sides answered the same questions: did the second get worse?

Only the questions whose verdict changed say anything (McNemar 1947); under no difference each of them is a fair coin,
so the p values are exact binomial tails. Pure functions, standard library only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

SIGNIFICANCE = 0.05
POWER = 0.8


@dataclass(frozen=True)
class Paired:
    """Accuracies and standard errors are fractions of 1; lost and gained count questions.

    lost: right on the baseline's side only. gained: right on the plugin's side only.
    p_worse: chance of at least so many losses among the changed ones if losses and gains were equally likely.
    p_changed: McNemar's exact p, two-sided.
    smallest_significant: the smallest drop in accuracy that p_worse would call significant with so many changes.
    detectable: the drop that so many questions detect with a chance of POWER, as many of them changing as here.
    """

    questions: int
    baseline: float
    baseline_stderr: float
    plugin: float
    plugin_stderr: float
    lost: int
    gained: int
    p_worse: float
    p_changed: float
    smallest_significant: float
    detectable: float

    @property
    def significantly_worse(self) -> bool:
        return self.p_worse < SIGNIFICANCE


def compare(baseline: Sequence[bool], plugin: Sequence[bool]) -> Paired:
    """Whether each answer was right, in the same order of questions. Raises ValueError where they cannot be paired."""
    if len(baseline) != len(plugin):
        raise ValueError(f"plugin: takes {len(baseline)} verdicts as the baseline has, got {len(plugin)}")
    if not baseline:
        raise ValueError("baseline: takes at least one verdict, got none")
    pairs = list(zip(baseline, plugin, strict=True))
    lost = sum(before and not after for before, after in pairs)
    gained = sum(after and not before for before, after in pairs)
    n = len(pairs)
    return Paired(
        questions=n,
        baseline=sum(map(bool, baseline)) / n,
        baseline_stderr=standard_error(sum(map(bool, baseline)), n),
        plugin=sum(map(bool, plugin)) / n,
        plugin_stderr=standard_error(sum(map(bool, plugin)), n),
        lost=lost,
        gained=gained,
        p_worse=tail(lost, lost + gained),
        p_changed=min(1.0, 2 * tail(max(lost, gained), lost + gained)),
        smallest_significant=smallest_significant_drop(n, lost + gained),
        detectable=detectable_drop(n, lost + gained),
    )


def standard_error(right: int, questions: int) -> float:
    """Of the mean of zeros and ones, with n - 1 as lm_eval has it; 0 for a single question."""
    if questions < 2:
        return 0.0
    mean = right / questions
    return math.sqrt(mean * (1 - mean) / (questions - 1))


def tail(at_least: int, coins: int) -> float:
    """Chance of `at_least` heads or more among `coins` fair coins, exact."""
    return float(Fraction(sum(math.comb(coins, heads) for heads in range(at_least, coins + 1)), 2**coins))


def smallest_significant_drop(questions: int, changed: int) -> float:
    """Drop in accuracy at which tail() falls below SIGNIFICANCE with `changed` changed answers.

    Too few changes are never significant: then the drop of the fewest losses that are, without a gain.
    """
    while tail(changed, changed) >= SIGNIFICANCE:
        changed += 1
    lost = next(lost for lost in range(changed // 2, changed + 1) if tail(lost, changed) < SIGNIFICANCE)
    return min(1.0, (2 * lost - changed) / questions)


def detectable_drop(questions: int, changed: int) -> float:
    """Drop d with n d^2 = (z_a sqrt(c) + z_b sqrt(c - d^2))^2, one-sided (Connor, Biometrics 43, 1987); at most 1.

    c: the share of changed answers; d where fewer changed than that, as a drop of d changes that many.
    """
    z_a, z_b = NormalDist().inv_cdf(1 - SIGNIFICANCE), NormalDist().inv_cdf(POWER)

    def detected(drop: float) -> bool:
        share = max(changed / questions, drop)
        return questions * drop**2 >= (z_a * math.sqrt(share) + z_b * math.sqrt(share - drop**2)) ** 2

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if detected(middle) else (middle, high)
    return high
