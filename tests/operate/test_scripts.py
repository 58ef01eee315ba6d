"""Job scripts for Slurm: their options, their shell with stand-ins for Slurm's commands, wrong input in one sentence."""

import os
import re
import signal
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import yaml

from labs import eventually
from runs import CUDA, run_tree, write_run
from thinwire.cluster.cluster import Cluster, Level
from thinwire.cluster.hardware import found_gpus
from thinwire.files.events import EventLog
from thinwire.operate.allocation import ranks_per_node_of

ROOT = Path(__file__).parents[2]


def options(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.MULTILINE))


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


def stand_in(folder: Path, name: str, body: str) -> None:
    """A command of Slurm's, first on the PATH, that notes its arguments in `folder/NAME.log`."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/bash\necho "$*" >> {folder}/{name}.log\n{body}\n')
    path.chmod(0o755)


def path_with(folder: Path) -> str:
    return f"{folder / 'bin'}:{os.environ['PATH']}"


def test_a_script_is_tried_before_it_is_submitted_and_the_job_named(
    call: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(
        tmp_path, "sbatch", f'cat > "{tmp_path}/script$1"; [ -d run/logs ] && touch "{tmp_path}/logs$1"; echo "7;mine"'
    )
    monkeypatch.setenv("PATH", path_with(tmp_path))
    run = write_run(tmp_path, corpus)
    printed = call("slurm", run)[1]
    status, text, said = call("slurm", run, "--submit")
    assert (status, text) == (0, f"submitted job 7; its output goes to {tmp_path}/run/logs\n"), said
    assert (tmp_path / "sbatch.log").read_text().splitlines() == ["--test-only", "--parsable"]
    assert (tmp_path / "script--test-only").read_text() == (tmp_path / "script--parsable").read_text() == printed
    assert [path.name for path in tmp_path.glob("logs--*")] == ["logs--parsable"], "made once the script was accepted"


@pytest.mark.parametrize(
    ("reason", "state", "restarts", "status", "requeued"),
    [
        ("stopped", "RUNNING", "0", 0, ["requeue 7"]),
        ("finished", "RUNNING", "0", 0, []),
        ("stopped", "COMPLETING", "0", 0, []),
        ("stopped", "RUNNING", "3", 1, []),
    ],
    ids=["stopped", "finished", "cancelled", "too-often"],
)
def test_a_script_passes_the_warning_on_and_asks_for_the_job_again(
    reason: str, state: str, restarts: str, status: int, requeued: list[str], call: Any, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "job.sh").write_text(call("slurm", write_run(tmp_path, corpus), "--requeues", "3")[1])
    (tmp_path / "run").mkdir()
    events = EventLog(tmp_path / "events")
    events.write("run_end", step=9, reason=reason)
    events.close()
    shows = '[ "$1" != show ] || echo n1; [ "$2" != show ] || echo "NodeName=n1 NodeAddr=10.1.0.3 State=UP"'
    stops = "stop() { echo stopped >> srun.log; cp events run/events.jsonl; sleep 0.2; exit 0; }; trap stop USR1"
    stand_in(tmp_path, "scontrol", shows)
    stand_in(tmp_path, "squeue", f"echo {state}")
    stand_in(tmp_path, "srun", f'{stops}\necho "$MASTER_ADDR" > started\nfor i in {{1..3000}}; do sleep 0.02; done')
    own = {"PATH": path_with(tmp_path), "SLURM_CPUS_PER_TASK": "1", "SLURM_RESTART_COUNT": restarts}
    process = subprocess.Popen(
        ["bash", "job.sh"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", **own},
    )  # fmt: skip
    assert eventually(lambda: (tmp_path / "started").exists() and catches(process.pid, signal.SIGUSR1))
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == status, said
    assert (tmp_path / "started").read_text() == "10.1.0.3\n"
    assert f"-m thinwire train {tmp_path}/run.toml\nstopped\n" in (tmp_path / "srun.log").read_text()
    asked = (tmp_path / "scontrol.log").read_text().splitlines()
    assert [line for line in asked if "show" not in line] == requeued
    assert ("asking for job 7 again" in said) == bool(requeued)
    assert ("requeued 3 times and still not finished" in said) == (status == 1)


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for this signal: before that it dies of it."""
    found = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)


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
