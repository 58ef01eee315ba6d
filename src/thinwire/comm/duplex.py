"""All-to-all and all-gather that use a link in both directions at once: NCCL's own on accelerators, ours over gloo.

A gloo receive announces itself to the sender on their one connection, and nothing is sent before that. gloo's own
all-to-all and ring send first: the announcement then waits behind this rank's own data, and the two directions of a link
take turns. Here every receive is posted before the first send. Sends start with the next rank of the group, so that no
two ranks begin with the same receiver. All ranks of a group issue the same calls in the same order.

Shapes: k ranks of the group; one row of a matrix for each
"""

import torch.distributed as dist
from torch import Tensor

from thinwire.comm.handle import Waitable


def all_to_all(received: Tensor, sent: Tensor, *, group: dist.ProcessGroup) -> list[Waitable]:
    """Row j of `sent` goes to rank j of the group, row i of `received` (k rows) comes from rank i. Wait for all works.

    This rank's own row is copied at once.
    """
    if received.is_cuda:
        return [dist.all_to_all_single(received, sent, group=group, async_op=True)]
    me, k = dist.get_rank(group), dist.get_world_size(group)
    received[me].copy_(sent[me])
    return _post(received, [sent[j] for j in range(k)], group)


def all_gather(received: Tensor, row: Tensor, *, group: dist.ProcessGroup) -> list[Waitable]:
    """Row i of `received` (k rows) becomes rank i's `row`; this rank's own may be that row itself. Wait for all works."""
    if received.is_cuda:
        return [dist.all_gather_single(received.view(-1), row, group=group, async_op=True)]
    me, k = dist.get_rank(group), dist.get_world_size(group)
    if received[me].data_ptr() != row.data_ptr():
        received[me].copy_(row)
    return _post(received, [row] * k, group)


def _post(received: Tensor, rows: list[Tensor], group: dist.ProcessGroup) -> list[Waitable]:
    me, k = dist.get_rank(group), len(rows)
    works = [dist.irecv(received[(me - d) % k], group=group, group_src=(me - d) % k) for d in range(1, k)]
    works += [dist.isend(rows[(me + d) % k], group=group, group_dst=(me + d) % k) for d in range(1, k)]
    assert all(work is not None for work in works), "every rank of a group takes part"
    return [work for work in works if work is not None]
