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
from .claims import FAILS, HOLDS, NOISE, Claim, cut_off, judge
from .results import Training

FIGURES = {  # name: (title, drawing)
    "curves": ("Test accuracy against iteration", figures.curves),
    "controls": (
        "Winning tickets and their controls",
        figures.methods("winning ticket", "random reinit", "random mask"),
    ),
    "one-shot": ("One-shot and iterative pruning", figures.methods("winning ticket", "one-shot")),
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
TONES = {HOLDS: "good", FAILS: "bad", NOISE: ""}

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
    held, failed, noise = (sum(claim.verdict == v for claim in claims) for v in TONES)
    page = PAGE.substitute(
        headline=f"Of {len(claims)} claims {held} hold, {failed} do not, "
        f"and in {noise} the difference is within noise.",
        context=escape(_context(trainings)),
        sections="\n".join(sections),
    )
    write(folder / "index.html", page)
    return folder / "index.html"


def _context(trainings: list[Training]) -> str:
    """What was run, where, and what the verdicts and bars mean."""
    replicates = len({rows[0]["replicate"] for rows in trainings})
    seeds = f"seeds 0 to {replicates - 1}" if replicates > 1 else "seed 0 alone, without noise"
    late, total = cut_off(trainings)
    text = (
        f"{trainings[0][-1]['iteration']:,.0f} iterations for each of {total} networks, {seeds}. "
        f"The early stop is the iteration of least validation loss; {late} networks were still at "
        "it when training ended, and would have gone on learning. A claim holds, or does not, "
        "where all replicates agree on the sign of the difference; else it is within noise. The "
        "difference is given as the mean, and from the least replicate to the greatest, as are "
        "the bars."
    )
    measured = [rows[-1] for rows in trainings if rows[-1]["device"]]
    if measured:
        machine = measured[0]
        text += f" Latency: {machine['device']}, {machine['threads']:.0f} thread, "
        text += f"{machine['backend']} backend, batch 1; a dense network runs as plain layers or "
        text += "in one call, as tickets do, whichever is faster. A ticket is clearly faster where "
        text += "its 80th percentile is below the dense network's 20th."
    return text


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
