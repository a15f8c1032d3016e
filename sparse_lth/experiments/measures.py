"""What is compared between networks: a number of a training, and how it is written."""

from collections.abc import Callable
from dataclasses import dataclass

from .results import Training, early_stop

POINTS = 0.2  # percentage points of accuracy that are "little"
SHARE = 0.1  # of the iterations that a network needs, likewise
NEAR_END = 0.95  # of the iterations: an early stop that is later may not be one


@dataclass(frozen=True)
class Measure:
    """of: a training -> the number; value, difference: how it is written; early: whether it is one
    of the early stop, which a training may have been too short for"""

    of: Callable[[Training], float]
    value: str
    difference: str
    early: bool

    def margin(self, value: float) -> float:
        """The difference from this value that is little."""
        return POINTS if "points" in self.difference else SHARE * value


def is_censored(training: Training) -> bool:
    """Whether it was still at its least validation loss, or nearly, when training ended."""
    return early_stop(training)["iteration"] >= NEAR_END * training[-1]["iteration"]


def _tenth(training: Training) -> float:
    tenth = training[-1]["iteration"] / 10
    known = (r for r in training if r["iteration"] >= tenth and r["test_accuracy"] is not None)
    return 100 * next(known)["test_accuracy"]


def _gap(training: Training) -> float:
    return 100 * (training[-1]["train_accuracy"] - training[-1]["test_accuracy"])


def _accuracy(of: Callable[[Training], float], early: bool = False) -> Measure:
    return Measure(of, "{:.2f} %", "{:+.2f} points", early)


EARLY_ITERATION = Measure(
    lambda training: early_stop(training)["iteration"],
    "iteration {:,.0f}",
    "{:+,.0f} iterations",
    early=True,
)
EARLY_ACCURACY = _accuracy(lambda t: 100 * early_stop(t)["test_accuracy"], early=True)
EARLY_TRAIN_ACCURACY = _accuracy(lambda t: 100 * early_stop(t)["train_accuracy"], early=True)
START_ACCURACY = _accuracy(lambda t: 100 * t[0]["test_accuracy"])
TENTH_ACCURACY = _accuracy(_tenth)  # after a tenth of the iterations, or where it is next known
END_ACCURACY = _accuracy(lambda t: 100 * t[-1]["test_accuracy"])
END_TRAIN_ACCURACY = _accuracy(lambda t: 100 * t[-1]["train_accuracy"])
END_GAP = _accuracy(_gap)  # training minus test accuracy
