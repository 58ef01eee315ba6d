"""What ranks hold of compressed weights between steps: how it came about, and how it comes back after a load.

Masters are saved as they are, but a run computes with what was decoded from the wire: a run that goes on with the same
bits needs that too. It takes the fewest bytes that are exact:

    exact    nothing was compressed on the way: the masters in the precision of compute. 16 bytes say so.
    sent     the latest all-gather after a step was compressed, without differences: the same all-gather of the same
             masters with the same seed gives the same bits. 16 bytes, the seed; one all-gather more at the start.
    kept     differences (weight deltas) add up over all steps, and somebody may have written to weights: they are no
             function of the masters. They are saved themselves: 2 or 4 bytes a parameter, in the precision of compute,
             each element once, since all ranks that hold an element hold the same bits.

The seed gives the same bits on the same levels, with the same cut, codecs and buffers only: `key` is a digest of these,
and part of the names in a checkpoint. Under another one weights begin with their masters' values, as in an uncoded run.
"""

import hashlib

import torch
from torch import Tensor

from thinwire.parallel.shard.shard_spec import Draw, Place
from thinwire.plan.traffic import P_REFRESH

EXACT = Draw(0, 0)
"""Nothing was compressed."""


class Received:
    """The weights of one flat buffer at depth lp, `weights`. `trained`: whether there are all-gathers after a step."""

    def __init__(self, place: Place, weights: Tensor, *, trained: bool) -> None:
        self.place, self._weights = place, weights.data
        outside = place.levels(place.cut.lp + 1, place.cut.lo)
        self.compressed = trained and any(level in place.cut.weights for level in outside)
        """Whether weights may be other than their masters."""
        self.sent: Draw | None = EXACT
        """What the latest all-gather drew; None: the weights are no function of the masters."""
        self._again = False
        self._record: Tensor | None = None

    def begins(self, *, exact: bool) -> Draw | None:
        """An all-gather of the masters begins, after a step or (`exact`) another write: what it draws.

        None: what came back from before the load is in place already, and nothing is to be sent.
        """
        again, self._again = self._again and exact, False
        if again or not self.compressed:
            return self.sent
        draw = EXACT if exact else self.place.draw(P_REFRESH)
        self.sent = None if self.place.cut.delta_levels and not exact else draw
        return draw

    def edited(self) -> None:
        """Somebody wrote to weights: where they were compressed, some of them still are, others not."""
        if self.sent != EXACT:
            self.sent = None

    # -- to bring back -------------------------------------------------------------------------------------------------

    @property
    def key(self) -> str:
        """Of all that the weights depend on beside masters and seed."""
        place, cut = self.place, self.place.cut
        levels = [(level.name, level.fanout) for level in place.world.cluster.levels]
        coded = [
            (level, cut.weights[level].definition, level in cut.delta_levels)
            for level in place.levels(cut.lp + 1, cut.lo)
            if level in cut.weights
        ]
        told = repr((levels, cut.lp, cut.lo, coded, place.layout, place.number, self._weights.dtype))
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    def kept(self) -> tuple[Draw | None, Tensor | None]:
        """What brings the weights back as they are now, if the masters come back too: for `bring_back`."""
        return self.sent, self._weights.clone() if self.sent is None else None

    def bring_back(self, sent: Draw | None, weights: Tensor | None = None) -> None:
        """From the next exact all-gather of the masters on, hold what was held when `kept` said so."""
        self.sent, self._again = sent, True
        if weights is not None:
            self._weights.copy_(weights)

    def record(self) -> Tensor:
        """(2,) what `sent` is, to be saved. Only where there is one."""
        assert self.sent is not None
        return torch.tensor([self.sent.step, self.sent.number])

    def arriving(self) -> Tensor:
        """(2,) to be filled with a saved record. It counts from `arrived` on."""
        self._record = torch.zeros(2, dtype=torch.int64)
        return self._record

    def arrived(self) -> None:
        """The tensor of `arriving` is filled."""
        if self._record is not None:
            step, number = self._record.tolist()
            self.bring_back(Draw(step, number))
            self._record = None
