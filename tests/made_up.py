"""Made-up results: every measure of every network reads a number of its own."""

from sparse_lth.experiments.results import MACHINE, TIMES


def row(iteration, validation_loss, test, train):
    row = {"iteration": iteration, "validation_loss": validation_loss}
    return row | {"test_accuracy": test, "train_accuracy": train}


TICKET = "winning ticket"
METHODS = {  # a number for every method
    TICKET: 3,
    "random reinit": 1,
    "random mask": 6,
    "one-shot": 5,
    "late rewinding": 2,
    "continued training": 12,
    "reinit from the ticket": 4,
    "pruned before training": 8,
    "noise of 0.5 std": 9,
    "noise of 3 std": 10,
}
# of the paper's ladder: how many prunings led there, and the density
ROUNDS = {0: (0, 1.0), 3: (2, 0.513), 7: (4, 0.211), 9: (5, 0.135), 15: (8, 0.036)}


def number(method, round):
    return 5 * METHODS[method] + round if round else 41


NUMBERS = {  # what each measure reads, without noise, of a network with this number
    "EARLY_ITERATION": lambda n: 500 + 5 * n,
    "EARLY_ACCURACY": lambda n: 70 + 0.11 * n,
    "EARLY_TRAIN_ACCURACY": lambda n: 75 + 0.12 * n,
    "START_ACCURACY": lambda n: 20 + 0.13 * n,
    "TENTH_ACCURACY": lambda n: 60 + 0.14 * n,
    "END_ACCURACY": lambda n: 80 - 0.15 * n,
    "END_TRAIN_ACCURACY": lambda n: 90 - 0.07 * n,
    "END_GAP": lambda n: 10 + 0.08 * n,
}


def trainings(seeds=5):
    for method in METHODS:
        for round, (prunings, density) in ROUNDS.items():
            if round == 0 and method != TICKET:
                continue
            for seed in range(seeds):
                n, noise = number(method, round), (0.004, -0.007, 0.001, 0.005, -0.003)
                wobble = noise[(seed * (n % 4 + 1) + n) % 5]
                steps = {
                    0: ("START_ACCURACY", None, 3.0),
                    100: (None, None, 2.5),
                    200: ("TENTH_ACCURACY", None, 2.0),
                    NUMBERS["EARLY_ITERATION"](n) + 100 * wobble: (
                        "EARLY_ACCURACY",
                        "EARLY_TRAIN_ACCURACY",
                        1.0,
                    ),
                    2000: ("END_ACCURACY", "END_TRAIN_ACCURACY", 1.5),
                }
                yield [
                    {
                        **row(step, loss, *(_accuracy(name, n, wobble) for name in names)),
                        "method": method,
                        "model": "lenet-300-100",
                        "blocksize": "1x1",
                        "replicate": seed,
                        "round": round,
                        "prunings": prunings,
                        "density": density,
                        **dict.fromkeys((*TIMES, *MACHINE)),
                    }
                    for step, (*names, loss) in steps.items()
                ]


def _accuracy(measure, n, wobble):
    wobble *= 2 if measure and "TRAIN" in measure else 1  # so that the gap has a spread, too
    return (NUMBERS[measure](n) + wobble) / 100 if measure else None
