"""What a group says about what it holds, in words that can be compared however the group cuts it."""

from collections.abc import Iterable, Sequence

import torch

from thinwire.comm.collectives import all_reduce_small
from thinwire.partition.engine import Sharded
from thinwire.sync.fragment import Fragment
from thinwire.sync.identity import fingerprint
from thinwire.sync.pending import Pending


def layout_of(engine: Sharded) -> str:
    """Name, shape and precision of every parameter, in the canonical order."""
    return str(
        [
            (slot.name, slot.shape, str(flat.master.dtype))
            for unit in engine.units
            for flat in unit.flats
            for slot in flat.layout.slots
        ]
    )


def state_of(
    engine: Sharded, fragments: Sequence[Fragment], pending: Iterable[Pending], own_outer: bool
) -> dict[str, str]:
    """Fingerprints of the outer weights and momentum (unless each group has its `own_outer`), of what is in flight and of
    frozen weights. All ranks of the group call it together."""
    sums = {
        "weights": 0 if own_outer else sum(_sum(fragment, fragment.weights) for fragment in fragments),
        "outer momentum": 0 if own_outer else sum(_sum(fragment, fragment.momentum) for fragment in fragments),
        "changes in flight": sum(_sum(fragments[each.key.fragment], each.change) for each in pending),
        "frozen weights": sum(fingerprint(share.master, share.start) for share in engine.shares(trained=False)),
    }
    total = torch.tensor(list(sums.values()), dtype=torch.float64)
    all_reduce_small(total, world=engine.world, op="sum")
    return dict(zip(sums, map(str, total.tolist()), strict=True))


def _sum(fragment: Fragment, values: torch.Tensor) -> int:
    pairs = zip(fragment.shares, fragment.split(values), strict=True)
    return sum(fingerprint(part, share.start) for share, part in pairs)
