"""What all tests share."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from metaloom.datasets import make_dataset
from tests.object_store import ObjectStore, running_object_store

SEVERAL_PROCESSES = ("faults", "multirank")


@pytest.fixture(scope="session", autouse=True)
def one_intra_op_thread() -> None:
    """Small tensors are faster on one thread, and sums have one order. Torch is not imported for it: the
    tests that need torch have done so when they were collected."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The cluster of the tests with the mark k8s."""
    group = parser.getgroup("k8s", "scenarios on the cluster that KUBECONFIG names (mark k8s)")
    group.addoption("--k8s-image", metavar="IMG", help="with metaloom in it (deploy/Dockerfile)")
    group.addoption("--k8s-namespace", metavar="NS", help="(default: that of the context)")
    group.addoption("--k8s-context", metavar="NAME", help="of the kubeconfig (default: the current one)")
    group.addoption("--k8s-checkpoints", metavar="URL", help="where pods keep checkpoints: an object store")
    group.addoption("--k8s-claim", metavar="CLAIM", help="in place of a URL: one that two pods may write to")
    group.addoption(
        "--k8s-submit",
        metavar="WORDS",
        default="",
        help="further options of every `metaloom submit`, such as '--env-from-secret s3'",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts jobs in the background with Ctrl-C ignored, and what they start would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Torch scripts its forward-mode rules when the first dual number is made, and warns of itself.
    config.addinivalue_line("filterwarnings", r"ignore:.torch\.jit\.script. is:DeprecationWarning:torch\.jit")


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Of several workers, one has all tests of a file, for the sake of its fixtures; and one has all tests
    that start many processes or kill them, which so come one after the other."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "processes" if file.split("/")[1] in SEVERAL_PROCESSES else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process, as a worker joins one."""
    import torch.distributed as dist  # most tests start quicker without

    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve classes a split of the built-in glyphs."""
    folder = tmp_path_factory.mktemp("data") / "glyphs"
    make_dataset("glyphs", folder, max_per_split=12)
    return folder


@pytest.fixture(scope="session")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four modules a split of the standard library."""
    folder = tmp_path_factory.mktemp("data") / "stdlib"
    make_dataset("stdlib", folder, max_per_split=4)
    return folder


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """An S3 server for all tests; its credentials are not in the environment."""
    with running_object_store(tmp_path_factory.mktemp("s3") / "server.log") as store:
        yield store


@pytest.fixture
def s3(s3_server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The S3 server, with all that finds it in the environment, for child processes too."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    return s3_server
