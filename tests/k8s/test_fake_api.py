"""The fake API server does as the real one, asked by the official client as it comes."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from metaloom.k8s.resources import (
    CONFIG_MAPS,
    EVENTS,
    JOB_SETS,
    JOBS,
    LIMIT_RANGES,
    LOCAL_QUEUES,
    PODS,
    PRIORITY_CLASSES,
    QUOTAS,
)
from tests.k8s.fake_api import FakeCluster
from tests.k8s.jobs import LABELS, config_map, job

kubernetes: Any = pytest.importorskip("kubernetes")


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeCluster]:
    with FakeCluster(tmp_path, kinds=[LOCAL_QUEUES]) as cluster:
        yield cluster


@pytest.fixture
def api(fake: FakeCluster) -> Iterator[Any]:
    with kubernetes.config.new_client_from_config(str(fake.kubeconfig)) as client:
        yield client
        client.rest_client.pool_manager.clear()


@pytest.fixture
def batch(api: Any) -> Any:
    return kubernetes.client.BatchV1Api(api)


@pytest.fixture
def core(api: Any) -> Any:
    return kubernetes.client.CoreV1Api(api)


def refusal(call: Callable[[], object]) -> tuple[int, str, str]:
    """Code, reason and message of a call that is refused."""
    with pytest.raises(kubernetes.client.ApiException) as caught:
        call()
    status = json.loads(caught.value.body)
    return caught.value.status, status["reason"], status["message"]


def phases(fake: FakeCluster) -> list[str]:
    return [pod["status"]["phase"] for pod in fake.pods("glyphs").all()]


def test_a_job_makes_pods_that_succeed_and_completes_in_two_steps(
    fake: FakeCluster, batch: Any, core: Any
) -> None:
    batch.create_namespaced_job("team", job())
    listed = core.list_namespaced_pod("team", label_selector="metaloom/job in (glyphs),!other").items
    assert [pod.metadata.labels["batch.kubernetes.io/job-completion-index"] for pod in listed] == ["0", "1"]
    assert [pod.status.phase for pod in listed] == ["Pending", "Pending"]
    pods = fake.pods("glyphs")
    pods.run()
    pods.log(0, "a", "b", "c")
    log = core.read_namespaced_pod_log(pods.name(0), "team", tail_lines=2, _preload_content=False)
    assert log.data == b"b\nc\n"
    pods.succeed(1)
    assert fake.get(JOBS, "glyphs")["status"]["completedIndexes"] == "1"
    pods.succeed(0)
    assert fake.conditions(JOBS, "glyphs") == ["SuccessCriteriaMet", "Complete"]
    assert batch.read_namespaced_job("glyphs", "team").status.succeeded == 2


def test_out_of_memory_is_replaced_until_the_backoff_limit_and_then_the_siblings_go(
    fake: FakeCluster, batch: Any
) -> None:
    batch.create_namespaced_job("team", job(backoffLimit=1))
    pods = fake.pods("glyphs")
    pods.run()
    pods.out_of_memory(1)
    state = pods.all()[1]["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (state["exitCode"], state["reason"]) == (137, "OOMKilled")
    assert sorted(phases(fake)) == ["Failed", "Pending", "Running"]
    pods.run()
    pods.out_of_memory(1)
    assert fake.conditions(JOBS, "glyphs") == ["FailureTarget", "Failed"]
    assert phases(fake) == ["Failed", "Failed"]
    assert fake.get(JOBS, "glyphs")["status"]["conditions"][-1]["reason"] == "BackoffLimitExceeded"


def test_a_preemption_is_ignored_and_an_exit_code_fails_the_job_where_the_policy_says_so(
    fake: FakeCluster, batch: Any
) -> None:
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 3]}},
    ]
    batch.create_namespaced_job("team", job(backoffLimit=0, podFailurePolicy={"rules": rules}))
    pods = fake.pods("glyphs")
    pods.run()
    pods.preempt(0)
    assert sorted(phases(fake)) == ["Failed", "Pending", "Running"]
    assert fake.get(JOBS, "glyphs")["status"]["failed"] == 0
    pods.run()
    pods.fail(1, code=3)
    ended = fake.get(JOBS, "glyphs")["status"]["conditions"][-1]
    assert (ended["type"], ended["reason"]) == ("Failed", "PodFailurePolicy")
    assert ended["message"].endswith("failed with exit code 3 matching FailJob rule at index 1")


def test_pods_that_wait_say_why_in_conditions_states_and_events(fake: FakeCluster, batch: Any) -> None:
    batch.create_namespaced_job("team", job())
    pods = fake.pods("glyphs")
    pods.unschedulable(0)
    pods.image_error(1, "manifest unknown")
    scheduled = pods.get(0)["status"]["conditions"][0]
    assert (scheduled["type"], scheduled["reason"]) == ("PodScheduled", "Unschedulable")
    waiting = pods.get(1)["status"]["containerStatuses"][0]["state"]["waiting"]
    assert waiting["reason"] == "ImagePullBackOff"
    reasons = {event["reason"] for event in fake.objects(EVENTS)}
    assert reasons == {"SuccessfulCreate", "FailedScheduling", "Failed", "BackOff"}


def test_a_deadline_ends_a_job_and_a_queue_holds_it_back(fake: FakeCluster, batch: Any) -> None:
    queued = job()
    queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "gpus"
    batch.create_namespaced_job("team", queued)
    assert fake.conditions(JOBS, "glyphs") == ["Suspended"]
    assert phases(fake) == []
    fake.admit("glyphs")
    assert phases(fake) == ["Pending", "Pending"]
    fake.exceed_deadline("glyphs")
    assert fake.conditions(JOBS, "glyphs") == ["FailureTarget", "Failed"]


def test_a_quota_refuses_pods_and_their_job_tells_in_an_event(
    fake: FakeCluster, batch: Any, core: Any
) -> None:
    fake.add(QUOTAS, {"metadata": {"name": "q"}, "spec": {"hard": {"limits.nvidia.com/gpu": "8"}}})
    batch.create_namespaced_job("team", job())
    assert len(phases(fake)) == 1
    created, event = sorted(fake.objects(EVENTS), key=lambda one: -len(one["reason"]))
    assert created["message"].startswith("Created pod: glyphs-0-")
    assert event["reason"] == "FailedCreate"
    words = "exceeded quota: q, requested: limits.nvidia.com/gpu=8, used: limits.nvidia.com/gpu=8, limited: "
    assert words in event["message"]
    pod = job()["spec"]["template"] | {"metadata": {"name": "more"}}
    code, reason, message = refusal(lambda: core.create_namespaced_pod("team", pod))
    assert (code, reason) == (403, "Forbidden")
    assert message.startswith('pods "more" is forbidden: exceeded quota: q')


def test_admission_refuses_pods_and_the_job_that_makes_them_tells_in_events(
    fake: FakeCluster, batch: Any, core: Any
) -> None:
    limits = {"type": "Container", "max": {"memory": "1Gi"}, "default": {"cpu": "2"}}
    fake.add(LIMIT_RANGES, {"metadata": {"name": "l"}, "spec": {"limits": [limits]}})
    batch.create_namespaced_job("team", job())
    (container,) = fake.pods("glyphs").get(0)["spec"]["containers"]
    resources = {"cpu": "2", "memory": "1Gi", "nvidia.com/gpu": "8"}
    assert container["resources"] == {"limits": resources, "requests": resources}
    fake.enforce("restricted")
    batch.create_namespaced_job("team", job("second", nodes=1))
    (event,) = (one for one in fake.objects(EVENTS) if one["type"] == "Warning")
    assert (event["involvedObject"]["name"], event["reason"]) == ("second", "FailedCreate")
    assert event["message"].startswith('Error creating: pods "second-0-')
    assert event["message"].endswith(
        'is forbidden: violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false '
        '(container "metaloom" must set securityContext.allowPrivilegeEscalation=false), unrestricted '
        'capabilities (container "metaloom" must set securityContext.capabilities.drop=["ALL"]), '
        'runAsNonRoot != true (pod or container "metaloom" must set securityContext.runAsNonRoot=true), '
        'seccompProfile (pod or container "metaloom" must set securityContext.seccompProfile.type to '
        '"RuntimeDefault" or "Localhost")'
    )
    fake.enforce("privileged")
    pod = job()["spec"]["template"] | {"metadata": {"name": "more"}}
    pod["spec"]["priorityClassName"] = "urgent"
    for dry_run in ({}, {"dry_run": "All"}):
        told = refusal(lambda more=dry_run: core.create_namespaced_pod("team", pod, **more))  # type: ignore[misc]
        assert told == (
            403,
            "Forbidden",
            'pods "more" is forbidden: no PriorityClass with name urgent was found',
        )
    fake.add(PRIORITY_CLASSES, {"metadata": {"name": "urgent"}, "value": 1000})
    pod["spec"]["containers"][0]["resources"] = {"requests": {"cpu": "4", "memory": "2Gi"}}
    code, _, message = refusal(lambda: core.create_namespaced_pod("team", pod))
    assert code == 422
    assert "spec.containers[0].resources.requests: Invalid value" in message
    pod["spec"]["containers"][0]["resources"] = {"limits": {"memory": "2Gi"}}
    code, _, message = refusal(lambda: core.create_namespaced_pod("team", pod))
    assert (code, message) == (
        403,
        'pods "more" is forbidden: maximum memory usage per Container is 1Gi, but limit is 2Gi',
    )


def changed(path: str, value: object) -> dict[str, Any]:
    """A Job with one field set; numbers in the path are places in lists."""
    result = job()
    *keys, last = path.split(".")
    inner: Any = result
    for key in keys:
        inner = inner[int(key)] if key.isdigit() else inner.setdefault(key, {})
    inner[last] = value
    return result


CONTAINER = "spec.template.spec.containers.0"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("metadata.name", "a" * 62, "must be no more than 63 characters"),
        ("metadata.name", "a_b", "a lowercase RFC 1123 subdomain"),
        ("metadata.labels", {"metaloom/job": "a b"}, "a valid label must be an empty string or consist of"),
        ("metadata.labels", {"a/b/c": ""}, "name part must consist of"),
        ("spec.completions", None, "spec.completions: Required value: when completion mode is Indexed"),
        ("spec.template.spec.restartPolicy", "Always", 'Unsupported value: "Always"'),
        (f"{CONTAINER}.resources.requests", {"nvidia.com/gpu": "4"}, "must be equal to nvidia.com/gpu limit"),
        (
            f"{CONTAINER}.resources",
            {"requests": {"nvidia.com/gpu": "8"}},
            "Limit must be set for non overcommi",
        ),
        (f"{CONTAINER}.volumeMounts", [{"name": "x", "mountPath": "/x"}], 'Not found: "x"'),
        (
            "spec.podFailurePolicy",
            {"rules": [{"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [2]}}]},
            'spec.podFailurePolicy.rules[0].action: Invalid value: "FailIndex": requires the '
            "backoffLimitPerIndex to be set",
        ),
        ("spec.podReplacementPolicy", "Terminating", 'supported values: "Failed", "TerminatingOrFailed"'),
        (
            "spec.maxFailedIndexes",
            0,
            "spec.backoffLimitPerIndex: Required value: when maxFailedIndexes is spec",
        ),
        ("spec.backoffLimitPerIndex", -1, "Invalid value: -1: must be greater than or equal to 0"),
        (
            "spec.podFailurePolicy",
            {"rules": [{"action": "FailJob"}]},
            "OnExitCodes and OnPodConditions is req",
        ),
    ],
)
def test_what_the_real_server_refuses_is_invalid(batch: Any, path: str, value: object, words: str) -> None:
    code, reason, message = refusal(lambda: batch.create_namespaced_job("team", changed(path, value)))
    assert (code, reason) == (422, "Invalid")
    assert words in message


def test_a_failure_policy_needs_pods_that_are_never_started_again(batch: Any) -> None:
    policy = {"rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}]}
    wrong = job(restart="OnFailure", podFailurePolicy=policy)
    _, _, message = refusal(lambda: batch.create_namespaced_job("team", wrong))
    assert 'only "Never" is supported when podFailurePolicy is specified' in message


def test_limits_for_each_index_take_an_indexed_job(batch: Any) -> None:
    wrong = job(completionMode="NonIndexed", backoffLimitPerIndex=1)
    _, _, message = refusal(lambda: batch.create_namespaced_job("team", wrong))
    assert message.endswith("spec.backoffLimitPerIndex: Invalid value: 1: requires indexed completion mode")
    wrong = job(backoffLimitPerIndex=1, maxFailedIndexes=3)
    _, _, message = refusal(lambda: batch.create_namespaced_job("team", wrong))
    assert message.endswith(
        "spec.maxFailedIndexes: Invalid value: 3: must be less than or equal to completions"
    )


def test_a_failure_policy_takes_pods_that_are_replaced_when_they_have_ended(batch: Any) -> None:
    policy = {"rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}]}
    wrong = job(podFailurePolicy=policy, podReplacementPolicy="TerminatingOrFailed")
    _, _, message = refusal(lambda: batch.create_namespaced_job("team", wrong))
    assert message.endswith(
        'spec.podReplacementPolicy: Unsupported value: "TerminatingOrFailed": supported values: "Failed"'
    )
    batch.create_namespaced_job("team", wrong | {"spec": wrong["spec"] | {"podReplacementPolicy": "Failed"}})


def test_fields_of_a_job_are_immutable_and_old_versions_conflict(fake: FakeCluster, batch: Any) -> None:
    batch.create_namespaced_job("team", job())
    code, _, message = refusal(
        lambda: batch.patch_namespaced_job("glyphs", "team", {"spec": {"completions": 3}})
    )
    assert code == 422
    assert message.endswith(
        "spec.completions: Invalid value: 3: can only be modified in tandem with spec.parallelism"
    )
    old = fake.get(JOBS, "glyphs")
    batch.patch_namespaced_job("glyphs", "team", {"metadata": {"labels": {"more": "yes"}}})
    code, reason, message = refusal(lambda: batch.replace_namespaced_job("glyphs", "team", old))
    assert (code, reason) == (409, "Conflict")
    assert "the object has been modified; please apply your changes to the latest version" in message
    assert fake.get(JOBS, "glyphs")["metadata"]["labels"] == LABELS | {"more": "yes"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("completionMode", "NonIndexed"),
        ("podFailurePolicy", {"rules": []}),
        ("template", {"spec": {"nodeSelector": {"pool": "a"}}}),
        ("template", {"metadata": {"labels": {"more": "yes"}}}),
    ],
)
def test_what_a_job_that_has_begun_does_is_immutable(batch: Any, field: str, value: object) -> None:
    batch.create_namespaced_job("team", job())
    change = {"spec": {field: value}}
    code, _, message = refusal(lambda: batch.patch_namespaced_job("glyphs", "team", change))
    assert code == 422
    assert message == f'Job.batch "glyphs" is invalid: spec.{field}: Invalid value: "...": field is immutable'


def test_the_machines_of_a_job_that_has_not_begun_may_be_chosen(fake: FakeCluster, batch: Any) -> None:
    batch.create_namespaced_job("team", job(suspend=True))
    batch.patch_namespaced_job(
        "glyphs", "team", {"spec": {"template": {"spec": {"nodeSelector": {"pool": "a"}}}}}
    )
    assert fake.get(JOBS, "glyphs")["spec"]["template"]["spec"]["nodeSelector"] == {"pool": "a"}
    change = {"spec": {"template": {"spec": {"serviceAccountName": "other"}}}}
    _, _, message = refusal(lambda: batch.patch_namespaced_job("glyphs", "team", change))
    assert message.endswith('spec.template: Invalid value: "...": field is immutable')


def test_a_config_map_that_is_immutable_keeps_its_data(fake: FakeCluster, core: Any) -> None:
    core.create_namespaced_config_map("team", config_map("a") | {"immutable": True})
    for field, value in (("data", {"key": "other"}), ("immutable", False)):
        told = refusal(
            lambda change={field: value}: core.patch_namespaced_config_map("a", "team", change)  # type: ignore[misc]
        )
        assert told == (
            422,
            "Invalid",
            f'ConfigMap "a" is invalid: {field}: Forbidden: field is immutable when `immutable` is set',
        )
    core.patch_namespaced_config_map("a", "team", {"metadata": {"labels": {"more": "yes"}}})
    assert fake.get(CONFIG_MAPS, "a")["metadata"]["labels"] == {"more": "yes"}


def test_unknown_fields_are_refused_where_the_request_wants_that_and_dropped_else(
    fake: FakeCluster, batch: Any
) -> None:
    wrong = job(replacementPolicy="Failed")
    wrong["spec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    wrong["metadata"]["labels"]["anything"] = "goes"
    code, reason, message = refusal(
        lambda: batch.create_namespaced_job("team", wrong, field_validation="Strict")
    )
    assert (code, reason) == (400, "BadRequest")
    assert message == (
        'Job in version "v1" cannot be handled as a Job: strict decoding error: unknown field '
        '"spec.template.spec.containers[0].imagePolicy", unknown field "spec.replacementPolicy"'
    )
    batch.create_namespaced_job("team", wrong)
    made = fake.get(JOBS, "glyphs")
    assert "replacementPolicy" not in made["spec"]
    assert made["metadata"]["labels"]["anything"] == "goes"
    change = {"spec": {"suspended": True}}
    code, reason, message = refusal(
        lambda: batch.patch_namespaced_job("glyphs", "team", change, field_validation="Strict")
    )
    assert (code, reason) == (422, "Invalid")
    assert message.startswith(' "" is invalid: patch: Invalid value: ')
    assert message.endswith(': strict decoding error: unknown field "spec.suspended"')


def test_a_field_that_is_given_twice_is_refused_where_the_request_wants_that(
    fake: FakeCluster,
) -> None:
    text = json.dumps(config_map("a")).replace('"data":', '"data": {"key": "first"}, "data":')
    headers = {"Authorization": f"Bearer {fake.token}", "Content-Type": "application/json"}

    def send(query: str) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection(fake.url.partition("//")[2])
        connection.request("POST", f"/api/v1/namespaces/team/configmaps{query}", text, headers)
        with connection.getresponse() as response:
            answer = response.status, json.loads(response.read())
        connection.close()
        return answer

    code, told = send("?fieldValidation=Strict")
    assert (code, told["message"]) == (
        400,
        'ConfigMap in version "v1" cannot be handled as a ConfigMap: strict decoding error: duplicate field '
        '"data"',
    )
    assert send("")[0] == 201
    assert fake.get(CONFIG_MAPS, "a")["data"] == {"key": "value"}  # the last


def test_names_namespaces_and_kinds_are_looked_for(fake: FakeCluster, api: Any, core: Any) -> None:
    core.create_namespaced_config_map("team", config_map("a"), dry_run="All")
    core.create_namespaced_config_map("team", config_map("a"))
    again = refusal(lambda: core.create_namespaced_config_map("team", config_map("a")))
    assert again == (409, "AlreadyExists", 'configmaps "a" already exists')
    away = refusal(lambda: core.create_namespaced_config_map("nowhere", config_map("a")))
    assert away == (404, "NotFound", 'namespaces "nowhere" not found')
    gone = refusal(lambda: core.delete_namespaced_config_map("b", "team"))
    assert gone == (404, "NotFound", 'configmaps "b" not found')
    custom = kubernetes.client.CustomObjectsApi(api)
    with pytest.raises(kubernetes.client.ApiException) as caught:
        custom.list_namespaced_custom_object(JOB_SETS.group, JOB_SETS.version, "team", JOB_SETS.plural)
    assert caught.value.body in ("404 page not found\n", b"404 page not found\n")


def test_a_watch_of_the_official_client_sees_changes_and_the_servers_timeout(
    fake: FakeCluster, core: Any
) -> None:
    version = core.list_namespaced_config_map("team").metadata.resource_version
    fake.add(CONFIG_MAPS, config_map("a"))
    seen = [
        (event["type"], event["object"].metadata.name)
        for event in kubernetes.watch.Watch().stream(
            core.list_namespaced_config_map, "team", resource_version=version, timeout_seconds=1
        )
    ]
    assert seen == [("ADDED", "a")]


def test_deleting_a_job_deletes_its_pods(fake: FakeCluster, batch: Any) -> None:
    batch.create_namespaced_job("team", job())
    batch.delete_namespaced_job("glyphs", "team", propagation_policy="Foreground")
    assert fake.objects(JOBS) == fake.objects(PODS) == []
