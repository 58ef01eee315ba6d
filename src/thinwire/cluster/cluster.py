"""What the network is: a device, and levels from the fastest link to the slowest.

A level joins `fanout` of the next inner thing: with `node` (fanout 8) and `cluster` (fanout 4), a node is 8 ranks and
the cluster is 4 nodes. Ranks number inner-first: rank r sits at coordinate `(r // inner ranks) % fanout` of a level.
`bytes_per_s` of a level is what one member (one of the next inner things, all its ranks together) can send over its
link at that level, in one direction; `latency_s` is the time before the first byte of a message arrives.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from thinwire.cluster.calibration import Calibration, Origin
from thinwire.config import Frozen, build, read_toml
from thinwire.errors import ConfigError
from thinwire.units import Bytes, BytesPerS, FlopsPerS, Seconds

MOST_RANKS = 10**7


class Level(Frozen):
    """One network tier. `None` for a figure means unknown: training needs none of them, planning asks for them."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")
    fanout: int = Field(ge=1, le=10**6)
    bytes_per_s: BytesPerS | None = Field(default=None, gt=0, le=1e18)
    latency_s: Seconds | None = Field(default=None, ge=0, le=1e6)
    behind: float = Field(default=1.0, ge=0, le=1)
    """Share of a transfer that goes on while the ranks compute: 0 where they copy from each other's memory themselves."""
    origin: Origin = "given"

    @field_validator("name")
    @classmethod
    def _reserved(cls, name: str) -> str:
        if name in ("replica", "all", "auto"):
            raise ValueError(f"a level cannot be called {name!r}: partitions use that word; call it for example 'node'")
        return name


class Device(Frozen):
    """What one rank computes on. Peak figures are the maker's dense figures; `None` means unknown."""

    name: str = "cpu"
    kind: Literal["cpu", "cuda"] = "cpu"
    peak_flops_per_s: FlopsPerS | None = Field(default=None, gt=0, le=1e24)
    """Dense peak in the compute precision of the run (bf16 on accelerators, fp32 on CPU)."""
    memory_bytes: Bytes | None = Field(default=None, gt=0, le=10**18)
    memory_bytes_per_s: BytesPerS | None = Field(default=None, gt=0, le=1e18)
    origin: Origin = "given"


class Measurement(Frozen):
    """A figure as it was measured: the median, and half of the range between the quartiles as a share of it."""

    what: str
    value: float
    unit: str
    spread: float = Field(ge=0)
    samples: int = Field(ge=1)
    origin: Literal["measured"] = "measured"


