"""The command that runs in every pod of a job."""

from __future__ import annotations

from metaloom.k8s.manifests.backend import PORT, Backend
from metaloom.k8s.request import RECIPE_FILE, RECIPE_FOLDER, JobRequest


def host_command(request: JobRequest, backend: Backend) -> list[str]:
    """The command with its arguments, run without a shell; the same at the first start and at every other."""
    command = [
        "metaloom",
        "train",
        f"{RECIPE_FOLDER}/{RECIPE_FILE}",
        "--run",
        request.run_folder,
        "--run-id",
        request.name,
        *request.train_options,
        *request.overrides,
        f"launcher.num_processes={request.num_ranks_per_node}",
        "launcher.show_all_ranks=true",
    ]
    if request.nodes == 1:
        command.append("launcher.hosts=null")
    else:
        # What else the recipe says of hosts stays.
        command += [
            f"launcher.hosts.endpoint={backend.first_host(request)}:{PORT}",
            f"launcher.hosts.num_hosts={request.nodes}",
            f"launcher.hosts.wait_s={request.wait_s:g}",
            f"launcher.hosts.own_folders={'true' if request.own_folders else 'false'}",
        ]
    return command


def literal(text: str) -> str:
    """A text that the kubelet, which replaces $(NAME) by a variable and $$ by $, leaves as the given one."""
    return text.replace("$", "$$")
