"""Results as a table: the paper's figure beside ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reproduce.experiments import Experiment, Shown, Training
from benchmarks.reproduce.running import Result

# Student's t, 97.5 %, by degrees of freedom.
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
BEGIN, END = "<!-- results: made by make reproduce -->", "<!-- end of results -->"


def figure(results: Sequence[Result], shown: Shown, training: Training, *, is_share: bool) -> str:
    """The figure of a row in words: of several seeds the mean over them with its 95 % interval; of one, that
    over episodes.

    Args:
        results: of all trainings.
        is_share: whether figures are shares, shown in per cent.
    """
    own = [result for result in results if result.training == training.name]
    found = [value for result in own if (value := value_of(result, shown)) is not None]
    values = [(mean / shown.per, None if half is None else half / shown.per) for mean, half in found]
    if not values:
        return "not run"
    scale, unit = (100.0, " %") if is_share else (1.0, "")
    means = [scale * mean for mean, _ in values]
    if len(means) == 1:
        half = values[0][1]
        around = "" if half is None else f" ± {_short(scale * half)}"
        return f"{_short(means[0])}{around}{unit} (seed {own[0].seed})"
    half = _T.get(len(means) - 1, 1.96) * statistics.stdev(means) / math.sqrt(len(means))
    return f"{_short(statistics.fmean(means))} ± {_short(half)}{unit} ({len(means)} seeds)"


def value_of(result: Result, shown: Shown) -> tuple[float, float | None] | None:
    """Mean and half width of the interval; None where the evaluation has no such contender."""
    found = next((method for method in result.methods if method["name"] == shown.contender), None)
    if found is None:
        return None
    if shown.measure == "forgetting":
        before, after = found["rehearsal"]
        return after - before, None
    if shown.measure == "gain":
        sign = 1.0 if found["higher_is_better"] else -1.0
        return sign * (found["mean"][shown.step] - found["mean"][0]), None
    if shown.group is not None:
        group = next((group for group in found["groups"] if group["name"] == shown.group), None)
        return None if group is None else (float(group["mean"]), float(group["ci95"]))
    if shown.measure == "worst_group":
        sign = 1.0 if found["higher_is_better"] else -1.0
        worst = min(found["groups"], key=lambda group: sign * float(group["mean"]))
        return float(worst["mean"]), float(worst["ci95"])
    return found["mean"][shown.step], found["ci95"][shown.step]


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def as_markdown(experiment: Experiment, results: Sequence[Result]) -> str:
    """A section for an experiment: its table, and the commands."""
    is_share = "accuracy" in experiment.metric
    lines = [
        f"### {experiment.title}",
        "",
        f"{experiment.paper}. Figures: {experiment.metric}.",
        "",
        "| method | published | here |",
        "|---|---|---|",
    ]
    for training in experiment.trainings:
        for shown in training.rows:
            found = figure(results, shown, training, is_share=is_share)
            lines.append(f"| {shown.method} | {shown.published or '-'} | {found} |")
    if results and experiment.drawing is not None:
        lines += ["", f"![{experiment.title}](images/{experiment.name}.svg)"]
    if results:
        dates = sorted({result.date for result in results})
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        hours = sum(result.seconds for result in results) / 3600
        told = f"Run {when}, {hours:.1f} hours by the clock; commands are in"
        lines += ["", told, f"{_stored_at(experiment)}."]
    return "\n".join([*lines, ""])


def _stored_at(experiment: Experiment) -> str:
    name = f"{experiment.name}.json"
    return f"[{name}](../benchmarks/reproduce/results/{name})"


def write_into(page: Path, sections: Sequence[str]) -> None:
    """Puts the sections between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(sections) + f"\n{END}{after}", encoding="utf-8")
