"""Results of an evaluation, as numbers and in words."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from metaloom.errors import TrackingError
from metaloom.tracking.jsonl import decode_number, encode_number

_NUMBERS = ("mean", "ci95", "rehearsal", "paired_ci95")


@dataclass(frozen=True)
class GroupResult:
    """How well a method does on the episodes of one group, after its last adaptation step.

    The half width is over the group's episodes, each by itself: of a small group these share samples, and the
    interval is then too narrow. It is infinite for a single episode.
    """

    name: str
    mean: float
    ci95: float
    num_episodes: int


@dataclass(frozen=True)
class StreamResult:
    """How well a method predicts what comes next in a group, adapted to the unlabelled inputs before it.

    Means and half widths are by the number of inputs that were seen.
    """

    seen: tuple[int, ...]
    mean: tuple[float, ...]
    ci95: tuple[float, ...]


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
    groups: tuple[GroupResult, ...] = ()  # in the order of their names; empty where episodes have none
    stream: StreamResult | None = None

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
            for group in method["groups"]:
                group |= {name: encode_number(group[name]) for name in ("mean", "ci95")}
            if method["stream"] is not None:
                for name in ("mean", "ci95"):
                    method["stream"][name] = [encode_number(value) for value in method["stream"][name]]
        return json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @property
    def has_groups(self) -> bool:
        return any(method.groups for method in self.methods)

    @property
    def has_streams(self) -> bool:
        return any(method.stream is not None for method in self.methods)

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
    groups = tuple(
        GroupResult(**(group | {name: decode_number(group[name]) for name in ("mean", "ci95")}))
        for group in fields["groups"]
    )
    stream = fields["stream"]
    if stream is not None:
        means, widths = (tuple(map(decode_number, stream[name])) for name in ("mean", "ci95"))
        stream = StreamResult(tuple(stream["seen"]), means, widths)
    return MethodResult(**(fields | numbers | {"groups": groups, "stream": stream}))


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
    return capitalized(_headline(summary))


def capitalized(text: str) -> str:
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
