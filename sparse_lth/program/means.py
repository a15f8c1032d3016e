"""Means over runs that differ in their seed alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

from scipy.stats import t


@dataclass(frozen=True)
class Mean:
    """Of a figure over runs; half: of its 95 % interval, by Student's t, None for a single run"""

    value: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        n = len(values)
        half = t.ppf(0.975, n - 1) * stdev(values) / sqrt(n) if n > 1 else None
        return cls(mean(values), half)

    def text(self, form: str, unit: str = "", sign: str = "") -> str:
        """97.61 ± 0.21 %, with form .2f; sign "+" shows that of a positive mean, too"""
        interval = f" ± {self.half:{form}}" if self.half is not None else ""
        return f"{self.value:{sign}{form}}{interval}{unit}"
