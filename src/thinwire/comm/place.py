"""A process's place in its world, from the variables that whoever started it has set. A pure function, no torch.

torchrun's variables come first, since scripts set them on purpose; then those of MPI's launchers, whose processes also see
the Slurm job in which mpirun runs; then Slurm's own; then those of a Kubeflow pod. A process that several launchers speak
to is the one that the innermost of them started.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from thinwire.config import show_text
from thinwire.errors import ConfigError
from thinwire.units import whole_number

_PORTS = (20000, 20000)
"""First port, and how many, from which a job takes the one that its name or number says."""
_DEFAULT_PORT = 29500
_BATCH_STEPS = 0xFFFFFFF0
"""Slurm's numbers from here on are no steps of srun: the batch script's, an interactive shell's (slurm.h)."""

_TEXT, _BRACKET = re.compile(r"[A-Za-z0-9._-]+"), re.compile(r"\[([^\[\]]*)\]")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


class _Launcher(NamedTuple):
    """The names of the variables in which an MPI launcher says which process is which."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    job: str
    """The same in all of its processes, another in those of its next start."""


_MPI = (
    _Launcher(
        "Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE", "PMIX_NAMESPACE",
    ),
    _Launcher(
        "MVAPICH2", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE", "PMI_JOBID",
    ),
    _Launcher("MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PMI_JOBID"),
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Which rank this process is, of how many, and where all of them meet."""

    rank: int
    size: int
    local_rank: int
    host: str
    port: int

    @staticmethod
    def from_environment(
        environment: Mapping[str, str], *, nodes: bool = False, command: str = "python TRAIN.py"
    ) -> "Place | None":
        """This process among those that a launcher started; None if it was started alone.

        `nodes`: each of them stands for a node and starts the node's ranks itself, so that places on a node do not matter.
        `command`: how this process was called, for the sentence that tells how to call it. Raises ConfigError if only some
        of a launcher's variables are there or they contradict each other, if they do not say where rank 0 is, or if this is
        the shell of a Slurm job of several tasks and none of its tasks.
        """
        if "RANK" in environment or "WORLD_SIZE" in environment:
            return _torch(environment, nodes=nodes)
        for launcher in _MPI:
            if launcher.rank in environment and not _of_slurm(environment, launcher):
                return _mpi(environment, launcher, nodes=nodes)
        if "SLURM_JOB_ID" in environment or "SLURM_PROCID" in environment:
            return _slurm(environment, command)
        if "PMIX_RANK" in environment:
            raise ConfigError(
                "PMIX_RANK is set but no launcher says how many ranks there are; start with torchrun, srun or mpirun, or "
                "set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
            )
        return _pod(environment, nodes=nodes)


