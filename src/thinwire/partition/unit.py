"""A unit with storage: a flat buffer for each kind of parameter in it, cut as the plan says."""

from torch import nn

from thinwire.comm.flight import Flight
from thinwire.comm.world import World
from thinwire.partition.deferred import FirstValues
from thinwire.partition.dtypes import Kind
from thinwire.partition.flat import Flat
from thinwire.partition.place import Cut
from thinwire.partition.units import UnitModules
from thinwire.partition.watched import Ask, watched
from thinwire.partition.wire import codecs_of, low_rank_of
from thinwire.plan import Plan


class Unit:
    """A unit's flat buffers (one for each kind of parameter in it) and what of them is in flight."""

    def __init__(self, found: UnitModules, flats: list[Flat], *, keep: bool, ask: Ask) -> None:
        self.name, self.entries, self.flats = found.name, found.entries, flats
        self.resident = found.resident
        self.keep = keep
        """Gathered once a step: from its first use to the backward of the last micro-batch."""
        self.gathering: Flight | None = None
        self.refreshing: Flight | None = None
        self.loose = False
        """Used outside its own forward in this micro-batch: it stays gathered to the end of it."""
        self.hidden = 0
        """Forwards of it in this micro-batch that autograd did not record: they come again in backward."""
        self.nests = False
        """Whether its forward runs parts that autograd does not record, so that its gradients come in backwards of those."""
        self.waiting: int | None = 0
        """Trained parameters whose gradient has yet to come in this backward; None: nobody knows before its end."""
        self.summed = False
        """Whether the gradients of this step have been taken away to be summed."""
        self._kinds = {p: watched(type(p), self, ask) for flat in flats for p in flat.parameters.values()}

    @property
    def label(self) -> str:
        """Its name in messages and timelines."""
        return self.name or "root"

    @property
    def cut(self) -> bool:
        """Whether its weights have to be gathered."""
        return any(flat.cut.lp >= 0 for flat in self.flats)

    @property
    def ready(self) -> bool:
        """Whether its parameters hold their numbers, and the newest ones."""
        return self.gathered and self.refreshing is None

    def watch(self) -> None:
        """Let parameters that cannot be read as they are ask first; the others are plain ones (see `watched`)."""
        away = not self.ready
        for flat in self.flats:
            for parameter in flat.parameters.values():
                kind = self._kinds[parameter]
                wanted = kind if away or (self.summed and flat.trained) else kind.plain
                if type(parameter) is not wanted:
                    parameter.__class__ = wanted

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for flat in self.flats if flat.trained for p in flat.parameters.values()]

    @property
    def gathered(self) -> bool:
        return all(flat.gathered for flat in self.flats)


def unit_of(found: UnitModules, plan: Plan, world: World, first: FirstValues, ask: Ask) -> Unit:
    """The unit of these modules: parameters that are trained, computed with and kept alike share a buffer."""
    kinds: dict[Kind, dict[str, nn.Parameter]] = {}
    for name, parameter in found.parameters.items():
        kinds.setdefault(Kind.of(name, parameter, plan.compute_dtype), {})[name] = parameter
    flats = [_flat(parameters, plan, world, first, kind) for kind, parameters in kinds.items()]
    return Unit(found, flats, keep=plan.partition.keep_gathered, ask=ask)


def _flat(parameters: dict[str, nn.Parameter], plan: Plan, world: World, first: FirstValues, kind: Kind) -> Flat:
    lp, lg, lo = plan.depths
    weights, grads, deltas = ({}, {}, frozenset[int]()) if kind.exact else codecs_of(plan, kind.master)
    outer = [level for level in grads if level > lg and world.fanout(level) > 1]
    cut = Cut(
        lp=min(lp, lg) if kind.trained else lp,
        lg=lg,
        lo=lo,
        weights=weights,
        grads=grads,
        delta_levels=deltas,
        feedback_level=max(outer) if plan.wire.error_feedback and outer else None,
        low_rank=low_rank_of(plan),
    )
    multiple = world.size * (plan.wire.block if plan.wire.coded else 1)
    if kind.seen is not None:
        multiple *= kind.seen.itemsize  # a shard of it may begin in the middle of a number; the whole may not
    return Flat(parameters, kind=kind, multiple=multiple, cut=cut, world=world, first=first)
