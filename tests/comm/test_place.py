"""A rank's place from a launcher's variables."""

import pytest

from thinwire.comm.place import Place, first_host
from thinwire.errors import ConfigError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
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


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n1,n2", "n1"), ("gpu[07,09-11],m1", "gpu07"), ("a[1-2]-ib", "a1-ib")]
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"MASTER_PORT": None}, "MASTER_PORT is not"),
        ({"RANK": "4"}, "rank 4 does not exist"),
        ({"RANK": "x"}, "not a whole number"),
    ],
)
def test_contradictions_are_named(change: dict[str, str | None], says: str) -> None:
    environment = {key: value for key, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=says):
        Place.from_environment(environment)
