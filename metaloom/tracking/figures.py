"""The figures of a report: adaptation curves and learning curves, as PNG and as inline SVG."""

import html
import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaloom.tracking.base import MetricRecord
from metaloom.tracking.results import EvaluationSummary, MethodResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS = "#0a84d6"
_OTHERS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#7f7f7f")
_MARKERS = ("o", "s", "^", "D", "v", "P")

# Colours that stand for the page's own in an SVG; replaced by CSS variables.
_INK, _RULE = "#010203", "#040506"
PAGE_COLOURS = {_INK: "currentColor", _RULE: "var(--rule)"}
PRINT_COLOURS = {_INK: "#1d2329", _RULE: "#d5dae0"}

_PANELS = (
    ("loss", "loss", 1.0),
    ("accuracy", "accuracy [%]", 100.0),
    ("bits_per_byte", "bits per byte", 1.0),
)


def _finite(values: Iterable[float], scale: float = 1.0) -> list[float]:
    """The values times `scale`; infinities become NaN, which leaves a gap instead of an endless axis."""
    return [scale * value if math.isfinite(value) else math.nan for value in values]


def _style(axes: "Axes", colours: Mapping[str, str]) -> None:
    ink, rule = colours[_INK], colours[_RULE]
    axes.patch.set_visible(False)
    axes.grid(True, color=rule, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
        spine.set_linewidth(0.8)
    axes.tick_params(colors=ink, labelsize=9, length=3)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(ink)
        label.set_fontsize(10)


def _whole_steps(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def _add_legend(figure: "Figure", handles: Sequence[Any], labels: Sequence[str], ink: str) -> None:
    # A leading underscore means "not in the legend" to matplotlib, a dollar sign mathematics.
    shown = [label.lstrip("_") or "unnamed" for label in labels]
    longest = max(len(label) for label in shown)
    legend = figure.legend(
        handles,
        shown,
        loc="outside lower center",
        ncols=min(len(shown), 3 if longest <= 16 else 2 if longest <= 30 else 1),
        frameon=False,
        fontsize=9,
        labelcolor=ink,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def draw_adaptation(summary: EvaluationSummary, colours: Mapping[str, str] = PRINT_COLOURS) -> "Figure":
    """The metric over adaptation steps: one line per method, the meta-trained on top.

    Bands are 95 % intervals: of the difference from the meta-trained where methods are paired, else of
    the means. A method that is far from all others would press them together: it is named, not drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    is_accuracy = summary.methods[0].metric == "accuracy"
    scale = 100.0 if is_accuracy else 1.0
    handles, labels = [], []
    is_paired = any(method.paired_ci95 is not None for method in summary.methods)
    for index, method in enumerate(summary.methods):
        is_ours = index == 0
        if _is_far_off(summary, method):
            ends = " to ".join(f"{scale * value:.4g}" for value in (method.mean[0], method.mean[-1]))
            handles.append(axes.plot([], [], linestyle="")[0])
            labels.append(f"{method.name}: {ends}, off the scale")
            continue
        colour = _OURS if is_ours else _OTHERS[(index - 1) % len(_OTHERS)]
        steps = list(range(len(method.mean)))
        widths = method.paired_ci95 or ((0.0,) * len(steps) if is_paired else method.ci95)
        mean, ci95 = _finite(method.mean, scale), _finite(widths, scale)
        low = [m - c for m, c in zip(mean, ci95, strict=True)]
        high = [m + c for m, c in zip(mean, ci95, strict=True)]
        depth = 10 if is_ours else 5
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0, zorder=depth - 1)
        (line,) = axes.plot(
            steps,
            mean,
            color=colour,
            linewidth=2.8 if is_ours else 1.5,
            linestyle="-" if is_ours else "--",
            marker=_MARKERS[index % len(_MARKERS)] if len(steps) <= 21 else "",
            markersize=6 if is_ours else 4.5,
            zorder=depth,
        )
        handles.append(line)
        labels.append(method.name)
    axes.set_xlabel("adaptation steps")
    axes.set_ylabel(
        "accuracy on query data [%]" if is_accuracy else f"{summary.methods[0].metric} on query data"
    )
    if is_accuracy:
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(float(bottom), -2.0), min(float(top), 102.0))
    _whole_steps(axes)
    _style(axes, colours)
    _add_legend(figure, handles, labels, colours[_INK])
    return figure


def draw_groups(summary: EvaluationSummary, colours: Mapping[str, str] = PRINT_COLOURS) -> "Figure":
    """The metric of each group with its interval, one row of points per method, the groups that the first
    method does worst on first."""
    from matplotlib.figure import Figure

    methods = [method for method in summary.methods if method.groups]
    ours = methods[0]
    ranked = sorted(ours.groups, key=lambda group: group.mean, reverse=not ours.higher_is_better)
    place = {group.name: position for position, group in enumerate(ranked, 1)}
    figure = Figure(figsize=(5.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    scale = 100.0 if ours.metric == "accuracy" else 1.0
    handles = []
    for index, method in enumerate(methods):
        shown = [group for group in method.groups if group.name in place]
        handles.append(
            axes.errorbar(
                [place[group.name] for group in shown],
                _finite((group.mean for group in shown), scale),
                yerr=_finite((group.ci95 for group in shown), scale),
                color=(_OURS, *_OTHERS)[index % (1 + len(_OTHERS))],
                fmt=_MARKERS[index % len(_MARKERS)],
                markersize=4.5,
                linewidth=1.0,
            )
        )
    axes.set_xlabel(f"groups, those that {ours.name} does worst on first")
    axes.set_ylabel("accuracy on query data [%]" if ours.metric == "accuracy" else ours.metric)
    _whole_steps(axes)
    _style(axes, colours)
    _add_legend(figure, handles, [method.name for method in methods], colours[_INK])
    return figure


def draw_streams(summary: EvaluationSummary, colours: Mapping[str, str] = PRINT_COLOURS) -> "Figure":
    """The metric of what comes next over the inputs seen before it, on a scale of doublings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    metric = summary.methods[0].metric
    scale = 100.0 if metric == "accuracy" else 1.0
    handles, labels = [], []
    for index, method in enumerate(summary.methods):
        if method.stream is None:
            continue
        colour = (_OURS, *_OTHERS)[index % (1 + len(_OTHERS))]
        seen, mean = method.stream.seen, _finite(method.stream.mean, scale)
        width = _finite(method.stream.ci95, scale)
        low = [m - c for m, c in zip(mean, width, strict=True)]
        high = [m + c for m, c in zip(mean, width, strict=True)]
        axes.fill_between(seen, low, high, color=colour, alpha=0.2, linewidth=0)
        handles += axes.plot(seen, mean, color=colour, linewidth=2.0, marker=_MARKERS[index % len(_MARKERS)])
        labels.append(method.name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(seen, [f"{each}" for each in seen])
    axes.set_xlabel("unlabelled inputs of the group seen before")
    unit = "accuracy [%]" if metric == "accuracy" else metric
    axes.set_ylabel(f"{unit} of what comes next")
    _style(axes, colours)
    _add_legend(figure, handles, labels, colours[_INK])
    return figure


def _is_far_off(summary: EvaluationSummary, method: MethodResult) -> bool:
    """Whether a method's curve lies further from the first one's than that moves, several times over."""
    ours = summary.methods[0]
    if method is ours or not all(map(math.isfinite, (*ours.mean, *method.mean))):
        return False
    low, high = min(ours.mean), max(ours.mean)
    distance = max(min(method.mean) - high, low - max(method.mean))
    return distance > 3.0 * (high - low)


def curve_names(curves: Sequence[MetricRecord]) -> list[str]:
    """The metrics of the outer loop that a learning curve shows, in the order of their appearance."""
    names = dict.fromkeys(name for record in curves for name in record.metrics)
    return [name for name in names if "/" not in name and any(_ends(name, panel[0]) for panel in _PANELS)]


def _ends(name: str, ending: str) -> bool:
    return name.removesuffix("_after").endswith(ending)


def draw_learning_curve(
    curves: Sequence[MetricRecord], colours: Mapping[str, str] = PRINT_COLOURS
) -> "Figure | None":
    """Losses and validation over outer steps, one panel per unit; None where there is nothing to show.

    Curves of more than 80 points are drawn thin, with their running mean over a fortieth on top.
    """
    from matplotlib.figure import Figure

    names = curve_names(curves)
    panels = [
        (label, scale, shown)
        for ending, label, scale in _PANELS
        if (shown := [name for name in names if _ends(name, ending)][:6])
    ]
    if not panels:
        return None
    figure = Figure(figsize=(5.4, 1.4 + 2.0 * len(panels)), layout="constrained")
    handles: list[Any] = []
    labels: list[str] = []
    palette = (_OURS, *_OTHERS)
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, scale, shown) in zip(all_axes, panels, strict=True):
        for name in shown:
            index = len(labels)
            records = [record for record in curves if name in record.metrics]
            steps = [record.step for record in records]
            values = _finite((record.metrics[name] for record in records), scale)
            colour = palette[index % len(palette)]
            style = "-" if index % 2 == 0 else "--"
            if len(values) > 80:
                axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
                values = _running_mean(values, len(values) // 40)
            marker = "o" if len(values) <= 20 else ""
            handles += axes.plot(
                steps, values, color=colour, linewidth=2.0, linestyle=style, marker=marker, markersize=4
            )
            labels.append(re.sub("_after$", "_after_adaptation", name).replace("_", " "))
        axes.set_ylabel(label)
        _style(axes, colours)
    all_axes[-1].set_xlabel("outer steps")
    _whole_steps(all_axes[-1])
    _add_legend(figure, handles, labels, colours[_INK])
    return figure


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the finite values among the last `width`, per position; NaN where there are none."""
    means = []
    for index in range(len(values)):
        window = [value for value in values[max(0, index - width + 1) : index + 1] if math.isfinite(value)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def save_figure(figure: "Figure", target: Path | io.BytesIO, kind: str) -> None:
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcParams["svg.fonttype"] = "none"
        mpl.rcParams["svg.hashsalt"] = "metaloom"
        # Names may have letters that the font lacks: boxes in a figure are no reason to fail.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        if kind == "png":
            figure.savefig(target, format="png", dpi=160, facecolor="white")
        else:
            metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
            figure.savefig(target, format="svg", transparent=True, metadata=metadata)


def inline_svg(figure: "Figure", prefix: str, title: str) -> str:
    """The figure as an element of a page: page colours, ids of its own, no addresses."""
    buffer = io.BytesIO()
    save_figure(figure, buffer, "svg")
    svg = buffer.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for placeholder, colour in PAGE_COLOURS.items():
        svg = svg.replace(placeholder, colour)
    head, _, rest = svg.partition(">")
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(title)}">{rest}'
