"""What was measured beside each claim, and whether it holds.

Networks of the same seed are compared in pairs; evidence.py says what their differences are worth.
"""

from dataclasses import dataclass
from itertools import product
from statistics import mean

from .chains import TICKET
from .claims import MORE, PAIRS, bounds
from .evidence import FAILS, FEWEST, UNDECIDED, UNTESTED, Evidence, decide, weigh
from .figures import dense_networks
from .measures import EARLY_ACCURACY, Measure, is_censored
from .results import Training, select


@dataclass(frozen=True)
class Claim:
    """figure: the name of the one that shows it; measured: in words"""

    figure: str
    text: str
    measured: str
    verdict: str


Judged = tuple[str, Evidence | str]  # what was measured in words; its evidence, or else a verdict


def judge(trainings: list[Training]) -> list[Claim]:
    """Every claim of the papers and of ours; those with evidence are one family."""
    found = []
    for pair in PAIRS:
        networks = [find(trainings, *network) for network in (pair.first, pair.second)]
        found.append((pair.figure, pair.text, *compare(pair.measure, *networks, pair.kind)))
    for blocksize, round in product(("1x1", "16x1", "16x4", "16x16"), (7, 15)):
        network = find(trainings, TICKET, round, blocksize)
        if network and network[0][-1]["latency_us"]:
            text = (
                f"Ours: the {blocksize} ticket that keeps {100 * network[0][0]['density']:.1f} % "
                "is faster than the dense network, and more accurate than the best dense network "
                "that is not clearly slower than the ticket."
            )
            found.append(("latency", text, *_against_dense(network, trainings)))
    decided = iter(decide([judged for *_, judged in found if isinstance(judged, Evidence)]))
    claims = []
    for figure, text, measured, judged in found:
        if isinstance(judged, Evidence):
            p, judged = next(decided)
            measured += f", p = {p:.3f}" if p >= 0.001 else ", p < 0.001"
        claims.append(Claim(figure, text, measured, judged))
    return claims


def find(
    trainings: list[Training], method: str, round: int, blocksize: str = "1x1"
) -> list[Training]:
    """The network's trainings by replicate, none if it was not trained."""
    same = select(trainings, method=method, round=round, blocksize=blocksize)
    return same[0] if same else []


def compare(
    measure: Measure, first: list[Training], second: list[Training], kind: str = MORE
) -> Judged:
    """Whether the first network has more, no less, or as much, by the seeds that both have."""
    both = [(a, b) for a in first for b in second if a[0]["replicate"] == b[0]["replicate"]]
    if not both:
        return "not run", UNTESTED
    values = [[measure.of(training) for training in network] for network in zip(*both, strict=True)]
    means = [mean(v) for v in values]
    margin = measure.margin(means[1])
    evidence = weigh([a - b for a, b in zip(*values, strict=True)], *bounds(kind, margin))
    words = " against ".join(
        f"{measure.value.format(value)} ({network['prunings']:.0f} prunings)"
        for value, network in zip(means, (first[0][0], second[0][0]), strict=True)
    )
    low, mid, high = (
        measure.difference.format(d)
        for d in (evidence.interval[0], evidence.mean, evidence.interval[1])
    )
    words += f": {mid} (95 %: {low.partition(' ')[0]} to {high.partition(' ')[0]})"
    if kind != MORE:
        words += f", {measure.difference.format(margin).lstrip('+')} being little"
    if len(both) < FEWEST:
        return f"{words}, of {len(both)} seeds where {FEWEST} are needed", UNDECIDED
    censored = sum(map(is_censored, (training for network in both for training in network)))
    if measure.early and censored:
        return f"{words}, {censored} of {2 * len(both)} networks still learning", UNDECIDED
    return words, evidence


def _against_dense(network: list[Training], trainings: list[Training]) -> Judged:
    """The claim that this ticket is faster than the dense network and more accurate than the best
    dense one that is not clearly slower: whose 20th percentile is not above its 80th."""
    dense, *narrower = dense_networks(trainings)
    ticket, speed = network[0][-1], dense[0][-1]["latency_us"]
    words = f"{ticket['latency_us']:.1f} µs against {speed:.1f} µs"
    if ticket["latency_us"] >= speed:
        return f"{words}, no faster than the dense network", FAILS
    if ticket["latency_p80_us"] >= dense[0][-1]["latency_p20_us"]:
        return f"{words}, not clearly faster than the dense network", UNDECIDED
    rivals = [r for r in narrower if r[0][-1]["latency_p20_us"] <= ticket["latency_p80_us"]]
    if not rivals:
        return f"{words}; no dense network that was trained is as fast", UNTESTED
    best = max(rivals, key=lambda rival: mean(map(EARLY_ACCURACY.of, rival)))
    measured, judged = compare(EARLY_ACCURACY, network, best)
    rival = best[0][-1]
    return f"{words}; {rival['model']} at {rival['latency_us']:.1f} µs: {measured}", judged
