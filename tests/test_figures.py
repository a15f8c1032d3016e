"""The figures draw the numbers that their axes say."""

from statistics import mean

import pytest

from sparse_lth.experiments import figures
from sparse_lth.experiments.results import select
from tests.made_up import NUMBERS, ROUNDS, TICKET, number, row, trainings

RESULTS = [*trainings()]
DENSITIES = [100 * density for _, density in ROUNDS.values()]


def _drawn(axes):
    """x, means, and ends of the bars of each line that has a legend entry."""
    found = {}
    for container in axes.containers:
        line, _, (bars,) = container.lines
        ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
        found[container.get_label()] = (*map(list, line.get_data()), ends)
    return found


def _expected(measure, method):
    """Means over the seeds, in percent of what the measure reads."""
    rounds = [n for n in ROUNDS if n or method == TICKET]
    return [NUMBERS[measure](number(method, n)) for n in rounds]


@pytest.mark.parametrize(
    ("figure", "labels", "measures"),
    [
        (
            figures.methods(TICKET, "one-shot"),
            (
                "early-stop iteration",
                "test accuracy at early stop (%)",
                "test accuracy at the end (%)",
            ),
            ("EARLY_ITERATION", "EARLY_ACCURACY", "END_ACCURACY"),
        ),
        (
            figures.training_accuracy,
            ("training accuracy at early stop (%)", "training accuracy at the end (%)"),
            ("EARLY_TRAIN_ACCURACY", "END_TRAIN_ACCURACY"),
        ),
        (figures.untrained, ("test accuracy (%)",), ("START_ACCURACY",)),
    ],
)
def test_a_panel_draws_its_measure_against_the_density(figure, labels, measures):
    panels = figure(RESULTS).axes
    assert [axes.get_ylabel() for axes in panels] == [*labels]
    for axes, measure in zip(panels, measures, strict=True):
        tolerance = 1 if measure == "EARLY_ITERATION" else 0.03
        assert axes.get_xscale() == "log"
        assert axes.get_xlim()[0] > axes.get_xlim()[1]  # dense on the left
        assert axes.get_xlabel() == "weights kept (%)"
        drawn = _drawn(axes)
        assert TICKET in drawn
        assert len(drawn) >= 2
        for method, (x, y, ends) in drawn.items():
            assert x == pytest.approx(DENSITIES if method == TICKET else DENSITIES[1:])
            assert y == pytest.approx(_expected(measure, method), abs=tolerance)
            for middle, (low, high) in zip(y, ends, strict=True):
                assert low < middle < high
                assert high - low < 2 * tolerance


def test_bars_reach_from_the_least_seed_to_the_greatest():
    (axes,) = figures.untrained(RESULTS).axes
    _, y, ends = _drawn(axes)[TICKET]
    for n, round in enumerate(ROUNDS):
        (network,) = select(RESULTS, method=TICKET, round=round)
        values = [100 * training[0]["test_accuracy"] for training in network]
        assert (y[n], *ends[n]) == pytest.approx((mean(values), min(values), max(values)))


def test_curves_are_means_of_the_evaluations_that_all_seeds_have():
    left, right = figures.curves(RESULTS).axes
    lines = {line.get_label(): line for line in left.get_lines()}
    assert [*lines] == ["100.0 %", "51.3 %", "21.1 %", "3.6 %"]
    assert [line.get_label() for line in right.get_lines()] == [
        TICKET,
        "random reinit",
        "random mask",
    ]
    x, y = lines["51.3 %"].get_data()
    assert [*x] == [0, 200, 2000]  # the early stops are at five other steps
    expected = [
        NUMBERS[m](number(TICKET, 3)) for m in ("START_ACCURACY", "TENTH_ACCURACY", "END_ACCURACY")
    ]
    assert y == pytest.approx(expected, abs=0.02)
    top = max(max(line.get_ydata()) for line in left.get_lines())
    assert left.get_ylim()[0] == pytest.approx(top - 4)
    assert top < left.get_ylim()[1] <= top + 0.4


def _timed():
    """Two tickets in blocks and two dense networks, one of each seed; speeds in hand-made rows."""
    for model, shape, round, accuracy, latency, speedup in (
        ("lenet-300-100", "1x1", 0, 0.98, 100, 1),
        ("lenet-150-50", "1x1", 0, 0.97, 50, 2),
        ("lenet-300-100", "16x16", 7, 0.975, 40, 2.5),
        ("lenet-300-100", "16x16", 15, 0.96, 20, 5),
    ):
        network = {"model": model, "blocksize": shape, "round": round, "density": 0.8**round}
        network |= {"method": "dense" if "150" in model else TICKET, "replicate": 0}
        rows = [row(0, 3, 0.1, 0), row(50, 1, accuracy, 1), row(90, 2, 0.5, 1)]
        rows = [evaluation | network | {"latency_us": None, "speedup": None} for evaluation in rows]
        rows[-1] |= {"latency_us": latency, "speedup": speedup}
        yield rows


def test_accuracy_is_drawn_against_the_latency_that_was_measured():
    (axes,) = figures.latency([*_timed()]).axes
    drawn = _drawn(axes)
    assert drawn["ticket, 16x16"][:2] == ([40, 20], pytest.approx([97.5, 96]))
    assert drawn["dense, narrower"][:2] == ([100, 50], pytest.approx([98, 97]))
    assert axes.get_xscale() == "log"
    assert "log scale" in axes.get_xlabel()
    ticks = {label.get_text() for label in axes.get_xticklabels()}
    assert {"20", "50", "100"} < ticks  # as they are said, not as powers of ten


def test_the_speedup_of_blocks_is_drawn_on_a_second_axis():
    axes, speed = figures.blocks([*_timed()]).axes
    assert _drawn(axes)["16x16"][:2] == (
        pytest.approx([100 * 0.8**7, 100 * 0.8**15]),
        pytest.approx([97.5, 96]),
    )
    lines = [[[*values] for values in line.get_data()] for line in speed.get_lines()]
    assert [pytest.approx([100 * 0.8**7, 100 * 0.8**15]), [2.5, 5]] in lines
    assert [[0, 1], [1, 1]] in lines  # as fast as the dense network
    assert speed.get_yscale() == "log"
