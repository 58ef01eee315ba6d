"""How groups meet: what each of them states is compared, and every rank learns with whom it exchanges which elements."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist

from thinwire.comm.collectives import all_reduce_small
from thinwire.comm.world import World
from thinwire.errors import PlanError
from thinwire.plan.sync import Sync
from thinwire.sync.fragment import Fragment, Replica
from thinwire.sync.peers import (
    COLLECTIVES,
    HEARTBEAT,
    RETURN,
    SEND,
    PeerGroup,
    Range,
    compare,
    digest,
    find_peer_groups,
    fingerprint,
    meet,
)
from thinwire.sync.pending import Pending

Stated = TypeVar("Stated")


class PeerGroups:
    """All ranks of `groups`. Every rank makes it and calls its methods in the same order."""

    def __init__(self, world: World, groups: Sequence[Sequence[int]]) -> None:
        self._world, self._groups = world, groups
        ranks = range(world.size)
        self._everyone = world.communicator(ranks, members_only=False, small=True) if world.size > 1 else None

    def compare(self, statement: Mapping[str, str]) -> None:
        """Every rank states what its group has, by name. Raises ConfigError naming a group that has something else."""
        said = self._gather({what: f"{digest([], value):x}" for what, value in statement.items()})
        ranks = [(rank, number) for number, group in enumerate(self._groups) for rank in group]
        compare([said[rank] for rank, _ in ranks], [number for _, number in ranks])

    def peer_groups(self, owned: Sequence[Range], sync: Sync) -> list[tuple[PeerGroup, list[Range]]]:
        """This rank's peer groups with their elements, in an order that all ranks share. `owned`: what this rank stands for.

        Raises PlanError if the groups do not own the same elements, or are sharded too differently to sum inside a level.
        """
        ranges = self._gather(list(owned))
        peer_groups = find_peer_groups([[(rank, ranges[rank]) for rank in group] for group in self._groups])
        memberships = Counter(rank for peers in peer_groups for rank in peers)
        one_each = all(memberships[rank] == 1 for group in self._groups for rank in group)
        made = [(self._peer_group(ranks, one_each, sync), met) for ranks, met in peer_groups.items()]
        own = [(peers, met) for peers, met in made if peers is not None]
        if sync.sum_inside is None:
            return own
        if not one_each:
            raise PlanError(f"sync.sum_inside = {sync.sum_inside!r} needs groups with the same partition; leave it out")
        ranks = next(ranks for ranks in peer_groups if self._world.rank in ranks)
        return [(self._in_tiers(peers, ranks, sync.level, sync.sum_inside), met) for peers, met in own]

    def _gather(self, own: Stated) -> list[Stated]:
        """What every rank says, by rank."""
        everyone = [own] * self._world.size
        if self._everyone is not None:
            with self._world.outstanding.waiting("the comparison of all groups"):
                dist.all_gather_object(everyone, own, group=self._everyone)
        return everyone

    def _peer_group(self, ranks: tuple[int, ...], one_each: bool, sync: Sync) -> PeerGroup | None:
        """The peer group of one rank of each group, with its communicators; None if this rank is not in it."""
        belongs, kinds = (
            self._world.rank in ranks,
            (SEND, RETURN) if sync.staleness_bound is None else (SEND, RETURN, HEARTBEAT),
        )
        if one_each and not belongs:
            return None
        made = {
            kind: self._world.communicator(ranks, members_only=one_each, small=kind == HEARTBEAT)
            for kind in (kinds if len(ranks) > 1 else ())
        }
        if not belongs:
            return None
        ordered = sorted(ranks)  # as communicators are
        groups = tuple((ranks.index(rank),) for rank in ordered)
        levels = tuple(self._between(rank, sync.level) for rank in ordered)
        return PeerGroup(groups, tuple(range(len(ranks))), made, ordered.index(self._world.rank), levels)

    def _in_tiers(self, peers: PeerGroup, ranks: tuple[int, ...], level: str, sum_inside: str) -> PeerGroup:
        """`peers` of `ranks` with those that add up inside a member of level `sum_inside`, and those that hold their sums.

        Raises PlanError if there are not as many in each.
        """
        world, cluster = self._world, self._world.cluster
        outside = cluster.ranks_within(cluster.index(sum_inside))
        ordered = sorted(ranks)
        places = [
            [rank for rank in ordered if rank // outside == place] for place in sorted({r // outside for r in ordered})
        ]
        inside = next(place for place in places if world.rank in place)
        if len({len(place) for place in places}) > 1 or not 1 < len(inside) < len(ordered):
            raise PlanError(f"sync.sum_inside = {sum_inside!r} needs as many groups in each, and several; leave it out")
        row = [place[inside.index(world.rank)] for place in places]
        joins = cluster.levels[cluster.index(sum_inside)].model_copy(update={"fanout": len(inside)})
        across = PeerGroup(
            tuple(tuple(ranks.index(rank) for rank in place) for place in places),
            tuple(range(len(places))),
            {kind: world.communicator(row, members_only=True) for kind in (SEND, RETURN)},
            row.index(world.rank),
            tuple(self._between(rank, level) for rank in row),
        )
        near = world.among(inside, cluster.model_copy(update={"levels": (joins,)}), kept=COLLECTIVES)
        return replace(peers, inside=near, across=across)

    def _between(self, rank: int, level: str) -> str:
        """The outermost level at which this rank and `rank` differ; at least `level`, which groups of one's own may lack."""
        cluster = self._world.cluster
        if level not in cluster.level_names:
            return level
        pairs = zip(cluster.coordinates(self._world.rank), cluster.coordinates(rank), strict=True)
        differ = [index for index, (mine, theirs) in enumerate(pairs) if mine != theirs]
        return cluster.level_names[max([cluster.index(level), *differ])]