def _torch(environment: Mapping[str, str], *, nodes: bool) -> Place:
    """Set by torchrun, by hand, or by Kubeflow's training operator, which numbers pods and knows no local ranks."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        there = " and ".join(name for name in needed[:2] if name in environment)
        verb = "are" if there.count(" ") else "is"
        raise ConfigError(f"{there} {verb} set but {', '.join(missing)} is not; start with torchrun, or unset {there}")
    names = ("PET_NODE_RANK", "PET_NNODES") if nodes and _numbers_nodes(environment) else ("RANK", "WORLD_SIZE")
    local_rank = _number(environment, "LOCAL_RANK") if environment.get("LOCAL_RANK") else 0
    return _checked(environment, names, local_rank, environment["MASTER_ADDR"], _port(environment))


def _numbers_nodes(environment: Mapping[str, str]) -> bool:
    """Whether PET_* (torchrun's options) number the nodes: an operator's WORLD_SIZE may count the ranks inside them too."""
    nodes = environment.get("PET_NNODES", "")
    return "TORCHELASTIC_RUN_ID" not in environment and "PET_NODE_RANK" in environment and nodes.isdecimal()


def _pod(environment: Mapping[str, str], *, nodes: bool) -> Place | None:
    """Kubeflow's TrainJob speaks torchrun's options, PET_*: each pod is a node."""
    if not _numbers_nodes(environment) or (not nodes and environment["PET_NNODES"] == "1"):
        return None
    if not nodes:
        raise ConfigError(
            f"PET_NODE_RANK = {environment['PET_NODE_RANK']} says that this is one of {environment['PET_NNODES']} nodes, "
            f"not which rank; give --ranks-per-node N to start the node's N ranks, or start with torchrun"
        )
    host = environment.get("PET_MASTER_ADDR") or environment.get("MASTER_ADDR")
    if not host:
        raise ConfigError("PET_NODE_RANK is set but PET_MASTER_ADDR is not; set it to the first node's address")
    port = _port(environment, "PET_MASTER_PORT" if environment.get("PET_MASTER_PORT") else "MASTER_PORT")
    return _checked(environment, ("PET_NODE_RANK", "PET_NNODES"), 0, host, port)


def _of_slurm(environment: Mapping[str, str], launcher: _Launcher) -> bool:
    """Whether srun has set what an MPI program wants to see: its own variables say more."""
    pairs = ((launcher.rank, "SLURM_PROCID"), (launcher.size, "SLURM_STEP_NUM_TASKS"))
    return launcher.local_rank not in environment and all(
        environment.get(theirs) == environment.get(own, "") for theirs, own in pairs
    )


def _mpi(environment: Mapping[str, str], launcher: _Launcher, *, nodes: bool) -> Place | None:
    """A process of mpirun's; None if it is the only one."""
    missing = [name for name in (launcher.size, *(() if nodes else (launcher.local_rank,))) if name not in environment]
    if missing:
        raise ConfigError(
            f"{launcher.rank} is set but {', '.join(missing)} is not; start with mpirun, srun or torchrun, or unset it"
        )
    local_rank = _number(environment, launcher.local_rank) if launcher.local_rank in environment else 0
    if environment[launcher.size] == "1" and not nodes:
        return None
    job = environment.get(launcher.job) or environment.get("SLURM_JOB_ID")
    chosen = _DEFAULT_PORT if job is None else _PORTS[0] + zlib.crc32(job.encode()) % _PORTS[1]
    return _checked(
        environment, (launcher.rank, launcher.size), local_rank, _rank_0(environment, launcher, local_rank),
        _port(environment, default=chosen),
    )  # fmt: skip


def _rank_0(environment: Mapping[str, str], launcher: _Launcher, local_rank: int) -> str:
    """The host of rank 0, which MPI's launchers do not name.

    Ranks of a host are numbered there in the order of their ranks: rank r is its host's r-th if those before it, rank 0
    among them, are all on that host.
    """
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"]
    nodes = environment.get("SLURM_JOB_NODELIST")
    if nodes:
        return first_host(nodes)
    rank, size = _number(environment, launcher.rank), _number(environment, launcher.size)
    here = _number(environment, launcher.local_size) if launcher.local_size in environment else size
    if rank == local_rank and here == size:
        return "127.0.0.1"
    raise ConfigError(
        f"{launcher.name} started rank {rank} of {size} and does not say on which host rank 0 is; set MASTER_ADDR to it: "
        f"mpirun -x MASTER_ADDR=HOST (Open MPI) or mpiexec -genv MASTER_ADDR HOST"
    )


def _slurm(environment: Mapping[str, str], command: str) -> Place | None:
    """A task of srun's; None in a job, or a step, of one."""
    # the shell of a job is numbered 0
    unsaid = 0 if environment.get("SLURM_PROCID", "0") != "0" else _BATCH_STEPS
    step = _number(environment, "SLURM_STEP_ID") if "SLURM_STEP_ID" in environment else unsaid
    tasks = "SLURM_STEP_NUM_TASKS" if step < _BATCH_STEPS and "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    size = _number(environment, tasks) if tasks in environment else 1
    if step >= _BATCH_STEPS:
        hosts = _number(environment, "SLURM_JOB_NUM_NODES") if "SLURM_JOB_NUM_NODES" in environment else 1
        if max(size, hosts) == 1:
            return None
        raise ConfigError(
            f"this is the shell of Slurm job {environment.get('SLURM_JOB_ID', '')} ({max(size, hosts)} tasks on {hosts} "
            f"node{'s' * (hosts > 1)}), not one of its tasks; write `srun {command}`, or ask Slurm for one task"
        )
    if size == 1:
        return None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ConfigError("SLURM_PROCID is set but SLURM_JOB_NODELIST is not; start with srun inside an allocation")
    job = _number(environment, "SLURM_JOB_ID") if "SLURM_JOB_ID" in environment else 0
    local_rank = _number(environment, "SLURM_LOCALID") if "SLURM_LOCALID" in environment else 0
    host = environment.get("MASTER_ADDR") or first_host(nodes)
    port = _port(environment, default=_PORTS[0] + (job + 101 * step) % _PORTS[1])  # steps of one job meet apart
    return _checked(environment, ("SLURM_PROCID", tasks), local_rank, host, port)


def _port(environment: Mapping[str, str], name: str = "MASTER_PORT", default: int | None = None) -> int:
    if default is not None and not environment.get(name):
        return default
    port = _number(environment, name)
    if not 0 < port < 1 << 16:
        raise ConfigError(f"{name} = {port} is no port; they are 1 to 65535")
    return port


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    number = whole_number(text, most=10**18)
    if number is None:
        raise ConfigError(f"{name} = {show_text(text)} is not a whole number; it is set by whoever starts the ranks")
    return number


def _checked(environment: Mapping[str, str], names: tuple[str, str], local_rank: int, host: str, port: int) -> Place:
    rank, size = (_number(environment, name) for name in names)
    if rank >= size:
        raise ConfigError(f"rank {rank} does not exist in a world of {size}; check {names[0]} and {names[1]}")
    return Place(rank, size, local_rank, host, port)


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: `"n[003-005,9],m1"` -> `"n003"`, `"gpu-[1-2]-[01-16]"` -> `"gpu-1-01"`.

    Names stand between commas; a part of a name in brackets stands for each of its numbers and ranges in turn, with leading
    zeros kept (`man scontrol`, show hostnames). Only the first is wanted, but the whole has to be a list. Raises
    ConfigError, with why it is none.
    """
    first, at = "", 0
    while True:
        name, at = _name(nodes, at)
        first = first or name
        if at == len(nodes):
            return first
        if nodes[at] != ",":
            raise _no_list(nodes, f"{nodes[at]!r} at position {at + 1} belongs to no name")
        at += 1


def _name(nodes: str, at: int) -> tuple[str, int]:
    """(the first host that the name at position `at` stands for, where the name ends)."""
    host, start = "", at
    while at < len(nodes) and nodes[at] != ",":
        if text := _TEXT.match(nodes, at):
            host, at = host + text[0], text.end()
        elif bracket := _BRACKET.match(nodes, at):
            host, at = host + _first_number(nodes, bracket[1]), bracket.end()
        else:
            break
    if not host:
        raise _no_list(nodes, f"there is no name at position {start + 1}")
    return host, at


def _first_number(nodes: str, inside: str) -> str:
    ranges = inside.split(",")
    for each in ranges:
        found = _RANGE.fullmatch(each)
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise _no_list(nodes, f"{show_text(each)} in brackets is neither a number nor a range such as 003-005")
    return ranges[0].partition("-")[0]


def _no_list(nodes: str, why: str) -> ConfigError:
    return ConfigError(
        f"the Slurm node list {show_text(nodes)} cannot be read: {why}; set MASTER_ADDR to the first host"
    )
