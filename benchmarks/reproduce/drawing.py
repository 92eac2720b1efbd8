"""The figure of an experiment."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reproduce.experiments import Experiment, Shown
from benchmarks.reproduce.running import Result
from benchmarks.reproduce.table import value_of

COLOURS = ("#0a84d6", "#d55e00", "#009e73", "#cc79a7")
MARKERS = ("o", "s", "^", "D")


def draw(experiment: Experiment, results: Sequence[Result], folder: Path) -> None:
    """Writes `<experiment>.svg`; nothing for an experiment without a figure, or without results.

    Points are means over seeds, their bars 95 % intervals over episodes where there is one seed.
    """
    if experiment.drawing is None or not results:
        return
    import matplotlib
    from matplotlib.figure import Figure

    panels = experiment.drawing.panels
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, series in enumerate(_series(experiment)):
            points = _points(experiment, results, series, Shown("", measure=panel.measure))
            places = [place for place, _, _ in points]
            if panel.against is not None:
                others = _points(experiment, results, series, Shown("", measure=panel.against))
                places = [value for _, value, _ in others]
                for (share, mean, _), place in zip(points, places, strict=True):
                    axes.annotate(
                        f"{share:g}", (place, mean), textcoords="offset points", xytext=(5, 5), fontsize=8
                    )
            axes.errorbar(
                places,
                [mean for _, mean, _ in points],
                yerr=[half for _, _, half in points],
                label=series,
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                capsize=3,
            )
        axes.set_xlabel(experiment.drawing.x if panel.against is None else panel.against_label)
        axes.set_ylabel(panel.label)
        axes.grid(True, color="#d5dae0", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    # No date and no random names in it: the same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": experiment.name}):
        figure.savefig(folder / f"{experiment.name}.svg", metadata={"Date": None})


def _series(experiment: Experiment) -> list[str]:
    return list(dict.fromkeys(training.at[0] for training in experiment.trainings if training.at is not None))


def _points(
    experiment: Experiment, results: Sequence[Result], series: str, shown: Shown
) -> list[tuple[float, float, float]]:
    """Place, mean and half width of the interval of each training of a series that was run."""
    points = []
    for training in experiment.trainings:
        own = [result for result in results if result.training == training.name]
        if training.at is None or training.at[0] != series or not own:
            continue
        found = [value for result in own if (value := value_of(result, shown)) is not None]
        if not found:
            continue
        half = found[0][1] if len(found) == 1 else None
        points.append((training.at[1], statistics.fmean(mean for mean, _ in found), half or 0.0))
    return sorted(points)
