"""Rules, each of which has something to say in one situation of a job; the first that has is its status."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from metaloom.k8s.admission import read_refusal
from metaloom.k8s.exit_codes import FINAL, exit_words
from metaloom.k8s.happening import newest
from metaloom.k8s.heartbeat import Progress, allowed_silence_s
from metaloom.k8s.pod_state import NodeState
from metaloom.k8s.queueing import kueue_words, queue_details, read_lack
from metaloom.k8s.top_state import Condition, true_conditions
from metaloom.k8s.view import View, has_failed, verb
from metaloom.k8s.wording import clock_words, counted, duration_words

State = Literal["queued", "starting", "running", "restarting", "stopping", "done", "failed", "unknown"]
_POLICY = re.compile(r"Container \S+ for pod (\S+) failed with exit code (\d+) matching")
_INDEXED = re.compile(r"-(\d+)-[a-z0-9]{5}$")
_UNATTENDED_S = 120


@dataclasses.dataclass(frozen=True)
class Told:
    """What a rule has to say."""

    state: State
    headline: str
    details: Sequence[str] = ()
    is_stuck: bool = False
    exit_code: int | None = None


def _took(view: View) -> str:
    started, ended = view.job.started, view.job.ended
    return "" if started is None or ended is None else duration_words((ended - started).total_seconds())


def _progress_words(progress: Progress | None) -> str:
    """step 1200 of 5000; "" where no step was told."""
    if progress is None or progress.step is None:
        return ""
    phase = "" if progress.phase == "meta-train" else f"{progress.phase} "
    return f"{phase}step {progress.step}" + ("" if progress.total is None else f" of {progress.total}")


# ---------------------------------------------------------------- how it ended


def _done(view: View) -> Told | None:
    if view.job.outcome is None or view.job.outcome[0] != "done":
        return None
    took, progress = _took(view), view.beat.progress
    steps = f", {progress.step} steps" if progress is not None and progress.is_ended and progress.step else ""
    return Told("done", f"done: finished{f' in {took}' if took else ''}{steps}", _restarted_lines(view))


def _failed(view: View) -> Told | None:
    if view.job.outcome is None or view.job.outcome[0] != "failed":
        return None
    condition = view.job.outcome[1]
    words, details, code = _failure(view, condition)
    took = _took(view)
    headline = f"failed{f' after {took}' if took else ''}: {words}"
    return Told("failed", headline, [*details, *_restarted_lines(view)], exit_code=code)


def _failure(view: View, condition: Condition) -> tuple[str, list[str], int | None]:
    """Why a job failed, more lines on it, and the run's exit code."""
    conditions = [condition, *(found for found in map(_failed_condition, view.others) if found is not None)]
    reached = _steps_reached(view)
    if any(
        "DeadlineExceeded" in one.reason or "than specified deadline" in one.message for one in conditions
    ):
        limit = view.job.deadline_s
        of = "" if limit is None else f" of {duration_words(limit)} (activeDeadlineSeconds {limit})"
        return f"it ran for longer than its deadline{of}", reached, None
    node = view.blamed()
    gave_up = [line for line in map(_gave_up, conditions) if line][:1]
    error = view.error_lines(node)
    if node is not None:
        words, own = _cause(view, node, error)
        return words, [*own, *gave_up, *reached], node.exit_code
    for one in conditions:
        named = _POLICY.search(one.message)
        if named is not None:
            code = int(named[2])
            who = _named_node(named[1].rpartition("/")[2], view)
            first = f": {error[0]}" if error else ""
            return f"{who} ended with {exit_words(code)}{first}", [*error[1:], *reached], code
    words = condition.message or condition.reason or "the cluster gives no reason"
    return words, [*(f"error: {error[0]}" if error else "",), *error[1:], *reached], None


def _named_node(pod: str, view: View) -> str:
    """A pod that is gone, as the node that it was, by the index in its name."""
    index = _INDEXED.search(pod)
    if index is None:
        return f"pod {pod}"
    return view.who(NodeState(int(index[1]), pod, None, "failed", ""))


def _failed_condition(other: Mapping[str, Any]) -> Condition | None:
    """The condition of a Job inside another object by which it failed."""
    if other.get("kind") != "Job":
        return None
    return next((one for one in true_conditions(other) if one.kind in ("Failed", "FailureTarget")), None)


def _gave_up(condition: Condition) -> str:
    """What is said of a limit of restarts that is reached."""
    limits = ("BackoffLimitExceeded", "ReachedMaxRestarts", "MaxFailedIndexesExceeded", "FailedIndexes")
    if condition.reason in limits or "backoff limit" in condition.message:
        return f"not started again: {condition.message or condition.reason}"
    return ""


