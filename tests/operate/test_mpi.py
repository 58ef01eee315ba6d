"""Ranks that MPI's launchers or srun start form one world: by what they set, and by MPI's launchers where they are."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from runs import command, environment, make_corpus, warm, write_run
from thinwire.files.events import read_events
from thinwire.train.folder import EVENTS_FILE

SHORT = {"run": {"steps": 3, "eval_every": 0, "sample_tokens": 0}, "schedule": {"warmup_steps": 0}}
OPEN_MPI = {"RANK": "OMPI_COMM_WORLD_RANK", "SIZE": "OMPI_COMM_WORLD_SIZE", "LOCAL": "OMPI_COMM_WORLD_LOCAL_RANK"}
HYDRA = {"RANK": "PMI_RANK", "SIZE": "PMI_SIZE", "LOCAL": "MPI_LOCALRANKID"}
SRUN = {"RANK": "SLURM_PROCID", "SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL": "SLURM_LOCALID"}
STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_JOB_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"))


def told_once(folder: Path) -> bool:
    """Whether every step of a run of two ranks was written once."""
    events = folder / EVENTS_FILE
    assert next(read_events(events, "run_start"))["ranks"] == 2
    return [event["step"] for event in read_events(events, "step")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("names", "job"),
    [
        (OPEN_MPI, {"PMIX_NAMESPACE": f"prterun-{os.getpid()}"}),
        (HYDRA, {"PMI_JOBID": f"kvs_{os.getpid()}"}),
        (SRUN, {"SLURM_JOB_ID": str(os.getpid()), **STEP}),
    ],
    ids=["open-mpi", "hydra", "srun"],
)
def test_processes_with_a_launchers_variables_make_one_run(
    names: dict[str, str], job: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path, corpus, cluster={"levels": [2]}, **SHORT)
    ranks = [
        warm(
            "train", run, merged=True,
            env={**environment(), **job, names["RANK"]: str(rank), names["SIZE"]: "2", names["LOCAL"]: str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=200)[0] for process in ranks]
    assert [process.wait() for process in ranks] == [0, 0], said
    assert told_once(tmp_path / "run")


@pytest.mark.parametrize(
    "starter",
    [
        ("mpirun.openmpi", "--oversubscribe", "-np", "2"),
        pytest.param(("mpiexec.hydra", "-n", "2"), marks=pytest.mark.slow),
    ],
    ids=["open-mpi", "hydra"],
)
@pytest.mark.parametrize(
    "per_node", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["a-process-a-rank", "a-process-a-node"]
)
def test_a_real_mpirun_starts_one_run(starter: tuple[str, ...], per_node: bool, corpus: Path, tmp_path: Path) -> None:
    if shutil.which(starter[0]) is None:
        pytest.skip(f"{starter[0]} is not on this machine")
    run = write_run(tmp_path, corpus, cluster={"levels": [2]}, **SHORT)
    count, more = ("1", ["--ranks-per-node=2"]) if per_node else ("2", [])
    own = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    done = subprocess.run(
        [*starter[:-1], count, *command("train", run, *more)],
        capture_output=True, text=True, env={**environment(), **own}, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert told_once(tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        ([], {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
         "Open MPI started rank 1 of 2 and does not say on which host rank 0 is; set MASTER_ADDR"),
        ([], {"PMIX_RANK": "1"}, "no launcher says how many ranks there are"),
        ([], {"PET_NODE_RANK": "0", "PET_NNODES": "2"}, "not which rank; give --ranks-per-node N"),
        ([], {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
         "give --ranks-per-node 2"),
        (["--ranks-per-node=3"], {}, "the levels node=2 make 2 ranks, but the launcher started 3"),
        (["--port=70000"], {}, "'--port' must be less than or equal to 65535"),
        (["--port=-1"], {}, "'--port' must be greater than or equal to 1"),
    ],
)  # fmt: skip
def test_places_that_cannot_be_told_are_refused_and_nothing_is_written(
    arguments: list[str], variables: dict[str, str], says: str, corpus: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path, corpus, cluster={"levels": [2]}, **SHORT)
    done = subprocess.run(
        command("train", run, *arguments), capture_output=True, text=True, env={**environment(), **variables},
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
