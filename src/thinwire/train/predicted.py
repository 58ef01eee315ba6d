"""What a rank holds and sends under its plan, by formula, unit by unit of its engine; and what codecs leave out.

Numbers that travel uncoded, codecs that have nothing to code: a plan names them, so a reader should be told.
"""

from dataclasses import dataclass
from functools import partial

from thinwire.comm.codecs.codec import IDENTITY, Codec
from thinwire.parallel.shard.engine import Sharded
from thinwire.parallel.shard.flat import Flat
from thinwire.parallel.shard.unit import Unit, flow_of
from thinwire.plan.traffic import step_bytes, total


def predicted_bytes(sharded: Sharded, step: int | None = None) -> dict[str, dict[str, int]]:
    """level name -> purpose -> bytes this rank sends in an optimizer step, by the formula of `traffic`.

    Steps are counted from 0; without one, it is any step after those that send more in the beginning.
    """
    names = sharded.world.cluster.level_names
    step = sharded.plan.compression.whole_steps if step is None else step
    flows = [_flow_bytes(sharded, unit, flat, step) for unit in sharded.units for flat in unit.flats]
    return {names[level]: purposes for level, purposes in sorted(total(flows).items()) if purposes}


def predicted_total(sharded: Sharded, first: int, steps: int) -> dict[str, dict[str, int]]:
    """The same of `steps` steps from `first` on."""
    whole = max(0, min(first + steps, sharded.plan.compression.whole_steps) - first)
    sums: dict[str, dict[str, int]] = {}
    for count, step in ((whole, 0), (steps - whole, None)):
        for level, purposes in predicted_bytes(sharded, step).items() if count else ():
            of_level = sums.setdefault(level, {})
            for purpose, sent in purposes.items():
                of_level[purpose] = of_level.get(purpose, 0) + count * sent
    return sums


def held_bytes(sharded: Sharded, state_numbers: int = 2) -> dict[str, int]:
    """state -> bytes on this rank; optimizer states are the masters, and `state_numbers` beside each (AdamW has two)."""
    sums = {"params": 0, "grads": 0, "master": 0}
    trained = 0
    for unit in sharded.units:
        for flat in unit.flats:
            for state, count in flat.held_bytes().items():
                sums[state] += count
            trained += flat.master.nbytes if flat.trained else 0
        sums["grads"] += sum(grads.nbytes for grads in unit.grads.values())
    return {"params": sums["params"], "grads": sums["grads"], "optimizer": sums["master"] + state_numbers * trained}


@dataclass(frozen=True)
class Uncoded:
    """Of `of` numbers that this rank sums at a level per step, `numbers` travel without the codec that the plan names."""

    codec: str
    numbers: int
    of: int


def uncoded(sharded: Sharded) -> dict[str, Uncoded]:
    """level name -> what `lowrank` sums as it is there: what is no matrix, or too small to gain, and padding."""
    found: dict[str, Uncoded] = {}
    for low_rank in (grads.low_rank for unit in sharded.units for grads in unit.grads.values()):
        if low_rank is not None:
            name = sharded.world.level_name(low_rank.level)
            before = found.get(name, Uncoded("lowrank", 0, 0))
            found[name] = Uncoded("lowrank", before.numbers + low_rank.uncoded, before.of + low_rank.numbers)
    return {name: counted for name, counted in found.items() if counted.numbers}


def idle_codecs(sharded: Sharded) -> dict[str, str]:
    """`weights.LEVEL` or `grads.LEVEL` -> the codec that the plan names there, where nothing of the kind is sent."""
    sent = predicted_bytes(sharded)
    return {
        f"{direction}.{level}": codec
        for direction, kind in (("weights", "P-"), ("grads", "G-"))
        for level, codec in getattr(sharded.plan.compression, direction).items()
        if codec != "fp32" and not any(purpose.startswith(kind) for purpose in sent.get(level, {}))
    }


def _gathers(unit: Unit, accumulate: int) -> int:
    """How often a unit's weights are gathered in a step."""
    if unit.keep:
        return 1
    return accumulate if unit.resident else 2 * accumulate


def _flow_bytes(sharded: Sharded, unit: Unit, flat: Flat, step: int) -> dict[int, dict[str, int]]:
    fanouts = [level.fanout for level in sharded.world.cluster.levels]

    def bytes_of(codec: Codec, element_bytes: int, n: int) -> int:
        return element_bytes * n if codec is IDENTITY else codec.wire_bytes(n)

    levels = range(len(fanouts))
    weights = [partial(bytes_of, flat.sharding.weights.get(level, IDENTITY), flat.compute_bytes) for level in levels]
    grads = [
        partial(bytes_of, flat.sharding.grads.get(level, IDENTITY), flat.master.element_size()) for level in levels
    ]
    flow = flow_of(unit, flat, _gathers(unit, sharded.plan.accumulate), step)
    return step_bytes(flow, fanouts, accumulate=sharded.plan.accumulate, weights=weights, grads=grads)