def _cause(view: View, node: NodeState, error: Sequence[str]) -> tuple[str, list[str]]:
    """What a node did that others ended by, and more lines on it."""
    where = "" if node.machine is None else f"pod {node.pod} on machine {node.machine}"
    words = f"{view.who(node)} {verb(node, 1)}"
    is_own = not node.is_out_of_memory and not node.disruption
    if is_own and error:
        return f"{words}: {error[0]}", [*error[1:], where]
    advice = []
    if node.is_out_of_memory:
        advice = ["give its pods more memory, or lower outer.micro_batch or loading.read_ahead"]
    return words, [*(f"error: {line}" for line in error[:1]), *advice, where]


def _steps_reached(view: View) -> list[str]:
    words = _progress_words(view.beat.progress)
    return [f"it had come to {words}"] if words else []


def _restarted_lines(view: View) -> list[str]:
    """What there was of restarts."""
    lines = []
    number = view.num_restarts()
    if number:
        before = view.before()
        cause = f", the last time since {before}" if before and not before.startswith("restart ") else ""
        lines.append(f"started again by the cluster {_times(number)}{cause}")
    if view.beat.restart is not None:
        at, of = view.beat.restart
        cause = f", the last time since {view.beat.fault}" if view.beat.fault else ""
        lines.append(f"restarted inside its pods {_times(at)} of {of}{cause}")
    return lines


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


# ---------------------------------------------------------------- how it ends


def _deleted(view: View) -> Told | None:
    if not view.job.is_deleted:
        return None
    left = view.are("running", "stopping", "starting", "lost")
    if not left:
        return Told("stopping", "stopping: deleted, and about to be gone")
    words = f"{view.what(left)} {'saves and ends' if len(left) == 1 else 'save and end'}"
    return Told("stopping", f"stopping: deleted; {words}", _steps_reached(view))


def _ending(view: View) -> Told | None:
    if view.job.verdict is None:
        return None
    outcome, condition = view.job.verdict
    left = view.are("running", "stopping", "starting", "queued")
    others = f"; {view.what(left)} {'is' if len(left) == 1 else 'are'} being stopped" if left else ""
    if outcome == "done":
        return Told("stopping", f"stopping: done{others}")
    words, details, code = _failure(view, condition)
    return Told("stopping", f"stopping: it has failed, since {words}{others}", details, exit_code=code)


# ---------------------------------------------------------------- before it runs


def _suspended(view: View) -> Told | None:
    if not view.job.is_suspended:
        return None
    wanted = _wanted(view.job.nodes, view.job.gpus_per_node)
    if not view.job.queue:
        headline = f"queued for {wanted}: suspended, so it has no pods until spec.suspend is false"
        return Told("queued", headline)
    told = kueue_words(view.others, view.happenings)
    again = f"{told.evicted_by}, and " if told.evicted_by else ""
    headline = (
        f"queued for {wanted}: {again}waiting in Kueue's queue {view.job.queue}{' again' if again else ''}"
    )
    details = [told.why_evicted, told.why_waiting, *queue_details(view.others), *_restarted_lines(view)]
    return Told("queued", headline, details)


def _wanted(num_nodes: int, gpus_per_node: int) -> str:
    if gpus_per_node:
        return counted(num_nodes * gpus_per_node, "GPU")
    return counted(num_nodes, "node")


def _not_created(view: View) -> Told | None:
    """Pods that the cluster refuses to make."""
    if not view.num_missing():
        return None
    newest_pod = max((one.created for one in view.present if one.created is not None), default=None)
    refusals = [
        one
        for one in view.happenings
        if one.kind != "Pod"
        and (one.reason.startswith("FailedCreate") or one.reason.endswith("CreationFailed"))
        and one.is_after(newest_pod)
    ]
    if not refusals:
        return None
    refusal = read_refusal(refusals[-1].message)
    who = _wanted(view.num_missing(), view.job.gpus_per_node)
    if refusal.is_passing:
        return Told("queued", f"queued for {who}: {refusal.words}", refusal.details)
    return Told(
        "starting",
        f"cannot start: {refusal.words}",
        [*refusal.details, *_again_lines(view)],
        is_stuck=True,
    )


def _again_lines(view: View) -> list[str]:
    before = view.before()
    return [f"started again, since {before}"] if before else []


