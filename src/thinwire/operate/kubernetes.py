"""Kubeflow manifests for a run: one pod a node, in it one launcher that starts the node's ranks. No torch.

A PyTorchJob for the training operator (v1), a TrainJob with a TrainingRuntime of its own for the trainer (v2). Either gives
every pod its number and the first pod's address; the launcher passes Kubernetes' SIGTERM on, so that an evicted run saves
before the grace period ends. The run file travels in a ConfigMap.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from thinwire.errors import ConfigError
from thinwire.operate.allocation import Allocation
from thinwire.train.config import RunConfig

Kind = Literal["pytorchjob", "trainjob"]
_CONFIG, _RUN_FILE = "/etc/thinwire", "run.toml"
_TRAINER = "trainer.kubeflow.org"


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
    variables: Mapping[str, str] = field(default_factory=dict)
    kind: Kind = "pytorchjob"


def check_paths(run_file: Path, config: RunConfig, folder: Path) -> None:
    """Raise ConfigError for the first path that would mean another place in a pod: pods start in their image's folder.

    `folder` is the run folder. It is the one that is written: what is nowhere but in a pod is gone with it.
    """
    if not folder.is_absolute():
        raise ConfigError(
            f"{run_file}: run.folder = {str(folder)!r} is relative: it would lie inside a pod and be gone with it; give an "
            f"absolute path on the claim, for example --claim NAME:/data --set run.folder=/data/{folder.name}"
        )
    read = {"data.path": config.data.path, "data.validation": config.data.validation, "model.init": config.model.init,
            "model.hf": config.model.hf, "plan.file": config.plan.file}  # fmt: skip
    for key, path in read.items():
        if path is not None and not path.is_absolute():
            raise ConfigError(
                f"{run_file}: {key} = {str(path)!r} is relative: pods start in the image's folder, not in yours; give an "
                f"absolute path on the claim or in the image"
            )
    if config.cluster.file is not None:
        raise ConfigError(f"{run_file}: cluster.file does not travel into the pods; give cluster.levels instead")


def off_claim(folder: Path, claim: tuple[str, str] | None) -> str | None:
    """A warning if the run folder is not on the claim, else None."""
    if claim is not None and folder.is_relative_to(claim[1]):
        return None
    where = "no --claim is given" if claim is None else f"it is not on the claim at {claim[1]}"
    return f"run.folder = {folder}: {where}; unless the image's pods mount something there, it is gone with them"


def gpu_resource_of(device: str) -> str:
    """What the makers' device plugins call a GPU like `device`."""
    return "amd.com/gpu" if device.lower().startswith(("mi", "amd")) else "nvidia.com/gpu"


def manifest(request: KubernetesRequest) -> list[dict[str, Any]]:
    """The ConfigMap and what runs it."""
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(request),
        "data": {_RUN_FILE: request.run_file},
    }
    return [config, *(_train_job(request) if request.kind == "trainjob" else [_pytorch_job(request)])]


def _metadata(request: KubernetesRequest) -> dict[str, Any]:
    return {"name": request.name, **({"namespace": request.namespace} if request.namespace else {})}


def _pytorch_job(request: KubernetesRequest) -> dict[str, Any]:
    nodes = request.allocation.fewest
    pod = {"spec": _pod(request, "pytorch")}
    replicas = {"Master": {"replicas": 1, "restartPolicy": "OnFailure", "template": pod}}
    if nodes > 1:
        replicas["Worker"] = {"replicas": nodes - 1, "restartPolicy": "OnFailure", "template": pod}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(request),
        "spec": {
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": request.restarts},
            "pytorchReplicaSpecs": replicas,
        },
    }


def _train_job(request: KubernetesRequest) -> list[dict[str, Any]]:
    """The runtime holds the whole pod: how a TrainJob may patch a given runtime has changed from release to release."""
    nodes = request.allocation.fewest
    job = {
        "name": "node",
        "template": {
            "metadata": {"labels": {f"{_TRAINER}/trainjob-ancestor-step": "trainer"}},
            "spec": {
                "backoffLimit": request.restarts,
                "template": {"spec": {"restartPolicy": "OnFailure", **_pod(request, "node")}},
            },
        },
    }
    head = {"apiVersion": f"{_TRAINER}/v1alpha1", "metadata": _metadata(request)}
    policy = {"numNodes": nodes, "torch": {}}
    runtime = {**head, "kind": "TrainingRuntime"}
    runtime["spec"] = {"mlPolicy": policy, "template": {"spec": {"replicatedJobs": [job]}}}
    trainer = {"numNodes": nodes, "numProcPerNode": request.allocation.ranks_per_node}
    named = {"apiGroup": _TRAINER, "kind": "TrainingRuntime", "name": request.name}
    return [runtime, {**head, "kind": "TrainJob", "spec": {"runtimeRef": named, "trainer": trainer}}]


def _pod(request: KubernetesRequest, container: str) -> dict[str, Any]:
    """`container`: what the operator calls the one that trains."""
    volumes, mounts = _volumes(request)
    return {
        "terminationGracePeriodSeconds": request.grace_s,
        "containers": [
            {
                "name": container,
                "image": request.image,
                "command": _command(request),
                "env": _environment(request),
                **_resources(request),
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }


def _command(request: KubernetesRequest) -> list[str]:
    allocation = request.allocation
    words = ["thinwire", "train", f"{_CONFIG}/{_RUN_FILE}", f"--ranks-per-node={allocation.ranks_per_node}"]
    levels = [allocation.levels(str(allocation.fewest))] if allocation.from_nodes else []
    for setting in (*request.settings, *levels):
        words += ["--set", setting]
    return words


def _environment(request: KubernetesRequest) -> list[dict[str, str]]:
    variables = {"PYTHONUNBUFFERED": "1", **request.variables}
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
