"""The page: every figure with the claims it shows, in one file that needs nothing else."""

import base64
import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ..files import write
from ..program.pages import render
from . import figures
from .claims import BEYOND
from .controls import CONTROLS
from .evidence import FAILS, FEWEST, HOLDS, LEVEL, UNDECIDED, UNTESTED
from .measures import NEAR_END, POINTS, SHARE, is_censored
from .results import Training
from .verdicts import judge

OTHERS = tuple(name for name in CONTROLS if name not in ("random reinit", "random mask"))
FIGURES = {  # name: (title, drawing)
    "curves": ("Test accuracy against iteration", figures.curves),
    "controls": (
        "Winning tickets and their controls",
        figures.methods("winning ticket", "random reinit", "random mask"),
    ),
    "training": ("Training accuracy", figures.training_accuracy),
    "one-shot": ("One-shot and iterative pruning", figures.methods("winning ticket", "one-shot")),
    "initialisations": (
        "Other initialisations and other masks",
        figures.methods("winning ticket", "random reinit", *OTHERS),
    ),
    "rewinding": (
        "What pruned weights start from",
        figures.methods(
            "winning ticket", "late rewinding", "learning-rate rewinding", "fine-tuning"
        ),
    ),
    "untrained": ("Mask and first weights alone", figures.untrained),
    "blocks": ("Blocks: accuracy and speed against density", figures.blocks),
    "latency": ("Accuracy against measured latency", figures.latency),
}
TONES = {HOLDS: "good", FAILS: "bad", UNDECIDED: "", UNTESTED: ""}


def write_page(trainings: list[Training], folder: Path) -> Path:
    """Writes figures/*.png and *.svg and index.html there; returns the page's path."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    claims, sections = judge(trainings), []
    for name, (title, drawing) in FIGURES.items():
        figure = drawing(trainings)
        for kind in ("png", "svg"):
            write(folder / "figures" / f"{name}.{kind}", _render(figure, kind))
        shown = [claim for claim in claims if claim.figure == name]
        sections.append({"title": title, "panels": _panels(figure), "claims": shown})
    counts = [sum(claim.verdict == verdict for claim in claims) for verdict in TONES]
    held, failed, undecided, untested = counts
    untested += len(BEYOND)
    page = render(
        "experiments/page.html",
        title="The lottery ticket hypothesis, measured",
        kicker="The lottery ticket hypothesis, measured",
        headline=f"Of {len(claims) + len(BEYOND)} claims {held} hold, {failed} do not, "
        f"{undecided} are not decided and {untested} not tested.",
        context=_context(trainings),
        sections=sections,
        tones=TONES,
        beyond=BEYOND,
    )
    write(folder / "index.html", page)
    return folder / "index.html"


def _context(trainings: list[Training]) -> str:
    """What was run, where, and what the verdicts and bars mean."""
    replicates = len({rows[0]["replicate"] for rows in trainings})
    seeds = f"seeds 0 to {replicates - 1}" if replicates > 1 else "seed 0 alone, without noise"
    late = sum(map(is_censored, trainings))
    text = (
        f"{trainings[0][-1]['iteration']:,.0f} iterations for each of {len(trainings)} networks, "
        f"{seeds}. The early stop is the iteration of least validation loss; {late} networks had "
        f"it in the last {1 - NEAR_END:.0%} of training, and might have gone on learning: a claim "
        "about the early stop of such a network is not decided. Networks of the same seed are "
        "compared: the difference is the mean over the seeds, with its 95 % interval. A verdict "
        f"is that of a t test, at {LEVEL} for all claims together (Holm), from {FEWEST} seeds on. "
        f"A difference is little up to {POINTS} points of accuracy, or {SHARE:.0%} of the "
        "iterations. The bars of the figures are from the least seed to the greatest."
    )
    measured = [rows[-1] for rows in trainings if rows[-1]["device"]]
    if measured:
        machine = measured[0]
        text += f" Latency: {machine['device']}, {machine['threads']:.0f} thread, "
        text += f"{machine['backend']} backend, batch 1; a dense network runs as plain layers or "
        text += "in one call, as tickets do, whichever is faster. A ticket is clearly faster where "
        text += "its 80th percentile is below the dense network's 20th."
    return text


def _panels(figure: Figure) -> list[str]:
    """Each panel of the figure as an SVG of its own, in base64, so that a narrow page stacks them.

    Axes that share a place, as those of two scales do, are one panel.
    """
    places = {}
    for axes in figure.axes:
        places.setdefault(axes.get_subplotspec(), []).append(axes)
    images = []
    for shown in places.values():
        for axes in figure.axes:
            axes.set_visible(axes in shown)
        images.append(base64.b64encode(_render(figure, "svg", bbox_inches="tight")).decode())
    return images


def _render(figure: Figure, kind: str, **options: object) -> bytes:
    """The same bytes for the same figure; text in the fonts of whoever looks at it."""
    image = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "sparse_lth", "svg.fonttype": "none"}):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(image, format=kind, dpi=120, metadata=metadata, **options)
    return image.getvalue()
