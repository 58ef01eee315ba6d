"""All ranks, and the groups in which they talk: one communicator per level and kind of collective, never per unit.

Ranks number inner-first (`Cluster.coordinates`). At each level a rank belongs to one group: the ranks that differ from
it in that level's coordinate alone. Different kinds of collective have communicators of their own, so that a gather
never queues behind a reduction (pytorch issue 177011). A world of one rank has no communicator and no process group.
"""

import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

from thinwire.cluster.cluster import Cluster, Level, check_size
from thinwire.comm.device import claim, rank_device
from thinwire.comm.handle import Outstanding
from thinwire.comm.interfaces import Presence, addresses, asked, tell_libraries
from thinwire.comm.ledger import Ledger
from thinwire.comm.lost import Peers
from thinwire.comm.place import Place
from thinwire.comm.rendezvous import Rendezvous
from thinwire.comm.status import Status, StatusServer
from thinwire.comm.transport import gloo, nccl
from thinwire.comm.transport.connect import find_same_host, transport_of
from thinwire.comm.transport.same_host import Exchanges
from thinwire.comm.transport.transport import TaggedTransport, Transport
from thinwire.errors import ConfigError, LinkError, RankLost
from thinwire.plan.hops import Link

Kind = Literal["gather", "reduce", "small"]


