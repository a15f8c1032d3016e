"""What the papers claim of LeNet-300-100: that one network has more than another, or as much."""

from dataclasses import dataclass
from math import inf

from .chains import TICKET
from .measures import (
    EARLY_ACCURACY,
    EARLY_ITERATION,
    EARLY_TRAIN_ACCURACY,
    END_ACCURACY,
    END_GAP,
    END_TRAIN_ACCURACY,
    START_ACCURACY,
    TENTH_ACCURACY,
    Measure,
)

MORE, NO_LESS, LIKE = "more", "no less", "like"  # what is claimed of the first of two networks
Network = tuple[str, int]  # method, round
# by the round of the paper's ladder in which they are left with so many percent of the weights
DENSE, HALF, FIFTH, EIGHTH, LEAST = ((TICKET, n) for n in (0, 3, 7, 9, 15))
REINIT, SCATTERED, ONE_SHOT = "random reinit", "random mask", "one-shot"


@dataclass(frozen=True)
class Pair:
    """The claim that one network has more than another, no less, or about as much.

    figure: the name of the one that shows it; networks of single weights, of all seeds
    """

    figure: str
    text: str
    measure: Measure
    first: Network
    second: Network
    kind: str = MORE


def bounds(kind: str, margin: float) -> tuple[float, float]:
    """Of the difference between the first network and the second, where the claim is true."""
    return {MORE: (0, inf), NO_LESS: (-margin, inf), LIKE: (-margin, margin)}[kind]


