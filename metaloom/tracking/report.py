"""One self-contained HTML page about a run: the result in a sentence, its numbers, its figures.

Nothing is fetched from anywhere: styles are inline, figures are inline SVG whose text and axes take
the colour of the page, so that they read well on light and dark. The figures also lie beside the
page as PNG files.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from metaloom.tracking.base import MetricRecord
from metaloom.tracking.figures import (
    PAGE_COLOURS,
    draw_adaptation,
    draw_groups,
    draw_learning_curve,
    draw_streams,
    inline_svg,
    save_figure,
)
from metaloom.tracking.groups import group_rows, stream_rows
from metaloom.tracking.results import (
    EvaluationSummary,
    capitalized,
    effort_rows,
    forgetting_rows,
    headline,
    summary_rows,
)

LEARNING_CURVE_FILE = "learning_curve.png"
ADAPTATION_FILE = "adaptation.png"
GROUPS_FILE = "groups.png"
STREAM_FILE = "stream.png"

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
        f"{capitalized(ours.metric)}, {direction} is better; ± is the 95 % confidence interval over "
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
    save_figure(draw_adaptation(evaluation), adaptation_png, "png")
    written.append(adaptation_png)
    svg = inline_svg(draw_adaptation(evaluation, {c: c for c in PAGE_COLOURS}), "a", "adaptation curves")
    metric = capitalized(evaluation.methods[0].metric)
    is_paired = any(method.paired_ci95 is not None for method in evaluation.methods)
    of_what = " of the difference from the meta-trained, on the same episodes" if is_paired else ""
    figures = [_figure(svg, f"{metric} over adaptation steps; bands are 95 % confidence intervals{of_what}")]

    printed = draw_learning_curve(curves)
    on_page = draw_learning_curve(curves, {c: c for c in PAGE_COLOURS})
    if printed is not None and on_page is not None:
        curve_png = path_html.parent / LEARNING_CURVE_FILE
        save_figure(printed, curve_png, "png")
        written.append(curve_png)
        svg = inline_svg(on_page, "b", "learning curve")
        figures.append(_figure(svg, "Meta-training: losses and validation over outer steps"))

    of_groups = f"{metric} of each group, with 95 % intervals"
    of_streams = f"{metric} over a stream of unlabelled inputs"
    for is_there, draw, file, key, caption in (
        (evaluation.has_groups, draw_groups, GROUPS_FILE, "c", of_groups),
        (evaluation.has_streams, draw_streams, STREAM_FILE, "d", of_streams),
    ):
        if is_there:
            save_figure(draw(evaluation), path_html.parent / file, "png")
            written.append(path_html.parent / file)
            svg = inline_svg(draw(evaluation, {c: c for c in PAGE_COLOURS}), key, caption)
            figures.append(_figure(svg, caption))

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
    parts += _of_groups(evaluation)
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


def _of_groups(evaluation: EvaluationSummary) -> list[str]:
    """What the page says of groups and of streams, where there are any."""
    parts = []
    columns, rows = group_rows(evaluation)
    if rows:
        parts += [
            "<h2>Groups</h2>",
            _table(columns, rows),
            '<p class="soft">The worst of several groups is also the unluckiest: with few episodes of each, '
            "it looks worse than it is. Intervals are over the episodes of a group.</p>",
        ]
    columns, rows = stream_rows(evaluation)
    if rows:
        parts += [
            "<h2>Stream</h2>",
            _table(columns, rows),
            '<p class="soft">Inputs of a group come one after another, without labels: those after the first '
            "n, up to twice as many, are predicted by what the first n say.</p>",
        ]
    return parts
