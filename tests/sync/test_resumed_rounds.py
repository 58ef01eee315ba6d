"""Worker groups that were saved in the middle of rounds and go on equal those that were never interrupted, bit for bit."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from logical import fill, put_together
from sync_toy import Group, draw
from thinwire.comm.world import World
from thinwire.sync.state import in_flight, own_names, taken_steps, to_load, to_save
from worlds import run_world

STEPS, SAVED_AT = 9, (3, 4, 6)
"""Rounds of four steps: before the first, at its end or one step later, in the middle of the second."""
Setting = dict[str, Any]
PLAIN: dict[str, Any] = {"cut": ("replica", "replica", "all")}


class Rounds(Group):
    """One rank of one group. The ranks of group 1 skip step 2."""

    def __init__(self, world: World, setting: Setting) -> None:
        super().__init__(world, **{**PLAIN, **setting})

    def go(self, last: int) -> list[float]:
        """Losses of this rank up to step `last`."""
        losses = []
        for step in range(self.sync.step, last):
            with self.engine.micro_batch(last=True):
                loss = self.engine.module(draw(step, self.world.rank)).square().mean()
                loss.backward()
            self.engine.finish_reduce()
            if self.sync.group == 1 and step == 2:
                self.optimizer.skip()
            else:
                self.optimizer.step(grad_scale=1 / self.inner.size)
            self.sync.after(step + 1, tokens=1.0 + self.sync.group)
            losses.append(loss.item())
        return losses

    def saved(self) -> dict[str, Tensor]:
        inner = self.engine.for_save()
        optimizer = [*self.optimizer.for_save(), *self.engine.carried_for_save()]
        return put_together(self.world, to_save(self.sync, inner, optimizer, updates=self.optimizer.updates))

    def load(self, saved: dict[str, Tensor], step: int) -> None:
        self.sync.go_on(step, flights=in_flight(self.sync, saved))
        updates = taken_steps(self.sync)
        carried = self.engine.carried_for_load(own_names(self.sync, saved))
        optimizer = [*self.optimizer.for_load({*saved, *own_names(self.sync, saved)}), *carried]
        fill([updates, *to_load(self.sync, self.engine.for_load(), optimizer, saved, same=True)], saved)
        self.engine.loaded()
        self.optimizer.loaded(int(updates.tensor))
        self.sync.compare()

    def validate(self) -> None:
        """As a run does it: forwards with the outer weights."""
        with self.sync.outer_weights(), torch.no_grad():
            self.engine.module(draw(0, 0))

    def state(self) -> list[list[float]]:
        """Masters and weights of the group, and the outer state."""
        self.engine.drain()
        flats = [flat for unit in self.engine.units for flat in unit.flats]
        outer = [values for each in self.sync.fragments for values in (each.weights, each.momentum, each.residual)]
        return [v.tolist() for flat in flats for v in (flat.master, flat.weights)] + [
            v.tolist() for v in outer if v is not None
        ]


def _differences(world: World, settings: dict[str, Setting]) -> list[str]:
    return [wrong for name, setting in settings.items() for wrong in _compared(world, name, setting)]


def _compared(world: World, name: str, setting: Setting) -> Iterator[str]:
    alone = Rounds(world, setting)
    losses, end = alone.go(STEPS), alone.state()
    saving, seen, saved = Rounds(world, setting), [], {}
    for step in range(1, STEPS + 1):
        seen += saving.go(step)
        if step in SAVED_AT:
            saved[step] = saving.saved()
            saving.validate()
    if (seen, saving.state()) != (losses, end):
        yield f"{name}: saving and validating change it"
    for step, tensors in saved.items():
        again = Rounds(world, setting)
        again.load(tensors, step)
        rest = again.go(STEPS)
        if rest != losses[step:]:
            yield f"{name}: saved at {step}, losses {rest} instead of {losses[step:]}"
        elif again.state() != end:
            yield f"{name}: saved at {step}, other weights"
        again.sync.drain()
    alone.sync.drain()
    saving.sync.drain()


def _agree(levels: Sequence[tuple[str, int]], settings: dict[str, Setting]) -> None:
    for wrong in run_world(levels, _differences, settings, timeout_s=550):
        assert not wrong, f"{len(wrong)} of {len(settings)} settings: " + "\n".join(wrong)


KINDS: dict[str, dict[str, Any]] = {
    "local_sgd": {"kind": "local_sgd"},
    "diloco": {"kind": "diloco"},
    "diloco, late": {"kind": "diloco", "delay": 2},
    "streaming": {"kind": "streaming_diloco", "fragments": 2},
    "eager": {"kind": "eager"},
    "co2": {"kind": "co2"},
    "sparse": {"kind": "sparse"},
    "sparse fragments, late": {"kind": "sparse", "fragments": 3, "delay": 3},
}
CODECS = ("fp32", "bf16", "fp16", "int8", "int4", "int4-hadamard", "e3m0", "topk")


def _kinds(**more: Any) -> dict[str, Setting]:
    return {name: {"sync": {"inner_steps": 4, **kind, **more}} for name, kind in KINDS.items()}


def test_every_kind() -> None:
    _agree([("site", 2)], _kinds())


def _coded(codec: str, feedback: bool) -> dict[str, Setting]:
    rounding = {"rounding": "stochastic", "block": 64} if codec in CODECS[3:7] else {}
    return _kinds(codec=codec, error_feedback=feedback, **rounding)


@pytest.mark.slow
def test_every_kind_with_another_codec() -> None:
    """Every codec but fp32 is that of one kind or two, half of them with feedback."""
    coded = CODECS[1:]
    settings = {}
    for number, name in enumerate(KINDS):
        codec, feedback = coded[number % len(coded)], number % 2 == 1
        settings[f"{name}, {codec}, feedback={feedback}"] = _coded(codec, feedback)[name]
    _agree([("site", 2)], settings)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("codec", CODECS)
def test_every_kind_with_every_codec_and_feedback(codec: str) -> None:
    settings: dict[str, Setting] = {}
    for feedback in (False, True) if codec != "fp32" else (False,):
        found = _coded(codec, feedback)
        settings |= {f"{name}, feedback={feedback}": setting for name, setting in found.items()}
    _agree([("site", 2)], settings)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kind_of_three_groups_with_codecs_of_two_hops_and_every_aggregate() -> None:
    settings = _kinds(codec="int4-hadamard", error_feedback=True, rounding="stochastic")
    for aggregate in ("tokens", "median", "trimmed"):
        found = _kinds(aggregate=aggregate)
        settings |= {f"{name}, {aggregate}": found[name] for name in found if name != "eager"}
    _agree([("site", 3)], settings)


INSIDE: dict[str, dict[str, Any]] = {
    "int8": {"weights": {"node": "int8"}, "grads": {"node": "int4-hadamard"}},
    "delta-int4": {"weights": {"node": "delta-int4"}, "grads": {"node": "bf16"}},
    "hadamard by chance": {"weights": {"node": "int4-hadamard"}, "grads": {"node": "int4"}, "rounding": "stochastic"},
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("compression", INSIDE.values(), ids=INSIDE)
def test_every_kind_over_groups_whose_own_weights_are_compressed(compression: dict[str, Any]) -> None:
    kinds = _kinds(codec="int8").items()
    _agree(
        [("node", 2), ("site", 2)],
        {name: {**kind, "compression": {"block": 64, **compression}} for name, kind in kinds},
    )


@pytest.mark.slow
def test_groups_whose_own_weights_are_compressed() -> None:
    base = {"inner_steps": 4, "kind": "streaming_diloco", "fragments": 2}
    settings = {
        name: {"sync": base, "compression": {"block": 64, **compression}} for name, compression in INSIDE.items()
    }
    _agree([("node", 2), ("site", 2)], settings)


def test_groups_that_add_up_first() -> None:
    sync = {"inner_steps": 4, "level": "node", "sum_inside": "node", "delay": 3}
    settings: dict[str, Setting] = {
        codec: {"cut": ("replica",) * 3, "sync": {**sync, "kind": "diloco", "codec": codec}}
        for codec in ("fp32", "e3m0")
    }
    _agree([("node", 2), ("site", 2)], settings)
