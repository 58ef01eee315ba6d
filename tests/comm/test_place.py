"""A rank's place from a launcher's variables."""

import pytest

from thinwire.comm.place import Place, first_host
from thinwire.errors import ConfigError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"}
SLURM = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "n[003-006]",
}  # fmt: skip


def test_places_are_read_from_torchrun_and_slurm() -> None:
    assert Place.from_environment({}) is None
    assert Place.from_environment(TORCHRUN) == Place(3, 4, 1, "n0", 29500)
    assert Place.from_environment(SLURM) == Place(5, 8, 1, "n003", 20123)


def test_a_batch_script_of_one_task_is_no_launcher() -> None:
    assert Place.from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) is None
    assert Place.from_environment({**BATCH, "SLURM_JOB_NUM_NODES": "1"}) is None


BATCH = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
         "SLURM_JOB_NODELIST": "n[1-2]"}  # fmt: skip
"""What the shell of `sbatch --nodes=2` sees (Slurm 22.05)."""


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"SLURM_NTASKS": "4"},
        {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2"},
        {"SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
    ],
    ids=["nodes", "tasks-and-nodes", "tasks-of-a-node", "numbered-batch-step", "interactive-step"],
)
@pytest.mark.parametrize("nodes", [False, True])
def test_the_shell_of_a_job_of_several_tasks_is_told_the_srun_line(change: dict[str, str], nodes: bool) -> None:
    with pytest.raises(ConfigError, match=r"shell of Slurm job 7 .*write `srun thinwire train a\.toml`"):
        Place.from_environment({**BATCH, **change}, nodes=nodes, command="thinwire train a.toml")


def test_a_step_of_one_task_in_a_larger_job_starts_its_ranks_itself() -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}
    assert Place.from_environment({**BATCH, **step}) is None


def test_steps_of_one_job_do_not_meet() -> None:
    first, second = (Place.from_environment({**SLURM, **STEP, "SLURM_STEP_ID": step}) for step in "01")
    assert first is not None and second is not None
    assert first.port != second.port


OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_RANK": "1", "PMIX_NAMESPACE": "876871681"}  # fmt: skip
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "1", "PMI_RANK": "1",
    "PMI_SIZE": "2",
}  # fmt: skip
"""As mpirun of Open MPI 4.1, mpiexec of MPICH 4.0 and mpirun_rsh of MVAPICH2 set them."""


@pytest.mark.parametrize("environment", [OPEN_MPI, HYDRA, MVAPICH], ids=["open-mpi", "hydra", "mvapich"])
def test_places_are_read_from_mpi_launchers(environment: dict[str, str]) -> None:
    place = Place.from_environment(environment)
    assert place is not None
    assert (place.rank, place.size, place.local_rank, place.host) == (1, 2, 1, "127.0.0.1")
    told = Place.from_environment({**environment, "MASTER_ADDR": "n7", "MASTER_PORT": "1234"})
    assert told == Place(1, 2, 1, "n7", 1234)


