"""Job scripts and manifests as text: their options, their shell, the published schema, and wrong input in one sentence."""

import os
import re
import signal
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import kubeflow.training
import kubernetes.client
import pytest
import tomli_w
import yaml

from runs import command as thinwire_command
from runs import environment, make_corpus, run_tree, write_run
from thinwire.cli import main
from thinwire.cluster.cluster import Cluster, Level
from thinwire.cluster.found import found_gpus
from thinwire.events import steps
from thinwire.launchers.allocation import ranks_per_node_of
from thinwire.launchers.names import job_name
from thinwire.train.folder import EVENTS_FILE
from thinwire.train.launch import free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """(status, output, errors) of `thinwire launch ...`, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def launch(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["launch", *map(str, arguments)])
        said = capsys.readouterr()
        assert left.value.code is None or isinstance(left.value.code, int)
        return left.value.code or 0, said.out, said.err

    return launch


def options(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.MULTILINE))


CUDA = {"cluster": {"device": {"name": "h100", "kind": "cuda"}, "levels": [8, 4]},
        "batch": {"sequences": 32, "micro_batch": 1}}  # fmt: skip


def test_a_script_asks_for_what_the_levels_say(call: Any, corpus: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, corpus, **CUDA)
    status, text, said = call(
        "slurm", run, "--time", "4:00:00", "--sbatch", "partition=gpu", "--sbatch", "--account=lab",
        "--interface", "ib0", "--set", "optimizer.lr=1e-4", "--stop-before", "5 min",
    )  # fmt: skip
    assert status == 0
    asked = options(text)
    assert asked == {
        "job-name": "run", "nodes": "4", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "4",
        "time": "4:00:00", "signal": "B:USR1@300", "requeue": "", "open-mode": "append", "chdir": str(tmp_path),
        "output": f"{tmp_path}/run/logs/slurm-%j.out", "partition": "gpu", "account": "lab",
    }  # fmt: skip
    assert "export NCCL_SOCKET_IFNAME=ib0" in text
    assert "--gpu-bind=none" in text
    assert f"-m thinwire train {run} --set optimizer.lr=1e-4 &" in text
    assert f"mkdir -p {tmp_path}/run/logs" in said
    assert not (tmp_path / "run").exists()


def test_one_launcher_a_node_gets_the_whole_nodes_cores(call: Any, corpus: Path, tmp_path: Path) -> None:
    text = call("slurm", write_run(tmp_path, corpus, **CUDA), "--per", "node")[1]
    asked = options(text)
    assert (asked["ntasks-per-node"], asked["cpus-per-task"], asked["gpus-per-node"]) == ("1", "32", "8")
    assert "--ranks-per-node=8" in text


RECIPES = [
    tomllib.loads(block)
    for block in re.findall(r"^```toml\n(.*?)^```$", (ROOT / "docs/recipes.md").read_text(), re.MULTILINE | re.DOTALL)
]
ON_GPUS = [tree for tree in RECIPES if {"preset", "device"} & tree.get("cluster", {}).keys()]


@pytest.mark.parametrize("recipe", ON_GPUS, ids=lambda recipe: recipe["plan"]["partition"])
def test_a_recipe_for_gpus_asks_the_scheduler_for_them(recipe: Any, call: Any, corpus: Path, tmp_path: Path) -> None:
    tree = run_tree(tmp_path / "run", corpus, plan=recipe["plan"], batch={"sequences": 384, "micro_batch": 1})
    (tmp_path / "run.toml").write_text(tomli_w.dumps({**tree, "cluster": recipe["cluster"]}))
    status, text, said = call("slurm", tmp_path / "run.toml")
    assert status == 0, said
    per_node = options(text)["ntasks-per-node"]
    assert options(text)["gpus-per-node"] == per_node == "8"
    assert "names no cluster.device" not in said
    status, text, said = call("k8s", tmp_path / "run.toml", "--image", "x")
    resource = "amd.com/gpu" if "frontier" in recipe["cluster"].get("preset", "") else "nvidia.com/gpu"
    for replica in list(yaml.safe_load_all(text))[1]["spec"]["pytorchReplicaSpecs"].values():
        assert replica["template"]["spec"]["containers"][0]["resources"]["limits"] == {resource: "8"}


def test_the_recipes_for_gpus_are_all_there() -> None:
    assert len(ON_GPUS) == 4


def test_a_run_file_without_a_device_is_told_what_its_script_asks_for(call: Any, corpus: Path, tmp_path: Path) -> None:
    tree = run_tree(tmp_path / "run", corpus, cluster={"levels": [2, 2]})
    del tree["cluster"]["device"]
    (tmp_path / "run.toml").write_text(tomli_w.dumps(tree))
    for arguments in (("slurm", tmp_path / "run.toml"), ("k8s", tmp_path / "run.toml", "--image", "x")):
        status, text, said = call(*arguments)
        asks = "gpus-per-node" in text or "nvidia.com/gpu" in text
        assert (status, asks) == (0, bool(found_gpus(os.environ)))
        assert ("it asks for GPUs" if asks else "it asks for no GPU") in said


@pytest.mark.parametrize("array", [None, "0-3%2"])
@pytest.mark.parametrize("nodes", [None, "1-2"])
def test_every_script_is_sound_bash_and_quotes_what_it_is_given(
    array: str | None, nodes: str | None, call: Any, corpus: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path, corpus, "a run; with $odd 'name'", run={"folder": str(tmp_path / "it's $HOME")})
    settings = ["--set", "run.sample_prompt=say \"hi\"; rm -rf $HOME `id` 'x'"]
    more = [*(["--array", array, "--set", "run.seed={task}"] if array else []), *(["--nodes", nodes] if nodes else [])]
    status, text, said = call("slurm", run, *settings, *more)
    assert status == 0, said
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    line = next(line for line in text.splitlines() if line.startswith("srun"))
    shown = 'srun() { printf "%s\\n" "$@"; }; SLURM_CPUS_PER_TASK=1 SLURM_ARRAY_TASK_ID=2 SLURM_JOB_NUM_NODES=2\n'
    whole = f"{shown}{line.removesuffix('&')}\n"
    done = subprocess.run(["bash", "-u"], input=whole, text=True, capture_output=True, check=True)
    words = done.stdout.splitlines()
    assert str(run) in words
    assert settings[1] in words
    assert ("run.seed=2" in words) == (array is not None)
    assert (f"run.folder={tmp_path}/it's $HOME/2" in words) == (array is not None)
    assert ("cluster.levels=[1,2]" in words) == (nodes is not None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--submit"], "sbatch is not on this machine's PATH"),
        (["--nodes", "many"], "--nodes many is no number of nodes"),
        (["--nodes", "4-2"], "--nodes 4-2 is no number of nodes"),
        (["--nodes", "3"], "batch.sequences = 16 is not divisible by 3 ranks"),
        (["--nodes", "1-3"], "batch.sequences = 16 is not divisible by 3 ranks"),
        (["--ranks-per-node", "3"], "do not divide into nodes of 3"),
        (["--per", "core"], "--per core is unknown"),
        (["--stop-before", "soon"], "--stop-before: 'soon'"),
        (["--array", "x"], "--array x does not begin with a number"),
        (["--set", "run.seed={task}"], "give --array too"),
        (["--array", "0-1", "--set", "run.folder=same"], "would share the run folder same"),
        (["--set", "optimizer.lrr=1"], "did you mean 'lr'"),
        (["--set", "data.path=nowhere"], "there is no corpus at nowhere"),
    ],
)
def test_wrong_requests_get_one_sentence(
    arguments: list[str], says: str, call: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = write_run(tmp_path, corpus)
    status, text, said = call("slurm", run, *arguments)
    assert (status, text) == (2, "")
    assert says in said
    assert len(said.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


@pytest.mark.parametrize(
    ("levels", "per_node"),
    [([("node", 8), ("cluster", 4)], 8), ([("die", 2), ("node", 4), ("site", 2)], 8), ([("node", 3)], 3),
     ([("gpu", 4), ("rack", 2), ("all-racks", 3)], 8), ([("anything", 6)], 6)],
)  # fmt: skip
def test_ranks_per_node_come_from_the_levels(levels: list[tuple[str, int]], per_node: int) -> None:
    cluster = Cluster(levels=tuple(Level(name=name, fanout=fanout) for name, fanout in levels))
    assert ranks_per_node_of(cluster) == per_node


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


@pytest.mark.parametrize(
    "more", [[], ["--nodes", "1"], ["--nodes", "2", "--ranks-per-node", "16", "--interface", "eth0"]]
)
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


@pytest.mark.parametrize("stop", [False, True], ids=["to-the-end", "stopped"])
def test_launchers_one_a_node_make_one_world(stop: bool, corpus: Path, tmp_path: Path) -> None:
    """Two launchers, as PyTorchJob's pods are started, of two ranks each; a SIGTERM to one stops and saves all."""
    sections = {
        "cluster": {"levels": [2, 2]},
        "run": {"steps": 100_000 if stop else 3},
        "schedule": {"warmup_steps": 0},
        "checkpoint": {"every_steps": 0},
    }
    run, port = write_run(tmp_path, corpus, **sections), str(free_port())
    pods = [
        subprocess.Popen(
            thinwire_command("train", run, "--ranks-per-node=2"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
            env={**environment(), "RANK": str(node), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port},
        )
        for node in range(2)
    ]  # fmt: skip
    events = tmp_path / "run" / EVENTS_FILE
    while stop and not (events.exists() and steps(events)):
        assert all(pod.poll() is None for pod in pods)
        time.sleep(0.2)
    if stop:
        pods[1].send_signal(signal.SIGTERM)
    said = [pod.communicate(timeout=200)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said
    assert ("stopped after step" if stop else "3 of 3") in said[0]
    last = max(steps(events))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert sorted(path.name for path in (tmp_path / "run" / "logs").iterdir()) == [f"rank-{i}.log" for i in (1, 2, 3)]


def test_launchers_that_do_not_make_the_levels_are_refused(corpus: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, corpus, cluster={"levels": [2, 2]})
    done = subprocess.run(
        thinwire_command("train", run, "--ranks-per-node=3"), capture_output=True, text=True, check=False,
        env={**environment(), "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "make 4 ranks, but the launcher started 6" in done.stderr
    assert not (tmp_path / "run").exists()
