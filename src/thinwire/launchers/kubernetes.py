"""A Kubeflow PyTorchJob manifest for a run: one pod a node, in it one launcher that starts the node's ranks. No torch.

The operator gives every pod its number and the first pod's address; the launcher passes Kubernetes' SIGTERM on, so that
an evicted run saves before the grace period ends. The run file travels in a ConfigMap.
"""

from dataclasses import dataclass
from typing import Any

from thinwire.launchers.allocation import Allocation

_CONFIG, _RUN_FILE = "/etc/thinwire", "run.toml"


@dataclass(frozen=True)
class KubernetesRequest:
    """Everything that the manifest says."""

    name: str
    image: str
    run_file: str
    """The text of the run file."""
    settings: tuple[str, ...]
    allocation: Allocation
    gpu_resource: str | None
    namespace: str | None = None
    claim: tuple[str, str] | None = None
    """A PersistentVolumeClaim and where it is mounted."""
    grace_s: int = 300
    restarts: int = 100
    interface: str | None = None


def gpu_resource_of(device: str) -> str:
    """What the makers' device plugins call a GPU like `device`."""
    return "amd.com/gpu" if device.lower().startswith(("mi", "amd")) else "nvidia.com/gpu"


def manifest(request: KubernetesRequest) -> list[dict[str, Any]]:
    """The ConfigMap and the PyTorchJob."""
    where = {"name": request.name, **({"namespace": request.namespace} if request.namespace else {})}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": where, "data": {_RUN_FILE: request.run_file}}
    nodes = request.allocation.fewest
    replicas = {"Master": _replica(request, 1)}
    if nodes > 1:
        replicas["Worker"] = _replica(request, nodes - 1)
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": where,
        "spec": {
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": request.restarts},
            "pytorchReplicaSpecs": replicas,
        },
    }
    return [config, job]


def _replica(request: KubernetesRequest, count: int) -> dict[str, Any]:
    volumes, mounts = _volumes(request)
    pod = {
        "terminationGracePeriodSeconds": request.grace_s,
        "containers": [
            {
                "name": "pytorch",
                "image": request.image,
                "command": _command(request),
                "env": _environment(request),
                **_resources(request),
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    return {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": pod}}


def _command(request: KubernetesRequest) -> list[str]:
    allocation = request.allocation
    words = ["thinwire", "train", f"{_CONFIG}/{_RUN_FILE}", f"--ranks-per-node={allocation.ranks_per_node}"]
    levels = [allocation.levels(str(allocation.fewest))] if allocation.from_nodes else []
    for setting in (*request.settings, *levels):
        words += ["--set", setting]
    return words


def _environment(request: KubernetesRequest) -> list[dict[str, str]]:
    variables = {"LOCAL_RANK": "0", "PYTHONUNBUFFERED": "1"}
    if request.interface:
        variables |= {"GLOO_SOCKET_IFNAME": request.interface, "NCCL_SOCKET_IFNAME": request.interface}
    return [{"name": name, "value": value} for name, value in variables.items()]


def _resources(request: KubernetesRequest) -> dict[str, Any]:
    if request.gpu_resource is None:
        return {}
    return {"resources": {"limits": {request.gpu_resource: str(request.allocation.ranks_per_node)}}}


def _volumes(request: KubernetesRequest) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The run file, shared memory between the ranks of a node, and the claim with corpora and run folders."""
    volumes: list[dict[str, Any]] = [
        {"name": "run-file", "configMap": {"name": request.name}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
    ]
    mounts = [{"name": "run-file", "mountPath": _CONFIG}, {"name": "shared-memory", "mountPath": "/dev/shm"}]
    if request.claim is not None:
        claim, path = request.claim
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": "data", "mountPath": path})
    return volumes, mounts
