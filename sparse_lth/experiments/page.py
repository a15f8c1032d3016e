"""The page: every figure with the claims it shows, in one file that needs nothing else."""

import base64
import io
from html import escape
from pathlib import Path
from string import Template

import matplotlib
from matplotlib.figure import Figure

from ..files import write
from . import figures
from .claims import BEYOND
from .controls import CONTROLS
from .evidence import FAILS, FEWEST, HOLDS, LEVEL, UNDECIDED, UNTESTED
from .measures import NEAR_END, POINTS, SHARE, is_censored
from .results import Training
from .verdicts import Claim, judge

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

PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The lottery ticket hypothesis, measured</title>
<style>
body { margin: 2rem auto; padding: 0 1rem; max-width: 1100px; color: #1b1e23; background: #fff;
       font: 16px/1.5 system-ui, sans-serif; }
h1 { line-height: 1.25; }
h2 { margin-top: 3rem; }
img { display: block; max-width: 100%; height: auto; margin: auto; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #d9dce1; text-align: left;
         vertical-align: top; }
th { color: #5c636e; font-size: .9rem; }
td:nth-child(1) { width: 48%; }
td:nth-child(3) { white-space: nowrap; font-weight: 600; }
.good { color: #15803d; }
.bad { color: #b91c1c; }
.soft { color: #5c636e; }
</style>
<h1>The lottery ticket hypothesis, measured</h1>
<p>$headline</p>
<p class="soft">$context</p>
$sections
</html>
""")


def write_page(trainings: list[Training], folder: Path) -> Path:
    """Writes figures/*.png and *.svg and index.html there; returns the page's path."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    claims, sections = judge(trainings), []
    for name, (title, drawing) in FIGURES.items():
        images = {kind: _render(drawing(trainings), kind) for kind in ("png", "svg")}
        for kind, image in images.items():
            write(folder / "figures" / f"{name}.{kind}", image)
        source = base64.b64encode(images["svg"]).decode()
        table = _table([claim for claim in claims if claim.figure == name])
        sections.append(
            f"<h2>{escape(title)}</h2>\n"
            f'<img alt="{escape(title)}" src="data:image/svg+xml;base64,{source}">\n{table}'
        )
    counts = [sum(claim.verdict == verdict for claim in claims) for verdict in TONES]
    held, failed, undecided, untested = counts
    untested += len(BEYOND)
    sections.append(_beyond())
    page = PAGE.substitute(
        headline=f"Of {len(claims) + len(BEYOND)} claims {held} hold, {failed} do not, "
        f"{undecided} are not decided and {untested} not tested.",
        context=escape(_context(trainings)),
        sections="\n".join(sections),
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


def _beyond() -> str:
    """What is not tested, as a section."""
    items = "".join(f"<li>{escape(claim)} {escape(why)}</li>\n" for claim, why in BEYOND)
    return f"<h2>Not tested</h2>\n<ul>\n{items}</ul>"


def _table(claims: list[Claim]) -> str:
    rows = "".join(
        f"<tr><td>{escape(claim.text)}</td><td>{escape(claim.measured)}</td>"
        f'<td class="{TONES[claim.verdict]}">{claim.verdict}</td></tr>\n'
        for claim in claims
    )
    if not rows:
        return ""
    return f"<table>\n<tr><th>claim</th><th>measured</th><th>verdict</th></tr>\n{rows}</table>"


def _render(figure: Figure, kind: str) -> bytes:
    """The same bytes for the same figure."""
    image = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "sparse_lth"}):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(image, format=kind, dpi=120, metadata=metadata)
    return image.getvalue()