PAIRS = (
    Pair(
        "curves",
        "Kept to 51.3 %, the ticket learns faster than the dense network: it is more accurate "
        "after a tenth of the iterations.",
        TENTH_ACCURACY,
        HALF,
        DENSE,
    ),
    Pair("curves", "Kept to 21.1 %, it learns faster still.", TENTH_ACCURACY, FIFTH, HALF),
    Pair(
        "curves",
        "Kept to 3.6 %, it learns slower again than at 21.1 %.",
        TENTH_ACCURACY,
        FIFTH,
        LEAST,
    ),
    Pair(
        "controls",
        "The dense network's early stop comes later than the ticket's at 21.1 %, which comes 38 % "
        "earlier in the paper.",
        EARLY_ITERATION,
        DENSE,
        FIFTH,
    ),
    Pair(
        "controls",
        "At 3.6 % the ticket falls back to the dense network's early stop.",
        EARLY_ITERATION,
        LEAST,
        DENSE,
        LIKE,
    ),
    Pair(
        "controls",
        "At 13.5 % the ticket is more accurate than the dense network, by more than 0.3 points in "
        "the paper.",
        EARLY_ACCURACY,
        EIGHTH,
        DENSE,
    ),
    Pair(
        "controls",
        "At 3.6 % the ticket is no less accurate than the dense network, to whose accuracy it "
        "falls back in the paper.",
        EARLY_ACCURACY,
        LEAST,
        DENSE,
        NO_LESS,
    ),
    Pair(
        "controls",
        "At 21.1 % the ticket drawn anew stops later than the ticket, 2.51 times as late in the "
        "paper.",
        EARLY_ITERATION,
        (REINIT, 7),
        FIFTH,
    ),
    Pair(
        "controls",
        "At 21.1 % the ticket drawn anew stops later than the dense network.",
        EARLY_ITERATION,
        (REINIT, 7),
        DENSE,
    ),
    Pair(
        "controls",
        "At 21.1 % the ticket is more accurate than the ticket drawn anew, by 0.5 points in the "
        "paper.",
        EARLY_ACCURACY,
        FIFTH,
        (REINIT, 7),
    ),
    Pair(
        "controls",
        "Below 21.1 %, at 13.5 %, the ticket drawn anew is less accurate than the dense network.",
        EARLY_ACCURACY,
        DENSE,
        (REINIT, 9),
    ),
    Pair(
        "controls",
        "At 21.1 % the ticket is more accurate than a random mask with the same counts.",
        EARLY_ACCURACY,
        FIFTH,
        (SCATTERED, 7),
    ),
    Pair(
        "controls",
        "At 21.1 % the ticket drawn anew is more accurate at the end than a random mask "
        "(appendix E).",
        END_ACCURACY,
        (REINIT, 7),
        (SCATTERED, 7),
    ),
    Pair(
        "training",
        "At 21.1 % training accuracy at the early stop is higher than the dense network's, as test "
        "accuracy is.",
        EARLY_TRAIN_ACCURACY,
        FIFTH,
        DENSE,
    ),
    Pair(
        "training",
        "At 21.1 % the ticket ends with the dense network's training accuracy, which is nearly "
        "100 %.",
        END_TRAIN_ACCURACY,
        FIFTH,
        DENSE,
        LIKE,
    ),
    Pair(
        "training",
        "At 13.5 % the ticket ends more accurate than the dense network, by up to 0.35 points in "
        "the paper.",
        END_ACCURACY,
        EIGHTH,
        DENSE,
    ),
    Pair(
        "training",
        "At 13.5 % the ticket generalises better: at the end the dense network's training accuracy "
        "is further above its test accuracy.",
        END_GAP,
        DENSE,
        EIGHTH,
    ),
    Pair(
        "training",
        "At 21.1 % the ticket ends more accurate than the ticket drawn anew.",
        END_ACCURACY,
        FIFTH,
        (REINIT, 7),
    ),
    Pair(
        "training",
        "At 3.6 % the ticket ends with more training accuracy than the ticket drawn anew "
        "(appendix D).",
        END_TRAIN_ACCURACY,
        LEAST,
        (REINIT, 15),
    ),
    Pair(
        "one-shot",
        "At 21.1 % the dense network stops later than the one-shot ticket.",
        EARLY_ITERATION,
        DENSE,
        (ONE_SHOT, 7),
    ),
    Pair(
        "one-shot",
        "At 21.1 % the one-shot ticket is more accurate than the dense network.",
        EARLY_ACCURACY,
        (ONE_SHOT, 7),
        DENSE,
    ),
    Pair(
        "one-shot",
        "At 3.6 % the iterative ticket is more accurate than the one-shot ticket.",
        EARLY_ACCURACY,
        LEAST,
        (ONE_SHOT, 15),
    ),
    Pair(
        "one-shot",
        "At 3.6 % the one-shot ticket's early stop comes later than the iterative ticket's.",
        EARLY_ITERATION,
        (ONE_SHOT, 15),
        LEAST,
    ),
    Pair(
        "initialisations",
        "At 3.6 % masks found by rewinding are more accurate than masks found by continued "
        "training, both trained from θ₀ (appendix B).",
        EARLY_ACCURACY,
        LEAST,
        ("continued training", 15),
    ),
    Pair(
        "initialisations",
        "At 3.6 % masks found by continued training stop later (appendix B).",
        EARLY_ITERATION,
        ("continued training", 15),
        LEAST,
    ),
    Pair(
        "initialisations",
        "At 21.1 % weights drawn from the ticket's own are about as accurate as weights drawn anew "
        "(appendix F.3).",
        EARLY_ACCURACY,
        ("reinit from the ticket", 7),
        (REINIT, 7),
        LIKE,
    ),
    Pair(
        "initialisations",
        "At 21.1 % the ticket drawn anew is more accurate than the network that was pruned before "
        "any training (appendix F.4).",
        EARLY_ACCURACY,
        (REINIT, 7),
        ("pruned before training", 7),
    ),
    Pair(
        "initialisations",
        "At 21.1 % noise of half a standard deviation barely changes the ticket's accuracy "
        "(appendix F.7).",
        EARLY_ACCURACY,
        ("noise of 0.5 std", 7),
        FIFTH,
        LIKE,
    ),
    Pair(
        "initialisations",
        "At 21.1 % the ticket with noise of three standard deviations is more accurate than the "
        "ticket drawn anew (appendix F.7).",
        EARLY_ACCURACY,
        ("noise of 3 std", 7),
        (REINIT, 7),
    ),
    Pair(
        "rewinding",
        "At 3.6 % late rewinding makes little difference. (arXiv 1903.01611 needs it for deeper "
        "networks, and not for LeNet.)",
        EARLY_ACCURACY,
        ("late rewinding", 15),
        LEAST,
        LIKE,
    ),
    Pair(
        "untrained",
        "At 21.1 % mask and θ₀ alone, before any training, classify better than a random mask over "
        "θ₀ (arXiv 1905.01067).",
        START_ACCURACY,
        FIFTH,
        (SCATTERED, 7),
    ),
)
BEYOND = (  # claims that this protocol does not test, and why
    (
        "Learning-rate rewinding is at least as accurate as weight rewinding, and both are more "
        "accurate than fine-tuning (arXiv 2003.02389).",
        "The learning rate is constant, as in the paper's own experiments with LeNet, so there is "
        "no schedule to rewind and no low rate to go on with; the figure shows what became of "
        "these networks all the same.",
    ),
    (
        "First weights that survive are bimodal in the later layers (appendix F.1, F.2), move "
        "further than others (F.5), and are spread evenly over outputs, not over inputs (F.6).",
        "This is about the weights, and the results are of losses and accuracies.",
    ),
    (
        "The patterns are the same with other learning rates, SGD, momentum, other distributions "
        "of first weights, pruning rates and widths (appendix G).",
        "One setting was run, that of section 2.",
    ),
)
