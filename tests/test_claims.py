"""Every claim reads the numbers that it speaks of, and its verdict is that of the differences."""

import pytest

from sparse_lth.experiments import measures
from sparse_lth.experiments.claims import LIKE, MORE, NO_LESS, PAIRS, bounds
from sparse_lth.experiments.evidence import FAILS, HOLDS, UNDECIDED, UNTESTED, decide, weigh
from sparse_lth.experiments.measures import is_censored
from sparse_lth.experiments.results import MACHINE, TIMES
from sparse_lth.experiments.verdicts import Evidence, judge
from tests.made_up import NUMBERS, ROUNDS, TICKET, number, row, trainings

INF = float("inf")


def test_a_difference_is_weighed_by_the_t_test():
    """By hand: mean 3, standard error sqrt(2.5 / 5), t = 4.243 of 4 degrees of freedom."""
    found = weigh([1, 2, 3, 4, 5], low=0, high=INF)
    assert found.mean == 3
    assert found.interval == pytest.approx((1.0368, 4.9632), abs=1e-4)
    assert found.p == pytest.approx(0.013236, abs=1e-6)
    assert found.inside
    against = weigh([-1, -2, -3, -4, -5], low=0, high=INF)
    assert (against.mean, against.inside) == (-3, False)
    assert against.p == pytest.approx(found.p)
    assert against.interval == tuple(-x for x in reversed(found.interval))


def test_a_difference_within_margins_needs_both_tests():
    """The nearer bound decides: t = (3 - 2) / 0.7071 of 4 degrees of freedom, p = 0.1151."""
    found = weigh([1, 2, 3, 4, 5], low=2, high=9)
    assert found.p == pytest.approx(2 * 0.1151, abs=1e-5)
    assert found.inside
    mirrored = weigh([-1, -2, -3, -4, -5], low=-9, high=-2)
    assert mirrored.p == pytest.approx(found.p)
    # outside, either bound would do, which is counted twice: 4 times the one-sided 0.006618
    beyond = weigh([1, 2, 3, 4, 5], low=-1, high=0)
    assert (beyond.p, beyond.inside) == (pytest.approx(4 * 0.006618, abs=1e-5), False)


