"""The report: what it says, and that it says it honestly, safely and without fetching anything."""

import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from metaloom.disk import Disk
from metaloom.errors import TrackingError
from metaloom.tracking.base import MetricRecord
from metaloom.tracking.cosines import CosineRecord, add_cosines, mean_cosines, read_cosines
from metaloom.tracking.figures import (
    curve_names,
    draw_adaptation,
    draw_cosines,
    draw_learning_curve,
    save_figure,
)
from metaloom.tracking.report import write_report
from metaloom.tracking.results import (
    EvaluationSummary,
    MethodResult,
    effort_rows,
    forgetting_rows,
    format_estimate,
    headline,
    summary_rows,
)


def method(
    name: str,
    mean: tuple[float, ...],
    ci95: float = 0.004,
    *,
    metric: str = "accuracy",
    rehearsal: tuple[float, float] | None = None,
) -> MethodResult:
    return MethodResult(
        name=name,
        inner_rate="0.4",
        metric=metric,
        higher_is_better=metric == "accuracy",
        mean=mean,
        ci95=(ci95,) * len(mean),
        num_episodes=2000,
        num_clusters=312,
        training=f"training of {name}",
        rehearsal=rehearsal,
    )


def comparison(*methods: MethodResult) -> EvaluationSummary:
    return EvaluationSummary("glyphs", "test", methods, ("a note",))


OURS = method("meta-trained", (0.2, 0.7, 0.931), rehearsal=(1.2, 1.31))
EQUAL = method("ordinary, equal data", (0.2, 0.6, 0.889))
RANDOM = method("random init", (0.2, 0.3, 0.4))
CURVES = [
    MetricRecord(
        step,
        1.0 + step,
        {"loss_after": 1 / (step + 1), "loss_before": 2.0, "validation_accuracy": 0.5, "pretrain/loss": 3.0},
    )
    for step in range(100)
]


