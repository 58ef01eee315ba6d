"""What the network is: a device, and levels from the fastest link to the slowest.

A level joins `fanout` of the next inner thing: with `node` (fanout 8) and `cluster` (fanout 4), a node is 8 ranks and
the cluster is 4 nodes. Ranks number inner-first: rank r sits at coordinate `(r // inner ranks) % fanout` of a level.
`bytes_per_s` of a level is what one member (one of the next inner things, all its ranks together) can send over its
link at that level, in one direction; `latency_s` is the time before the first byte of a message arrives.

A calibration says how near device and links come to their stated figures: it turns data-sheet numbers into seconds. A
cluster file may carry a measured one. Without it the presets' defaults hold, which were fitted on published runs;
`benchmarks/validate_planner.py` prints how well such fits predict runs that they have not seen.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from thinwire.config import Frozen, build, read_toml
from thinwire.errors import ConfigError
from thinwire.units import Bytes, BytesPerS, FlopsPerS, Seconds

Origin = Literal["default", "given", "measured"]


class Calibration(Frozen):
    """Shares of stated figures, and what the figures leave out."""

    matmul_efficiency: float = Field(default=0.71, gt=0, le=1)
    """Share of the device's peak that an endlessly large matmul reaches."""
    matmul_half: float = Field(default=56.0, ge=0)
    """Extent of one dimension of a matmul at which half of that is left: efficiency is the product of d / (d + half)."""
    memory_efficiency: float = Field(default=0.9, gt=0, le=1)
    """Share of the memory rate that element-wise work reaches."""
    launch_s: Seconds = Field(default=5e-6, ge=0)
    """Least time between two kernels of eager code: the floor under small work."""
    inner_link_efficiency: float = Field(default=0.86, gt=0, le=1)
    """Share of its stated rate that the innermost level reaches in collectives."""
    outer_link_efficiency: float = Field(default=0.8, gt=0, le=1)
    """The same of every other level."""
    collective_s: Seconds = Field(default=0.0, ge=0)
    """What starting a collective takes beyond the links' latency."""
    overlap_slowdown: float = Field(default=0.1, ge=0)
    """By how much computing is slower while a collective is under way."""
    memory_backward: float = Field(default=2.0, gt=0)
    """Element-wise work of a backward, over that of its forward."""
    weight_s: Seconds = Field(default=0.0, ge=0)
    """What one weight of a block costs a forward however few tokens there are: it is read. A backward takes twice that,
    to read it and to write its gradient."""
    logit_s: Seconds | None = Field(default=None, ge=0)
    """The loss, forward and backward, for one logit; none: as long as its bytes take to be read and written."""
    optimizer_s: Seconds | None = Field(default=None, ge=0)
    """Updating one number: scaling its gradient, the norm, AdamW; none: as long as its states take."""
    collect_s: Seconds = Field(default=0.0, ge=0)
    """Taking one number of a micro-batch's fresh gradient over into the flat sums."""
    sum_s: Seconds = Field(default=0.0, ge=0)
    """Adding up one number that a reduce-scatter received, beyond its way over the link."""
    meeting_s: Seconds = Field(default=0.0, ge=0)
    """What ranks lose by waiting for each other wherever compute stops for a transfer that they carry themselves: one is
    always late, most so where ranks share cores."""
    coding_s: dict[str, tuple[Seconds, Seconds]] = Field(default_factory=dict)
    """Codec -> seconds to code one number and to decode one; those left out take as long as touching their bytes."""
    framework_bytes: Bytes = Field(default=3 * 2**29, ge=0)
    """Memory of the runtime, its communication buffers and what the allocator cannot use."""
    origin: Origin = "default"
    source: str = "ten A100 runs of arXiv 2104.04473, table 1"
    """What the constants were fitted on."""


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

    @property
    def shape(self) -> tuple[tuple[str, int], ...]:
        """(name, fanout) of each level, inner to outer: what a plan is made for."""
        return tuple((level.name, level.fanout) for level in self.levels)

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


def show_levels(shape: Iterable[tuple[str, int]]) -> str:
    """`"node=2 x cluster=4"`."""
    return " x ".join(f"{name}={fanout}" for name, fanout in shape)


def read_cluster(path: Path) -> Cluster:
    """A cluster file, as `thinwire probe` writes it. Raises ConfigError (another version, unknown key, bad number)."""
    tree = read_toml(path)
    if tree.get("version", 1) != 1:
        raise ConfigError(f"{path} is a cluster file of version {tree['version']}; this thinwire reads version 1")
    return build(Cluster, tree, str(path))


def check_size(cluster: Cluster, size: int) -> None:
    """Raise ConfigError, in one sentence, if the launcher's world is not the cluster's."""
    if cluster.ranks != size:
        inside, rest = divmod(cluster.ranks, size)
        nodes = "" if rest else f", or, if each of these is to start a node's ranks, give --ranks-per-node {inside}"
        raise ConfigError(
            f"the levels {show_levels(cluster.shape)} make {cluster.ranks} ranks, but the launcher started {size}; change "
            f"cluster.levels, or start {cluster.ranks} processes{nodes}"
        )
