"""What was saved under one set of codecs goes on under any other with the exact masters, and under its own as it was."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.nn.functional as F

from partition_toy import Toy, adamw, batches, one_step, plan_of
from replicated import replicate
from thinwire.checkpoint.store import Checkpoints
from thinwire.comm.world import World
from thinwire.parallel.shard.engine import Sharded, shard
from worlds import run_world

SETTINGS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "nothing coded": ((0, 0, 1), {}),
    "int4 and delta weights": (
        (0, 0, 1), {"grads": {"cluster": "int4"}, "weights": {"cluster": "delta-int4"}, "error_feedback": True}
    ),
    "low rank": ((0, 0, 1), {"grads": {"cluster": "lowrank"}, "rank": 1, "rank_from": 0, "weights": {"cluster": "bf16"}}),
    "int8, other blocks": ((-1, 0, 1), {"grads": {"node": "int8", "cluster": "int8"}, "block": 64}),
    "e3m0 by chance": ((-1, -1, 1), {"grads": {"cluster": "e3m0"}, "rounding": "stochastic", "error_feedback": True}),
}  # fmt: skip


def _loss(engine: Any, world: World) -> float:
    """Of step 2, without taking it; every rank's own."""
    tokens, targets = next(batches(world, 2, 1))
    with engine.micro_batch(last=True):
        loss = F.cross_entropy(engine.module(tokens).view(-1, 11), targets.view(-1), reduction="sum")
        loss.backward()
    engine.finish_reduce()
    engine.dropped()
    engine.drain()
    return loss.item()


def _saved(world: World, name: str, folder: Path) -> tuple[Checkpoints, Sharded]:
    """Two steps under the setting, saved."""
    cut, compression = SETTINGS[name]
    engine = shard(Toy(), plan_of(world, cut, compression=compression), world)
    optimizer = adamw(engine)
    for step in range(2):
        one_step(engine, optimizer, world, step)
    store = Checkpoints(folder, keep_last=1, keep_every=0, world=world)
    store.save(2, [*engine.for_save(), *optimizer.for_save(), *engine.carried_for_save()], {}).result()
    return store, engine


def _all(world: World, folder: Path) -> dict[tuple[str, str], float]:
    out: dict[tuple[str, str], float] = {}
    for saved in SETTINGS:
        store, running = _saved(world, saved, folder / saved.replace(" ", "-"))
        out[saved, "running"] = _loss(running, world)
        found = store.newest()
        assert found is not None
        twin = replicate(Toy(), plan_of(world, (-1, -1, -1)), world)
        store.load(found, twin.for_load())
        twin.loaded()
        out[saved, "twin"] = _loss(twin, world)
        for name, (cut, compression) in SETTINGS.items():
            engine = shard(Toy(), plan_of(world, cut, compression=compression), world)
            optimizer = adamw(engine)
            carried = engine.carried_for_load(found.manifest.tensors)
            store.load(found, [*engine.for_load(), *optimizer.for_load(found.manifest.tensors), *carried])
            engine.loaded()
            optimizer.loaded(2)
            out[saved, name] = _loss(engine, world)
    return out


@cache
def results() -> list[dict[tuple[str, str], float]]:
    with TemporaryDirectory() as folder:
        return run_world((2, 2), _all, Path(folder))


def test_the_next_loss_is_that_of_the_exact_masters_under_every_other_set_of_codecs() -> None:
    for result in results():
        for saved in SETTINGS:
            losses = {name: result[saved, name] for name in (*SETTINGS, "twin") if name != saved}
            assert len(set(losses.values())) == 1, (saved, losses)


def test_under_its_own_codecs_the_next_loss_is_the_runs_own() -> None:
    for result in results():
        for saved, (_, compression) in SETTINGS.items():
            assert result[saved, saved] == result[saved, "running"]
            assert "weights" in compression or result[saved, "running"] == result[saved, "twin"], saved
    for saved in ("int4 and delta weights", "low rank"):
        assert any(result[saved, "running"] != result[saved, "twin"] for result in results())
