"""What the papers claim, beside what was measured, and whether it holds.

Noise is the span of the replicates: by how much, for each, two networks of its seed differ.
"""

from dataclasses import dataclass
from itertools import product
from statistics import mean

import numpy as np

from .figures import (
    Measure,
    dense_networks,
    early_accuracy,
    early_iteration,
    nearest,
    start_accuracy,
    tenth_accuracy,
)
from .results import Training, select

HOLDS, FAILS, NOISE = "holds", "does not hold", "within noise"
FORMATS = {  # of a value, of a difference
    early_accuracy: ("{:.2f} %", "{:+.2f} points"),
    early_iteration: ("iteration {:,.0f}", "{:+,.0f} iterations"),
    start_accuracy: ("{:.1f} %", "{:+.1f} points"),
    tenth_accuracy: ("{:.2f} %", "{:+.2f} points"),
}


@dataclass(frozen=True)
class Claim:
    """figure: the name of the one that shows it; measured: in words"""

    figure: str
    text: str
    measured: str
    verdict: str


def judge(trainings: list[Training]) -> list[Claim]:
    """Every claim, of the papers and of ours: that the first network has more than the second."""

    def at(percent: float, method: str = "winning ticket", blocksize: str = "1x1"):
        return nearest(select(trainings, method=method, blocksize=blocksize), percent / 100)

    dense, ticket, small = at(100), at(21.1), at(3.6)
    reinit, late = at(21.1, "random reinit"), at(3.6, "late rewinding")
    claims = [
        (
            "curves",
            "Kept to 21.1 %, the ticket learns faster than the dense network: it is more accurate "
            "after a tenth of the iterations.",
            (tenth_accuracy, ticket, dense),
        ),
        (
            "curves",
            "Kept to 3.6 %, it learns slower again than at 21.1 %.",
            (tenth_accuracy, ticket, small),
        ),
        (
            "controls",
            "The dense network's early stop comes later than the ticket's at 21.1 %, which comes "
            "38 % earlier in the paper.",
            (early_iteration, dense, ticket),
        ),
        (
            "controls",
            "At 13.5 % the ticket is more accurate than the dense network, by more than 0.3 "
            "points in the paper.",
            (early_accuracy, at(13.5), dense),
        ),
        (
            "controls",
            "At 3.6 % the ticket falls back to the dense network's accuracy, and not below it.",
            (early_accuracy, small, dense),
        ),
        (
            "controls",
            "At 21.1 % the ticket drawn anew stops later than the ticket, 2.51 times as late in "
            "the paper.",
            (early_iteration, reinit, ticket),
        ),
        (
            "controls",
            "At 21.1 % the ticket is more accurate than the ticket drawn anew, by 0.5 points in "
            "the paper.",
            (early_accuracy, ticket, reinit),
        ),
        (
            "controls",
            "At 21.1 % the ticket is more accurate than a random mask with the same counts.",
            (early_accuracy, ticket, at(21.1, "random mask")),
        ),
        (
            "one-shot",
            "At 3.6 % the iterative ticket is more accurate than the one-shot ticket.",
            (early_accuracy, small, at(3.6, "one-shot")),
        ),
        (
            "one-shot",
            "At 3.6 % the one-shot ticket's early stop comes later than the iterative ticket's.",
            (early_iteration, at(3.6, "one-shot"), small),
        ),
        (
            "rewinding",
            "At 3.6 % late rewinding is more accurate than rewinding to θ₀. (arXiv 1903.01611 "
            "needs it for deeper networks; for LeNet it finds little difference.)",
            (early_accuracy, late, small),
        ),
        (
            "rewinding",
            "At 3.6 % learning-rate rewinding is more accurate than weight rewinding "
            "(arXiv 2003.02389: at least as accurate).",
            (early_accuracy, at(3.6, "learning-rate rewinding"), late),
        ),
        (
            "rewinding",
            "At 3.6 % weight rewinding is more accurate than fine-tuning (arXiv 2003.02389).",
            (early_accuracy, late, at(3.6, "fine-tuning")),
        ),
        (
            "untrained",
            "At 21.1 % mask and θ₀ alone, before any training, classify better than a random mask "
            "over θ₀ (arXiv 1905.01067).",
            (start_accuracy, ticket, at(21.1, "random mask")),
        ),
        (
            "blocks",
            "Ours: at 3.6 % single weights are more accurate than 16x16 blocks.",
            (early_accuracy, small, at(3.6, blocksize="16x16")),
        ),
    ]
    judged = [Claim(figure, text, *_compare(*networks)) for figure, text, networks in claims]
    for blocksize, percent in product(("1x1", "16x1", "16x4", "16x16"), (21.1, 3.6)):
        network = at(percent, blocksize=blocksize)
        text = (
            f"Ours: the {blocksize} ticket that keeps {100 * network[0][0]['density']:.1f} % is "
            "faster than the dense network, and more accurate than a narrower one as fast."
        )
        if network[0][-1]["latency_us"]:
            judged.append(Claim("latency", text, *_against_dense(network, trainings)))
    return judged


def verdict(differences: list[float]) -> str:
    """Of the claim that they are above 0; noise where the replicates do not agree."""
    if min(differences) > 0:
        return HOLDS
    return FAILS if max(differences) < 0 else NOISE


def cut_off(trainings: list[Training]) -> tuple[int, int]:
    """How many networks were at their least validation loss when training ended, of how many."""
    late = sum(early_iteration(rows) == rows[-1]["iteration"] for rows in trainings)
    return late, len(trainings)


def _compare(measure: Measure, a: list[Training], b: list[Training]) -> tuple[str, str]:
    """(measured, verdict) of the claim that a has more than b, replicate by replicate."""
    values = [[measure(training) for training in network] for network in (a, b)]
    differences = [x - y for x, y in zip(*values, strict=True)]
    value, difference = FORMATS[measure]
    means = " against ".join(value.format(mean(v)) for v in values)
    return f"{means}: {_span(differences, difference)}", verdict(differences)


def _against_dense(network: list[Training], trainings: list[Training]) -> tuple[str, str]:
    """(measured, verdict) of the claim that it is faster than the dense network, and more accurate
    than a narrower one as fast, on the line between those measured."""
    rivals = dense_networks(trainings)
    dense, ticket = rivals[0][0][-1], network[0][-1]
    speed = ticket["latency_us"]
    text = f"{mean(map(early_accuracy, network)):.2f} % at {speed:.1f} µs"
    if speed >= dense["latency_us"]:
        return f"{text}, no faster than the dense network's {dense['latency_us']:.1f} µs", FAILS
    if ticket["latency_p80_us"] >= dense["latency_p20_us"]:
        return f"{text}, not clearly faster than {dense['latency_us']:.1f} µs", NOISE
    rivals.sort(key=lambda rival: rival[0][-1]["latency_us"])
    speeds = np.log([rival[0][-1]["latency_us"] for rival in rivals])
    differences = [
        early_accuracy(rows) - np.interp(np.log(speed), speeds, [early_accuracy(r) for r in same])
        for rows, *same in zip(network, *rivals, strict=True)
    ]
    return f"{text}: {_span(differences, '{:+.2f} points')}", verdict(differences)


def _span(differences: list[float], form: str) -> str:
    """The mean difference, and the replicates' least and greatest."""
    numbers = [form.format(d) for d in (mean(differences), min(differences), max(differences))]
    unit = form.partition("} ")[2]
    low, high = (number.removesuffix(f" {unit}") for number in numbers[1:])
    return f"{numbers[0]} ({low} to {high})"
