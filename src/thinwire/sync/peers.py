"""Whether all groups are what they should be: compared when they meet, and with every round. Never assumed.

Who exchanges which elements with whom: interval intersections of what the ranks of every group own. Pure.

Elements are numbered in the canonical order: the trained parameters back to back, without padding. Every group owns each
element exactly once. A peer group is a tuple of ranks, one of each group, that own the same elements and so exchange them
directly. Groups with the same partition make K peer groups; groups of other sizes or partitions make more, smaller ones.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from thinwire.comm.world import World
from thinwire.errors import ConfigError, PlanError
from thinwire.plan.rounds import HEADER_BYTES

Range = tuple[int, int]
"""Elements start .. end of the canonical order."""
SEND, RETURN, HEARTBEAT = "outer-send", "outer-return", "outer-beat"
COLLECTIVES = 3
"""Inside, of one exchange. Ranks may be as many behind each other: nothing that was sent inside is written to again."""


def find_peer_groups(owned: Sequence[Sequence[tuple[int, Sequence[Range]]]]) -> dict[tuple[int, ...], list[Range]]:
    """peer group -> its ranges, ascending. `owned[g]` lists (rank, ranges) for the ranks of group g.

    Raises PlanError if a group does not own every element exactly once, or the groups own different numbers of elements.
    """
    spans = [_spans(group, number) for number, group in enumerate(owned)]
    ends = {group[-1][1] if group else 0 for group in spans}
    if len(ends) != 1:
        raise PlanError(f"the groups do not train the same model: they own {sorted(ends)} elements")
    edges = sorted({edge for group in spans for start, end, _ in group for edge in (start, end)})
    positions = [0] * len(spans)
    peer_groups: dict[tuple[int, ...], list[Range]] = {}
    for start, end in pairwise(edges):
        for number, group in enumerate(spans):
            while group[positions[number]][1] <= start:
                positions[number] += 1
        peers = tuple(group[position][2] for group, position in zip(spans, positions, strict=True))
        ranges = peer_groups.setdefault(peers, [])
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((start, end))
    return dict(sorted(peer_groups.items()))


def _spans(group: Sequence[tuple[int, Sequence[Range]]], number: int) -> list[tuple[int, int, int]]:
    """(start, end, rank), ascending and without a gap."""
    spans = sorted((start, end, rank) for rank, ranges in group for start, end in ranges if end > start)
    at = 0
    for start, end, rank in spans:
        if start != at:
            raise PlanError(f"group {number} owns elements {min(at, start)} to {max(at, start)} not once (rank {rank})")
        at = end
    return spans


def meet(mine: Sequence[Range], theirs: Sequence[Range]) -> list[Range]:
    """Where two ascending lists of ranges overlap."""
    met = [(max(a, c), min(b, d)) for a, b in mine for c, d in theirs]
    return [(start, end) for start, end in met if start < end]


def digest(tensors: Sequence[Tensor], *words: int | str) -> int:
    """63 bits of a hash (XXH3) of the tensors' bits and of `words`: against drift and mistakes, not against malice."""
    hashed = xxhash.xxh3_64()
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    hashed.update(repr(words).encode())
    return int.from_bytes(hashed.digest()) >> 1


def fingerprint(values: Tensor, start: int) -> int:
    """Of elements start .. of a flat tensor: a sum over elements, so that the shards of any partition add up to that of
    the whole.

    Each element counts with 20 bits of a hash of its bits and its position; sums of up to 2^33 elements are exact in fp64.
    """
    total, size = 0, 1 << 20
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[values.element_size()]
    for first in range(0, values.numel(), size):
        part = values[first : first + size].detach().cpu()
        place = torch.arange(start + first + 1, start + first + 1 + part.numel())
        mixed = (part.view(bits).long() * 0x1E3779B97F4A7C15 + place * 0x3F58476D1CE4E5B9) * 0x14D049BB133111EB
        total += int(((mixed >> 40) & 0xFFFFF).sum())
    return total


def compare(statements: Sequence[Mapping[str, str]], groups: Sequence[int]) -> None:
    """`statements[i]`, made by a rank of group `groups[i]`, must all agree with those of group 0, key by key.

    Raises ConfigError naming the group and what differs.
    """
    for what in statements[0]:
        said: dict[int, list[str]] = {}
        for statement, group in zip(statements, groups, strict=True):
            said.setdefault(group, []).append(statement.get(what, "nothing"))
        reference = set(said[0])
        for group, values in said.items():
            if set(values) != reference:
                raise ConfigError(
                    f"group {group} and group 0 do not start from the same {what} ({sorted(set(values))[0][:60]} and "
                    f"{sorted(reference)[0][:60]}); give every group the same run file, corpus and checkpoint"
                )


@dataclass(frozen=True)
class PeerGroup:
    """One rank of each group, in the order of their ranks, with a communicator for each hop."""

    groups: tuple[tuple[int, ...], ...]
    """Of each rank of the communicators, the groups it speaks for: its own, or those whose contributions were added up."""
    present: tuple[int, ...]
    """The places in the communicators of those that take part."""
    communicators: Mapping[str, dist.ProcessGroup]
    place: int
    """This rank's own."""
    levels: tuple[str, ...]
    """By place: the level whose links lie between this rank and that one."""
    inside: World | None = None
    """Those of its ranks that add up their contributions before anything travels farther, this one among them."""
    across: "PeerGroup | None" = None
    """The ranks elsewhere, and this one, that hold the same chunk of such sums."""

    @property
    def size(self) -> int:
        """How many take part."""
        return len(self.present)

    @property
    def members(self) -> list[tuple[int, ...]]:
        """The groups of those that take part, in the order of their rows."""
        return [self.groups[place] for place in self.present]

    @property
    def header_bytes(self) -> int:
        """Of a message, before its numbers."""
        return HEADER_BYTES * len(self.groups[self.place])

    def without(self, groups: Collection[int]) -> "PeerGroup":
        """The peer group of those that are left, who send each other everything themselves from now on."""
        left = tuple(place for place in self.present if not set(self.groups[place]) & set(groups))
        return replace(self, present=left, inside=None, across=None)
