"""Why a cluster takes no pods of a job, in words: a quota, limits, pod security, an unknown class."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

from metaloom.k8s.quantities import parse_quantity
from metaloom.k8s.wording import listed

_PREFIX = re.compile(r'^(?:Error creating: )?(?:pods? "[^"]*" is forbidden: )?')
_QUOTA = re.compile(r"exceeded quota: ([^,]+), requested: (.*), used: (.*), limited: (.*)", re.DOTALL)
_UNSAID = re.compile(r"failed quota: ([^:]+): must specify (.*)", re.DOTALL)
_SECURITY = re.compile(r'violates PodSecurity "([^"]*)": (.*)', re.DOTALL)
_LIMIT = re.compile(
    r"(?:(?:minimum|maximum) (\S+) usage|(\S+) max limit to request ratio) per (?:Container|Pod) is "
)
_PRIORITY = re.compile(r"no PriorityClass with name (\S+) was found")
# The options that ask for an amount of a pod.
OPTIONS = {
    "cpu": "--cpus-per-node",
    "memory": "--memory-per-node",
    "ephemeral-storage": "--ephemeral-storage",
}
# By what pods of metaloom have an amount that a quota counts.
SAID_BY = {
    "requests.cpu": "--cpus-per-node",
    "cpu": "--cpus-per-node",
    "limits.cpu": "a default of the namespace (LimitRange), since pods of metaloom limit no processors",
    "requests.memory": "--memory-per-node",
    "memory": "--memory-per-node",
    "limits.memory": "--memory-per-node",
}


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why pods of a job are not made.

    Attributes:
        words: without a full stop.
        is_passing: whether they are made once other work has ended.
        details: lines.
        advice: what to do; "" where the words say it.
        quota: the name of the quota that refuses them; "" where it is none.
    """

    words: str
    is_passing: bool = False
    details: tuple[str, ...] = ()
    advice: str = ""
    quota: str = ""


def read_refusal(message: str) -> Refusal:
    """What a server, or an event of a controller that it has refused a pod, says."""
    said = _PREFIX.sub("", message)
    if (quota := _QUOTA.search(said)) is not None:
        return _read_quota(*quota.groups())
    if (unsaid := _UNSAID.match(said)) is not None:
        name, what = unsaid.groups()
        amounts = [word.strip() for word in re.split("[;,]", re.sub(r" for: [^;]*", "", what))]
        words = f"the quota {name} of the namespace counts {listed(amounts)}, which they do not say"
        by = list(dict.fromkeys(SAID_BY[amount] for amount in amounts if amount in SAID_BY))
        return Refusal(words, advice=f"it takes {listed(by)}" if by else "", quota=name)
    if (security := _SECURITY.match(said)) is not None:
        level, why = security.groups()
        advice = "name a namespace that admits them with --namespace, or ask who runs the cluster"
        if "IPC_LOCK" in why:
            advice = f"leave out --rdma, whose pods may lock memory (IPC_LOCK), or {advice}"
        return Refusal(f"the namespace admits no such pods (pod security {level})", False, (why,), advice)
    if limited := _LIMIT.findall(said):
        names = dict.fromkeys(name for found in limited for name in found if name)
        options = [OPTIONS[name] for name in names if name in OPTIONS]
        advice = f"change {listed(options)}" if options else "ask for as much as that allows"
        limits = " ".join(said.strip("[]").split())
        return Refusal("a limit of the namespace (LimitRange) does not allow it", False, (limits,), advice)
    if (priority := _PRIORITY.search(said)) is not None:
        words = f"the cluster has no PriorityClass {priority[1]}"
        return Refusal(words, advice="name another with --priority-class (kubectl get priorityclasses)")
    return Refusal(said)


def _read_quota(name: str, requested: str, used: str, limited: str) -> Refusal:
    lines = tuple(f"requested {requested}; used {used} of {limited}".splitlines())
    limits = _amounts(limited)
    beyond = [key for key, amount in _amounts(requested).items() if key in limits and amount > limits[key]]
    if beyond:
        words = f"one pod asks for more {', '.join(beyond)} than the quota {name} of the namespace allows"
        return Refusal(words, False, lines, "ask for less", quota=name)
    return Refusal(f"the quota {name} of the namespace is used up", True, lines, quota=name)


def _amounts(text: str) -> dict[str, Fraction]:
    """The quantities of `limits.memory=2Gi,pods=1`; what is none is left out."""
    amounts: dict[str, Fraction] = {}
    for word in text.split(","):
        key, _, amount = word.partition("=")
        try:
            amounts[key] = parse_quantity(amount)
        except ValueError:
            continue
    return amounts
