"""Kubeflow manifests: the published schemas, one world of launchers that are started as pods are, wrong input."""

import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import kubeflow.training
import kubernetes.client
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime, TrainerV1alpha1TrainJob

from runs import CUDA, environment, warm, write_run
from runs import command as thinwire_command
from thinwire.files.events import steps
from thinwire.operate.allocation import job_name
from thinwire.train.folder import EVENTS_FILE
from thinwire.train.launch import free_port


def conforms(value: Any, kind: str, where: str) -> None:
    """`value` has the type `kind` of the published client, key by key, and every required field."""
    if match := re.fullmatch(r"list\[(.+)\]", kind):
        assert isinstance(value, list), where
        for i, item in enumerate(value):
            conforms(item, match[1], f"{where}[{i}]")
    elif match := re.fullmatch(r"dict\(str, (.+)\)", kind):
        for key, item in value.items():
            assert isinstance(key, str), where
            conforms(item, match[1], f"{where}.{key}")
    elif kind in ("str", "int", "bool"):
        assert type(value).__name__ == kind, f"{where} is {value!r}, not {kind}"
    else:
        model = getattr(kubeflow.training, kind, None) or getattr(kubernetes.client, kind)
        names = {there: here for here, there in model.attribute_map.items()}
        for key, item in value.items():
            assert key in names, f"{where} has no field {key}"
            conforms(item, model.openapi_types[names[key]], f"{where}.{key}")
        model(**{names[key]: item for key, item in value.items()})  # raises for a required field that is missing


MORE = pytest.mark.parametrize(
    "more", [[], ["--nodes", "1"], ["--nodes", "2", "--ranks-per-node", "16", "--interface", "eth0", "--env", "A=b"]]
)


@MORE
def test_a_manifest_keeps_to_the_published_schema(more: list[str], call: Any, corpus: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, corpus, "My_Run", **CUDA)
    status, text, said = call(
        "k8s", run, "--image", "registry/thinwire:0.1", "--claim", "corpora:/data", "--namespace", "lab",
        "--set", "run.folder=/data/run", *more,
    )  # fmt: skip
    assert status == 0, said
    config, job = yaml.safe_load_all(text)
    conforms(config, "V1ConfigMap", "ConfigMap")
    conforms(job, "KubeflowOrgV1PyTorchJob", "PyTorchJob")
    assert config["data"]["run.toml"] == run.read_text()
    assert job["metadata"] == {"name": "my-run", "namespace": "lab"}
    replicas = job["spec"]["pytorchReplicaSpecs"]
    nodes = 4 if not more else int(more[1])
    assert sum(replica["replicas"] for replica in replicas.values()) == nodes
    assert replicas["Master"]["replicas"] == 1
    assert set(replicas) == ({"Master", "Worker"} if nodes > 1 else {"Master"})
    ranks = "16" if len(more) > 2 else "8"
    for replica in replicas.values():
        container = replica["template"]["spec"]["containers"][0]
        assert container["name"] == "pytorch"
        assert container["resources"]["limits"] == {"nvidia.com/gpu": ranks}
        assert f"--ranks-per-node={ranks}" in container["command"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in replica["template"]["spec"]["volumes"]}


@MORE
def test_a_trainjob_keeps_to_the_published_schema_and_its_runtime_holds_the_same_pod(
    more: list[str], call: Any, corpus: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path, corpus, "My_Run", **CUDA)
    asked = ["--image", "registry/thinwire:0.1", "--claim", "corpora:/data", "--set", "run.folder=/data/run", *more]
    config, old = yaml.safe_load_all(call("k8s", run, *asked)[1])
    status, text, said = call("k8s", run, *asked, "--kind", "trainjob")
    assert status == 0, said
    same, runtime, job = yaml.safe_load_all(text)
    assert same == config
    for document, model in ((runtime, TrainerV1alpha1TrainingRuntime), (job, TrainerV1alpha1TrainJob)):
        assert model.from_dict(document).to_dict() == document, "unknown keys are dropped, wrong kinds raise"
    nodes, ranks = (4 if not more else int(more[1])), (16 if len(more) > 2 else 8)
    assert job["spec"]["trainer"] == {"numNodes": nodes, "numProcPerNode": ranks}
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"] == job["metadata"]["name"] == "my-run"
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (node["name"], container.pop("name")) == ("node", "node"), "the trainer's plugin looks for these"
    (known,) = (before := old["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"])["containers"]
    del known["name"]
    assert {**before, "restartPolicy": "OnFailure"} == pod


def test_the_check_against_the_trainers_schema_finds_wrong_manifests() -> None:
    good = {"kind": "TrainJob", "spec": {"runtimeRef": {"name": "x"}, "trainer": {"numNodes": 2}}}
    assert TrainerV1alpha1TrainJob.from_dict(good).to_dict() == good
    odd = {"kind": "TrainJob", "spec": {"runtimeRef": {"name": "x"}, "trainer": {"nodes": 2}}}
    assert TrainerV1alpha1TrainJob.from_dict(odd).to_dict() != odd
    for wrong in ({"trainer": {}}, {"runtimeRef": {"name": "x"}, "trainer": {"numNodes": "2"}}):
        with pytest.raises(ValueError, match="validation error"):
            TrainerV1alpha1TrainJob.from_dict({"spec": wrong})