class Page(HTMLParser):
    """The text, the tags and everything that could be fetched from a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")
        ]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def report(
    folder: Path, summary: EvaluationSummary, title: str = "a run", curves: list[MetricRecord] | None = None
) -> str:
    facts = {"version.python": "3.11", "recipe": "recipes/glyphs.yaml"}
    paths = write_report(
        folder / "report.html",
        title=title,
        facts=facts,
        curves=CURVES if curves is None else curves,
        evaluation=summary,
    )
    assert all(path.is_file() for path in paths)
    return paths[0].read_text(encoding="utf-8")


def test_the_headline_says_who_wins_by_how_much() -> None:
    assert headline(comparison(OURS, RANDOM, EQUAL)) == (
        "Meta-trained wins: 93.1 ± 0.4 % accuracy after 2 adaptation steps on glyphs (test), "
        "4.2 ± 0.6 points above the best baseline, ordinary, equal data (88.9 ± 0.4 %)."
    )


def test_the_headline_is_honest_when_meta_training_loses() -> None:
    better = dataclasses.replace(EQUAL, mean=(0.2, 0.6, 0.951))
    assert headline(comparison(OURS, better)) == (
        "Meta-training does not win: meta-trained has 93.1 ± 0.4 % accuracy after 2 adaptation steps on "
        "glyphs (test), 2.0 ± 0.6 points below ordinary, equal data (95.1 ± 0.4 %)."
    )


def test_the_headline_claims_no_winner_within_the_uncertainty() -> None:
    level = dataclasses.replace(EQUAL, mean=(0.2, 0.6, 0.929))
    assert headline(comparison(OURS, level)) == (
        "No clear winner: meta-trained has 93.1 ± 0.4 % accuracy after 2 adaptation steps on glyphs (test), "
        "ordinary, equal data (92.9 ± 0.4 %) is as good within the uncertainty (difference 0.2 ± 0.6 points)."
    )


def test_lower_bits_per_byte_win() -> None:
    ours = method("meta-trained", (3.0, 2.314), 0.012, metric="bits per byte")
    other = method("equal data", (3.0, 2.5), 0.005, metric="bits per byte")
    assert headline(comparison(ours, other)) == (
        "Meta-trained wins: 2.314 ± 0.012 bits per byte after 1 adaptation step on glyphs (test), "
        "0.186 ± 0.013 below the best baseline, equal data (2.500 ± 0.005)."
    )
    assert headline(comparison(other, ours)).startswith(
        "Meta-training does not win: equal data has 2.500 ± 0.005"
    )
    assert "0.186 ± 0.013 above meta-trained" in headline(comparison(other, ours))


def test_a_method_far_from_all_others_is_named_but_not_drawn() -> None:
    far = method("random init", (0.9, 0.91, 0.92))
    near = method("other", (0.2, 0.25, 0.3))
    ours = method("meta-trained", (0.2, 0.25, 0.31))
    figure = draw_adaptation(comparison(ours, near, far))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "meta-trained",
        "other",
        "random init: 90 to 92, off the scale",
    ]
    assert figure.axes[0].get_ylim()[1] < 60.0


def test_the_headline_without_baselines_or_finite_numbers_claims_nothing() -> None:
    assert headline(comparison(OURS)).endswith("there is no baseline to compare it with.")
    diverged = dataclasses.replace(OURS, mean=(0.2, math.nan, math.nan))
    assert headline(comparison(diverged, EQUAL)).startswith("No result: meta-trained has no finite accuracy")
    assert "no baseline" in headline(comparison(OURS, diverged))
    unknown = dataclasses.replace(EQUAL, ci95=(math.nan,) * 3)
    assert "4.2 points above ordinary, equal data (88.9 %); no interval is known" in headline(
        comparison(OURS, unknown)
    )


def test_estimates_read_as_people_write_them() -> None:
    assert format_estimate("accuracy", 0.9312, 0.00412) == "93.1 ± 0.4 %"
    assert format_estimate("bits per byte", 2.3141, 0.0119) == "2.314 ± 0.012"
    assert format_estimate("accuracy", math.nan, math.nan) == "not finite"


def test_tables_have_a_row_per_step_and_say_what_each_method_was_given() -> None:
    level = dataclasses.replace(EQUAL, paired_ci95=(0.01, 0.01, 0.003))
    summary = comparison(OURS, level, method("prototypes", (0.8,)))
    columns, rows = summary_rows(summary)
    assert columns == ["adaptation", "meta-trained", "ordinary, equal data", "prototypes"]
    assert [row[:2] for row in rows] == [
        ["before", "20.0 ± 0.4 %"],
        ["step 1", "70.0 ± 0.4 %"],
        ["step 2", "93.1 ± 0.4 %"],
    ]
    assert [row[3] for row in rows] == ["80.0 ± 0.4 %", "–", "–"]
    assert effort_rows(summary)[1][:2] == [
        ["meta-trained", "–", "0.4", "training of meta-trained"],
        ["ordinary, equal data", "+4.2 ± 0.3 points", "0.4", "training of ordinary, equal data"],
    ]
    assert forgetting_rows(summary)[1] == [["meta-trained", "1.200", "1.310", "+0.110"]]
    assert summary_rows(comparison(method("a", (0.5,))))[1] == [["before", "50.0 ± 0.4 %"]]


def test_the_headline_takes_the_paired_interval_where_it_is_known() -> None:
    unpaired = method("ordinary, equal data", (0.2, 0.6, 0.930))
    assert headline(comparison(OURS, unpaired)).startswith("No clear winner")
    paired = dataclasses.replace(unpaired, paired_ci95=(0.0, 0.0, 0.0005))
    assert "0.1 ± 0.1 points above the best baseline" in headline(comparison(OURS, paired))
    assert EvaluationSummary.from_json(comparison(OURS, paired).to_json()).methods[1].paired_ci95 == (
        0.0,
        0.0,
        0.0005,
    )


def test_a_summary_survives_json_with_numbers_that_json_does_not_have() -> None:
    summary = comparison(OURS, dataclasses.replace(EQUAL, mean=(0.1, math.inf, 0.3)))
    assert EvaluationSummary.from_json(summary.to_json()) == summary
    diverged = comparison(dataclasses.replace(OURS, mean=(0.1, 0.2, math.nan)))
    assert math.isnan(EvaluationSummary.from_json(diverged.to_json()).methods[0].mean[2])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"methods": [{}], "notes": []}'])
def test_text_that_is_no_summary_is_an_error_with_a_fix(text: str) -> None:
    with pytest.raises(TrackingError, match=r"not an evaluation summary .*metaloom evaluate"):
        EvaluationSummary.from_json(text)


def test_summaries_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one method"):
        comparison()
    with pytest.raises(ValueError, match="by the same metric"):
        comparison(OURS, method("other", (1.0,), metric="bits per byte"))
    with pytest.raises(ValueError, match="2 means and 1 half widths"):
        dataclasses.replace(OURS, mean=(0.1, 0.2), ci95=(0.1,))


def test_the_page_holds_the_result_the_tables_the_figures_and_the_facts(tmp_path: Path) -> None:
    page = Page(report(tmp_path, comparison(OURS, EQUAL, RANDOM)))
    text = " ".join(page.text).replace("\xa0", " ")
    for words in (
        headline(comparison(OURS, EQUAL, RANDOM)),
        "training of random init",
        "70.0 ± 0.4 %",
        "over 2,000 episodes in 312 clusters",
        "+0.110",
        "a note",
        "recipes/glyphs.yaml",
        "adaptation steps",
        "outer steps",
    ):
        assert words in text
    assert page.tags.count("svg") == 2
    assert page.tags.count("table") == 3
    for name in ("adaptation.png", "learning_curve.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    text = report(tmp_path, comparison(OURS, EQUAL))
    page = Page(text)
    assert "https://" not in text
    assert "http://" not in text
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert all(address.startswith("#") for address in page.addresses)
    assert "default-src 'none'" in text


def test_every_reference_inside_the_figures_is_defined_once(tmp_path: Path) -> None:
    text = report(tmp_path, comparison(OURS, EQUAL))
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(ids)


def test_figures_on_the_page_take_its_colours(tmp_path: Path) -> None:
    text = report(tmp_path, comparison(OURS, EQUAL))
    assert "currentColor" in text
    assert "prefers-color-scheme: dark" in text
    assert "#010203" not in text
    assert "#040506" not in text


def test_texts_are_escaped_everywhere(tmp_path: Path) -> None:
    planted = '<script>alert("x")</script>'
    evil = dataclasses.replace(OURS, name=planted, inner_rate=planted, training=planted)
    summary = EvaluationSummary(planted, planted, (evil, EQUAL), (planted,))
    curves = [MetricRecord(step, 0.0, {f"{planted}_loss": 1.0}) for step in range(3)]
    page = Page(report(tmp_path, summary, title=planted, curves=curves))
    assert "script" not in page.tags
    assert planted in "".join(page.text)


@pytest.mark.parametrize("name", ["$x^{", "_hidden", "模型", "a\nb"])
def test_names_are_drawn_as_they_are_whatever_they_hold(tmp_path: Path, name: str) -> None:
    report(tmp_path, comparison(dataclasses.replace(OURS, name=name), EQUAL))


def test_a_run_without_outer_loop_metrics_has_no_learning_curve(tmp_path: Path) -> None:
    page = report(tmp_path, comparison(OURS), curves=[MetricRecord(0, 0.0, {"pretrain/loss": 1.0})])
    assert Page(page).tags.count("svg") == 1
    assert not (tmp_path / "learning_curve.png").exists()
    assert draw_learning_curve([]) is None


def test_the_learning_curve_shows_the_outer_loop_only() -> None:
    assert curve_names(CURVES) == ["loss_after", "validation_accuracy"]
    figure = draw_learning_curve(CURVES)
    assert figure is not None
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy [%]"]


def test_numbers_that_are_not_finite_leave_gaps(tmp_path: Path) -> None:
    curves = [MetricRecord(step, 0.0, {"meta_loss": math.inf if step % 2 else 1.0}) for step in range(200)]
    diverged = dataclasses.replace(OURS, mean=(0.2, math.inf, math.nan))
    report(tmp_path, comparison(diverged, EQUAL), curves=curves)
    (axes,) = draw_adaptation(comparison(diverged, EQUAL)).axes
    assert all(math.isfinite(limit) for limit in axes.get_ylim())


# ---------------------------------------------------------------- cosines between gradients


def cosines(step: int, labels: str, cosine: float, of: str = "groups") -> CosineRecord:
    rows = tuple(tuple(1.0 if a == b else cosine for b in labels) for a in labels)
    return CosineRecord(step, of, tuple(labels), rows)


def test_cosines_are_averaged_over_the_later_half_and_pairs_that_never_met_are_left_empty() -> None:
    records = [cosines(1, "ab", 0.9), cosines(2, "ab", -0.2), cosines(3, "abc", -0.4), cosines(4, "ad", 0.1)]
    shown = mean_cosines(records, most=3)
    assert shown is not None
    assert (shown.step, shown.of, shown.labels) == (4, "groups", ("a", "b", "c"))
    assert shown.values[0][1] == pytest.approx(-0.4)
    assert shown.values[2] == pytest.approx((-0.4, -0.4, 1.0))
    shown = mean_cosines(records, most=4)
    assert shown is not None
    assert math.isnan(shown.values[1][3])
    assert mean_cosines([], most=3) is None


def test_of_tasks_the_last_steps_cosines_are_shown() -> None:
    shown = mean_cosines([cosines(1, "12", 0.9, "tasks"), cosines(2, "345", -0.2, "tasks")], most=2)
    assert shown == cosines(2, "34", -0.2, "tasks")


def test_a_resumed_run_writes_its_cosines_over_those_of_a_lost_attempt(tmp_path: Path) -> None:
    path = tmp_path / "cosines.jsonl"
    assert read_cosines(path) == []
    for record in (
        cosines(2, "ab", 0.1),
        cosines(4, "ab", 0.2),
        cosines(6, "ab", 0.3),
        cosines(4, "ab", 0.4),
    ):
        add_cosines(path, record, Disk())
    with path.open("a") as file:
        file.write('{"step": 6, "of"')  # torn by a killed process
    assert read_cosines(path) == [cosines(2, "ab", 0.1), cosines(4, "ab", 0.4)]


@pytest.mark.parametrize("num_groups", [2, 15])
def test_the_report_has_a_heat_map_of_cosines_without_pictures_or_addresses(
    tmp_path: Path, num_groups: int
) -> None:
    labels = "abcdefghijklmnopqrstu"[:num_groups]
    paths = write_report(
        tmp_path / "report.html",
        title="a run",
        facts={},
        curves=CURVES,
        evaluation=comparison(OURS, EQUAL),
        cosines=[cosines(4, labels, -0.25)],
    )
    assert tmp_path / "cosines.png" in paths
    assert all(path.is_file() for path in paths)
    page = Page(paths[0].read_text(encoding="utf-8"))
    assert "image" not in page.tags
    assert all(address.startswith("#") for address in page.addresses)
    text = " ".join(page.text)
    assert "Cosines between the meta-gradients of groups, mean over the later half of meta-training" in text
    assert ("\N{MINUS SIGN}0.25" in text) == (num_groups == 2)
    save_figure(draw_cosines(cosines(6, "$_", 0.5)), tmp_path / "signs.png", "png")  # mathematics elsewhere


def test_a_report_without_cosines_has_no_heat_map(tmp_path: Path) -> None:
    assert "Cosines" not in report(tmp_path, comparison(OURS, EQUAL))
    assert not (tmp_path / "cosines.png").exists()
