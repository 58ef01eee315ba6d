"""Which parameters of a module move together: its units.

By default every entry of a ModuleList or Sequential is a unit (the transformer blocks), and so is every other child of the
root that holds parameters (embedding, final norm, head). A module without a forward (a ModuleList of lists, a ModuleDict, a
ParameterList) is no unit: nobody could tell when it is used; its entries are. A parameter belongs to the first unit that
meets it; tied parameters are counted once, those without elements not at all. What hangs on the root itself or on modules
without a forward, or is shared by several units, stays gathered from its first use in forward to the end of backward.

A unit with storage: a flat buffer for each kind of parameter in it, cut as the plan says.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from thinwire.comm.handle import Flight
from thinwire.comm.world import World
from thinwire.errors import PlanError
from thinwire.parallel.shard.deferred import FirstValues
from thinwire.parallel.shard.dtypes import Kind
from thinwire.parallel.shard.flat import Flat
from thinwire.parallel.shard.hooks import Ask, watched
from thinwire.parallel.shard.shard_spec import Cut, codecs_of, low_rank_of
from thinwire.plan.plan import Plan


@dataclass
class UnitModules:
    """A unit before it has storage: its parameters by name, and the modules whose forward uses them."""

    name: str
    entries: list[nn.Module]
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def resident(self) -> bool:
        """Whether its weights are kept from forward to backward because no single module spans all their uses."""
        return len(self.entries) > 1 or self.name == ""


def find_units(root: nn.Module, chosen: Sequence[str] | None = None) -> list[UnitModules]:
    """The units of `root` in module order; `chosen` names the submodules that are to be units instead of the default.

    Raises PlanError for a name that is no submodule or holds no parameters, or one unit inside another.
    """
    heads = _chosen(root, chosen) if chosen is not None else _default(root)
    units = [UnitModules(name, [module]) for name, module in heads.items()]
    owner: dict[nn.Parameter, UnitModules] = {}
    names = {parameter: name for name, parameter in root.named_parameters() if parameter.numel()}
    for unit in units:
        for parameter in unit.entries[0].parameters():
            if parameter not in names:
                continue
            if parameter not in owner:
                owner[parameter] = unit
                unit.parameters[names[parameter]] = parameter
            elif owner[parameter] is not unit and unit.entries[0] not in owner[parameter].entries:
                owner[parameter].entries.append(unit.entries[0])
    rest = {name: parameter for parameter, name in names.items() if parameter not in owner}
    found = [unit for unit in units if unit.parameters]
    return [UnitModules("", [root], rest), *found] if rest else found


def _default(root: nn.Module) -> dict[str, nn.Module]:
    lists = {n: m for n, m in root.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and n}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists if other != n)}
    order = {name: position for position, (name, _) in enumerate(root.named_modules())}
    # A module that lies in several places is named after the first.
    heads = {name: entry for prefix, held in outer.items() for name, entry in _entries(prefix, held) if name in order}
    covered = {id(module) for entry in heads.values() for module in entry.modules()}
    for name, module in root.named_modules():
        inside = any(name.startswith(head + ".") for head in heads)
        holds_units = any(head.startswith(name + ".") for head in heads) or name == ""
        usable = has_forward(module) and any(p.numel() for p in module.parameters())
        if id(module) not in covered and not inside and not holds_units and usable:
            heads[name] = module
    return dict(sorted(heads.items(), key=lambda item: order[item[0]]))


def _entries(prefix: str, container: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The entries of a container, and of the containers in it, that have a forward."""
    for key, entry in container.named_children():
        if has_forward(entry):
            yield f"{prefix}.{key}", entry
        else:
            yield from _entries(f"{prefix}.{key}", entry)


def has_forward(module: nn.Module) -> bool:
    """Whether a module can be called."""
    own = module.__dict__.get("forward", type(module).forward)
    return own is not nn.Module.forward


def _chosen(root: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    modules = dict(root.named_modules())
    for name in names:
        if name not in modules:
            raise PlanError(
                f"unit {name!r} is no submodule of the model; names look like {', '.join(list(modules)[1:4])}"
            )
        if not any(True for _ in modules[name].parameters()):
            raise PlanError(f"unit {name!r} holds no parameters; leave it out")
        if not has_forward(modules[name]):
            raise PlanError(f"unit {name!r} is a {type(modules[name]).__name__} without a forward; name its entries")
        inside = [other for other in names if other != name and name.startswith(other + ".")]
        if inside:
            raise PlanError(f"unit {name!r} lies inside unit {inside[0]!r}; name one of them")
    return {name: modules[name] for name in names}


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
