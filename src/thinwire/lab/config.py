"""LAB.toml: how many hosts and ranks, what rate each link has, which faults come when."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from thinwire.config import Frozen, build, override, read_toml
from thinwire.errors import ConfigError
from thinwire.units import Bytes, BytesPerS, Seconds, show_bytes, show_rate

MAX_HOSTS = 254
"""Addresses of one /24 network."""
MIN_RATE_BYTES_PER_S, MAX_RATE_BYTES_PER_S = 1e4 / 8, 10e9 / 8
"""10 kbit/s to 10 Gbit/s. Above it the machine's cores, not the limiter, set the speed of an emulated link."""

FaultKind = Literal["rate", "cut", "restore", "drop_host", "freeze", "thaw", "kill"]
_ON_LINKS, _ON_RANKS = ("rate", "cut", "restore"), ("freeze", "thaw", "kill")


class Fault(Frozen):
    """Something that goes wrong (or right again), `at_s` seconds after the command began or `at_step` of its run."""

    kind: FaultKind
    at_s: Seconds | None = Field(default=None, ge=0)
    at_step: int | None = Field(default=None, ge=0)
    """When the run's `events.jsonl` holds a `step` record of this number or a later one."""
    host: int | None = Field(default=None, ge=0)
    site: int | None = Field(default=None, ge=0)
    """Instead of `host`: the uplink of a site, for `rate`, `cut` and `restore`."""
    rank: int | None = Field(default=None, ge=0)
    rate: BytesPerS | None = None
    """The new rate, bytes per second; left out: unlimited."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.at_s is None) == (self.at_step is None):
            raise ValueError(f"a fault {self.kind!r} needs one of at_s and at_step")
        given = [name for name in ("host", "site", "rank") if getattr(self, name) is not None]
        wanted = ("host", "site") if self.kind in _ON_LINKS else ("rank",) if self.kind in _ON_RANKS else ("host",)
        if len(given) != 1 or given[0] not in wanted:
            raise ValueError(f"a fault {self.kind!r} needs {' or '.join(wanted)}, and nothing else to act on")
        if self.rate is not None and self.kind != "rate":
            raise ValueError(f"a fault {self.kind!r} has no rate; write kind = 'rate' to change one")
        return self

    @field_validator("rate")
    @classmethod
    def _shaped(cls, rate: float | None) -> float | None:
        return None if rate is None else checked_rate(rate)


class LabConfig(Frozen):
    """A whole LAB.toml. Rates are per direction; a rate that is left out is unlimited (a link of this machine's speed)."""

    hosts: int
    ranks_per_host: int = Field(default=1, ge=1)
    host_rate: BytesPerS | tuple[BytesPerS, ...] | None = None
    """Bytes per second of every host's uplink, or one figure per host."""
    hosts_per_site: int | None = Field(default=None, ge=1)
    """Hosts that share a switch of their own (a site or a rack); left out: all hosts on one switch."""
    site_rate: BytesPerS | None = None
    """Bytes per second of every site's uplink."""
    delay: Seconds | None = Field(default=None, gt=0)
    """One-way delay of a host's uplink; needs netem in the kernel."""
    congestion: str | None = None
    """TCP's congestion control on the links; default: cubic, or reno where the kernel has no cubic."""
    burst: Bytes | None = Field(default=None, ge=20_000)
    """Bytes a link may send at once before its rate holds; default: what the rate needs."""
    memory_per_rank: Bytes = Field(default=300 * 2**20, ge=0)
    """What a rank takes of this machine's memory; more ranks than fit are refused."""
    events: Path | None = None
    """The `events.jsonl` that faults with `at_step` follow."""
    faults: tuple[Fault, ...] = ()

    @field_validator("hosts")
    @classmethod
    def _some_hosts(cls, hosts: int) -> int:
        if not 1 <= hosts <= MAX_HOSTS:
            raise ValueError(f"a lab has 1 to {MAX_HOSTS} hosts, not {hosts}")
        return hosts

    @field_validator("host_rate", "site_rate")
    @classmethod
    def _shaped(cls, rate: Any) -> Any:
        for value in rate if isinstance(rate, tuple) else (rate,):
            if value is not None:
                checked_rate(value)
        return rate

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if isinstance(self.host_rate, tuple) and len(self.host_rate) != self.hosts:
            raise ValueError(
                f"host_rate has {len(self.host_rate)} figures for {self.hosts} hosts; give one, or one each"
            )
        if self.hosts_per_site is not None and self.hosts % self.hosts_per_site:
            raise ValueError(f"hosts = {self.hosts} is not divisible by hosts_per_site = {self.hosts_per_site}")
        if self.site_rate is not None and self.sites < 2:
            raise ValueError("site_rate needs two sites or more; set hosts_per_site to a part of hosts")
        for number, fault in enumerate(self.faults):
            self._check_fault(number, fault)
        return self

    def _check_fault(self, number: int, fault: Fault) -> None:
        for name, count in (("host", self.hosts), ("site", self.sites), ("rank", self.ranks)):
            index = getattr(fault, name)
            if index is not None and index >= count:
                raise ValueError(f"faults[{number}] names {name} {index}, but the lab has {count}, numbered from 0")

    @property
    def ranks(self) -> int:
        return self.hosts * self.ranks_per_host

    @property
    def sites(self) -> int:
        """How many sites there are; 0 without a second tier."""
        return 0 if self.hosts_per_site is None else self.hosts // self.hosts_per_site

    def rate_of(self, host: int) -> float | None:
        """Bytes per second of a host's uplink, None for unlimited."""
        return self.host_rate[host] if isinstance(self.host_rate, tuple) else self.host_rate

    def host_of(self, rank: int) -> int:
        return rank // self.ranks_per_host


def checked_rate(bytes_per_s: float) -> float:
    """`bytes_per_s`, or ValueError if the lab cannot shape a link to it."""
    if bytes_per_s <= 0:
        raise ValueError(
            "0 is no rate for a link; leave it out for an unlimited one, and cut one with a fault of kind 'cut'"
        )
    if not MIN_RATE_BYTES_PER_S <= bytes_per_s <= MAX_RATE_BYTES_PER_S:
        raise ValueError(
            f"{show_rate(bytes_per_s)} is outside what the kernel shapes here, "
            f"{show_rate(MIN_RATE_BYTES_PER_S)} to {show_rate(MAX_RATE_BYTES_PER_S)}; leave it out for an unlimited link"
        )
    return bytes_per_s


def read_lab(path: Path, settings: tuple[str, ...] = ()) -> LabConfig:
    """The lab that the TOML file at `path` describes, overridden by `settings`. Raises ConfigError."""
    return build(LabConfig, override(read_toml(path), settings), str(path))


def check_memory(config: LabConfig, available_bytes: int) -> None:
    """Raise ConfigError if the ranks of `config` need more memory than there is."""
    needed = config.ranks * config.memory_per_rank
    if needed > available_bytes:
        raise ConfigError(
            f"{config.hosts} hosts x {config.ranks_per_host} ranks need {show_bytes(needed)} at "
            f"{show_bytes(config.memory_per_rank)} each, but this machine has {show_bytes(available_bytes)} available; "
            f"at most {available_bytes // config.memory_per_rank} ranks fit, or lower memory_per_rank"
        )


def choose_congestion(config: LabConfig, available: Sequence[str]) -> str:
    """The congestion control to use, of those the kernel has. Raises ConfigError if the one asked for is not there."""
    if config.congestion is None:
        return "cubic" if "cubic" in available else "reno"
    if config.congestion not in available:
        raise ConfigError(f"congestion = {config.congestion!r} is not in this kernel, which has {', '.join(available)}")
    return config.congestion


def available_memory_bytes(text: str) -> int:
    """MemAvailable of the contents of /proc/meminfo, in bytes."""
    line = next(line for line in text.splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024
