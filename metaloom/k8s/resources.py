"""The kinds of Kubernetes objects that are read or written, and where an API server has them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Resource:
    """A kind of objects.

    Attributes:
        group: of the API; "" for the core.
        plural: the kind in URLs and in rules of permissions.
        is_namespaced: whether objects lie in a namespace.
    """

    group: str
    version: str
    kind: str
    plural: str
    is_namespaced: bool = True

    @property
    def api_version(self) -> str:
        """As in the `apiVersion` of an object."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def full_name(self) -> str:
        """As in messages and for `kubectl`: `pods`, `jobs.batch`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def path(self, namespace: str, name: str = "") -> str:
        """The path of the collection in a namespace, or of one object in it."""
        prefix = f"/apis/{self.api_version}" if self.group else f"/api/{self.version}"
        within = f"/namespaces/{namespace}" if self.is_namespaced else ""
        return f"{prefix}{within}/{self.plural}" + (f"/{name}" if name else "")


PODS = Resource("", "v1", "Pod", "pods")
SERVICES = Resource("", "v1", "Service", "services")
CONFIG_MAPS = Resource("", "v1", "ConfigMap", "configmaps")
EVENTS = Resource("", "v1", "Event", "events")
SECRETS = Resource("", "v1", "Secret", "secrets")
CLAIMS = Resource("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims")
SERVICE_ACCOUNTS = Resource("", "v1", "ServiceAccount", "serviceaccounts")
QUOTAS = Resource("", "v1", "ResourceQuota", "resourcequotas")
LIMIT_RANGES = Resource("", "v1", "LimitRange", "limitranges")
NAMESPACES = Resource("", "v1", "Namespace", "namespaces", is_namespaced=False)
NODES = Resource("", "v1", "Node", "nodes", is_namespaced=False)
PRIORITY_CLASSES = Resource(
    "scheduling.k8s.io", "v1", "PriorityClass", "priorityclasses", is_namespaced=False
)
JOBS = Resource("batch", "v1", "Job", "jobs")
ACCESS_REVIEWS = Resource(
    "authorization.k8s.io", "v1", "SelfSubjectAccessReview", "selfsubjectaccessreviews", is_namespaced=False
)
JOB_SETS = Resource("jobset.x-k8s.io", "v1alpha2", "JobSet", "jobsets")
PYTORCH_JOBS = Resource("kubeflow.org", "v1", "PyTorchJob", "pytorchjobs")
TRAIN_JOBS = Resource("trainer.kubeflow.org", "v1alpha1", "TrainJob", "trainjobs")
TRAINING_RUNTIMES = Resource("trainer.kubeflow.org", "v1alpha1", "TrainingRuntime", "trainingruntimes")
# Kueue's are read in whatever version a cluster has them: `Cluster.as_served`.
LOCAL_QUEUES = Resource("kueue.x-k8s.io", "v1beta1", "LocalQueue", "localqueues")
WORKLOADS = Resource("kueue.x-k8s.io", "v1beta1", "Workload", "workloads")
