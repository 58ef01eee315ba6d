"""A process's place in its world, read from the variables that torchrun or Slurm set. A pure function, no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from thinwire.errors import ConfigError
from thinwire.units import whole_number

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM_PORTS = (20000, 20000)
"""First port, and how many, from which a Slurm job takes the one its id says."""


@dataclass(frozen=True)
class Place:
    """Which rank this process is, of how many, and where all of them meet."""

    rank: int
    size: int
    local_rank: int
    host: str
    port: int

    @staticmethod
    def from_environment(environment: Mapping[str, str]) -> "Place | None":
        """torchrun's variables first, then Slurm's (only inside a job step of several tasks), else None.

        Raises ConfigError if only some of a launcher's variables are there, or if they contradict each other.
        """
        if "RANK" in environment and "WORLD_SIZE" in environment:
            return _torchrun(environment)
        if "SLURM_PROCID" in environment and (
            "SLURM_NTASKS" in environment and _number(environment, "SLURM_NTASKS") > 1
        ):
            return _slurm(environment)
        return None


def _torchrun(environment: Mapping[str, str]) -> Place:
    missing = [name for name in _TORCHRUN if name not in environment]
    if missing:
        raise ConfigError(
            f"RANK and WORLD_SIZE are set but {', '.join(missing)} is not; start with torchrun, or unset them"
        )
    return _checked(
        Place(
            rank=_number(environment, "RANK"),
            size=_number(environment, "WORLD_SIZE"),
            local_rank=_number(environment, "LOCAL_RANK"),
            host=environment["MASTER_ADDR"],
            port=_number(environment, "MASTER_PORT"),
        )
    )


def _slurm(environment: Mapping[str, str]) -> Place:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ConfigError("SLURM_PROCID is set but SLURM_JOB_NODELIST is not; start with srun inside an allocation")
    first, count = _SLURM_PORTS
    return _checked(
        Place(
            rank=_number(environment, "SLURM_PROCID"),
            size=_number(environment, "SLURM_NTASKS"),
            local_rank=_number(environment, "SLURM_LOCALID") if "SLURM_LOCALID" in environment else 0,
            host=environment.get("MASTER_ADDR") or first_host(nodes),
            port=(
                _number(environment, "MASTER_PORT")
                if environment.get("MASTER_PORT")
                else first + (_number(environment, "SLURM_JOB_ID") if "SLURM_JOB_ID" in environment else 0) % count
            ),
        )
    )


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: `"n[003-005,9],m1"` -> `"n003"`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    if match is None:
        raise ConfigError(f"the Slurm node list {nodes!r} cannot be read; set MASTER_ADDR to the first host")
    return f"{match[1]}{match[2] or ''}{match[3] if match[2] else ''}"


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    number = whole_number(text)
    if number is None:
        raise ConfigError(f"{name} = {text[:40]!r} is not a whole number; it is set by torchrun or srun")
    return number


def _checked(place: Place) -> Place:
    if not 1 <= place.port <= 65535:
        raise ConfigError(f"MASTER_PORT = {place.port} is no port; they are 1 to 65535")
    if place.rank >= place.size:
        raise ConfigError(f"rank {place.rank} does not exist in a world of {place.size}; check RANK and WORLD_SIZE")
    return place
