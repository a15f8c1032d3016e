"""What differences between networks of the same seed say of a claim."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import ttest_1samp
from statsmodels.stats.multitest import multipletests

from ..program.means import Mean

HOLDS, FAILS, UNDECIDED, UNTESTED = "holds", "does not hold", "not decided", "not tested"
FEWEST = 5  # seeds: with fewer an interval says nothing
LEVEL = 0.05  # of error, over all claims of a family together


@dataclass(frozen=True)
class Evidence:
    """mean: of the differences, in `interval` with 95 % confidence; p: of the t test that decides
    between the claim and its opposite; inside: whether it speaks for the claim"""

    mean: float
    interval: tuple[float, float]
    p: float
    inside: bool


def weigh(differences: Sequence[float], low: float, high: float) -> Evidence:
    """Of the claim that the mean difference is between these bounds, one of which is finite.

    The claim needs both one-sided tests, its opposite either of them (so that is counted twice);
    p is that of the likelier, doubled for having looked at both. Differences that are equal but for
    rounding have no spread to judge by: p is 1.
    """
    found = Mean.of(differences)
    bounds = [(b, side) for b, side in ((low, "greater"), (high, "less")) if np.isfinite(b)]
    if np.ptp(differences) < 1e-9:
        return Evidence(found.value, (found.value, found.value), 1.0, False)
    within = [float(ttest_1samp(differences, b, alternative=side).pvalue) for b, side in bounds]
    holds, fails = max(within), len(within) * min(1 - p for p in within)
    interval = found.value - found.half, found.value + found.half
    return Evidence(found.value, interval, min(1.0, 2 * min(holds, fails)), holds < fails)


def decide(family: Sequence[Evidence]) -> list[tuple[float, str]]:
    """(p, verdict) of each: p adjusted by Holm's method, so that one error in the whole family is
    as unlikely as LEVEL."""
    if not family:
        return []
    adjusted = multipletests([evidence.p for evidence in family], LEVEL, method="holm")[1]
    verdicts = []
    for evidence, p in zip(family, adjusted, strict=True):
        verdict = (HOLDS if evidence.inside else FAILS) if p < LEVEL else UNDECIDED
        verdicts.append((float(p), verdict))
    return verdicts