def _in_trouble(view: View) -> Told | None:
    """Pods that have a machine and cannot start."""
    nodes = [one for one in view.present if one.trouble]
    if not nodes:
        return None
    first = nodes[0]
    same = [one for one in nodes if one.trouble == first.trouble]
    who = "" if len(same) == view.job.nodes else f" ({view.what(same)})"
    others = [f"{view.who(one)}: {one.trouble}" for one in nodes if one.trouble != first.trouble]
    headline = f"cannot start: {first.trouble}{who}"
    return Told("starting", headline, [*others[:3], *_again_lines(view)], is_stuck=True)


def _unscheduled(view: View) -> Told | None:
    waiting = view.are("queued")
    if not waiting:
        return None
    before = view.before()
    again = f"{before}; " if before else ""
    wanted = _wanted(len(waiting), view.job.gpus_per_node)
    message = next((one.unscheduled for one in waiting if one.unscheduled), "")
    lack = read_lack(message)
    details = _autoscaler_lines(view)
    placed = [one for one in view.present if one.phase != "queued"]
    if placed and not before:
        verbs = "has a machine, and waits" if len(placed) == 1 else "have machines, and wait"
        details.append(f"{view.what(placed)} {verbs} for the rest")
    prefix = f"queued{' again' if again else ''} for {wanted}"
    if lack is None:
        why = message or waiting[0].words
        return Told("queued", f"{again}{prefix}: {why}", details)
    reasons = [f"{number} of {lack.num_total} {words}" if number else words for number, words in lack.reasons]
    if lack.is_of_gpus:
        headline = f"{prefix}: 0 of the cluster's {counted(lack.num_total, 'node')} have them free"
        if len(reasons) == 1:
            reasons = []
    elif len(reasons) == 1 and lack.reasons[0][0] == 0:
        # Of the pod itself, as a claim that is not there: no node will change that.
        return Told("queued", f"{again}{prefix}: {reasons[0]}", details, is_stuck=True)
    else:
        headline = f"{prefix}: none of the cluster's {counted(lack.num_total, 'node')} can take it"
    return Told("queued", f"{again}{headline}", [*reasons, *details])


def _autoscaler_lines(view: View) -> list[str]:
    one = newest(view.happenings, "TriggeredScaleUp", "NotTriggerScaleUp")
    if one is None:
        return []
    verb = "adds nodes" if one.reason == "TriggeredScaleUp" else "adds no node"
    return [f"the autoscaler {verb}: {one.message}"]


# ---------------------------------------------------------------- while it runs


def _disrupted(view: View) -> Told | None:
    """Nodes that were ended from outside and are not replaced yet, or failed and will be."""
    bad = [one for one in view.present if has_failed(one) and one.phase != "lost"]
    if not bad:
        return None
    node = min(bad, key=lambda one: (not one.disruption, one.ended or view.now, one.index or 0))
    same = [one for one in bad if one.words == node.words]
    if len(same) > 1:
        words = f"{view.what(same)} {verb(node, len(same))}"
        more = view.error_lines(node)
        details = [f"error: {more[0]}", *more[1:]] if more else []
    else:
        words, details = _cause(view, node, view.error_lines(node))
    if node.exit_code in FINAL:
        return Told(
            "stopping", f"stopping: {words}", [*details, *_steps_reached(view)], exit_code=node.exit_code
        )
    return Told("restarting", f"restarting: {words}", [*details, *_steps_reached(view)])


def _lost(view: View) -> Told | None:
    lost = view.are("lost")
    if not lost:
        return None
    rest = view.are("running")
    others = f"; {view.what(rest)} {'runs' if len(rest) == 1 else 'run'}" if rest else ""
    what = (
        f"{view.who(lost[0])}: {lost[0].words}" if len(lost) == 1 else f"{view.what(lost)}: {lost[0].words}"
    )
    stuck = [one for one in lost if one.is_stuck]
    if stuck:
        detail = (
            f"pod {stuck[0].pod} was to end and cannot: it stays until its machine is back, or is taken out "
            f"of the cluster (kubectl delete node {stuck[0].machine})"
        )
    else:
        detail = "the cluster replaces the pods of a machine that stays silent, by default after 5 minutes"
    details = [detail, *_steps_reached(view)]
    return Told("unknown", f"unknown: {what}{others}", details, is_stuck=bool(stuck))


def _starting(view: View) -> Told | None:
    starting = view.are("starting")
    missing = view.num_missing()
    if not starting and not missing:
        return None
    before = view.before()
    state: State = "restarting" if before else "starting"
    prefix = f"restarting: {before}; " if before else "starting: "
    details = _steps_reached(view) if before else []
    if starting:
        words = starting[0].words.removeprefix("starting: ")
        who = f"{view.what(starting)}: " if len(starting) < view.job.nodes else ""
        return Told(state, f"{prefix}{who}{words}", details)
    if view.present:
        have = "has" if missing == 1 else "have"
        return Told(
            state, f"{prefix}{missing} of {counted(view.job.nodes, 'node')} {have} no pod yet", details
        )
    return _without_pods(view, state, prefix, details)


