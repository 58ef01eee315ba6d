"""Groups that keep pace: none goes more than `staleness_bound` steps ahead of the slowest one."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sync_toy import SITES, Group, diverging
from thinwire.comm.world import World
from thinwire.errors import PlanError
from thinwire.plan.rounds import HEARTBEAT_BYTES
from thinwire.plan.sync import SyncConfig
from thinwire.sync import rounds_in_flight as pace_module
from thinwire.sync.rounds_in_flight import Pace
from worlds import run_world

FOUR = [("node", 2), ("site", 2)]
STREAMING = {"kind": "streaming_diloco", "inner_steps": 8, "fragments": 3, "delay": 3}


class Board:
    """On which the ranks of a host write how many steps they have made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, rank: int, steps: int) -> None:
        new = self._folder / f"{rank}.new"
        new.write_text(str(steps), encoding="ascii")
        new.rename(self._folder / str(rank))

    def read(self, rank: int) -> int:
        path = self._folder / str(rank)
        return int(path.read_text(encoding="ascii")) if path.exists() else 0

    def wait_for(self, rank: int, steps: int) -> None:
        give_up_s = time.monotonic() + 60
        while self.read(rank) < steps:
            assert time.monotonic() < give_up_s, (
                f"rank {rank} does not come to step {steps}, it is at {self.read(rank)}"
            )
            time.sleep(0.002)


def _held_back(world: World, folder: Path, staleness_bound: int | None, far: int) -> list[int]:
    """Rank 1 makes no second step before rank 0 has made `far`: by how many steps rank 0 was ahead after each of its own."""
    board, group = Board(folder), Group(world, {"inner_steps": 12, "staleness_bound": staleness_bound})
    ahead = []
    for step in range(1, 11):
        if world.rank == 1:
            board.write(1, step)
            if step == 2:
                board.wait_for(0, far)
        group.train(1)
        if world.rank == 0:
            ahead.append(step - board.read(1))
            board.write(0, step)
    group.sync.settle()
    return ahead


@pytest.mark.parametrize("staleness_bound", [1, 2, 4])
def test_nobody_is_further_ahead_than_the_lead_and_as_far_as_that_nobody_waits(
    staleness_bound: int, tmp_path: Path
) -> None:
    ahead = run_world(SITES, _held_back, tmp_path, staleness_bound, staleness_bound + 1)[0]
    assert max(ahead) <= staleness_bound
    assert ahead[staleness_bound] >= staleness_bound - 1  # rank 1 had begun step 2 at most


def test_without_a_lead_rounds_alone_hold_a_group_back(tmp_path: Path) -> None:
    ahead = run_world(SITES, _held_back, tmp_path, None, 10)[0]
    assert max(ahead) >= 8


def _trained(world: World, sync: dict[str, Any]) -> tuple[torch.Tensor, list[int]]:
    group = Group(world, sync)
    group.train(20)
    group.sync.settle()
    return group.local(), group.state()


@pytest.mark.parametrize("sync", [STREAMING, {"kind": "eager", "inner_steps": 4}, {"kind": "co2", "inner_steps": 4}])
def test_what_is_trained_is_the_same_bit_for_bit(sync: dict[str, Any]) -> None:
    free, paced = (
        run_world(SITES, _trained, {**sync, "staleness_bound": staleness_bound}) for staleness_bound in (None, 2)
    )
    for (weights, state), (expected, expected_state) in zip(paced, free, strict=True):
        assert torch.equal(weights, expected)
        assert state == expected_state


def _beats(world: World, sync: dict[str, Any], steps: int) -> dict[str, int]:
    group = Group(world, sync)
    world.ledger.drain()
    group.train(steps)
    group.sync.settle()
    sent = world.ledger.drain().sent_bytes()
    return {level: purposes["outer-beat"] for level, purposes in sent.items() if "outer-beat" in purposes}


@pytest.mark.parametrize("more", [{}, {"sum_inside": "node"}])
def test_i7_a_byte_a_step_goes_to_every_other_group_over_the_links_between_them(more: dict[str, Any]) -> None:
    for sent in run_world(FOUR, _beats, {**STREAMING, **more, "delay": 5, "level": "node", "staleness_bound": 3}, 10):
        assert sent == {"node": 10 * HEARTBEAT_BYTES, "site": 2 * 10 * HEARTBEAT_BYTES}
    assert run_world(SITES, _beats, STREAMING, 10) == [{}, {}]


def _unequal(world: World, staleness_bound: int | None) -> tuple[torch.Tensor, int]:
    """Weights of groups of two and of four ranks, and how many beats this rank has sent."""
    group = Group(
        world,
        {**STREAMING, "staleness_bound": staleness_bound},
        groups=[[0, 1], [2, 3, 4, 5]],
        cut=("replica", "node", "node"),
    )
    world.ledger.drain()
    group.train(10)
    group.sync.settle()
    beats = [entry.sent_bytes for entry in world.ledger.drain().entries if entry.purpose == "outer-beat"]
    return group.local(), sum(beats)


def test_ranks_that_stand_for_parts_of_several_others_hear_of_all_of_them() -> None:
    free, paced = (run_world([("flat", 6)], _unequal, staleness_bound) for staleness_bound in (None, 2))
    assert [beats for _, beats in free] == [0] * 6
    assert min(beats for _, beats in paced) == 10 * HEARTBEAT_BYTES
    assert max(beats for _, beats in paced) > 10 * HEARTBEAT_BYTES
    for (weights, _), (expected, _) in zip(paced, free, strict=True):
        assert torch.equal(weights, expected)


def _diverging(world: World) -> tuple[str, list[int], list[int]]:
    group = Group(world, {**STREAMING, "inner_steps": 4, "fragments": 2, "delay": 2, "staleness_bound": 2})
    said = diverging(group, 1)
    if not said:
        group.train(4)
        group.sync.settle()
    return said, group.state(), sorted(group.sync.present)


def test_a_diverged_group_is_named_and_the_others_keep_pace_without_it() -> None:
    named, *others = (run_world([("site", 3)], _diverging)[rank] for rank in (1, 0, 2))
    assert named[0].startswith("group 1: its outer weights or momentum of fragment 0 are not those of the other")
    assert [present for _, _, present in others] == [[0, 2], [0, 2]]
    assert others[0] == others[1]


class _Late:
    """A collective that was waited for a quarter of a second."""

    def __init__(self, *chains: Any) -> None:
        pass

    def finish(self) -> float:
        return 0.25


def test_what_was_waited_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace_module, "InFlight", _Late)
    pace = Pace(2, None)  # type: ignore[arg-type]
    for _ in range(5):
        pace.keep([])
    assert (pace.waited_s(), pace.waited_s()) == (0.75, 0.0)
    pace.settle()
    assert pace.waited_s() == 0.5


@pytest.mark.parametrize(
    ("given", "levels", "said"),
    [
        (
            {"staleness_bound": 30},
            SITES,
            r"sync: staleness_bound = 30 keeps groups together, and rounds of inner_steps = 30 do as much; leave it",
        ),
        ({"staleness_bound": 2}, [("site", 1)], "and there is one group; leave it out"),
    ],
)
def test_a_lead_that_would_do_nothing_is_refused(given: dict[str, Any], levels: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        SyncConfig.model_validate(given).resolve(levels)