def test_ranks_of_one_mpirun_meet_at_one_port_and_those_of_another_do_not() -> None:
    one = Place.from_environment(OPEN_MPI)
    other = Place.from_environment({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"})
    later = Place.from_environment({**OPEN_MPI, "PMIX_NAMESPACE": "876871682"})
    assert one is not None and other is not None and later is not None
    assert one.port == other.port != later.port


@pytest.mark.parametrize(
    "change",
    [
        {"OMPI_COMM_WORLD_LOCAL_RANK": "0"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
    ],
    ids=["elsewhere", "here"],
)
def test_mpi_over_several_hosts_needs_to_be_told_where_rank_0_is(change: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        Place.from_environment({**OPEN_MPI, **change})
    in_slurm = Place.from_environment({**OPEN_MPI, **change, **SLURM, **STEP})
    assert in_slurm is not None
    assert (in_slurm.size, in_slurm.host) == (2, "n003")


def test_mpirun_inside_a_slurm_job_is_who_started_the_ranks() -> None:
    """Its daemons are tasks of a step of their own, or it forks in the batch script's shell."""
    for around in ({**SLURM, **STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, {**BATCH, "SLURM_NTASKS": "2"}):
        place = Place.from_environment({**around, **OPEN_MPI})
        assert place is not None
        assert (place.rank, place.size) == (1, 2)


def test_what_srun_sets_for_mpi_programs_says_no_more_than_its_own() -> None:
    pmi = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_JOBID": "123.0", "PMIX_RANK": "5"}
    assert Place.from_environment({**SLURM, **STEP, **pmi}) == Place(5, 8, 1, "n003", 20123)


def test_one_process_of_mpirun_starts_its_ranks_itself() -> None:
    alone = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert Place.from_environment(alone) is None
    assert Place.from_environment(alone, nodes=True) is not None


POD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "run-master-0", "MASTER_PORT": "23456"}
TRAINJOB = {"PET_NODE_RANK": "1", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_MASTER_ADDR": "run-node-0-0.run",
            "PET_MASTER_PORT": "29500"}  # fmt: skip


def test_pods_have_no_local_ranks() -> None:
    for nodes in (False, True):
        assert Place.from_environment(POD, nodes=nodes) == Place(1, 2, 0, "run-master-0", 23456)
    counted = {**POD, "WORLD_SIZE": "16", "PET_NODE_RANK": "1", "PET_NNODES": "2"}  # nprocPerNode: 8
    assert Place.from_environment(counted, nodes=True) == Place(1, 2, 0, "run-master-0", 23456)


def test_a_trainjob_numbers_nodes() -> None:
    assert Place.from_environment(TRAINJOB, nodes=True) == Place(1, 2, 0, "run-node-0-0.run", 29500)
    with pytest.raises(ConfigError, match="one of 2 nodes, not which rank; give --ranks-per-node"):
        Place.from_environment(TRAINJOB)
    assert Place.from_environment({**TRAINJOB, "PET_NODE_RANK": "0", "PET_NNODES": "1"}) is None


def test_the_ranks_of_torchrun_in_a_pod_are_torchruns() -> None:
    inside = {**TRAINJOB, **TORCHRUN, "TORCHELASTIC_RUN_ID": "none"}
    for nodes in (False, True):
        assert Place.from_environment(inside, nodes=nodes) == Place(3, 4, 1, "n0", 29500)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[07,09-11],m1", "gpu07"),
        ("a[1-2]-ib", "a1-ib"),
        ("n[003-005,9],m1", "n003"),
        ("nodeA,nodeB[001,003]", "nodeA"),
        ("gpu-[1-2]-[01-16]", "gpu-1-01"),
        ("rack[0-1]_blade[0-1]", "rack0_blade0"),
        ("a-1.cluster.local,b[1-2].cluster.local", "a-1.cluster.local"),
        ("r[1-2]c[3]n[0004-0010],x", "r1c3n0004"),
        ("n[9,003-005]", "n9"),
        ("[10-12]", "10"),
        ("a[08-100]", "a08"),
        (f"n[1-{'9' * 18}]", "n1"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
    assert first_host(f"{nodes},z[1-3]") == first


@pytest.mark.parametrize(
    "nodes",
    ["", ",", "n1,", ",n1", "n1,,n2", "n[1-2", "n1-2]", "n[]", "n[a-b]", "n[5-3]", "n[1-]", "n[1,]", "n[1-2,[3-4]]", "n 1",
     "n[1- 2]", "n1;n2", "n[\u00b2]", "ok,n[1-2-3]", f"n[{'1' * 5000}]", "[", "n[000x133]"],
)  # fmt: skip
def test_what_is_no_node_list_is_told_in_a_sentence(nodes: str) -> None:
    with pytest.raises(ConfigError, match=r"^the Slurm node list .* cannot be read: .*; set MASTER_ADDR"):
        first_host(nodes)


@pytest.mark.parametrize(
    ("launcher", "change", "says"),
    [
        (TORCHRUN, {"MASTER_PORT": None}, "MASTER_PORT is not"),
        (TORCHRUN, {"MASTER_ADDR": ""}, "MASTER_ADDR is not"),
        (TORCHRUN, {"WORLD_SIZE": None}, "RANK is set but WORLD_SIZE is not"),
        (TORCHRUN, {"RANK": None}, "WORLD_SIZE is set but RANK is not"),
        (TORCHRUN, {"RANK": "4"}, "rank 4 does not exist"),
        (TORCHRUN, {"RANK": "x"}, "not a whole number"),
        (TORCHRUN, {"RANK": "\u00b2"}, "not a whole number"),
        (TORCHRUN, {"RANK": "-1"}, "not a whole number"),
        (TORCHRUN, {"WORLD_SIZE": "9" * 5000}, "not a whole number"),
        (TORCHRUN, {"MASTER_PORT": "65536"}, "is no port"),
        (TORCHRUN, {"MASTER_PORT": "0"}, "is no port"),
        ({**SLURM, **STEP}, {"SLURM_STEP_NUM_TASKS": "many"}, "not a whole number"),
        ({**SLURM, **STEP}, {"SLURM_JOB_ID": "1_2"}, "not a whole number"),
        ({**SLURM, **STEP}, {"SLURM_JOB_NODELIST": "n[1-"}, "cannot be read"),
        ({**SLURM, **STEP}, {"SLURM_JOB_NODELIST": None}, "SLURM_JOB_NODELIST is not"),
        ({**SLURM, **STEP}, {"MASTER_PORT": "70000"}, "is no port"),
        (OPEN_MPI, {"OMPI_COMM_WORLD_SIZE": None}, "OMPI_COMM_WORLD_SIZE is not"),
        (OPEN_MPI, {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}, "rank 2 does not exist"),
        (HYDRA, {"MPI_LOCALRANKID": None}, "MPI_LOCALRANKID is not"),
        ({"PMIX_RANK": "0"}, {}, "no launcher says how many ranks"),
    ],
)  # fmt: skip
def test_contradictions_are_named(launcher: dict[str, str], change: dict[str, str | None], says: str) -> None:
    environment = {key: value for key, value in {**launcher, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=says):
        Place.from_environment(environment)