@pytest.mark.parametrize("differences", [[1.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
def test_differences_without_spread_decide_nothing(differences):
    assert weigh(differences, low=0, high=INF).p == 1
    assert weigh(differences, low=0, high=INF).interval == (differences[0], differences[0])


def test_two_differences_are_weighed_too():
    """By hand: mean 1, standard error 0.1, t = 10 of one degree of freedom."""
    assert weigh([0.9, 1.1], low=0, high=INF).p == pytest.approx(0.063451, abs=1e-6)


def test_a_mean_at_a_margin_says_nothing():
    """Just above it, the opposite is likelier, but both its tests count: p is 1 at most."""
    found = weigh([0.09, 0.10, 0.11, 0.12, 0.14], low=-0.1105, high=0.1105)
    assert found.p == 1


def test_more_seeds_of_the_same_spread_decide_more():
    ps = [weigh([-0.5, 1.5] * n, low=0, high=INF).p for n in (2, 4, 8, 16)]
    assert ps == sorted(ps, reverse=True)
    assert ps[0] > 0.05 > ps[-1]


@pytest.mark.parametrize(
    ("kind", "mean", "verdict"),
    [
        (MORE, 0.1, HOLDS),
        (MORE, -0.1, FAILS),
        (NO_LESS, 0.3, HOLDS),
        (NO_LESS, 0.1, HOLDS),
        (NO_LESS, -0.1, HOLDS),
        (NO_LESS, -0.3, FAILS),
        (LIKE, 0.3, FAILS),
        (LIKE, 0.1, HOLDS),
        (LIKE, -0.1, HOLDS),
        (LIKE, -0.3, FAILS),
    ],
)
def test_what_is_claimed_decides_which_differences_are_for_it(kind, mean, verdict):
    differences = [mean + noise for noise in (0.01, -0.02, 0.0, 0.02, -0.01)]
    ((_, found),) = decide([weigh(differences, *bounds(kind, margin=0.2))])
    assert found == verdict


def test_a_family_is_decided_by_holms_method():
    family = [Evidence(1, (0, 2), p, inside) for p, inside in ((0.04, True), (0.01, False))]
    assert decide(family) == [(pytest.approx(0.04), HOLDS), (pytest.approx(0.02), FAILS)]
    family += [Evidence(1, (0, 2), 0.03, True)]
    assert [verdict for _, verdict in decide(family)] == [UNDECIDED, FAILS, UNDECIDED]
    assert [p for p, _ in decide(family)] == pytest.approx([0.06, 0.03, 0.06])
    assert decide([]) == []


TRAINING = [
    row(0, 3.0, 0.11, None),
    row(10, 2.5, 0.31, None),
    row(50, 2.0, None, None),  # a tenth, which is not tested
    row(60, 1.9, 0.52, None),
    row(300, 0.5, 0.83, 0.86),
    row(400, 0.5, 0.84, 0.87),  # as low, and later
    row(500, 0.9, 0.75, 0.99),
]


@pytest.mark.parametrize(
    ("name", "value", "written", "difference"),
    [
        ("EARLY_ITERATION", 300, "iteration 300", "+300 iterations"),
        ("EARLY_ACCURACY", 83, "83.00 %", "+83.00 points"),
        ("EARLY_TRAIN_ACCURACY", 86, "86.00 %", "+86.00 points"),
        ("START_ACCURACY", 11, "11.00 %", "+11.00 points"),
        ("TENTH_ACCURACY", 52, "52.00 %", "+52.00 points"),
        ("END_ACCURACY", 75, "75.00 %", "+75.00 points"),
        ("END_TRAIN_ACCURACY", 99, "99.00 %", "+99.00 points"),
        ("END_GAP", 24, "24.00 %", "+24.00 points"),
    ],
)
def test_each_measure_reads_its_ownnumber(name, value, written, difference):
    measure = getattr(measures, name)
    assert measure.of(TRAINING) == pytest.approx(value)
    assert measure.value.format(value) == written
    assert measure.difference.format(value) == difference
    assert measure.early == name.startswith("EARLY")
    assert measure.margin(300) == pytest.approx(30 if name == "EARLY_ITERATION" else 0.2)


@pytest.mark.parametrize(
    ("last", "expected"), [(420, True), (421, True), (422, False), (401, True)]
)
def test_an_early_stop_in_the_last_twentieth_is_censored(last, expected):
    training = [row(0, 3.0, 0, 0), row(400, 1.0, 0, 0), row(last, 2.0, 0, 0)]
    assert is_censored(training) == expected


DENSE, HALF, FIFTH, EIGHTH, LEAST = ((TICKET, round) for round in ROUNDS)
EXPECTED = {  # as the paper has them, written down a second time: how a claim begins
    "Kept to 51.3 %, the ticket learns faster": ("TENTH_ACCURACY", HALF, DENSE, MORE),
    "Kept to 21.1 %, it learns faster still": ("TENTH_ACCURACY", FIFTH, HALF, MORE),
    "Kept to 3.6 %, it learns slower again": ("TENTH_ACCURACY", FIFTH, LEAST, MORE),
    "The dense network's early stop comes later": ("EARLY_ITERATION", DENSE, FIFTH, MORE),
    "At 3.6 % the ticket falls back to the dense network's early": (
        "EARLY_ITERATION",
        LEAST,
        DENSE,
        LIKE,
    ),
    "At 13.5 % the ticket is more accurate than": ("EARLY_ACCURACY", EIGHTH, DENSE, MORE),
    "At 3.6 % the ticket is no less accurate than the dense": (
        "EARLY_ACCURACY",
        LEAST,
        DENSE,
        NO_LESS,
    ),
    "At 21.1 % the ticket drawn anew stops later than the ticket": (
        "EARLY_ITERATION",
        ("random reinit", 7),
        FIFTH,
        MORE,
    ),
    "At 21.1 % the ticket drawn anew stops later than the dense": (
        "EARLY_ITERATION",
        ("random reinit", 7),
        DENSE,
        MORE,
    ),
    "At 21.1 % the ticket is more accurate than the ticket drawn": (
        "EARLY_ACCURACY",
        FIFTH,
        ("random reinit", 7),
        MORE,
    ),
    "Below 21.1 %, at 13.5 %, the ticket drawn anew is less": (
        "EARLY_ACCURACY",
        DENSE,
        ("random reinit", 9),
        MORE,
    ),
    "At 21.1 % the ticket is more accurate than a random mask": (
        "EARLY_ACCURACY",
        FIFTH,
        ("random mask", 7),
        MORE,
    ),
    "At 21.1 % the ticket drawn anew is more accurate at the end": (
        "END_ACCURACY",
        ("random reinit", 7),
        ("random mask", 7),
        MORE,
    ),
    "At 21.1 % training accuracy at the early stop is higher": (
        "EARLY_TRAIN_ACCURACY",
        FIFTH,
        DENSE,
        MORE,
    ),
    "At 21.1 % the ticket ends with the dense network's training": (
        "END_TRAIN_ACCURACY",
        FIFTH,
        DENSE,
        LIKE,
    ),
    "At 13.5 % the ticket ends more accurate": ("END_ACCURACY", EIGHTH, DENSE, MORE),
    "At 13.5 % the ticket generalises better": ("END_GAP", DENSE, EIGHTH, MORE),
    "At 21.1 % the ticket ends more accurate": ("END_ACCURACY", FIFTH, ("random reinit", 7), MORE),
    "At 3.6 % the ticket ends with more training accuracy": (
        "END_TRAIN_ACCURACY",
        LEAST,
        ("random reinit", 15),
        MORE,
    ),
    "At 21.1 % the dense network stops later than the one-shot": (
        "EARLY_ITERATION",
        DENSE,
        ("one-shot", 7),
        MORE,
    ),
    "At 21.1 % the one-shot ticket is more accurate": (
        "EARLY_ACCURACY",
        ("one-shot", 7),
        DENSE,
        MORE,
    ),
    "At 3.6 % the iterative ticket is more accurate": (
        "EARLY_ACCURACY",
        LEAST,
        ("one-shot", 15),
        MORE,
    ),
    "At 3.6 % the one-shot ticket's early stop comes later": (
        "EARLY_ITERATION",
        ("one-shot", 15),
        LEAST,
        MORE,
    ),
    "At 3.6 % masks found by rewinding are more accurate": (
        "EARLY_ACCURACY",
        LEAST,
        ("continued training", 15),
        MORE,
    ),
    "At 3.6 % masks found by continued training stop later": (
        "EARLY_ITERATION",
        ("continued training", 15),
        LEAST,
        MORE,
    ),
    "At 21.1 % weights drawn from the ticket's own": (
        "EARLY_ACCURACY",
        ("reinit from the ticket", 7),
        ("random reinit", 7),
        LIKE,
    ),
    "At 21.1 % the ticket drawn anew is more accurate than the network": (
        "EARLY_ACCURACY",
        ("random reinit", 7),
        ("pruned before training", 7),
        MORE,
    ),
    "At 21.1 % noise of half a standard deviation": (
        "EARLY_ACCURACY",
        ("noise of 0.5 std", 7),
        FIFTH,
        LIKE,
    ),
    "At 21.1 % the ticket with noise of three": (
        "EARLY_ACCURACY",
        ("noise of 3 std", 7),
        ("random reinit", 7),
        MORE,
    ),
    "At 3.6 % late rewinding makes little difference": (
        "EARLY_ACCURACY",
        ("late rewinding", 15),
        LEAST,
        LIKE,
    ),
    "At 21.1 % mask and θ₀ alone": ("START_ACCURACY", FIFTH, ("random mask", 7), MORE),
}


@pytest.fixture(scope="module")
def judged():
    return judge([*trainings()])


def test_every_claim_is_expected_and_no_other(judged):
    assert len(judged) == len(PAIRS) == len(EXPECTED)
    for start in EXPECTED:
        assert sum(claim.text.startswith(start) for claim in judged) == 1, start


@pytest.mark.parametrize("start", EXPECTED)
def test_a_claim_is_judged_by_its_own_numbers(judged, start):
    measure, first, second, kind = EXPECTED[start]
    (claim,) = (claim for claim in judged if claim.text.startswith(start))
    means = [NUMBERS[measure](number(*network)) for network in (first, second)]
    form, unit, tolerance = (
        ("{:,.0f}", " iterations", 1)
        if measure == "EARLY_ITERATION"
        else ("{:.2f}", " points", 0.02)
    )
    difference = means[0] - means[1]
    before, _, after = claim.measured.partition(": ")
    said = [
        float(part.split()[1 if unit == " iterations" else 0].replace(",", ""))
        for part in before.split(" against ")
    ]
    assert said == pytest.approx(means, abs=tolerance), form
    assert [part.partition(" (")[2] for part in before.split(" against ")] == [
        f"{ROUNDS[round][0]} prunings)" for _, round in (first, second)
    ]
    assert float(after.split()[0]) == pytest.approx(difference, abs=2 * tolerance)
    assert after.split()[1] == unit.strip()
    low, high = (float(x) for x in after.partition("(95 %: ")[2].partition(")")[0].split(" to "))
    assert low < difference < high or high - low < 2 * tolerance
    assert (low + high) / 2 == pytest.approx(difference, abs=2 * tolerance)
    little = f"{0.1 * means[1]:,.0f} iterations" if unit == " iterations" else "0.20 points"
    assert (f", {little} being little" in after) == (kind != MORE)
    assert after.endswith(", p < 0.001") or 0.001 <= float(after.rpartition("p = ")[2]) <= 1
    margin = {MORE: 0, NO_LESS: -0.2, LIKE: 0.2}[kind]
    if measure == "EARLY_ITERATION" and kind == LIKE:
        margin = 0.1 * means[1]
    holds = abs(difference) < margin if kind == LIKE else difference > margin
    assert claim.verdict == (HOLDS if holds else FAILS), claim


def _claim(found, start):
    (claim,) = (claim for claim in judge(found) if claim.text.startswith(start))
    return claim


def _is_of(training, method, round):
    return (training[0]["method"], training[0]["round"]) == (method, round)


def test_four_seeds_decide_nothing():
    claims = judge([*trainings(seeds=4)])
    assert {claim.verdict for claim in claims} == {UNDECIDED}
    assert all("of 4 seeds where 5 are needed" in claim.measured for claim in claims)


def test_six_seeds_decide(judged):
    claims = judge([*trainings(seeds=6)])
    assert UNDECIDED not in {claim.verdict for claim in claims}


def test_what_was_measured_is_said_in_full():
    """By hand: differences of 1, 2, 3, 4 and 5 points; their interval is 3 -+ 2.776 * 0.7071, and
    their p, 0.0132, counts three times: as many claims are of these two networks."""
    found = []
    for round, accuracy in ((0, 0.9), (9, 0.91)):
        for seed in range(5):
            test = accuracy + 0.01 * seed * (round > 0)
            rows = [row(0, 3.0, 0.1, 0.1), row(100, 1.0, test, 1.0), row(900, 2.0, test, 1.0)]
            network = {"method": TICKET, "model": "lenet-300-100", "blocksize": "1x1"}
            network |= {"replicate": seed, "round": round, "prunings": round, "density": 0.8**round}
            network |= dict.fromkeys((*TIMES, *MACHINE))
            found.append([evaluation | network for evaluation in rows])
    said = [c.measured for c in judge(found) if c.text.startswith("At 13.5 % the ticket is")]
    assert said == [
        "93.00 % (9 prunings) against 90.00 % (0 prunings): "
        "+3.00 points (95 %: +1.04 to +4.96), p = 0.040"
    ]


def test_a_network_that_was_not_run_leaves_its_claims_untested():
    some = [t for t in trainings() if t[0]["method"] != "one-shot"]
    claims = judge(some)
    untested = {claim.text for claim in claims if claim.verdict == UNTESTED}
    assert untested == {pair.text for pair in PAIRS if pair.figure == "one-shot"}
    assert {c.measured for c in claims if c.verdict == UNTESTED} == {"not run"}


def test_a_claim_of_the_early_stop_of_a_network_that_was_still_learning_is_not_decided():
    whole = [*trainings()]
    (late,) = (t for t in whole if _is_of(t, TICKET, 7) and t[0]["replicate"] == 3)
    late[-2]["iteration"] = 1900  # of 2000
    verdicts = {c.text: c for c in judge(whole)}
    for pair in PAIRS:
        claim = verdicts[pair.text]
        if (TICKET, 7) in (pair.first, pair.second) and pair.measure.early:
            assert claim.verdict == UNDECIDED
            assert claim.measured.endswith("1 of 10 networks still learning")
        else:
            assert claim.verdict != UNDECIDED


def test_networks_are_compared_seed_by_seed():
    """Whatever the order of the file; a seed that only one of them has does not count."""
    whole = [*trainings(seeds=6)]
    start = "At 21.1 % the ticket is more accurate than a random mask"
    without = _claim([t for t in whole if t[0]["replicate"] != 2], start)
    lacking = [t for t in whole if not (_is_of(t, TICKET, 7) and t[0]["replicate"] == 2)]
    assert (
        _claim(lacking[::-1], start).measured.partition(", p")[0]
        == (without.measured.partition(", p")[0])
    )


def _timed(model, blocksize, round, accuracy, p20, p50, p80):
    """Five trainings of a network that was timed."""
    for seed in range(5):
        wobble = (0.001, -0.002, 0.0, 0.002, -0.0005)[(seed * (len(model) % 4 + 1) + round) % 5]
        rows = [row(0, 3.0, 0.1, 0.1), row(500, 1.0, accuracy + wobble, 1), row(900, 2.0, 0, 1)]
        network = {"method": "dense" if "-" in model else TICKET, "model": model}
        network |= {"blocksize": blocksize, "replicate": seed, "round": round}
        network |= {"prunings": round, "density": 0.8**round, **dict.fromkeys((*TIMES, *MACHINE))}
        rows = [evaluation | network for evaluation in rows]
        if seed == 0:
            rows[-1] |= {"latency_us": p50, "latency_p20_us": p20, "latency_p80_us": p80}
        yield rows


DENSE_NETWORKS = [
    ("lenet", "1x1", 0, 0.98, 95, 100, 105),
    ("lenet-150-50", "1x1", 0, 0.97, 55, 60, 65),
    ("lenet-75-25", "1x1", 0, 0.95, 29, 30, 31),
]


@pytest.mark.parametrize(("round", "density"), [(7, "21.0 %"), (15, "3.5 %")])
@pytest.mark.parametrize(
    ("accuracy", "times", "verdict", "measured"),
    [
        (0.99, (96, 101, 106), FAILS, "101.0 µs against 100.0 µs, no faster than the dense"),
        (0.99, (89, 92, 95), UNDECIDED, "92.0 µs against 100.0 µs, not clearly faster"),
        (0.99, (89, 92, 98), UNDECIDED, "92.0 µs against 100.0 µs, not clearly faster"),
        (0.99, (10, 11, 12), UNTESTED, "no dense network that was trained is as fast"),
        (0.979, (60, 70, 80), HOLDS, "lenet-150-50 at 60.0 µs: 97.9"),
        (0.96, (60, 70, 80), FAILS, "lenet-150-50 at 60.0 µs: 96.0"),
        (0.96, (47, 50, 56), FAILS, "lenet-150-50 at 60.0 µs: 96.0"),  # not clearly slower
        (0.96, (47, 50, 54), HOLDS, "lenet-75-25 at 30.0 µs: 96.0"),  # clearly slower
        (0.97, (60, 70, 80), UNDECIDED, "lenet-150-50 at 60.0 µs: 97.0"),
    ],
)
def test_a_ticket_is_held_against_the_best_dense_network_that_is_no_slower(
    accuracy, times, verdict, measured, round, density
):
    networks = [*DENSE_NETWORKS, ("lenet", "16x4", round, accuracy, *times)]
    claim = _claim([t for network in networks for t in _timed(*network)], "Ours: the 16x4 ticket")
    assert measured in claim.measured
    assert claim.verdict == verdict
    assert claim.figure == "latency"
    assert f"keeps {density}" in claim.text