def test_a_run_folder_that_no_claim_holds_is_told(call: Any, corpus: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, corpus)
    for claim, says in (([], "no --claim is given"), (["--claim", "c:/data"], "it is not on the claim at /data")):
        status, _, said = call("k8s", run, "--image", "x", *claim)
        assert status == 0
        assert f"run.folder = {tmp_path}/run: {says}" in said
    said = call("k8s", run, "--image", "x", "--claim", f"c:{tmp_path}")[2]
    assert "run.folder" not in said


def test_the_schema_check_itself_finds_wrong_manifests() -> None:
    good = {"replicas": 1, "restartPolicy": "OnFailure", "template": {"spec": {"containers": [{"name": "pytorch"}]}}}
    conforms(good, "KubeflowOrgV1ReplicaSpec", "")
    for key, wrong in (("replicas", "1"), ("restart", "Never"), ("template", {"spec": {"containers": [{}]}})):
        with pytest.raises((AssertionError, ValueError)):
            conforms({**good, key: wrong}, "KubeflowOrgV1ReplicaSpec", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nodes", "2-4"], "a PyTorchJob has a fixed number of pods"),
        (["--claim", "corpora"], "--claim corpora is not of the form NAME:/PATH"),
        (["--name", "42"], "makes no name for a job"),
        (["--set", "cluster={file='c.toml'}"], "c.toml does not exist"),
        (["--kind", "job"], "--kind job is unknown; there are pytorchjob and trainjob"),
        (["--kind", "trainjob", "--nodes", "2-4"], "a TrainJob has a fixed number of pods"),
        (["--set", "run.folder=runs/x"], "run.folder = 'runs/x' is relative: it would lie inside a pod"),
        (["--kind", "trainjob", "--set", "run.folder=x"], "--claim NAME:/data --set run.folder=/data/x"),
        (["--set", "data.path=corpus"], "data.path = 'corpus' is relative"),
        (["--set", "model={init='init'}"], "model.init = 'init' is relative"),
        (["--set", "plan={file='plan.json'}"], "plan.file = 'plan.json' is relative"),
        (["--set", "batch.sequences=17", "--nodes", "2"], "batch.sequences = 17 is not divisible by 2 ranks"),
        (["--env", "PET_NNODES=2"], "PET_NNODES is set by the launcher"),
        (["--image", ""], "--image is empty"),
        (["--interface", "eth0\nx"], "--interface 'eth0\\nx' has a line break"),
        (["--namespace", " "], "--namespace is empty"),
        (["--name", "9" * 5000], "makes no name for a job"),
        (["--claim", "a\n:/b"], "--claim 'a\\n:/b' has a line break"),
    ],
)
def test_wrong_manifests_get_one_sentence(
    arguments: list[str], says: str, call: Any, corpus: Path, tmp_path: Path
) -> None:
    status, text, said = call("k8s", write_run(tmp_path, corpus), "--image", "x", *arguments)
    assert (status, text) == (2, "")
    assert says in said
    assert len(said.strip().splitlines()) == 1


def test_names_are_dns_labels() -> None:
    assert job_name("Llama_7B.final run") == "llama-7b-final-run"
    assert len(job_name("x" * 80)) == 50


@pytest.mark.parametrize(("stop", "pod"), [(False, "trainjob"), (True, "pytorchjob")], ids=["to-the-end", "stopped"])
def test_launchers_one_a_node_make_one_world(stop: bool, pod: str, corpus: Path, tmp_path: Path) -> None:
    """Two launchers, as an operator's pods are started, of two ranks each; a SIGTERM to one stops and saves all."""
    sections = {
        "cluster": {"levels": [2, 2]},
        "run": {"steps": 100_000 if stop else 3},
        "schedule": {"warmup_steps": 0},
        "checkpoint": {"every_steps": 0},
    }
    run, port = write_run(tmp_path, corpus, **sections), str(free_port())
    pods = [
        warm("train", run, "--ranks-per-node=2", env={**environment(), **_of_pod(pod, node, port)}, merged=True)
        for node in range(2)
    ]
    events = tmp_path / "run" / EVENTS_FILE
    while stop and not (events.exists() and steps(events)):
        assert all(pod.poll() is None for pod in pods)
        time.sleep(0.2)
    if stop:
        pods[1].send_signal(signal.SIGTERM)
    said = [pod.communicate(timeout=200)[0] for pod in pods]
    assert [pod.poll() for pod in pods] == [0, 0], said
    assert ("stopped after step" if stop else "3 of 3") in said[0]
    last = max(steps(events))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert sorted(path.name for path in (tmp_path / "run" / "logs").iterdir()) == [f"rank-{i}.log" for i in (1, 2, 3)]


def _of_pod(kind: str, node: int, port: str) -> dict[str, str]:
    """What the operators set in a pod."""
    if kind == "trainjob":
        return {"PET_NODE_RANK": str(node), "PET_NNODES": "2", "PET_NPROC_PER_NODE": "2", "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": port}  # fmt: skip
    return {"RANK": str(node), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def test_launchers_that_do_not_make_the_levels_are_refused(corpus: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, corpus, cluster={"levels": [2, 2]})
    done = subprocess.run(
        thinwire_command("train", run, "--ranks-per-node=3"), capture_output=True, text=True, check=False,
        env={**environment(), "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "make 4 ranks, but the launcher started 6" in done.stderr
    assert not (tmp_path / "run").exists()