class Cluster(Frozen):
    """A device and the levels that join many of it, inner to outer."""

    version: Literal[1] = 1
    device: Device = Device()
    levels: tuple[Level, ...] = Field(min_length=1)
    interface: str | None = Field(default=None, min_length=1)
    """The network interface that ranks talk over (several: `eth0,eth1`); None: the one that reaches the others."""
    calibration: Calibration | None = None
    """How near device and links come to these figures; none: the device's default."""
    measured: tuple[Measurement, ...] = ()
    """What a probe timed; the figures above were fitted to it."""
    share_device: bool = False
    """Ranks of a host may compute on one accelerator and talk over host memory: for tests of several ranks on one card."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [level.name for level in self.levels]
        if len(set(names)) != len(names):
            raise ValueError(f"level names must differ, these are {', '.join(names)}")
        if self.ranks > MOST_RANKS:
            raise ValueError(f"the levels make {self.ranks:,} ranks; at most {MOST_RANKS:,} are planned for")
        return self

    @property
    def ranks(self) -> int:
        """How many ranks the cluster has: the product of the fanouts."""
        return math.prod(level.fanout for level in self.levels)

    @property
    def level_names(self) -> tuple[str, ...]:
        return tuple(level.name for level in self.levels)

    def index(self, name: str) -> int:
        """Position of level `name`, 0 is the innermost. Raises ConfigError naming the levels there are."""
        if name not in self.level_names:
            raise ConfigError(f"there is no level {name!r}; the levels are {', '.join(self.level_names)} (inner first)")
        return self.level_names.index(name)

    def ranks_within(self, index: int) -> int:
        """Ranks inside one member-group of level `index`, that level included; `ranks_within(-1)` is 1."""
        return math.prod(level.fanout for level in self.levels[: index + 1])

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """Where `rank` sits: its position at each level, inner to outer."""
        return tuple(rank // self.ranks_within(i - 1) % level.fanout for i, level in enumerate(self.levels))

    def group(self, rank: int, index: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` only in their coordinate at level `index`, in coordinate order."""
        stride = self.ranks_within(index - 1)
        fanout = self.levels[index].fanout
        base = rank - (rank // stride % fanout) * stride
        return tuple(base + k * stride for k in range(fanout))

    def span(self, rank: int, index: int) -> tuple[int, ...]:
        """All ranks that share `rank`'s member of level `index` and everything inside it, ascending."""
        size = self.ranks_within(index)
        first = rank // size * size
        return tuple(range(first, first + size))


class ClusterConfig(Frozen):
    """`[cluster]` of a run file: a preset, a cluster file, or levels spelled out; and `device`."""

    preset: str | None = None
    file: str | None = None
    device: Device | str | None = None
    """A preset's name, alone or as `name` of a table with figures over the preset's; a table with a `kind` of its own;
    "cuda": the GPU that this machine has. Default: that of the preset or file; with levels what this machine has."""
    levels: tuple[Level, ...] = ()
    interface: str | None = Field(default=None, min_length=1)
    share_device: bool = False

    @field_validator("levels", mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        """`[2, 4]` is short for two levels named `node` and `cluster` (one number: `node`)."""
        if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
            names = ["node", "cluster"] if len(value) <= 2 else [f"level{i}" for i in range(len(value))]
            return [{"name": name, "fanout": fanout} for name, fanout in zip(names, value, strict=False)]
        return value

    @field_validator("device", mode="before")
    @classmethod
    def _over_preset(cls, value: Any) -> Any:
        """A table that names a preset means it; one without `kind` has to."""
        from thinwire.cluster.presets import DEVICES, device_preset

        if not isinstance(value, dict) or not isinstance(value.get("name", ""), str):
            return value
        name = value.get("name") or ("cuda" if value.get("kind") == "cuda" else "cpu")
        if name in DEVICES:
            preset = DEVICES[name]
            if value.get("kind", preset.kind) != preset.kind:
                raise ValueError(
                    f"the device {name!r} is of kind {preset.kind!r}, not {value['kind']!r}; leave kind out"
                )
            figures = {"origin": "given", **value} if value.keys() - {"name", "kind"} else value
            return {**preset.model_dump(), **figures}
        if "kind" in value:
            return {**value, "name": name}
        try:
            return device_preset(name)
        except ConfigError as error:
            raise ValueError(f"{error} (for one of your own give kind = 'cuda' or 'cpu' and its figures too)") from None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [name for name in ("preset", "file", "levels") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"give one of preset, file and levels, not {' and '.join(given)}")
        return self

    def resolve(self, base: Path = Path(), *, gpus: Sequence[str] | None = None) -> Cluster:
        """The cluster this section means; `file` is relative to `base`. Raises ConfigError.

        `gpus`: names of those that this machine has; None: they are looked for where they matter.
        """
        from thinwire.cluster.presets import preset

        if self.preset:
            cluster = preset(self.preset)
        elif self.file:
            cluster = read_cluster(base / self.file)
        else:
            levels = self.levels or (Level(name="node", fanout=1),)
            cluster = build(Cluster, {"device": self._device(gpus), "levels": levels}, "cluster")
        device = self._device(gpus) if self.device is not None else cluster.device
        if self.share_device and device.kind == "cpu":
            raise ConfigError("cluster.share_device is for accelerators, and the device is a CPU; leave it out")
        given: dict[str, Any] = {"device": device, "share_device": self.share_device or cluster.share_device}
        if self.interface:
            given["interface"] = self.interface
        return cluster.model_copy(update=given)

    def _device(self, gpus: Sequence[str] | None) -> Device:
        from thinwire.cluster.found import found_device, found_gpus
        from thinwire.cluster.presets import device_preset

        if isinstance(self.device, Device):
            return self.device
        if self.device not in (None, "cuda"):
            return device_preset(self.device)
        found = found_device(found_gpus(os.environ) if gpus is None else gpus)
        return Device(name="cuda", kind="cuda") if self.device and found.kind == "cpu" else found


def read_cluster(path: Path) -> Cluster:
    """A cluster file, as `thinwire probe` writes it. Raises ConfigError (another version, unknown key, bad number)."""
    tree = read_toml(path)
    if tree.get("version", 1) != 1:
        raise ConfigError(f"{path} is a cluster file of version {tree['version']}; this thinwire reads version 1")
    return build(Cluster, tree, str(path))


def check_size(cluster: Cluster, size: int) -> None:
    """Raise ConfigError, in one sentence, if the launcher's world is not the cluster's."""
    if cluster.ranks != size:
        product = " x ".join(f"{level.name}={level.fanout}" for level in cluster.levels)
        inside, rest = divmod(cluster.ranks, size)
        nodes = "" if rest else f", or, if each of these is to start a node's ranks, give --ranks-per-node {inside}"
        raise ConfigError(
            f"the levels {product} make {cluster.ranks} ranks, but the launcher started {size}; change cluster.levels, "
            f"or start {cluster.ranks} processes{nodes}"
        )