def places_in(fragment: Fragment, ranges: Sequence[Range]) -> list[slice]:
    """Where in the fragment's vector the elements `ranges` of the canonical order are, neighbours joined."""
    found: list[Range] = []
    at = 0
    for start, end in fragment.ranges:
        for first, last in meet([(start, end)], ranges):
            here = (first - start + at, last - start + at)
            if found and found[-1][1] == here[0]:
                here = (found.pop()[0], here[1])
            found.append(here)
        at += end - start
    return [slice(first, last) for first, last in found]


def layout_of(engine: Replica) -> str:
    """Name, shape and precision of every parameter, in the canonical order."""
    return str(
        [(slot.name, slot.shape, str(buffer.master)) for buffer in engine.buffers() for slot in buffer.layout.slots]
    )


def state_of(
    engine: Replica, fragments: Sequence[Fragment], pending: Iterable[Pending], own_outer: bool
) -> dict[str, str]:
    """Fingerprints of the outer weights and momentum (unless each group has its `own_outer`), of what is in flight and of
    frozen weights. All ranks of the group call it together."""
    sums = {
        "weights": 0 if own_outer else sum(_sum(fragment, fragment.weights) for fragment in fragments),
        "outer momentum": 0 if own_outer else sum(_sum(fragment, fragment.momentum) for fragment in fragments),
        "changes in flight": sum(_sum(fragments[each.key.fragment], each.change) for each in pending),
        "frozen weights": sum(fingerprint(share.master, share.start) for share in engine.shares(trained=False)),
    }
    total = torch.tensor(list(sums.values()), dtype=torch.float64)
    all_reduce_small(total, world=engine.world, op="sum")
    return dict(zip(sums, map(str, total.tolist()), strict=True))


def _sum(fragment: Fragment, values: torch.Tensor) -> int:
    pairs = zip(fragment.shares, fragment.split(values), strict=True)
    return sum(fingerprint(part, share.start) for share, part in pairs)
