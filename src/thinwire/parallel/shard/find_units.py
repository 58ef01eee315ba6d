"""Which parameters of a module move together: its units.

By default every entry of a ModuleList or Sequential is a unit (the transformer blocks), and so is every other child of the
root that holds parameters (embedding, final norm, head). A module without a forward (a ModuleList of lists, a ModuleDict, a
ParameterList) is no unit: nobody could tell when it is used; its entries are. A parameter belongs to the first unit that
meets it; tied parameters are counted once, those without elements not at all. What hangs on the root itself or on modules
without a forward, or is shared by several units, stays gathered from its first use in forward to the end of backward.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from thinwire.errors import PlanError


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
