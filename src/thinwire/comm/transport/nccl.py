"""Accelerators' tensors, by NCCL: single collectives, which use both directions of a link at once by themselves."""

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from thinwire.comm.transport.transport import (
    PLAIN,
    Issued,
    Label,
    Waitable,
    all_gather_single,
    joined,
    places_of,
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


class NcclTransport:
    """`thinwire.comm.transport.transport.Transport`; its exchanges have no tags."""

    reads_memory, header_bytes = False, 0

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._k = group, group.size()

    def all_gather(
        self, received_kn: Tensor, row_n: Tensor, *, among: Sequence[int] | None = None, label: Label = PLAIN
    ) -> Sequence[Waitable]:
        places = places_of(self._group, among)
        if len(places) == self._k:
            return [all_gather_single(received_kn.view(-1), row_n, group=self._group)]
        me = places.index(self._group.rank())
        if received_kn[me].data_ptr() != row_n.data_ptr():
            received_kn[me].copy_(row_n)
        return self._among(received_kn, [row_n] * len(places), places)

    def all_to_all(
        self,
        received_kn: Tensor,
        sent_kn: Tensor,
        *,
        among: Sequence[int] | None = None,
        copy_own: bool = True,
        label: Label = PLAIN,
    ) -> Sequence[Waitable]:
        places = places_of(self._group, among)
        if len(places) == self._k:
            return [dist.all_to_all_single(received_kn, sent_kn, group=self._group, async_op=True)]
        if copy_own:
            me = places.index(self._group.rank())
            received_kn[me].copy_(sent_kn[me])
        return self._among(received_kn, list(sent_kn), places)

    def _among(self, received: Tensor, rows: Sequence[Tensor], places: Sequence[int]) -> Sequence[Waitable]:
        """NCCL wants sends and receives of several peers in one batch."""
        group = self._group
        me, k = places.index(group.rank()), len(places)
        sources, targets = [(me - d) % k for d in range(1, k)], [(me + d) % k for d in range(1, k)]
        come = [dist.P2POp(dist.irecv, received[j], group=group, group_peer=places[j]) for j in sources]
        go = [dist.P2POp(dist.isend, rows[j], group=group, group_peer=places[j]) for j in targets]
        return list(dist.batch_isend_irecv([*come, *go])) if k > 1 else []

    def reduce_scatter(self, out_n: Tensor, pieces: Sequence[Tensor], *, label: Label = PLAIN) -> Issued:
        full_kn = joined(pieces, self._k)
        work = reduce_scatter_single(out_n.view(-1), full_kn.reshape(-1), group=self._group)
        return Issued([work], (out_n, full_kn))

    def compare(self, tag: int) -> Sequence[Waitable]:
        raise NotImplementedError("NCCL's exchanges have no tags; compare numbers")

    def pieces_of(self, whole_n: Tensor) -> int:
        return 1
