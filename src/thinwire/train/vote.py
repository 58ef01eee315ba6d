"""A stop that all ranks agree on. Inside a group it is known every step; across worker groups it travels behind them."""

import torch
import torch.distributed as dist

from thinwire.comm.handle import Handle
from thinwire.comm.transport.transport import all_gather_single
from thinwire.comm.world import World

EVERY = 10
"""Steps between two votes across groups: a stop takes effect 10 to 20 steps after it was asked for."""


class StopVote:
    """Every rank's group says whether it wants to stop; the answer of one vote is read when the next begins.

    So groups drift apart by up to that many steps without waiting for each other, and stop after the same step.
    """

    def __init__(self, world: World, group: World) -> None:
        self._world = world
        alike = range(world.rank % group.size, world.size, group.size)
        self._group = world.communicator(alike, members_only=True, small=True) if len(alike) > 1 else None
        self._level = world.level_name(len(world.cluster.levels) - 1)
        self._asked = False
        self._handle: Handle | None = None
        self._votes = torch.zeros(0)

    def after(self, step: int, *, asked: bool) -> bool:
        """Whether to stop now, after `step`; `asked`: whether this rank's group wants to."""
        if self._group is None:
            return asked
        self._asked = self._asked or asked
        if step % EVERY:
            return False
        stop = self._read()
        self._cast(self._group)
        return stop

    def close(self) -> None:
        """Wait for a vote that nobody needs any more."""
        self._read()

    def _read(self) -> bool:
        if self._handle is None:
            return False
        self._handle.wait()
        self._handle = None
        return bool(self._votes.any())

    def _cast(self, group: dist.ProcessGroup) -> None:
        own = torch.tensor([float(self._asked)])
        self._votes = torch.empty(dist.get_world_size(group))
        entry = self._world.ledger.open(
            level=self._level,
            kind="all_gather",
            purpose="control",
            payload_bytes=self._votes.nbytes,
            sent_bytes=own.nbytes * (len(self._votes) - 1),
            codec="identity",
        )
        work = all_gather_single(self._votes, own, group=group)
        self._handle = Handle(self._world.outstanding, entry, [work], keep=(own, self._votes))
