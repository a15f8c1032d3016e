"""What a run found, in words: of the summaries of `measure.summarise` and `measure.compare`."""

GOOD, BAD = "good", "bad"


def headline(summary: dict) -> str:
    """One sentence: whether the pruned network is faster, and as accurate as the dense one."""
    accuracy, *others = summary["rows"]
    speeds = [row for row in others if "batch" in row]
    if not speeds:
        return (
            f"With {percent(summary['density'])} of the weights {_accuracy(accuracy, summary)}. "
            "Not timed: pruned weights are still there, as zeros; --export-sparse removes them."
        )
    directions = [direction(row) for row in speeds]
    if min(directions) == 1:
        answer = "Faster, but less accurate" if direction(accuracy) == -1 else "Yes"
    elif max(directions) == 1:
        answer = "It depends on the batch"
    else:
        answer = "No" if min(directions) == -1 else "Not clear"
    *parts, last = (f"{verdict(row).partition(' (')[0]} at batch {row['batch']}" for row in speeds)
    joint = "but" if direction(accuracy) == -1 and max(directions) == 1 else "and"
    text = f"{', '.join(parts)} and {last}" if parts else last
    return f"{answer}: {text}, {joint} {_accuracy(accuracy, summary)}."


def _accuracy(row: dict, summary: dict) -> str:
    """The end of a sentence about the pruned network."""
    figures = f"{row['pruned']:.2f} % against {row['dense']:.2f} %"
    if summary.get("trained", 1) > 1:
        figures += f", after {summary['trained']} rounds of training against 1"
    if direction(row):
        more = "more" if row["pruned"] > row["dense"] else "less"
        return f"{_points(row)} points {more} accurate ({figures})"
    noise = f", within the noise of {summary['images']:,} test images"
    return f"as accurate ({figures}{noise if _points(row) != '0.00' else ''})"


def verdict(row: dict) -> str:
    """How the pruned network does in this row, in words."""
    gain = row.get("gain")
    if gain is None:
        if _points(row) == "0.00":
            return "the same"
        if direction(row) == 0:
            return f"within noise ({row['pruned'] - row['dense']:+.2f})"
        return f"{_points(row)} points {'lower' if row['pruned'] < row['dense'] else 'higher'}"
    if direction(row) == 0:
        low, high = row.get("gain_range", (gain, gain))
        return f"no clear difference ({low:.2f}x to {high:.2f}x)"
    better, worse = ("faster", "slower") if "batch" in row else ("smaller", "larger")
    if row.get("disagree"):
        least = min(max(g, 1 / g) for g in row["gain_range"])
        return f"at least {factor(least)} {better if gain > 1 else worse}"
    return f"{factor(max(gain, 1 / gain))} {better if gain > 1 else worse}"


def direction(row: dict) -> int:
    """1 better, -1 worse, 0 within the noise: of the test set, or of the turns of a timing."""
    if "noise" in row:
        low, high = row["noise"]
        return (row["pruned"] > high) - (row["pruned"] < low)
    gains = (row["gain"], *row.get("gain_range", ()))
    return 1 if min(gains) > 1 else -1 if max(gains) < 1 else 0


def tone(row: dict) -> str:
    """ "good", "bad" or "", for a colour"""
    return {1: GOOD, -1: BAD, 0: ""}[direction(row)]


def context(summary: dict, dataset: str) -> str:
    """Where the figures are from."""
    backend = f", {summary['backend']} backend" if "backend" in summary else ""
    threads = f"{summary['threads']} thread{'s' if summary['threads'] > 1 else ''}"
    return f"{summary['device']}, {threads}{backend}, {dataset}"


def notes(summary: dict) -> list[str]:
    """What has to be known beside the figures, a sentence each."""
    text, batches = [], {}
    for row in summary["rows"]:
        if "batch" in row:
            batches.setdefault(row["rival"], []).append(str(row["batch"]))
    if batches:
        best = ", ".join(f"{way} at batch {' and '.join(n)}" for way, n in batches.items())
        text.append(f"The best dense network, which the pruned one is compared with: {best}.")
    text += [f"{way} was left out: {why}." for way, why in summary.get("left_out", {}).items()]
    if summary.get("busy"):
        load, cores = summary["busy"]
        text.append(
            f"The machine was busy, with a load of {load:.1f} on {cores} cores: measured nine "
            "times, and a difference counts if all nine show it."
        )
    layers = summary["layers"]
    stored, kept = (sum(layer.get(key, 0) for layer in layers) for key in ("stored", "kept"))
    if stored and stored != kept:
        share = percent(summary["stored_density"] * kept / stored)
        text.append(
            f"The stored density, {percent(summary['stored_density'])}, is {factor(stored / kept)} "
            f"the {share} that is kept: a block is stored with its zeros, and so is a dense layer."
        )
    return text + [f"{x['layer']} stays dense: {x['dense']}." for x in layers if "dense" in x]


def _points(row: dict) -> str:
    return f"{abs(row['pruned'] - row['dense']):.2f}"


def percent(fraction: float) -> str:
    return f"{100 * fraction:#.3g}".rstrip(".") + " %"


def factor(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 1.1 else f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"


def quantity(value: float, unit: str) -> str:
    """With its unit; times to three digits, which is more than a machine repeats."""
    if unit == "%":
        return f"{value:.2f} %"
    if unit == "bytes":
        return f"{value / 1e6:.2f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"
    value = float(f"{value:.3g}")
    unit = "/s" if unit == "images/s" else f" {unit}"
    return f"{value:,.0f}{unit}" if value >= 100 else f"{value:g}{unit}"
