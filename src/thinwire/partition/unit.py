"""A unit with storage: a flat buffer for each kind of parameter in it, cut as the plan says."""

import torch
from torch import nn

from thinwire.comm.flight import Flight
from thinwire.comm.world import World
from thinwire.partition.deferred import FirstValues
from thinwire.partition.dtypes import computed_in, master_dtype
from thinwire.partition.flat import Flat
from thinwire.partition.place import Cut
from thinwire.partition.units import UnitModules
from thinwire.partition.wire import codecs_of, low_rank_of
from thinwire.plan import Plan


class Unit:
    """A unit's flat buffers (one for each kind of parameter in it) and what of them is in flight."""

    def __init__(self, found: UnitModules, flats: list[Flat], *, keep: bool) -> None:
        self.name, self.entries, self.flats = found.name, found.entries, flats
        self.resident = found.resident
        self.keep = keep
        """Gathered once a step: from its first use to the backward of the last micro-batch."""
        self.gathering: Flight | None = None
        self.refreshing: Flight | None = None
        self.waiting = 0
        """Trained parameters whose gradient has not come yet in this micro-batch."""

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for flat in self.flats if flat.trained for p in flat.parameters.values()]

    @property
    def gathered(self) -> bool:
        return all(flat.gathered for flat in self.flats)


def unit_of(found: UnitModules, plan: Plan, world: World, first: FirstValues) -> Unit:
    """The unit of these modules: parameters that are trained, computed with and kept alike share a buffer."""
    kinds: dict[tuple[bool, torch.dtype, torch.dtype], dict[str, nn.Parameter]] = {}
    for name, parameter in found.parameters.items():
        kind = parameter.requires_grad, computed_in(parameter.dtype, plan.compute_dtype), master_dtype(parameter.dtype)
        kinds.setdefault(kind, {})[name] = parameter
    flats = [
        _flat(parameters, plan, world, first, trained=trained, compute=compute, master=master)
        for (trained, compute, master), parameters in kinds.items()
    ]
    return Unit(found, flats, keep=plan.partition.keep_gathered)


def _flat(
    parameters: dict[str, nn.Parameter],
    plan: Plan,
    world: World,
    first: FirstValues,
    *,
    trained: bool,
    compute: torch.dtype,
    master: torch.dtype,
) -> Flat:
    lp, lg, lo = plan.depths
    weights, grads, deltas = codecs_of(plan, master)
    outer = [level for level in grads if level > lg and world.fanout(level) > 1]
    cut = Cut(
        lp=min(lp, lg) if trained else lp,
        lg=lg,
        lo=lo,
        weights=weights,
        grads=grads,
        delta_levels=deltas,
        feedback_level=max(outer) if plan.wire.error_feedback and outer else None,
        low_rank=low_rank_of(plan),
    )
    multiple = world.size * (plan.wire.block if plan.wire.coded else 1)
    return Flat(parameters, compute=compute, master=master, multiple=multiple, cut=cut, world=world, first=first)