def _without_pods(view: View, state: State, prefix: str, details: list[str]) -> Told:
    warning = next((one for one in reversed(view.happenings) if one.is_warning and one.kind != "Pod"), None)
    said = [f"{warning.kind} {warning.name}: {warning.reason}: {warning.message}"] if warning else []
    since = view.job.created
    waited_s = 0.0 if since is None else (view.now - since).total_seconds()
    if waited_s > _UNATTENDED_S and not view.job.is_seen:
        controller = f"the controller of {view.job.kind}s"
        words = f"nobody has taken it up for {duration_words(waited_s)}: is {controller} running?"
        return Told(state, f"{prefix}{words}", [*said, *details], is_stuck=True)
    return Told(state, f"{prefix}the cluster has it, and no pod is there yet", [*said, *details])


def _running(view: View) -> Told | None:
    running = view.are("running")
    if not running:
        return None
    beat, details = view.beat, _restarted_lines(view)
    done = view.are("done")
    if done:
        details = [f"{view.what(done)} {'is' if len(done) == 1 else 'are'} done", *details]
    stopping = view.are("stopping")
    if stopping:
        details = [*(f"{view.who(one)}: {one.words}" for one in stopping[:3]), *details]
    if beat.is_restarting and beat.restart is not None:
        cause = f": {beat.fault}" if beat.fault else ""
        headline = f"restarting ({beat.restart[0]} of {beat.restart[1]}) from the last checkpoint{cause}"
        silence = _silence(view, running)
        return Told("restarting", headline, [silence] if silence else [])
    silence = _silence(view, running)
    if silence:
        reached = _progress_words(beat.progress)
        at = f", at {reached}" if reached else ""
        return Told("running", f"running, but {silence}{at}", details)
    return Told("running", f"running: {_going_words(view, running)}", details)


def _going_words(view: View, running: Sequence[NodeState]) -> str:
    progress = view.beat.progress
    if progress is None:
        since = max((one.started for one in running if one.started is not None), default=None)
        when = "" if since is None else f" since {clock_words(since, view.now)}"
        return f"on {counted(len(running), 'node')}{when}; no step is told yet"
    if progress.is_ended:
        if progress.phase == "meta-train":
            return f"{progress.phase} is done after {counted(progress.step or 0, 'step')}, and it is ending"
        return f"{progress.phase} is done"
    if progress.step is None:
        return f"{progress.phase} of {counted(progress.total or 0, 'step')} has begun"
    words = _progress_words(progress)
    if progress.eta is not None:
        left = duration_words((progress.eta - view.now).total_seconds())
        return f"{words}, {left} left (until {clock_words(progress.eta, view.now)})"
    if progress.left_s is not None:
        return f"{words}, {duration_words(progress.left_s)} left"
    return words


def _silence(view: View, running: Sequence[NodeState]) -> str:
    """Since when nothing was heard, where that is longer than a run that goes well is silent; else ""."""
    started = max((one.started for one in running if one.started is not None), default=None)
    if not view.is_heard or (view.beat.num_lines and view.beat.heard_at is None):
        return ""
    times = [moment for moment in (started, view.beat.heard_at) if moment is not None]
    if not times:
        return ""
    heard = max(times)
    silent_s = (view.now - heard).total_seconds()
    if silent_s <= allowed_silence_s(view.beat.progress):
        return ""
    since = clock_words(heard, view.now)
    return f"nothing has been heard of it since {since} ({duration_words(silent_s)})"


def _all_done(view: View) -> Told | None:
    if view.present and len(view.are("done")) == len(view.present):
        return Told("stopping", "stopping: all nodes are done, and the cluster is about to say so")
    left = view.are("stopping")
    if left:
        return Told("stopping", f"stopping: {view.what(left)}: {left[0].words}", _steps_reached(view))
    return None


def _unknown(view: View) -> Told:
    return Told("unknown", "unknown: neither its object nor its pods say what it does")


RULES: tuple[Callable[[View], Told | None], ...] = (
    _done,
    _failed,
    _deleted,
    _ending,
    _suspended,
    _not_created,
    _in_trouble,
    _unscheduled,
    _disrupted,
    _lost,
    _starting,
    _running,
    _all_done,
    _unknown,
)
