"""A unit with storage: a flat buffer for each kind of parameter in it, sharded as the plan says, and its gradients."""

from torch import nn

from thinwire.comm.codecs.codec import Blocks
from thinwire.comm.handle import InFlight
from thinwire.comm.world import World
from thinwire.parallel.shard.accumulation import GradAccumulation
from thinwire.parallel.shard.deferred import FirstValues
from thinwire.parallel.shard.dtypes import Kind
from thinwire.parallel.shard.find_units import UnitModules
from thinwire.parallel.shard.flat import Flat
from thinwire.parallel.shard.hooks import Ask, watched
from thinwire.parallel.shard.sharding import Sharding, codecs_of, low_rank_of
from thinwire.plan import operations
from thinwire.plan.hops import Buffer
from thinwire.plan.plan import Plan


class Unit:
    """A unit's flat buffers (one for each kind of parameter in it) and what of them is in flight."""

    def __init__(self, found: UnitModules, flats: list[Flat], *, keep: bool, ask: Ask) -> None:
        self.name, self.entries, self.flats = found.name, found.entries, flats
        self.grads = {
            flat: GradAccumulation(flat.parameters, flat.spec, kind=flat.kind) for flat in flats if flat.trained
        }
        self.resident = found.resident
        self.keep = keep
        """Gathered once a step: from its first use to the backward of the last micro-batch."""
        self.gathering: InFlight | None = None
        self.regathering: InFlight | None = None
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
        self.trained = [p for flat in flats if flat.trained for p in flat.parameters.values()]
        self.sharded = any(flat.sharded for flat in flats)
        """Whether its weights have to be gathered."""
        self._kinds = [
            (p, watched(type(p), self, ask), flat.trained) for flat in flats for p in flat.parameters.values()
        ]
        self._asks = False, False
        """Whether frozen and trained parameters ask first."""

    @property
    def label(self) -> str:
        """Its name in messages and timelines."""
        return self.name or "root"

    @property
    def nbytes(self) -> int:
        """Of its full weights, as gradients are summed."""
        return sum(flat.layout.numel * flat.master.element_size() for flat in self.flats)

    @property
    def ready(self) -> bool:
        """Whether its parameters hold their numbers, and the newest ones."""
        return self.gathered and self.regathering is None

    def watch(self) -> None:
        """Let parameters that cannot be read as they are ask first; the others are plain ones (see `watched`)."""
        away = not self.ready
        asks = away, away or self.summed
        if asks == self._asks:
            return
        self._asks = asks
        for parameter, kind, trained in self._kinds:
            wanted = kind if asks[trained] else kind.plain
            if type(parameter) is not wanted:
                parameter.__class__ = wanted

    @property
    def gathered(self) -> bool:
        return not self.sharded or all(flat.gathered for flat in self.flats)


def described(unit: Unit, step: int) -> operations.Unit:
    """What the step program needs to know of the unit in a step, counted from 0."""
    return operations.Unit(unit.name, tuple(_buffer(unit, flat, step) for flat in unit.flats), unit.resident)


def _buffer(unit: Unit, flat: Flat, step: int) -> Buffer:
    sharding, levels = flat.sharding, range(len(flat.spec.world.cluster.levels))
    summing = unit.grads[flat].low_rank_at(step) if flat.trained else None
    codecs = [*sharding.weights.values(), *sharding.grads.values()]
    return Buffer(
        flat.layout.numel,
        sharding.lp if flat.sharded else -1,
        sharding.lg,
        sharding.lo,
        tuple(sharding.weights[level].name if level in sharding.weights else None for level in levels),
        tuple(sharding.grads[level].name if level in sharding.grads else None for level in levels),
        weight_bytes=flat.compute_bytes,
        grad_bytes=flat.master.element_size(),
        block=next((codec.form.block for codec in codecs if isinstance(codec, Blocks)), 128),
        trained=flat.trained,
        low_rank=None if summing is None else (summing.level, summing.lengths),
        parameters=len(flat.parameters) if flat.trained else 0,
        used=flat.layout.used,
    )


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
    sharding = Sharding(
        lp=min(lp, lg) if kind.trained else lp,
        lg=lg,
        lo=lo,
        weights=weights,
        grads=grads,
        delta_levels=deltas,
        feedback_level=max(outer) if plan.compression.error_feedback and outer else None,
        low_rank=low_rank_of(plan),
    )
    multiple = world.size * (plan.compression.block if plan.compression.coded else 1)
    if kind.seen is not None:
        multiple *= (
            kind.seen.itemsize
        )  # a shard of it may begin in the middle of a number; the unsharded buffer may not
    return Flat(parameters, kind=kind, multiple=multiple, sharding=sharding, world=world, first=first)
