"""All-to-all and all-gather that use a link in both directions at once: NCCL's own on accelerators, ours over gloo.

A gloo receive announces itself to the sender on their one connection, and nothing is sent before that. gloo's own
all-to-all and ring send first: the announcement then waits behind this rank's own data, and the two directions of a link
take turns. Here every receive is posted before the first send. Sends start with the next rank of the group, so that no
two ranks begin with the same receiver. All ranks of a group issue the same calls in the same order.

A device whose tensors the group's library does not take (gloo, where ranks share an accelerator) is reached over copies in
host memory: what was computed is waited for before it is sent, and what came is copied back when it is waited for.

Where the ranks of a group are `near`, on one host, rows are read from memory (`thinwire.comm.transport.same_host`).

`among` leaves ranks of the group out, for instance because they are gone: only those at the given places take part.

Shapes: k ranks of the group that take part; one row of a matrix for each
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.comm.compat import Waitable, all_gather_single
from thinwire.comm.transport.local_socket import OtherExchangeError
from thinwire.comm.transport.same_host import PLAIN, WEIGHTS, Mark, Neighbours

_HEADERS = 2**30
"""gloo's slot of headers; those of messages are their tags."""


def all_to_all(
    received: Tensor,
    sent: Tensor,
    *,
    group: dist.ProcessGroup,
    among: Sequence[int] | None = None,
    copy_own: bool = True,
    near: Neighbours | None = None,
    mark: Mark = PLAIN,
) -> Sequence[Waitable]:
    """Row j of `sent` goes to the j-th rank, row i of `received` (k rows) comes from the i-th. Wait for all works.

    Rows of another `mark.tag` are never taken for this exchange's: on one host that raises OtherExchangeError, over gloo
    they wait for their own. This rank's own row is copied at once; without `copy_own` it may be left as it is.
    """
    places = _places(group, among)
    if carries(group, received) and len(places) == group.size():
        return [dist.all_to_all_single(received, sent, group=group, async_op=True)]
    me = places.index(group.rank())
    if copy_own:
        received[me].copy_(sent[me])
    return _post(received, list(sent), group, places, near, gathers=False, mark=mark)


def all_gather(
    received: Tensor,
    row: Tensor,
    *,
    group: dist.ProcessGroup,
    among: Sequence[int] | None = None,
    near: Neighbours | None = None,
    mark: Mark = PLAIN,
) -> Sequence[Waitable]:
    """Row i of `received` (k rows) becomes the i-th rank's `row`; the own one may be that row itself. Wait for all works.

    With a `mark.tag` the ranks find out, before a byte of another gather is taken for this one's, if they do not mean the
    same: waiting raises OtherExchangeError. NCCL's have none.
    """
    places = _places(group, among)
    if carries(group, received) and len(places) == group.size():
        return [all_gather_single(received.view(-1), row, group=group)]
    me = places.index(group.rank())
    if received[me].data_ptr() != row.data_ptr():
        received[me].copy_(row)
    return _post(received, [row] * len(places), group, places, near, gathers=True, mark=mark)


def compare(tag: int, *, group: dist.ProcessGroup, near: Neighbours | None) -> Sequence[Waitable]:
    """Wait for all works: raises OtherExchangeError if another rank is in a tagged gather, or compares something else."""
    nothing = torch.empty(0, dtype=torch.uint8)
    places = list(range(group.size()))
    others = [place for place in places if place != group.rank()]
    if near is not None:
        rows = dict.fromkeys(others, nothing)
        return [near.exchange(rows, rows, gathers=True, mark=Mark(WEIGHTS, tag))]
    return [Headers(group, others, others, tag)]


def carries(group: dist.ProcessGroup, tensor: Tensor) -> bool:
    """Whether the group's library takes tensors of this accelerator as they are: NCCL does, gloo does not."""
    kind, told = tensor.device.type, cast(Any, group)  # torch's stubs lack the list of what a group was made for
    return kind != "cpu" and any(taken.type == kind for taken in told._device_types)


class _Landing:
    """Rows on their way into host memory: waiting for them puts them where they belong."""

    def __init__(self, works: Sequence[Waitable], here: Tensor, there: Tensor, places: Sequence[int]) -> None:
        self._works, self._here, self._there, self._places = works, here, there, places

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        for place in self._places:
            self._there[place].copy_(self._here[place])


def _places(group: dist.ProcessGroup, among: Sequence[int] | None) -> list[int]:
    return list(range(group.size()) if among is None else among)


def _post(
    received: Tensor,
    rows: list[Tensor],
    group: dist.ProcessGroup,
    places: list[int],
    near: Neighbours | None,
    *,
    gathers: bool,
    mark: Mark,
) -> Sequence[Waitable]:
    me, k = places.index(group.rank()), len(places)
    sources, targets = [(me - d) % k for d in range(1, k)], [(me + d) % k for d in range(1, k)]
    if carries(group, received):  # NCCL wants sends and receives of several peers in one batch
        come = [dist.P2POp(dist.irecv, received[j], group=group, group_peer=places[j]) for j in sources]
        go = [dist.P2POp(dist.isend, rows[j], group=group, group_peer=places[j]) for j in targets]
        return list(dist.batch_isend_irecv([*come, *go])) if k > 1 else []
    if received.device.type != "cpu":
        here = torch.empty_like(received, device="cpu")
        sent = [rows[0].cpu()] * k if gathers else [row.cpu() for row in rows]
        works = _post(here, sent, group, places, None, gathers=gathers, mark=mark)
        return [_Landing(works, here, received, sources)]
    if near is not None:
        come_near, go_near = {places[j]: received[j] for j in sources}, {places[j]: rows[j] for j in targets}
        return [near.exchange(come_near, go_near, gathers=gathers, mark=mark)]
    first: list[Waitable] = []
    if mark.tag and gathers:
        first = [Headers(group, [places[j] for j in sources], [places[j] for j in targets], mark.tag)]
    # The group's own calls: `dist.irecv` looks ranks up in both directions, which costs more than a small message. Messages
    # of another tag are never taken for this one's: a slot of gloo is a queue of its own.
    both = [group.recv([received[j]], places[j], mark.tag) for j in sources]
    return first + both + [group.send([rows[j]], places[j], mark.tag) for j in targets]


class Headers:
    """The tag of this rank's gather to all others of it, and theirs to this one; on a slot of gloo's, so in order."""

    def __init__(self, group: dist.ProcessGroup, sources: Sequence[int], targets: Sequence[int], tag: int) -> None:
        self._mine, self._theirs = torch.tensor([tag]), torch.zeros(len(sources), 1, dtype=torch.int64)
        self._works = [group.recv([row], place, _HEADERS) for row, place in zip(self._theirs, sources, strict=True)]
        self._works += [group.send([self._mine], place, _HEADERS) for place in targets]

    @staticmethod
    def sent_bytes(k: int) -> int:
        """By one rank in a gather of k."""
        return 8 * (k - 1)

    def wait(self) -> None:
        """Raises OtherExchangeError."""
        for work in self._works:
            work.wait()
        mine = int(self._mine)
        for theirs in self._theirs.view(-1).tolist():
            if theirs != mine:
                raise OtherExchangeError("ranks are in different all-gathers", mine, theirs)
