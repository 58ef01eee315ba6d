"""`thinwire launch slurm` on a real Slurm: it runs where the levels say, saves before the limit, and goes on after it."""

import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runs import command, make_corpus, make_text, thinwire, write_run
from slurm_cluster import Slurm, slurm
from thinwire.cli import main
from thinwire.files.events import read_events, steps
from thinwire.train.folder import EVENTS_FILE

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture
def here(cluster: Slurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of one's own to work in, and Slurm's commands talk to the test's cluster."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What `thinwire launch slurm ARGUMENTS` prints."""
    with pytest.raises(SystemExit) as left:
        main(["launch", "slurm", *map(str, arguments)])
    said = capsys.readouterr()
    assert not left.value.code, said.err
    return said.out


def submit(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The number of the job that was submitted."""
    memory = [] if "--mem" in arguments else ["--sbatch", "mem=100"]
    found = re.search(r"submitted job (\d+)", launch(capsys, *arguments, "--submit", *memory))
    assert found is not None
    return found[1]


def losses(folder: Path) -> list[float]:
    recorded = steps(folder / EVENTS_FILE)
    return [recorded[step]["loss"] for step in sorted(recorded)]


def at_step(folder: Path, step: int, timeout_s: float = 300) -> None:
    """Wait until the run in `folder` has done `step` steps."""
    end_s = time.monotonic() + timeout_s
    while not (folder / EVENTS_FILE).exists() or max(steps(folder / EVENTS_FILE), default=0) < step:
        assert time.monotonic() < end_s, f"{folder} did not get to step {step}"
        time.sleep(0.2)


def log(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((folder / "logs").glob("slurm-*.out")))


def reference(folder: Path, corpus: Path, **sections: dict[str, object]) -> list[float]:
    """The losses of the same run, never interrupted, started without Slurm."""
    done = thinwire("train", write_run(folder, corpus, "reference", **sections))
    assert done.returncode == 0, done.stderr
    return losses(folder / "reference")


def start_soon(cluster: Slurm, number: str) -> None:
    """Not after the two minutes that Slurm lets a requeued job wait.

    Not at once either: Slurm revokes the credential of the run before by the second, and in that same second a new run
    is refused for it ("Job credential revoked").
    """
    cluster.call("scontrol", "update", f"JobId={number}", "StartTime=now+3")


def finish(cluster: Slurm, number: str, folder: Path) -> None:
    """Let a requeued job start soon and end."""
    cluster.wait(number, "PENDING")
    start_soon(cluster, number)
    job = cluster.wait(number, "COMPLETED", "FAILED", "CANCELLED", timeout_s=400)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log(folder)
    assert next(read_events(folder / EVENTS_FILE, "run_end"))["reason"] != "finished"
    assert list(read_events(folder / EVENTS_FILE, "run_end"))[-1]["reason"] == "finished"


LONG = {
    "model": {"preset": "llama-1m", "hidden": 128, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 384},
    "batch": {"sequences": 16, "tokens": 64, "micro_batch": 4},
    "checkpoint": {"every_steps": 0},
}
"""A run whose steps take a tenth of a second on an idle core, so that there is time to interrupt it."""
FOUR = {"cluster": {"levels": [2, 2]}, "batch": {"sequences": 16, "micro_batch": 4}}


@pytest.mark.parametrize("per", ["rank", "node"])
def test_it_runs_on_the_nodes_that_the_levels_say(
    per: str, cluster: Slurm, here: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(here, corpus, **FOUR, run={"steps": 6})
    number = submit(capsys, run, "--per", per, "--time", "5")
    job = cluster.wait(number, "COMPLETED", "FAILED")
    assert job["JobState"] == "COMPLETED", log(here / "run")
    assert (job["NumNodes"], job["Requeue"]) == ("2", "1")
    assert losses(here / "run") == reference(here, corpus, **FOUR, run={"steps": 6})
    assert "6 of 6" in log(here / "run")


@pytest.mark.parametrize("per", ["rank", "node"])
def test_a_corpus_that_is_not_there_is_made_by_the_job_once(
    per: str, cluster: Slurm, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two nodes with one disk; a folder with a blank and a quote in its name, variables and a line of setup."""
    run = write_run(here, here / "corpora" / "made", **FOUR, run={"steps": 3, "folder": str(here / "it's a run")})
    run.write_text(run.read_text().replace("[data]\n", f'[data]\nsources = ["{make_text(here / "text")}"]\n'))
    setup = ["--setup", "export ONE=$(echo 1)", "--env", "TWO=2 2", "--mem", "200", "--time", "5", "--per", per]
    number = submit(capsys, run, *setup)
    job = cluster.wait(number, "COMPLETED", "FAILED")
    said = log(here / "it's a run")
    assert job["JobState"] == "COMPLETED", said
    assert job["MinMemoryNode"] == "200M"
    assert len(losses(here / "it's a run")) == 3
    assert said.count("tokenising") == 1
    assert [path.name for path in (here / "corpora").iterdir()] == ["made"]


def test_a_batch_script_without_srun_is_told_the_line(
    cluster: Slurm, here: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(here, corpus, **FOUR)
    called = shlex.join([*command("train", run)])
    for number, asks in enumerate((["--nodes=2"], ["--ntasks=4"])):
        done = cluster.call(
            "sbatch", "--wait", "--parsable", "--mem=100", *asks, f"--output={here}/said{number}",
            f"--wrap={called}; [ $? = 2 ]",
        )  # fmt: skip
        said = (here / f"said{number}").read_text()
        assert f"shell of Slurm job {done.strip()} " in said
        assert "write `srun thinwire train" in said
    assert not (here / "run").exists()


def test_neighbouring_ranks_share_a_node(
    cluster: Slurm, here: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script's own srun, with another program: ranks 0 and 1 on the first node, 2 and 3 on the second."""
    text = launch(capsys, write_run(here, corpus, **FOUR), "--time", "5")
    line = next(line for line in text.splitlines() if line.startswith("srun"))
    words = shlex.split(line.removesuffix("&"))
    own = shlex.join(words[: next(i for i, word in enumerate(words) if "python" in word)]).replace("'", '"')
    shown = r"""bash -c 'echo "$SLURM_PROCID $SLURMD_NODENAME $SLURM_LOCALID"'"""
    header = [line for line in text.splitlines() if line.startswith("#") and "output" not in line]
    script = "\n".join([*header, f"#SBATCH --output={here}/places", f"{own} {shown}"])
    (here / "places.sh").write_text(script)
    number = cluster.call("sbatch", "--parsable", "--mem=100", str(here / "places.sh")).strip()
    cluster.wait(number, "COMPLETED")
    places = sorted(line.split() for line in (here / "places").read_text().splitlines())
    assert [int(place[2]) for place in places] == [0, 1, 0, 1]
    assert places[0][1] == places[1][1] != places[2][1] == places[3][1]


def test_it_saves_before_the_time_limit_and_goes_on_in_the_same_job(
    cluster: Slurm, here: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit of two minutes, the signal 80 s before it (Slurm may send it half a minute earlier than that)."""
    run = write_run(here, corpus, **LONG, run={"steps": 100_000})
    number = submit(capsys, run, "--time", "2", "--stop-before", "80 s")
    cluster.wait(number, "RUNNING")
    job = cluster.wait(number, "PENDING", "COMPLETED", "FAILED", "TIMEOUT", timeout_s=180)
    assert (job["JobState"], job["Restarts"]) == ("PENDING", "1"), log(here / "run")
    done = max(steps(here / "run" / EVENTS_FILE))
    assert [path.name for path in (here / "run" / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    assert "asking for job" in log(here / "run")
    cluster.call("scontrol", "update", f"JobId={number}", "TimeLimit=10")
    start_soon(cluster, number)
    at_step(here / "run", done + 2)
    cluster.call("scancel", number)
    assert f"going on with {here / 'run'}" in log(here / "run").replace("\n", " ")


def test_a_preempted_job_saves_in_its_grace_time_and_is_requeued(
    cluster: Slurm, here: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {**LONG, "cluster": {"levels": [2, 2]}, "run": {"steps": 200}}
    run = write_run(here, corpus, **sections)
    number = submit(capsys, run, "--time", "10", "--sbatch", "partition=low")
    at_step(here / "run", 2)
    urgent = cluster.call(
        "sbatch",
        "--parsable",
        "--partition=high",
        "--nodes=3",
        "--exclusive",
        f"--output={here}/urgent",
        "--wrap=sleep 1",
    ).strip()
    cluster.wait(urgent, "COMPLETED")
    assert 0 < max(steps(here / "run" / EVENTS_FILE)) < 200, log(here / "run")
    finish(cluster, number, here / "run")
    assert sorted(steps(here / "run" / EVENTS_FILE)) == list(range(1, 201))


def test_a_cancelled_job_stays_cancelled(
    cluster: Slurm, here: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = submit(capsys, write_run(here, corpus, run={"steps": 100000}), "--time", "10")
    at_step(here / "run", 3)
    cluster.call("scancel", number)
    assert cluster.wait(number, "CANCELLED")["Restarts"] == "0"
    time.sleep(8)
    assert cluster.job(number)["JobState"] == "CANCELLED"


def test_a_rank_that_fails_ends_the_job_and_is_not_tried_again(
    cluster: Slurm, here: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(here, corpus, **FOUR, optimizer={"lr": 1e6, "clip_norm": 0.0}, run={"steps": 100})
    number = submit(capsys, run, "--time", "5")
    job = cluster.wait(number, "FAILED", "COMPLETED")
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0"), log(here / "run")
    assert "not finite" in log(here / "run")


def test_the_tasks_of_an_array_have_run_folders_of_their_own(
    cluster: Slurm, here: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(here, corpus, run={"steps": 4})
    settings = ["--set", "run.seed={task}", "--set", f"run.folder={here}/sweep/{{task}}"]
    number = submit(capsys, run, "--array", "3-4", "--time", "5", *settings)
    for task in (3, 4):
        job = cluster.wait(f"{number}_{task}", "COMPLETED", "FAILED")
        assert job["JobState"] == "COMPLETED", log(here / "sweep")
        assert f"seed = {task}\n" in (here / "sweep" / str(task) / "run.toml").read_text()
        assert (here / "sweep" / "logs" / f"slurm-{number}_{task}.out").is_file()
    assert losses(here / "sweep" / "3") != losses(here / "sweep" / "4")


def test_the_levels_follow_the_nodes_that_slurm_gives(
    cluster: Slurm, here: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(here, corpus, batch={"sequences": 24, "micro_batch": 2}, run={"steps": 3})
    number = submit(capsys, run, "--nodes", "2-3", "--ranks-per-node", "2", "--time", "5")
    job = cluster.wait(number, "COMPLETED", "FAILED")
    assert job["JobState"] == "COMPLETED", log(here / "run")
    started = next(read_events(here / "run" / EVENTS_FILE, "run_start"))
    assert started["ranks"] == 2 * int(job["NumNodes"]) >= 4


def test_what_slurm_refuses_leaves_nothing_behind(
    cluster: Slurm, here: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(here, corpus)
    with pytest.raises(SystemExit) as left:
        main(["launch", "slurm", str(run), "--submit", "--sbatch", "partition=nowhere"])
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert "sbatch refuses the job: invalid partition specified: nowhere" in said
    assert len(said.strip().splitlines()) == 1
    assert not (here / "run").exists()
