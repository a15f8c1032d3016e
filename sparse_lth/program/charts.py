"""Charts as data: `parts.html` draws them as inline SVG, whose points say their values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 60, 350, 8, 190  # of the field in which the points lie


@dataclass(frozen=True)
class Axis:
    """What an axis shows; ticks: the values that are labelled."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def at(self, value: float) -> float:
        """0 at the low end, which may be the greater one, 1 at the high end."""
        value, low, high = (math.log(v) if self.log else v for v in (value, self.low, self.high))
        return (value - low) / (high - low)


@dataclass(frozen=True)
class Series:
    """points: (x, y, what they say); style: as CSS; spans: (x, low, high), error bars"""

    name: str
    points: Sequence[tuple[float, float, str]]
    style: str
    line: bool = True
    spans: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Chart:
    """label: what it shows, for who does not see it; band: a range of y, and what it says"""

    label: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    band: tuple[float, float, str] | None = None

    def left(self, x: float) -> str:
        return f"{LEFT + self.x.at(x) * (RIGHT - LEFT):.1f}"

    def top(self, y: float) -> str:
        return f"{BOTTOM - self.y.at(y) * (BOTTOM - TOP):.1f}"

    def path(self, series: Series) -> str:
        points = (f"{self.left(x)} {self.top(y)}" for x, y, _ in series.points)
        return f"M{'L'.join(points)}"


def linear(label: str, values: Sequence[float], least: float = 0.0) -> Axis:
    """An axis around the values, of a width of at least `least`, in steps of 1, 2 or 5."""
    middle, width = (min(values) + max(values)) / 2, max(least, max(values) - min(values), 1e-9)
    low, high = middle - 0.54 * width, middle + 0.54 * width
    power = 10.0 ** math.floor(math.log10(width / 4))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= width / 5)
    first, last = math.ceil(low / step), math.floor(high / step)
    return Axis(label, low, high, [float(f"{n * step:.6g}") for n in range(first, last + 1)])


def logarithmic(label: str, values: Sequence[float]) -> Axis:
    """An axis around the values, which are above 0, with ticks at 1, 2 and 5."""
    margin = max(1.1, (max(values) / min(values)) ** 0.05)
    low, high = min(values) / margin, max(values) * margin
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 1000 else (1,)
    ticks = [float(f"{n}e{decade}") for decade in decades for n in steps]
    return Axis(label, low, high, [tick for tick in ticks if low <= tick <= high], log=True)
