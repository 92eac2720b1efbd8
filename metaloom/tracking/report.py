"""One self-contained HTML page about a run: the result in a sentence, its numbers, its figures.

Nothing is fetched from anywhere: styles are inline, figures are inline SVG whose text and axes take
the colour of the page, so that they read well on light and dark. The figures also lie beside the
page as PNG files.
"""

import html
import io
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaloom.errors import TrackingError
from metaloom.tracking.base import MetricRecord
from metaloom.tracking.jsonl import decode_number, encode_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEARNING_CURVE_FILE = "learning_curve.png"
ADAPTATION_FILE = "adaptation.png"
_NUMBERS = ("mean", "ci95", "rehearsal", "paired_ci95")


@dataclass(frozen=True)
class MethodResult:
    """How one way of getting initial weights does on held-out tasks.

    Means and half widths are per adaptation step 0..K; accuracies lie between 0 and 1.
    """

    name: str  # "meta-trained", "random init", "ordinary, equal data"
    inner_rate: str  # for people: "0.4" or "learned"
    metric: str  # "accuracy" or "bits per byte"
    higher_is_better: bool
    mean: tuple[float, ...]
    ci95: tuple[float, ...]  # half widths of the 95 % confidence intervals
    num_episodes: int
    num_clusters: int  # groups of episodes that share classes or files, which the interval allows for
    training: str  # for people: the data and compute spent
    rehearsal: tuple[float, float] | None = None  # loss on pre-training data before and after adaptation
    # Half widths of the intervals of the difference from the first method, which has met the same
    # episodes; None for the first method itself.
    paired_ci95: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        paired = self.ci95 if self.paired_ci95 is None else self.paired_ci95
        if not self.mean or not len(self.mean) == len(self.ci95) == len(paired):
            raise ValueError(
                f"{self.name!r}: {len(self.mean)} means and {len(self.ci95)} half widths; "
                "there is one of each per adaptation step, from step 0 on"
            )


