"""Gradient sums of low rank with error feedback (PowerSGD, Vogels et al., arXiv 1905.13727, algorithms 1 and 2).

A rank holds matrices M (its gradients and what earlier steps did not send). With Q from the step before, all of them sum
P = M Q, make its columns orthonormal, and sum Q' = M^T P; every one then has the sum of the matrices' projections P Q'^T.
Both sums are linear, so two small all-reduces replace that of M: r (rows + columns) numbers for rows x columns. What is
no matrix, or too small to gain, travels with P as it is.

Each rank keeps M - P (M^T P)^T, what it did not put into the sum, for the next step: sums sent + residuals = sums put
in. A matrix of rank r or less passes whole. P's columns stay orthonormal when M is zero, so Q recovers afterwards.
Nothing is kept of a step that is not taken. All ranks compute P from the same sum: replicas stay equal as far as equal
devices factorise alike.

Shapes: n numbers of a part, r columns of P and Q

What a rank has not sent yet: the loss of coding one message, added to the next one (error feedback).

Seide et al. 2014 (1-bit SGD), Karimireddy et al., arXiv 1901.09847. Of n numbers put in, sums sent + residuals = sums put
in, over any number of steps; a step that is not taken leaves the residual as it was.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


class Residual:
    """The (n,) numbers that one rank carries over from step to step at one hop; none before the first step."""

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self._next: Tensor | None = None
        self._arriving: list[Tensor] = []

    def plus(self, part_n: Tensor) -> Tensor:
        """`part_n` with what earlier steps did not send; a new tensor."""
        return part_n.clone() if self.value is None else part_n + self.value

    def leave(self, lost_n: Tensor) -> None:
        """This step did not send `lost_n`; it counts once the step is applied."""
        self._next = lost_n

    def applied(self) -> None:
        """The step was taken."""
        if self._next is not None:
            self.value = self._next
        self.dropped()

    def dropped(self) -> None:
        """The step is not taken."""
        self._next = None

    def arriving(self, n: int, device: torch.device) -> Tensor:
        """(n,) zeros to be filled with a saved residual. Of several their sum is carried on, from `arrived` on."""
        self._arriving.append(torch.zeros(n, device=device))
        return self._arriving[-1]

    def arrived(self) -> None:
        """The tensors of `arriving` are filled."""
        if self._arriving:
            self.value = sum(self._arriving[1:], start=self._arriving[0])
        self._arriving = []


_SEED = 1905_13727


@dataclass(frozen=True)
class Matrix:
    """Elements start .. start + rows x columns of a part, row by row."""

    start: int
    rows: int
    columns: int

    @property
    def end(self) -> int:
        return self.start + self.rows * self.columns


class LowRank:
    """Sums parts of n fp32 numbers over the `fanout` ranks of a level's group; the same `matrices` on all of them.

    `all_reduce(message_m)` sums a message of m numbers, a multiple of `fanout` and perhaps 0, in place, hop by hop.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        n: int,
        *,
        rank: int,
        level: int,
        fanout: int,
        all_reduce: Callable[[Tensor], Iterator[Any]],
        device: torch.device,
    ) -> None:
        self.level = level
        self._matrices, self._n, self._rank = tuple(matrices), n, rank
        self._fanout, self._all_reduce = fanout, all_reduce
        self._rest = _gaps(matrices, n)
        generator = torch.Generator().manual_seed(_SEED)
        self._q = [torch.randn(m.columns, rank, generator=generator).to(device) for m in matrices]
        self._next_q: list[Tensor] | None = None
        self.residual = Residual()

    @property
    def lengths(self) -> tuple[int, int]:
        """Numbers of the two all-reduced messages."""
        rows, columns = (
            sum(sizes) for sizes in ([m.rows for m in self._matrices], [m.columns for m in self._matrices])
        )
        return self.uncoded + self._rank * rows, self._rank * columns

    @property
    def uncoded(self) -> int:
        """Numbers that are summed as they are: of no matrix, or of one too small to gain."""
        return sum(end - start for start, end in self._rest)

    @property
    def numbers(self) -> int:
        """Numbers of a part, coded or not."""
        return self._n

    @property
    def started(self) -> list[tuple[Matrix, Tensor]]:
        """Each matrix and its Q, (columns, r), from which the next step starts; written in place by a load."""
        return list(zip(self._matrices, self._q, strict=True))

    def reduce(self, out: Tensor, part_n: Tensor, where: slice) -> Iterator[Any]:
        """`out` becomes the elements `where` of the sum of everybody's `part_n`, hop by hop as `all_reduce` does."""
        put_n = self.residual.plus(part_n)
        there = [put_n[m.start : m.end].view(m.rows, m.columns) for m in self._matrices]
        exact = [put_n[start:end] for start, end in self._rest]
        made = [m @ q for m, q in zip(there, self._q, strict=True)]
        first = yield from self._sum([*made, *exact])
        p = [torch.linalg.qr(tall).Q for tall in first[: len(made)]]
        own_q = [m.t() @ tall for m, tall in zip(there, p, strict=True)]
        q = yield from self._sum(own_q)
        sum_n = torch.empty_like(put_n)
        for (start, end), reduced in zip(self._rest, first[len(made) :], strict=True):
            sum_n[start:end] = reduced
            put_n[start:end] = 0.0
        for m, left, tall, wide, own in zip(self._matrices, there, p, q, own_q, strict=True):
            torch.mm(tall, wide.t(), out=sum_n[m.start : m.end].view(m.rows, m.columns))
            left.addmm_(tall, own.t(), alpha=-1)
        out.copy_(sum_n[where])
        self._next_q = [wide / wide.norm().clamp(min=torch.finfo(wide.dtype).tiny) for wide in q]
        self.residual.leave(put_n)

    def _sum(self, parts: list[Tensor]) -> Generator[Any, None, list[Tensor]]:
        """All-reduces the parts as one message; returns them summed."""
        numbers = sum(part.numel() for part in parts)
        like = parts[0] if parts else torch.empty(0)
        message = like.new_zeros(-(-numbers // self._fanout) * self._fanout)
        if numbers:
            torch.cat([part.reshape(-1) for part in parts], out=message[:numbers])
        yield from self._all_reduce(message)
        ends = accumulate(part.numel() for part in parts)
        return [message[end - part.numel() : end].view_as(part) for end, part in zip(ends, parts, strict=True)]

    def applied(self) -> None:
        """The step was taken: its Q and its residual count from now on."""
        if self._next_q is not None:
            self._q = self._next_q
        self.residual.applied()
        self.dropped()

    def dropped(self) -> None:
        """Forget what this step would have left."""
        self._next_q = None
        self.residual.dropped()


def _gaps(matrices: Sequence[Matrix], n: int) -> list[tuple[int, int]]:
    """What of n numbers lies in no matrix."""
    starts = [0, *(m.end for m in matrices)]
    ends = [*(m.start for m in matrices), n]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if start < end]
