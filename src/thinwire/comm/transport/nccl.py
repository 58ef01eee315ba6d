"""Accelerators' tensors, by NCCL: single collectives, which use both directions of a link at once by themselves."""

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from thinwire.comm.transport.transport import (
    PLAIN,
    Issued,
    Label,
    Transport,
    Waitable,
    all_gather_single,
    joined,
    reduce_scatter_single,
)  # fmt: skip


def join(store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
    """torch.distributed's default group of all ranks."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=size, timeout=timeout)


def new_group(ranks: Sequence[int], timeout: timedelta, *, members_only: bool) -> dist.ProcessGroup:
    """A communicator of `ranks`; who calls it when is said at `World.communicator`."""
    group: dist.ProcessGroup = dist.new_group(
        list(ranks), timeout=timeout, backend="nccl", use_local_synchronization=members_only
    )
    return group


class NcclTransport(Transport):
    """`thinwire.comm.transport.transport.Transport` by NCCL; its exchanges have no tags."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())
        self._group = group

    def all_gather(
        self, received_kn: Tensor, row_n: Tensor, *, among: Sequence[int] | None = None, label: Label = PLAIN
    ) -> Sequence[Waitable]:
        """By NCCL's own where all of the group take part."""
        if len(self._places(among)) == self._k:
            return [all_gather_single(received_kn.view(-1), row_n, group=self._group)]
        return super().all_gather(received_kn, row_n, among=among, label=label)

    def all_to_all(
        self, received_kn: Tensor, sent_kn: Tensor, *, among: Sequence[int] | None = None, copy_own: bool = True,
        label: Label = PLAIN,
    ) -> Sequence[Waitable]:  # fmt: skip
        """By NCCL's own where all of the group take part."""
        if len(self._places(among)) == self._k:
            return [dist.all_to_all_single(received_kn, sent_kn, group=self._group, async_op=True)]
        return super().all_to_all(received_kn, sent_kn, among=among, copy_own=copy_own, label=label)

    def reduce_scatter(self, out_n: Tensor, pieces: Sequence[Tensor], *, label: Label = PLAIN) -> Issued:
        full_kn = joined(pieces, self._k)
        work = reduce_scatter_single(out_n.view(-1), full_kn.reshape(-1), group=self._group)
        return Issued([work], (out_n, full_kn))

    def _exchange(
        self, received_kn: Tensor, rows: Sequence[Tensor], places: Sequence[int], *, gathers: bool, label: Label
    ) -> Sequence[Waitable]:
        """NCCL wants sends and receives of several peers in one batch."""
        group, (sources, targets) = self._group, self._around(places)
        come = [dist.P2POp(dist.irecv, received_kn[j], group=group, group_peer=places[j]) for j in sources]
        go = [dist.P2POp(dist.isend, rows[j], group=group, group_peer=places[j]) for j in targets]
        return list(dist.batch_isend_irecv([*come, *go])) if come else []