@dataclass
class World:
    """One rank's view of all ranks. Make it with `World.join`, end it with `leave`."""

    rank: int
    size: int
    local_rank: int
    cluster: Cluster
    device: torch.device
    ledger: Ledger = field(default_factory=Ledger)
    outstanding: Outstanding = field(default_factory=Outstanding)
    """Handles not waited for yet, and what others may ask of this rank."""
    _peers: Peers | None = None
    _groups: dict[tuple[int, Kind], dist.ProcessGroup] = field(default_factory=dict)
    _transports: dict[tuple[int, Kind], Transport] = field(default_factory=dict)
    timeout: timedelta = timedelta(seconds=600)
    over_host: bool = False
    """Tensors of an accelerator travel as copies in host memory, over gloo: several ranks may share one."""
    _devices: gloo.Devices = ()
    """What gloo's communicators share."""
    _exchanges: Exchanges = field(default_factory=Exchanges)
    """Between this rank and others of its host."""
    _parts: list["World"] = field(default_factory=list)
    """Worlds of some of the ranks, to be left with this one."""

    @staticmethod
    def join(
        cluster: Cluster, *, rank: int, size: int, local_rank: int, host: str, port: int, timeout_s: float = 600.0,
        stopped: Callable[[], bool] = lambda: False, statement: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
    ) -> "World":  # fmt: skip
        """Meet the other ranks at host:port (rank 0 listens there) and make every communicator.

        `stopped` is asked while others are waited for: whether this process is to leave instead. `statement`, as JSON: what
        every rank must have in common besides the cluster's levels. `device`: where tensors are, if not on a device such as
        the cluster's. Raises ConfigError if the levels do not multiply up to
        `size`, a rank states something else than rank 0, this rank has no device or an interface that is named is not
        here, LinkError if the ranks do not meet in time, StopAsked.
        """
        check_size(cluster, size)
        device = device or rank_device(cluster, local_rank)
        world = World(rank, size, local_rank, cluster, device, over_host=cluster.share_device)
        world.timeout = timedelta(seconds=timeout_s)
        if size > 1:
            meeting = Rendezvous(rank, size, host, port, timeout_s=timeout_s, stopped=stopped)
            levels = [[level.name, level.fanout] for level in cluster.levels]
            world._meet(meeting, {"levels": levels, **(statement or {})})
            try:
                with world.outstanding.waiting("the start of the communicators"):
                    world._connect(meeting.store)
            except (RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise LinkError(f"{world.introduction}; it could not connect to the others: {reason}") from None
        return world

    def _meet(self, meeting: Rendezvous, statement: Mapping[str, Any]) -> None:
        """Find out whether all have the same in mind, who the others are, and at which addresses all reach each other."""
        here, ends = addresses(), meeting.open()
        try:
            wanted = asked(self.cluster.interface, os.environ, here, cuda=self.device.type == "cuda")
        except ConfigError as error:
            meeting.fail("config", f"rank {self.rank}: {error}")
        meeting.agree(statement)
        server = StatusServer(self.rank, self.status)
        try:
            own = Presence.of_this_process(self.rank, server.port, here, wanted, ends)
            self._peers = self.outstanding.accounts = Peers(self.rank, meeting.present(own, server), server)
        except BaseException:
            server.close()
            raise

    def _connect(self, store: dist.Store) -> None:
        peers = self._peers
        assert peers is not None
        self._devices = gloo.open_devices(peers.route)
        claim(store, self.device, rank=self.rank, share=self.over_host)
        if self._has_nccl:
            tell_libraries(os.environ, peers.interfaces, between_hosts=not peers.on_one_host)
            nccl.join(store, self.rank, self.size, self.timeout)
        else:
            gloo.join(store, self.rank, self.size, self._devices, self.timeout)
        self._make_groups()

    @property
    def _has_nccl(self) -> bool:
        return self.device.type != "cpu" and not self.over_host

    @property
    def status(self) -> Status:
        """What this rank is doing, as the others are told who ask for it."""
        return self.outstanding.status

    @property
    def introduction(self) -> str | None:
        """Over which interface this rank talks to the others; None if there are none."""
        return None if self._peers is None else self._peers.introduction()

    @contextmanager
    def failures_explained(self) -> Iterator[None]:
        """Whatever connections break inside, one sentence names the rank that others waited for (RankLost).

        A failure of this rank's own passes, after all others have been told of it.
        """
        try:
            yield
        except Exception as error:
            found = self.outstanding.explain(error)
            if self._peers is not None and not isinstance(found, RankLost):
                self._peers.announce(found)
            if found is error:
                raise
            raise found from None

    @staticmethod
    def from_environment(cluster: Cluster, environment: Mapping[str, str], *, timeout_s: float = 600.0) -> "World":
        """`join` at the place that torchrun or Slurm gave this process; a world of one without either.

        Raises what `join` and `Place.from_environment` raise.
        """
        place = Place.from_environment(environment) or Place(0, 1, 0, "127.0.0.1", 0)
        return World.join(cluster, **asdict(place), timeout_s=timeout_s)

    def _make_groups(self, base: Sequence[int] | None = None, kept: int = 0) -> None:
        exchanges = self._exchanges = Exchanges(kept)
        for index in range(len(self.cluster.levels)):
            ranks = self.cluster.group(self.rank, index)
            ranks = ranks if base is None else tuple(base[rank] for rank in ranks)
            if len(ranks) == 1:
                continue
            for kind in get_args(Kind):
                self._groups[index, kind] = self.communicator(ranks, members_only=True, small=kind == "small")
                self._transports[index, kind] = transport_of(self._groups[index, kind])
            if self.device.type != "cpu":  # what others may read is in this machine's memory
                continue
            found = find_same_host(self._groups[index, "small"], exchanges, timeout_s=self.timeout.total_seconds())
            if found is not None:
                self._transports |= {(index, "gather"): found, (index, "reduce"): found}
                self.outstanding.same_host.append(found)

    def inside(self, level: int) -> "World":
        """The world of one group: the levels below `level` alone, with this world's communicators, ledger and handles.

        Inside the innermost level there is one rank, in a level of fanout 1.
        """
        levels = self.cluster.levels[:level] or (Level(name="rank", fanout=1),)
        cluster = Cluster(device=self.cluster.device, levels=levels)
        groups = {key: group for key, group in self._groups.items() if key[0] < level}
        transports = {key: found for key, found in self._transports.items() if key[0] < level}
        return World(
            self.rank % cluster.ranks, cluster.ranks, self.local_rank, cluster, self.device, self.ledger,
            self.outstanding, self._peers, groups, transports, self.timeout, self.over_host, self._devices, self._exchanges,
        )  # fmt: skip

    def among(self, ranks: Sequence[int], cluster: Cluster, *, kept: int = 0) -> "World":
        """The world of the given ranks (this one among them), joined as `cluster` says, with communicators of its own.

        `kept`: how many exchanges inside a host others may be behind, where ranks need not be equally far; what this rank
        sent in those must not be written to.
        """
        part = World(
            list(ranks).index(self.rank), len(ranks), self.local_rank, cluster, self.device, self.ledger,
            self.outstanding, self._peers, timeout=self.timeout, over_host=self.over_host, _devices=self._devices,
        )  # fmt: skip
        part._make_groups(base=ranks, kept=kept)
        self._parts.append(part)
        return part

    def through_sockets(self, levels: Container[int]) -> "World":
        """This world, except that at the given levels ranks of one host talk as if they were on several."""
        far = {key: transport_of(group) for key, group in self._groups.items() if key[0] in levels}
        return replace(self, _transports=self._transports | far)

    def communicator(
        self, ranks: Sequence[int], *, members_only: bool, small: bool = False, timeout: timedelta | None = None
    ) -> dist.ProcessGroup:
        """A new communicator of `ranks`; a `small` one is for a few numbers on the CPU.

        Every rank calls this for every communicator, in the same order; or (`members_only`, cheaper in large worlds) only
        the members do, and only if all of them have made the same number of communicators before: torch derives the
        name under which they meet from that number.
        """
        if self._has_nccl and not small:
            return nccl.new_group(ranks, timeout or self.timeout, members_only=members_only)
        return gloo.new_group(ranks, self._devices, timeout or self.timeout, members_only=members_only)

    def group(self, level: int, kind: Kind) -> dist.ProcessGroup | None:
        """This rank's communicator at a level; None where the level joins only one member."""
        return self._groups.get((level, kind))

    def transport(self, level: int, kind: Kind) -> Transport | None:
        """How this rank's group at a level sends rows; None where the level joins only one member."""
        return self._transports.get((level, kind))

    def reads_memory(self, level: int) -> bool:
        """Whether the ranks of the group at a level are on one host and read each other's memory."""
        transport = self.transport(level, "gather")
        return transport is not None and transport.reads_memory

    def has_tags(self, level: int) -> bool:
        """Whether ranks of the group at a level that are in different gathers find out at once."""
        return isinstance(self.transport(level, "gather"), TaggedTransport)

    @property
    def links(self) -> tuple[Link, ...]:
        """The levels, as far as the bytes of a step depend on them."""
        found = []
        for index, level in enumerate(self.cluster.levels):
            transport = self.transport(index, "gather")
            header_bytes = 0 if transport is None else transport.header_bytes
            tagged = self.has_tags(index)
            found.append(Link(index, level.fanout, header_bytes, tagged, level.latency_s, level.bytes_per_s))
        return tuple(found)

    def fanout(self, level: int) -> int:
        return self.cluster.levels[level].fanout

    def coordinate(self, level: int) -> int:
        """This rank's position in its group at a level."""
        return self.cluster.coordinates(self.rank)[level]

    def level_name(self, level: int) -> str:
        return self.cluster.levels[level].name

    def settle(self) -> None:
        """Wait until the ranks of this host have read what this one has sent. Raises LinkError if one is gone."""
        try:
            self._exchanges.end()
        except (RuntimeError, LinkError) as error:
            self.outstanding.fail(error)

    def leave(self) -> None:
        """Close every communicator. A handle that nobody waited for is a bug, and raises AssertionError."""
        dropped = list(self.outstanding)
        for world in (self, *self._parts):
            if not self.outstanding.broken:
                world.settle()
        for same_host in self.outstanding.same_host:
            same_host.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        if self._peers is not None:
            self._peers.close()
        assert not dropped, f"{len(dropped)} handles were never waited for, the first is {dropped[0]}"
