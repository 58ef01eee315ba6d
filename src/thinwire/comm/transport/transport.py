"""How the ranks of a level send rows to each other: what all transports share.

`gloo` goes over sockets, `same_host` reads memory of processes of this host, `nccl` is for accelerators. Which one a group
has is decided in `thinwire.comm.transport.connect`, once; nobody else asks for a device or a library.

torch 2.10 to 2.13 under one name each, as GPU images lag behind and torch renames: torch 2.13 calls
`all_gather_into_tensor` and `reduce_scatter_tensor` by the names below and warns of the old ones; releases before it have
the old ones alone. They are looked up at each call, so that a test can take the new names away.

Shapes: k ranks that take part, one row of a matrix for each; n elements of a rank's chunk
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

OTHERS, WEIGHTS, GRADS = range(3)
"""Streams: weight all-gathers, gradient reductions, and all else."""
_TORCH: Any = dist  # its stubs know the names of one release


class Waitable(Protocol):
    """What torch.distributed returns for an asynchronous call."""

    def wait(self) -> object: ...


@dataclass(frozen=True)
class Label:
    """What is known of an exchange on all its ranks."""

    stream: int = OTHERS
    tag: int = 0
    """What it is for: both ends must mean the same."""
    lasting: bool = False
    """Rows stay as they are until `World.settle`: a rank may go on before others have read its."""


PLAIN = Label()


class Issued(NamedTuple):
    """A collective under way: wait for all `works`, then `finish`; `keep` must stay as it is until then."""

    works: Sequence[Waitable]
    keep: Sequence[Tensor]
    finish: Callable[[], None] | None = None


class Transport(ABC):
    """Collectives of one group of `k` ranks, this one at place `me`. All of them issue the same ones in the same order.

    A transport says how rows are exchanged; `NcclTransport` has library calls for all ranks of the group beside that.
    `among` leaves ranks of the group out, for instance because they are gone: only those at the given places take part.
    """

    reads_memory = False
    """Whether rows are copied by the thread that waits for them: it gains nothing by waiting late."""
    header_bytes = 0
    """What one rank sends for the tag of a gather, beside the rows."""

    def __init__(self, me: int, k: int) -> None:
        self._me, self._k = me, k

    def all_gather(
        self, received_kn: Tensor, row_n: Tensor, *, among: Sequence[int] | None = None, label: Label = PLAIN
    ) -> Sequence[Waitable]:
        """Row i of `received_kn` becomes the i-th rank's `row_n`; the own one may be that row itself.

        With a `label.tag` the ranks of a `TaggedTransport` find out, before a byte of another gather is taken for this
        one's, if they do not mean the same: waiting raises OtherExchangeError.
        """
        places = self._places(among)
        own = received_kn[places.index(self._me)]
        if own.data_ptr() != row_n.data_ptr():
            own.copy_(row_n)
        return self._exchange(received_kn, [row_n] * len(places), places, gathers=True, label=label)

    def all_to_all(
        self,
        received_kn: Tensor,
        sent_kn: Tensor,
        *,
        among: Sequence[int] | None = None,
        copy_own: bool = True,
        label: Label = PLAIN,
    ) -> Sequence[Waitable]:
        """Row j of `sent_kn` goes to the j-th rank, row i of `received_kn` comes from the i-th.

        Rows of another `label.tag` are never taken for this exchange's: on one host that raises OtherExchangeError, over
        gloo they wait for their own. This rank's own row is copied at once; without `copy_own` it may be left as it is.
        """
        places = self._places(among)
        if copy_own:
            own = places.index(self._me)
            received_kn[own].copy_(sent_kn[own])
        return self._exchange(received_kn, list(sent_kn), places, gathers=False, label=label)

    def reduce_scatter(self, out_n: Tensor, pieces: Sequence[Tensor], *, label: Label = PLAIN) -> Issued:
        """`out_n` becomes the sum of everybody's chunk for this rank; k n numbers in flat `pieces` that follow each other.

        An all-to-all and a local sum in the order of the ranks, in `out_n`'s precision: deterministic. `out_n` may be this
        rank's own chunk of the pieces.
        """
        sent_kn = joined(pieces, self._k).contiguous()
        received_kn = torch.empty_like(sent_kn)
        works = self.all_to_all(received_kn, sent_kn, copy_own=False, label=label)

        def finish() -> None:
            rows = [sent_kn[rank] if rank == self._me else row for rank, row in enumerate(received_kn)]
            _sum(rows, out_n.view(-1), spare=received_kn[self._me])

        return Issued(works, (sent_kn, received_kn), finish)

    def pieces_of(self, whole_n: Tensor) -> int:
        """In how many pieces, all on their way at once, an all-reduce of it is fastest."""
        return 1

    @abstractmethod
    def _exchange(
        self, received_kn: Tensor, rows: Sequence[Tensor], places: Sequence[int], *, gathers: bool, label: Label
    ) -> Sequence[Waitable]:
        """Row j of `received_kn` becomes what the rank at the j-th of the places has for this one; `rows[j]` is for it.

        The own rows are left alone. `gathers` tells a gather, whose rows are all the same, from an all-to-all.
        """

    def _places(self, among: Sequence[int] | None) -> list[int]:
        return list(range(self._k) if among is None else among)

    def _around(self, places: Sequence[int]) -> tuple[list[int], list[int]]:
        """(from whom, to whom) as indices of `places`: the next rank comes first, so no two begin with the same one."""
        me, k = places.index(self._me), len(places)
        return [(me - d) % k for d in range(1, k)], [(me + d) % k for d in range(1, k)]


class TaggedTransport(Transport):
    """One whose exchanges carry the tag of their label."""

    @abstractmethod
    def compare(self, tag: int) -> Sequence[Waitable]:
        """Waiting raises OtherExchangeError if another rank is in a tagged gather, or compares something else."""


def joined(pieces: Sequence[Tensor], k: int) -> Tensor:
    """(k, n): flat pieces that follow one another, without a copy if there is one."""
    flat = pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
    return flat.view(k, flat.numel() // k)


def _sum(rows: Sequence[Tensor], out: Tensor, *, spare: Tensor) -> None:
    """`out` becomes the sum of the rows in their order, in its precision; `spare` is scratch of a row's shape.

    `out` may be one of the rows: it is written by the last addition only.
    """
    total, *others = (row.to(out.dtype) for row in rows)
    spare = spare if spare.dtype == out.dtype else torch.empty_like(out)
    for number, row in enumerate(others, 1):
        total = torch.add(total, row, out=out if number == len(others) else spare)


def all_gather_single(out: Tensor, own: Tensor, *, group: dist.ProcessGroup) -> Waitable:
    """(k n,) `out` becomes everybody's (n,) `own` in the order of the ranks, once what comes back has been waited for."""
    call = getattr(_TORCH, "all_gather_single", None) or _TORCH.all_gather_into_tensor
    work: Waitable = call(out, own, group=group, async_op=True)
    return work


def reduce_scatter_single(out: Tensor, full: Tensor, *, group: dist.ProcessGroup) -> Waitable:
    """(n,) `out` becomes the sum of everybody's chunk of (k n,) `full` for this rank, once it has been waited for."""
    call = getattr(_TORCH, "reduce_scatter_single", None) or _TORCH.reduce_scatter_tensor
    work: Waitable = call(out, full, group=group, async_op=True)
    return work
