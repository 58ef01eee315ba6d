"""A run that was saved and goes on equals the one that was never interrupted, bit for bit, whatever is coded."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from logical import fill, put_together
from partition_toy import Toy, adamw, batches, plan_of, weights
from thinwire.comm.world import World
from thinwire.parallel.shard.engine import Sharded, shard
from thinwire.parallel.shard.optimizer import ShardedOptimizer
from worlds import run_world

STEPS, SAVED_AT = 4, (1, 3)
Setting = dict[str, Any]
WEIGHTS = ("bf16", "fp16", "int8", "int4", "int4-hadamard", "e3m0", "delta-int8", "delta-int4")
GRADS = ("bf16", "fp16", "int8", "int4", "int4-hadamard", "e3m0", "lowrank")
INSIDE = {"delta-int8": "int8", "delta-int4": "int4", "lowrank": "int8"}
"""What stands in where a codec is not allowed."""


class Run:
    """One rank of a run of the toy under a setting."""

    def __init__(self, world: World, setting: Setting) -> None:
        self.world, self.accumulate = world, setting.get("accumulate", 1)
        plan = plan_of(world, **setting)
        self.engine: Sharded = shard(Toy(), plan, world)
        self.optimizer: ShardedOptimizer = adamw(self.engine)

    def train(self, first: int, last: int) -> list[tuple[float, float]]:
        """(loss of this rank, gradient norm) of the steps; nothing is landed in between that a step does not land."""
        seen = []
        for step in range(first, last):
            total, pairs = 0.0, list(batches(self.world, step, self.accumulate))
            for number, (tokens, targets) in enumerate(pairs):
                with self.engine.micro_batch(last=number == len(pairs) - 1):
                    loss = F.cross_entropy(self.engine.module(tokens).view(-1, 11), targets.view(-1), reduction="sum")
                    loss.backward()
                total += loss.item()
            self.engine.finish_reduce()
            seen.append((total, self.engine.grad_norm()))
            self.optimizer.step(grad_scale=0.01)
        return seen

    def saved(self) -> dict[str, Tensor]:
        pieces = [*self.engine.for_save(), *self.optimizer.for_save(), *self.engine.carried_for_save()]
        return put_together(self.world, pieces)

    def load(self, saved: dict[str, Tensor], step: int) -> None:
        carried = self.engine.carried_for_load(saved)
        fill([*self.engine.for_load(), *self.optimizer.for_load(saved), *carried], saved)
        self.engine.loaded()
        self.optimizer.loaded(step)

    def state(self) -> tuple[list[list[float]], bytes]:
        """Masters and weights at depth lp, and a hash of the gathered weights."""
        self.engine.drain()
        flats = [flat for unit in self.engine.units for flat in unit.flats]
        held = [values.tolist() for flat in flats for values in (flat.master, flat.weights)]
        return held, weights(self.engine)


def _differences(world: World, settings: dict[str, Setting]) -> list[str]:
    return [wrong for name, setting in settings.items() for wrong in _compared(world, name, setting)]


def _compared(world: World, name: str, setting: Setting) -> Iterator[str]:
    alone = Run(world, setting)
    losses, end = alone.train(0, STEPS), alone.state()
    saving, seen, saved = Run(world, setting), [], {}
    for step in range(STEPS):
        seen += saving.train(step, step + 1)
        if step + 1 in SAVED_AT:
            saved[step + 1] = saving.saved()
    if (seen, saving.state()) != (losses, end):
        yield f"{name}: saving changes it"
    for step, tensors in saved.items():
        again = Run(world, setting)
        again.load(tensors, step)
        rest = again.train(step, STEPS)
        if rest != losses[step:]:
            yield f"{name}: saved at {step}, losses {rest} instead of {losses[step:]}"
        elif again.state() != end:
            yield f"{name}: saved at {step}, other weights"


def _settings(levels: Sequence[int], *, stochastic: bool) -> dict[str, Setting]:
    """Every codec of weights and of gradients, with and without feedback, under cuts that make it travel in other ways."""
    names, outer = ["node", "cluster"][: len(levels)], len(levels) - 1
    base = {"block": 64, "rounding": "stochastic" if stochastic else "nearest", "rank": 1}
    found: dict[str, Setting] = {}
    for number, codec in enumerate(WEIGHTS):
        for cut in [(-1, -1, outer), (outer - 1, outer - 1, outer), (outer, outer, outer)]:
            within = {
                name: codec if cut[0] < at <= cut[2] else INSIDE.get(codec, codec) for at, name in enumerate(names)
            }
            grads = {names[-1]: GRADS[number % len(GRADS)]} if cut[1] < outer else {}
            compression = {**base, "weights": within, "grads": grads}
            found[f"weights {codec} {cut}"] = {"cut": cut, "compression": compression, "accumulate": 1 + number % 2}
    for number, codec in enumerate(GRADS):
        within = {name: codec if name == names[-1] else INSIDE.get(codec, codec) for name in names}
        for cut in [(-1, -1, -1), (outer - 1, outer - 1, outer)]:
            for feedback in (False,) if codec == "lowrank" else (False, True):
                compression = {**base, "grads": within, "error_feedback": feedback, "rank_from": 2}
                found[f"gradients {codec} {cut} {feedback}"] = {
                    "cut": cut,
                    "compression": compression,
                    "accumulate": 2 - number % 2,
                }
    return found


def _agree(levels: Sequence[int], settings: dict[str, Setting]) -> None:
    for wrong in run_world(list(levels), _differences, settings, timeout_s=550):
        assert not wrong, f"{len(wrong)} of {len(settings)} settings: " + "\n".join(wrong)


def _every_codec_once(settings: dict[str, Setting]) -> dict[str, Setting]:
    """One of the cuts of each codec, and of those with and without feedback: each time the next."""
    of_codec: dict[str, list[str]] = {}
    for name in settings:
        of_codec.setdefault(" ".join(name.split()[:2]), []).append(name)
    chosen = [names[number % len(names)] for number, names in enumerate(of_codec.values())]
    return {name: settings[name] for name in chosen}


@pytest.mark.parametrize("levels", [[2], pytest.param([2, 2], marks=pytest.mark.slow)], ids=str)
def test_every_codec_under_one_of_its_cuts(levels: list[int]) -> None:
    settings = _every_codec_once(_settings(levels, stochastic=len(levels) == 1))
    assert len(settings) == len(WEIGHTS) + len(GRADS)
    _agree(levels, settings)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_codec_with_and_without_feedback_over_one_level() -> None:
    _agree([2], _settings([2], stochastic=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", ["weights", "gradients"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_every_codec_with_and_without_feedback_over_two_levels(what: str, stochastic: bool) -> None:
    settings = _settings([2, 2], stochastic=stochastic)
    _agree([2, 2], {name: setting for name, setting in settings.items() if name.startswith(what)})


BOTH = {"weights": {"node": "int8", "cluster": "int8"}, "rounding": "stochastic", "block": 64}


def _rewritten(world: World, *, landing: bool) -> tuple[list[list[float]], bytes]:
    """Three steps, after each of which masters are written by hand; `landing`: whether everything lands in between."""
    run = Run(world, {"cut": (-1, -1, 1), "compression": BOTH})
    for step in range(3):
        run.train(step, step + 1)
        if landing:
            run.engine.drain()
        with run.engine.rewriting(range(len(run.engine.units))):
            for share in run.engine.shares():
                share.master.mul_(1.01)
        if landing:
            run.engine.drain()
    return run.state()


def _both_ways(world: World) -> None:
    assert _rewritten(world, landing=True) == _rewritten(world, landing=False)


def test_when_a_hop_sets_out_changes_no_bit() -> None:
    run_world((2, 2), _both_ways)


def _edited(world: World) -> None:
    """Somebody writes to weights that were compressed: some of them still are."""
    setting = {"cut": (-1, -1, 0), "compression": {"weights": {"node": "int8"}, "block": 64}}
    run = Run(world, setting)
    run.train(0, 2)
    with run.engine.full_parameters(), torch.no_grad():
        run.engine.module.blocks[0][0].weight.mul_(0.5)
    saved = run.saved()
    assert {name.split("/")[1] for name in saved if name.startswith("carried/")} == {"seed", "weights"}
    again = Run(world, setting)
    again.load(saved, 2)
    assert again.train(2, 4) == run.train(2, 4)
    assert again.state() == run.state()


def test_weights_that_somebody_wrote_to_come_back_as_they_were() -> None:
    run_world(2, _edited)


def _afresh(world: World) -> None:
    cut = (-1, -1, 0)
    int8, none = ({"cut": cut, "compression": {"weights": weights, "block": 64}} for weights in ({"node": "int8"}, {}))
    by_chance = {"cut": cut, "compression": {**int8["compression"], "rounding": "stochastic"}}
    run, plain = Run(world, int8), Run(world, none)
    run.train(0, 2)
    plain.train(0, 2)
    saved = run.saved()
    old = {name: tensor for name, tensor in saved.items() if not name.startswith("carried/seed/")}
    cases = [(int8, saved, False), (int8, old, True), (by_chance, saved, True), (none, saved, True)]
    for setting, tensors, afresh in [*cases, (none, plain.saved(), False), (int8, plain.saved(), True)]:
        resumed = [Run(world, setting) for _ in range(2)]
        assert resumed[0].engine.starts_afresh(tensors) == afresh, (setting, afresh)
        for each in resumed:
            each.load(tensors, 2)
        assert resumed[0].train(2, 4) == resumed[1].train(2, 4)
        assert resumed[0].state() == resumed[1].state()


def test_another_plan_or_an_older_checkpoint_begins_with_the_masters_the_same_each_time() -> None:
    run_world(2, _afresh)
