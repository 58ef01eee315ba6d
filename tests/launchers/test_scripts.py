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
from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime, TrainerV1alpha1TrainJob

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
        (["--nodes", "9" * 5000], "999 is no number of nodes"),
        (["--nodes", "\u00b2"], "--nodes \u00b2 is no number of nodes"),
        (["--nodes", "1-999999999"], "--nodes 1-999999999 is no number of nodes (at most 100,000)"),
        (["--array", "\u00b2"], "--array \u00b2 does not begin with a number"),
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
        (["--set", "data.path=nowhere", "--set", "data.sources=['gone']"], "gone does not exist"),
        (["--set", "data.path=nowhere", "--set", "data.sources=['stdlib']", "--set", "data.tokenizer=gone.json"],
         "gone.json"),
        (["--set", "data.path=nowhere", "--set", "data.sources=['stdlib']", "--set", "batch.tokens=4096"],
         "batch.tokens = 4096 is longer than the model's 64 positions"),
        (["--mem", "64 GB"], "--mem 64 GB is no size; write for example 64G"),
        (["--mem", "\u0666\u0664G"], "is no size"),
        (["--env", "NAME"], "--env NAME is not of the form NAME=VALUE"),
        (["--env", "2X=1"], "--env 2X=1 is not of the form NAME=VALUE"),
        (["--env", "X=a\nb"], "--env 'X=a\\nb' has a line break"),
        (["--env", "LOCAL_RANK=0"], "LOCAL_RANK is set by the launcher"),
        (["--setup", "module load cuda\nrm x"], "--setup 'module load cuda\\nrm x' has a line break"),
        (["--setup", " "], "--setup is empty"),
        (["--sbatch", "account=a\n#SBATCH --time=1"], "--sbatch 'account=a\\n#SBATCH --time=1' has a line break"),
        (["--sbatch", ""], "--sbatch is empty"),
        (["--time", "1:00:00\nx"], "time '1:00:00\\nx' has a line break"),
        (["--array", "0-3\n4"], "array '0-3\\n4' has a line break"),
        (["--python", ""], "--python is empty"),
        (["--interface", "ib0\r"], "--interface 'ib0\\r' has a line break"),
        (["--set", 'run.folder="a\\nb"'], "output '"),
    ],
)  # fmt: skip
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


def test_a_corpus_that_the_job_will_make_need_not_be_there(call: Any, tmp_path: Path) -> None:
    """In a fresh clone, and in an array whose tasks share it."""
    for more in ([], ["--array", "0-3", "--set", "run.seed={task}"], ["--nodes", "1-2"], ["--per", "node"]):
        status, text, said = call("slurm", ROOT / "examples/stdlib.toml", *more)
        assert status == 0, said
        assert options(text)["ntasks-per-node"] == ("1" if "node" in more else "2")
    assert list(tmp_path.iterdir()) == []


def test_setup_lines_come_first_and_a_failing_one_ends_the_job(call: Any, corpus: Path, tmp_path: Path) -> None:
    """Before `set -u`, which activation scripts do not stand; variables and the interpreter are those asked for."""
    setup = [
        "--setup",
        "source env.sh  # 'mine'",
        "--setup",
        "export SECOND=$FIRST",
        "--env",
        "A=b c'd",
        "--mem",
        "64G",
    ]
    text = call("slurm", write_run(tmp_path, corpus), *setup, "--python", "python3")[1]
    assert options(text)["mem"] == "64G"
    assert text.index("source env.sh") < text.index("export SECOND") < text.index("set -u") < text.index("export A=")
    assert "\nsrun " in text and " python3 -m thinwire train " in text
    before = (
        text[: text.index("first=$(scontrol")] + 'echo "$SECOND"\n' + re.search("export A=.*", text)[0] + '\necho "$A"'
    )  # type: ignore[index]
    (tmp_path / "env.sh").write_text("export FIRST=${UNSET-one}\n: $NEVER_SET\n")
    done = subprocess.run(["bash"], input=before, text=True, capture_output=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\nb c'd\n", "")
    (tmp_path / "env.sh").unlink()
    done = subprocess.run(["bash"], input=before, text=True, capture_output=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "thinwire: this line of --setup failed: source env.sh  # 'mine'" in done.stderr


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
        subprocess.Popen(
            thinwire_command("train", run, "--ranks-per-node=2"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
            env={**environment(), **_of_pod(pod, node, port)},
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