@dataclass(frozen=True)
class EvaluationSummary:
    """The methods compared on one split; the first one is the meta-trained, the others are baselines."""

    dataset: str
    split: str
    methods: tuple[MethodResult, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("an evaluation compares at least one method")
        if len({(method.metric, method.higher_is_better) for method in self.methods}) > 1:
            raise ValueError("methods of one evaluation are compared by the same metric")

    @property
    def num_steps(self) -> int:
        """K, the most adaptation steps of any method."""
        return max(len(method.mean) for method in self.methods) - 1

    def to_json(self) -> str:
        """The summary as strict JSON; NaN and infinities become strings."""
        fields = asdict(self)
        for method in fields["methods"]:
            for name in _NUMBERS:
                if method[name] is not None:
                    method[name] = [encode_number(value) for value in method[name]]
        return json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "EvaluationSummary":
        """Inverse of `to_json`.

        Raises:
            TrackingError: the text is something else.
        """
        try:
            fields = json.loads(text)
            methods = tuple(_method_from(method) for method in fields.pop("methods"))
            notes = tuple(str(note) for note in fields.pop("notes"))
            return cls(**fields, methods=methods, notes=notes)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TrackingError(
                f"not an evaluation summary ({error}). Summaries are written by `metaloom evaluate`; "
                "run it again on this run."
            ) from error


def _method_from(fields: dict[str, Any]) -> MethodResult:
    numbers = {
        name: None if fields[name] is None else tuple(map(decode_number, fields[name])) for name in _NUMBERS
    }
    return MethodResult(**(fields | numbers))


# ---------------------------------------------------------------------------------- numbers in words


def format_estimate(metric: str, mean: float, ci95: float) -> str:
    """`93.1 ± 0.4 %` for accuracies, `2.314 ± 0.012` for other metrics."""
    if not math.isfinite(mean):
        return "not finite"
    if metric == "accuracy":
        return f"{100 * mean:.1f} ± {100 * ci95:.1f} %" if math.isfinite(ci95) else f"{100 * mean:.1f} %"
    return f"{mean:.3f} ± {ci95:.3f}" if math.isfinite(ci95) else f"{mean:.3f}"


def summary_rows(summary: EvaluationSummary) -> tuple[list[str], list[list[str]]]:
    """The comparison as (columns, rows) of text: a row for each adaptation step, a column for each method."""
    columns = ["adaptation", *(method.name for method in summary.methods)]
    rows = []
    for step in range(summary.num_steps + 1):
        estimates = [
            format_estimate(method.metric, method.mean[step], method.ci95[step])
            if step < len(method.mean)
            else "–"
            for method in summary.methods
        ]
        rows.append(["before" if step == 0 else f"step {step}", *estimates])
    return columns, rows


def effort_rows(summary: EvaluationSummary) -> tuple[list[str], list[list[str]]]:
    """How far each method is behind the first, and what it was given: inner rate, training."""
    ours = summary.methods[0]
    sign = 1.0 if ours.higher_is_better else -1.0
    rows = [
        [
            method.name,
            "–"
            if method.paired_ci95 is None
            else _format_signed(
                method.metric, sign * (ours.mean[-1] - method.mean[-1]), method.paired_ci95[-1]
            ),
            method.inner_rate or "–",
            method.training or "–",
        ]
        for method in summary.methods
    ]
    return ["method", f"{summary.methods[0].name} ahead by", "inner rate", "training"], rows


def forgetting_rows(summary: EvaluationSummary) -> tuple[list[str], list[list[str]]]:
    """The loss on pre-training data before and after adaptation; no rows where none was measured."""
    rows = [
        [method.name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
        for method in summary.methods
        if method.rehearsal is not None
        for before, after in [method.rehearsal]
    ]
    return ["method", "before", "after", "change"], rows


def headline(summary: EvaluationSummary) -> str:
    """Who wins, by how much, and whether that could be chance.

    The interval is that of the paired difference where it is known (`MethodResult.paired_ci95`), else the
    root of the summed squares of both half widths, as if the methods had met different tasks.
    """
    return _capitalized(_headline(summary))


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _headline(summary: EvaluationSummary) -> str:
    ours, baselines = summary.methods[0], summary.methods[1:]
    steps = len(ours.mean) - 1
    after = f"after {steps} adaptation step{'' if steps == 1 else 's'}" if steps else "without adaptation"
    where = f"on {summary.dataset} ({summary.split})"
    if not math.isfinite(ours.mean[-1]):
        return f"No result: {ours.name} has no finite {ours.metric} {after} {where}."
    result = f"{format_estimate(ours.metric, ours.mean[-1], ours.ci95[-1])} {ours.metric} {after} {where}"
    finite = [method for method in baselines if math.isfinite(method.mean[-1])]
    if not finite:
        return f"{ours.name} reaches {result}; there is no baseline to compare it with."
    sign = 1.0 if ours.higher_is_better else -1.0
    best = max(finite, key=lambda method: sign * method.mean[-1])
    gain = sign * (ours.mean[-1] - best.mean[-1])
    half_width = math.hypot(ours.ci95[-1], best.ci95[-1])
    if best.paired_ci95 is not None:
        half_width = best.paired_ci95[-1]
    rival = f"{best.name} ({format_estimate(best.metric, best.mean[-1], best.ci95[-1])})"
    amount = _format_difference(ours.metric, abs(gain), half_width)
    better, worse = ("above", "below") if ours.higher_is_better else ("below", "above")
    if not math.isfinite(half_width):
        relation = better if gain > 0 else worse
        return f"{ours.name} reaches {result}, {amount} {relation} {rival}; no interval is known for that."
    if gain > half_width:
        return f"{ours.name} wins: {result}, {amount} {better} the best baseline, {rival}."
    if gain < -half_width:
        return f"Meta-training does not win: {ours.name} has {result}, {amount} {worse} {rival}."
    return (
        f"No clear winner: {ours.name} has {result}, {rival} is as good within the uncertainty "
        f"(difference {amount})."
    )


def _format_signed(metric: str, value: float, half_width: float) -> str:
    sign = "-" if value < 0 else "+"
    return sign + _format_difference(metric, abs(value), half_width) if math.isfinite(value) else "–"


def _format_difference(metric: str, value: float, half_width: float) -> str:
    scale, digits, unit = (100.0, 1, " points") if metric == "accuracy" else (1.0, 3, "")
    width = f" ± {scale * half_width:.{digits}f}" if math.isfinite(half_width) else ""
    return f"{scale * value:.{digits}f}{width}{unit}"


# ------------------------------------------------------------------------------------------- figures

# Okabe and Ito's palette for colour-blind readers; markers tell the lines apart without colour.
_OURS = "#0a84d6"
_OTHERS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#7f7f7f")
_MARKERS = ("o", "s", "^", "D", "v", "P")

# Colours that stand for the page's own in an SVG; replaced by CSS variables.
_INK, _RULE = "#010203", "#040506"
_PAGE_COLOURS = {_INK: "currentColor", _RULE: "var(--rule)"}
_PRINT_COLOURS = {_INK: "#1d2329", _RULE: "#d5dae0"}

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


def draw_adaptation(summary: EvaluationSummary, colours: Mapping[str, str] = _PRINT_COLOURS) -> "Figure":
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
    curves: Sequence[MetricRecord], colours: Mapping[str, str] = _PRINT_COLOURS
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


def _save(figure: "Figure", target: Path | io.BytesIO, kind: str) -> None:
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


def _inline_svg(figure: "Figure", prefix: str, title: str) -> str:
    """The figure as an element of a page: page colours, ids of its own, no addresses."""
    buffer = io.BytesIO()
    _save(figure, buffer, "svg")
    svg = buffer.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for placeholder, colour in _PAGE_COLOURS.items():
        svg = svg.replace(placeholder, colour)
    head, _, rest = svg.partition(">")
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(title)}">{rest}'


# ---------------------------------------------------------------------------------------------- page

_CSS = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1d2329; --soft: #5b6672; --rule: #d9dee4;
  --card: #f5f7f9; --ours: #0a6ebd; }
@media (prefers-color-scheme: dark) { :root { --page: #14181c; --ink: #e4e8ec; --soft: #9aa5b1;
  --rule: #343c45; --card: #1c2228; --ours: #5ab4f2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1.25rem 3rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.15rem; font-weight: 600; color: var(--soft); margin: 0 0 .5rem; overflow-wrap: anywhere; }
.headline { font-size: 1.45rem; line-height: 1.35; margin: 0 0 1.5rem; text-wrap: pretty; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1.5rem;
  align-items: start; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .875rem; margin-top: .4rem; }
svg { width: 100%; height: auto; display: block; } svg text { font-family: inherit !important; }
.wide { overflow-x: auto; border: 1px solid var(--rule); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .75rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
tr:last-child td, tr:last-child th { border-bottom: 0; }
thead th { background: var(--card); font-weight: 600; }
th:first-child, .words { text-align: left; } td.words { white-space: normal; min-width: 12rem; }
tbody th { font-weight: 400; position: sticky; left: 0; background: var(--page); white-space: normal;
  min-width: 7rem; overflow-wrap: anywhere; }
tr.ours th, tr.ours td { font-weight: 600; } tr.ours th { color: var(--ours); }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1.25rem; margin: 0;
  font-size: .9rem; }
dt { color: var(--soft); overflow-wrap: anywhere; } dd { margin: 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); font-size: .875rem; }
@media (max-width: 32rem) { .headline { font-size: 1.2rem; } body { padding: 1rem .9rem 2rem; } }
"""


_WORDS = ' class="words"'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names the row; cells of running words are set to the left and folded.

    Where rows are methods, the first one, the meta-trained, stands out.
    """
    words = {"training"}
    head = "".join(
        f'<th scope="col"{_WORDS if column in words else ""}>{html.escape(column)}</th>' for column in columns
    )
    body = []
    for index, row in enumerate(rows):
        cells = [f'<th scope="row">{html.escape(row[0])}</th>']
        for column, cell in zip(columns[1:], row[1:], strict=True):
            kind = _WORDS if column in words else ""
            cells.append(f"<td{kind}>{html.escape(cell)}</td>")
        kind = ' class="ours"' if index == 0 and columns[0] == "method" else ""
        body.append(f"<tr{kind}>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _unbroken(text: str) -> str:
    """The text with its estimates kept on one line each."""
    return text.replace(" ± ", "&nbsp;±&nbsp;").replace(" %", "&nbsp;%")


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _interval_words(summary: EvaluationSummary) -> str:
    ours = summary.methods[0]
    direction = "higher" if ours.higher_is_better else "lower"
    clusters = f" in {ours.num_clusters:,} clusters" if ours.num_clusters != ours.num_episodes else ""
    return (
        f"{_capitalized(ours.metric)}, {direction} is better; ± is the 95 % confidence interval over "
        f"{ours.num_episodes:,} episodes{clusters}"
    )


def write_report(
    path_html: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    curves: Sequence[MetricRecord],
    evaluation: EvaluationSummary,
) -> list[Path]:
    """Writes the page and, beside it, its figures as PNG; returns the paths, the page first.

    Args:
        path_html: the page; its folder is made.
        title: name of the run.
        facts: what the run was made of, by name.
        curves: records of metrics.jsonl; without any of an outer loop there is no learning curve.
        evaluation: the comparison; its first method is the meta-trained.
    """
    path_html.parent.mkdir(parents=True, exist_ok=True)
    written = [path_html]

    adaptation_png = path_html.parent / ADAPTATION_FILE
    _save(draw_adaptation(evaluation), adaptation_png, "png")
    written.append(adaptation_png)
    svg = _inline_svg(draw_adaptation(evaluation, {c: c for c in _PAGE_COLOURS}), "a", "adaptation curves")
    metric = _capitalized(evaluation.methods[0].metric)
    is_paired = any(method.paired_ci95 is not None for method in evaluation.methods)
    of_what = " of the difference from the meta-trained, on the same episodes" if is_paired else ""
    figures = [_figure(svg, f"{metric} over adaptation steps; bands are 95 % confidence intervals{of_what}")]

    printed = draw_learning_curve(curves)
    on_page = draw_learning_curve(curves, {c: c for c in _PAGE_COLOURS})
    if printed is not None and on_page is not None:
        curve_png = path_html.parent / LEARNING_CURVE_FILE
        _save(printed, curve_png, "png")
        written.append(curve_png)
        svg = _inline_svg(on_page, "b", "learning curve")
        figures.append(_figure(svg, "Meta-training: losses and validation over outer steps"))

    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="headline">{_unbroken(html.escape(headline(evaluation)))}</p>',
        f'<div class="figures">{"".join(figures)}</div>',
        "<h2>Methods</h2>",
        _table(*summary_rows(evaluation)),
        f'<p class="soft">{html.escape(_interval_words(evaluation))}.</p>',
        _table(*effort_rows(evaluation)),
    ]
    parts += [f'<p class="soft">{html.escape(note)}</p>' for note in evaluation.notes]
    columns, rows = forgetting_rows(evaluation)
    if rows:
        parts += [
            "<h2>Forgetting</h2>",
            _table(columns, rows),
            '<p class="soft">Loss on data of the pre-training kind, before and after adaptation; '
            "a positive change is forgetting.</p>",
        ]
    listed = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items()
    )
    if listed:
        parts += ["<h2>Facts</h2>", f"<dl>{listed}</dl>"]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_CSS}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    path_html.write_text(page, encoding="utf-8")
    return written
