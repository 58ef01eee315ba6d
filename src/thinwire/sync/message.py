"""What groups send each other: coded numbers, and before them a head for each group that the message speaks for.

A head has 16 bytes: the weight of the group's contribution, and a hash of the outer state that was taken from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from thinwire.comm.codec import sum_decoded
from thinwire.rounds.traffic import HEADER_BYTES
from thinwire.sync.identity import strays


class Coder(Protocol):
    """What of a codec is needed here: the aggregate has to see every contribution by itself."""

    salt: int

    @property
    def name(self) -> str: ...

    def encode(self, x_n: Tensor) -> Tensor: ...

    def decode(self, coded: Tensor, n: int, dtype: torch.dtype) -> Tensor: ...

    def sum_into(self, coded_rc: Tensor, out_n: Tensor) -> None:
        """`out_n` becomes the sum of what the rows decode to, in their order."""


class Raw:
    """Numbers as they are, as bytes."""

    name, salt = "fp32", 0

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def encode(self, x_n: Tensor) -> Tensor:
        return x_n.to(self._dtype).contiguous().view(torch.uint8)

    def decode(self, coded: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        return coded.clone().view(self._dtype)[:n].to(dtype)

    def sum_into(self, coded_rc: Tensor, out_n: Tensor) -> None:
        sum_decoded(self.decode, coded_rc, out_n)


def head(weight: float, digest: int, device: torch.device) -> Tensor:
    """(16,) bytes: the weight of a group's contribution, 0 to leave it out, and the hash of what it was taken from."""
    words = [torch.tensor([weight], dtype=torch.float64), torch.tensor([digest], dtype=torch.int64)]
    return torch.cat([word.view(torch.uint8) for word in words]).to(device)


@dataclass
class Outcome:
    """What came out, once the chain has run to its end."""

    change: Tensor
    """The aggregate, n elements."""
    own: Tensor | None
    """This member's contribution as the others decoded it, where it is asked for."""
    weights: dict[int, float] = field(default_factory=dict)
    """Of the contributions that count, by group; 0 for those left out."""
    astray: list[int] = field(default_factory=list)
    """Groups that are left out because their outer state is not that of the others."""

    def count(self, heads: Tensor, members: Sequence[tuple[int, ...]]) -> list[float]:
        """Whose contributions count, of `members` whose messages began with `heads` (a row each): their weights.

        What was added up with that of a group astray is left out with it.
        """
        groups = [group for member in members for group in member]
        words = heads.cpu().contiguous().view(len(groups), HEADER_BYTES)
        said = dict(zip(groups, words.view(torch.float64)[:, 0].tolist(), strict=True))
        digests = dict(zip(groups, words.view(torch.int64)[:, 1].tolist(), strict=True))
        self.astray = strays({group: digests[group] for group, weight in said.items() if weight > 0})
        out = {group for member in members if set(member) & set(self.astray) for group in member}
        self.weights = {group: 0.0 if group in out else weight for group, weight in said.items()}
        return [sum(self.weights[group] for group in member) for member in members]
