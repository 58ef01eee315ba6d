"""Where a process of the lab is, told in the variables that torchrun would set. Pure functions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from thinwire.lab import network
from thinwire.lab.config import LabConfig

FIRST_PORT = 29_500
_DROPPED = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "TORCHELASTIC_RUN_ID", "HOSTNAME")


@dataclass(frozen=True)
class Member:
    """One process to start: on which host, as which rank (None: one launcher for the whole host), with what variables."""

    host: int
    rank: int | None
    environment: Mapping[str, str]

    @property
    def log_name(self) -> str:
        return f"host-{self.host}.log" if self.rank is None else f"rank-{self.rank}.log"


def members(config: LabConfig, environment: Mapping[str, str], *, per_host: bool, port: int) -> Iterator[Member]:
    """Every process of one command: a rank each, or with `per_host` a launcher each. `environment` is the caller's."""
    kept = {key: value for key, value in environment.items() if key not in _DROPPED}
    for host in range(config.hosts):
        common = {**kept, **_of_host(config, host, port)}
        if per_host:
            yield Member(host, None, {**_without_rank(common), **_for_torchrun(config, host, port)})
            continue
        for local_rank in range(config.ranks_per_host):
            rank = host * config.ranks_per_host + local_rank
            yield Member(host, rank, {**common, **_of_rank(config, rank, local_rank)})


def _of_host(config: LabConfig, host: int, port: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": network.address(0),
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": network.INTERFACE,
        "NCCL_SOCKET_IFNAME": network.INTERFACE,
        "OMP_NUM_THREADS": "1",
        "NNODES": str(config.hosts),
        "NODE_RANK": str(host),
        "GROUP_RANK": str(host),
        "PYTHONUNBUFFERED": "1",
    }


def _of_rank(config: LabConfig, rank: int, local_rank: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(config.ranks),
        "LOCAL_WORLD_SIZE": str(config.ranks_per_host),
    }


def _without_rank(environment: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def _for_torchrun(config: LabConfig, host: int, port: int) -> dict[str, str]:
    """torchrun reads its own options from these."""
    return {
        "PET_NNODES": str(config.hosts),
        "PET_NODE_RANK": str(host),
        "PET_NPROC_PER_NODE": str(config.ranks_per_host),
        "PET_MASTER_ADDR": network.address(0),
        "PET_MASTER_PORT": str(port),
    }
