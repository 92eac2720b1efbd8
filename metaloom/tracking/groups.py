"""What an evaluation says of groups and of streams, as tables of text."""

from metaloom.tracking.results import EvaluationSummary, GroupResult, MethodResult, format_estimate

NUM_SHOWN = 10


def worst_group(method: MethodResult) -> GroupResult | None:
    """The group that a method does worst on; None where episodes have no groups. The first by name of those
    that are as bad. A group that has no finite mean is worse than any other."""
    sign = 1.0 if method.higher_is_better else -1.0
    # Comparisons with NaN are false: no key of its own would put it anywhere.
    badness = {group: (group.mean == group.mean, sign * group.mean) for group in method.groups}
    return min(method.groups, key=badness.__getitem__, default=None)


def group_average(method: MethodResult) -> float:
    """The mean over groups, each of which counts once."""
    return sum(group.mean for group in method.groups) / len(method.groups)


def group_rows(summary: EvaluationSummary) -> tuple[list[str], list[list[str]]]:
    """The average over groups, the worst group of each method, and the groups that the first method does
    worst on, by method. No rows where episodes have no groups."""
    methods = [method for method in summary.methods if method.groups]
    columns = ["group", *(method.name for method in methods)]
    if not methods:
        return columns, []
    worst = [worst_group(method) for method in methods]
    rows = [
        ["average over groups", *(_words(method, group_average(method)) for method in methods)],
        [
            "worst group",
            *(
                f"{_words(method, group.mean, group.ci95)} ({group.name})"
                for method, group in zip(methods, worst, strict=True)
                if group is not None
            ),
        ],
    ]
    by_name = [{group.name: group for group in method.groups} for method in methods]
    ours = methods[0]
    ranked = sorted(ours.groups, key=lambda group: group.mean, reverse=not ours.higher_is_better)
    for name in (group.name for group in ranked[:NUM_SHOWN]):
        cells = [
            _words(method, groups[name].mean, groups[name].ci95) if name in groups else "–"
            for method, groups in zip(methods, by_name, strict=True)
        ]
        rows.append([name, *cells])
    return columns, rows


def stream_rows(summary: EvaluationSummary) -> tuple[list[str], list[list[str]]]:
    """How well what comes next is predicted, by the inputs that were seen before: a row for each number of
    them. No rows where there was no stream."""
    methods = [method for method in summary.methods if method.stream is not None]
    streams = [method.stream for method in methods if method.stream is not None]
    columns = ["inputs seen", *(method.name for method in methods)]
    positions = streams[0].seen if streams else ()
    return columns, [
        [
            f"{seen}",
            *(
                _words(method, stream.mean[place], stream.ci95[place])
                for method, stream in zip(methods, streams, strict=True)
            ),
        ]
        for place, seen in enumerate(positions)
    ]


def _words(method: MethodResult, mean: float, ci95: float = float("inf")) -> str:
    return format_estimate(method.metric, mean, ci95)
