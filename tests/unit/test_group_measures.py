"""What episodes say of groups: means, the worst, intervals; and how a report tells it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from metaloom.group_measures import group_results, worst_of_groups
from metaloom.tracking.groups import group_average, group_rows, stream_rows, worst_group
from metaloom.tracking.report import write_report
from metaloom.tracking.results import EvaluationSummary, GroupResult, MethodResult, StreamResult


def method(name: str, groups: tuple[GroupResult, ...], stream: StreamResult | None = None) -> MethodResult:
    return MethodResult(
        name, "none", "accuracy", True, (0.5,), (0.1,), 4, 2, "none", groups=groups, stream=stream
    )


ARM = method(
    "meta-trained",
    (GroupResult("a", 0.9, 0.05, 4), GroupResult("b <i>", 0.4, math.inf, 1), GroupResult("c", 0.8, 0.1, 4)),
    StreamResult((1, 2, 4), (0.3, 0.5, 0.6), (0.1, 0.1, 0.1)),
)
ERM = method("erm", (GroupResult("a", 0.2, 0.05, 4), GroupResult("b <i>", 0.6, math.inf, 1)))
SUMMARY = EvaluationSummary("faces", "test", (ARM, ERM))


def test_groups_have_the_mean_and_the_interval_of_their_own_episodes() -> None:
    values, groups = [0.0, 1.0, 0.5, 0.7, 0.25], ["b", "b", "a", None, "b"]
    a, b = group_results(values, groups)
    assert (a.name, a.mean, a.ci95, a.num_episodes) == ("a", 0.5, math.inf, 1)
    mean = 1.25 / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in (0.0, 1.0, 0.25)) / 2)
    assert b.mean == pytest.approx(mean)
    assert b.ci95 == pytest.approx(4.30265 * deviation / math.sqrt(3), rel=1e-6)  # Student's, 2 degrees
    assert group_results(values, [None] * 5) == ()


def test_the_worst_group_has_the_largest_loss_and_the_smallest_score() -> None:
    measures = {"loss": [1.0, 3.0, 2.5, 9.0], "accuracy": [0.5, 0.7, 0.1, 0.0]}
    assert worst_of_groups(measures, ["a", "a", "b", None]) == {
        "worst_group_loss": 2.5,
        "worst_group_accuracy": 0.1,
    }
    assert worst_of_groups(measures, [None] * 4) == {}


def test_the_worst_group_is_named() -> None:
    worst = worst_group(ARM)
    assert worst is not None
    assert worst.name == "b <i>"
    assert worst_group(method("none", ())) is None
    assert group_average(ARM) == pytest.approx(0.7)
    broken = method("broken", (GroupResult("a", 0.1, 0.1, 2), GroupResult("b", math.nan, 0.1, 2)))
    found = worst_group(broken)
    assert found is not None
    assert found.name == "b"


def test_tables_have_average_and_worst_first_then_groups_from_the_worst_on() -> None:
    columns, rows = group_rows(SUMMARY)
    assert columns == ["group", "meta-trained", "erm"]
    assert rows == [
        ["average over groups", "70.0 %", "40.0 %"],
        ["worst group", "40.0 % (b <i>)", "20.0 ± 5.0 % (a)"],
        ["b <i>", "40.0 %", "60.0 %"],
        ["c", "80.0 ± 10.0 %", "–"],
        ["a", "90.0 ± 5.0 %", "20.0 ± 5.0 %"],
    ]
    assert group_rows(EvaluationSummary("faces", "test", (method("none", ()),)))[1] == []
    columns, rows = stream_rows(SUMMARY)
    assert columns == ["inputs seen", "meta-trained"]
    assert [row[0] for row in rows] == ["1", "2", "4"]
    assert rows[-1][1] == "60.0 ± 10.0 %"


def test_a_summary_with_groups_and_streams_is_read_back_from_json() -> None:
    assert EvaluationSummary.from_json(SUMMARY.to_json()) == SUMMARY


def test_the_report_has_tables_and_figures_of_groups_and_streams(tmp_path: Path) -> None:
    written = write_report(tmp_path / "report.html", title="t", facts={}, curves=[], evaluation=SUMMARY)
    assert {"groups.png", "stream.png"} <= {path.name for path in written}
    page = (tmp_path / "report.html").read_text()
    for text in ("<h2>Groups</h2>", "<h2>Stream</h2>", "b &lt;i&gt;", 'aria-label="Accuracy of each group'):
        assert text in page
    assert "b <i>" not in page
    plain = EvaluationSummary("faces", "test", (method("none", ()),))
    write_report(tmp_path / "plain.html", title="t", facts={}, curves=[], evaluation=plain)
    assert "<h2>Groups</h2>" not in (tmp_path / "plain.html").read_text()
