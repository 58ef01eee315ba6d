"""What a cut costs, said before the first step: state -> level -> bytes per rank, level -> bytes sent per step."""

from functools import partial

from thinwire.comm.codec import IDENTITY, Codec
from thinwire.partition.engine import Sharded, Unit
from thinwire.partition.flat import Flat
from thinwire.traffic import step_bytes, total


def predicted_bytes(sharded: Sharded) -> dict[str, dict[str, int]]:
    """level name -> purpose -> bytes this rank sends in one optimizer step, by the formula of `traffic`."""
    names = sharded.world.cluster.level_names
    flows = [
        _flow_bytes(sharded, flat, _gathers(unit, sharded.plan.accumulate))
        for unit in sharded.units
        for flat in unit.flats
    ]
    return {names[level]: purposes for level, purposes in sorted(total(flows).items()) if purposes}


def _gathers(unit: Unit, accumulate: int) -> int:
    """How often a unit's weights are gathered in a step."""
    if unit.keep:
        return 1
    return accumulate if unit.resident else 2 * accumulate


def _flow_bytes(sharded: Sharded, flat: Flat, gathers: int) -> dict[int, dict[str, int]]:
    fanouts = [level.fanout for level in sharded.world.cluster.levels]

    def bytes_of(codec: Codec, element_bytes: int, n: int) -> int:
        return element_bytes * n if codec is IDENTITY else codec.wire_bytes(n)

    levels = range(len(fanouts))
    weights = [partial(bytes_of, flat.cut.weights.get(level, IDENTITY), flat.compute_bytes) for level in levels]
    grads = [partial(bytes_of, flat.cut.grads.get(level, IDENTITY), flat.master.element_size()) for level in levels]
    return step_bytes(flat.flow(gathers), fanouts, accumulate=sharded.plan.accumulate, weights=weights, grads=grads)


def held_bytes(sharded: Sharded) -> dict[str, int]:
    """state -> bytes on this rank, AdamW's two moments counted with the masters as optimizer states."""
    sums = {"params": 0, "grads": 0, "master": 0}
    trained = 0
    for unit in sharded.units:
        for flat in unit.flats:
            for state, count in flat.held_bytes().items():
                sums[state] += count
            trained += flat.master.nbytes if flat.trained else 0
    return {"params": sums["params"], "grads": sums["grads"], "optimizer": sums["master"] + 2 * trained}
