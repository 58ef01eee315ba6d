"""The exchanges themselves: rows go where they should, own rows stay when asked, absent ranks are left out."""

import torch

from thinwire.comm.world import World
from worlds import run_world


def _exchanged(world: World, among: list[int] | None, copy_own: bool) -> list[list[float]] | None:
    """What came, one row a rank that takes part; row j that rank i sends is full of 10 i + j."""
    transport = world.through_sockets([0]).transport(0, "reduce")
    assert transport is not None
    places = list(range(world.size)) if among is None else among
    if world.rank not in places:
        return None
    sent = torch.tensor([[10.0 * world.rank + j] * 3 for j in places])
    received = torch.full((len(places), 3), -1.0)
    for work in transport.all_to_all(received, sent, among=among, copy_own=copy_own):
        work.wait()
    return received.tolist()


def test_every_row_arrives_and_the_own_one_only_if_asked_for() -> None:
    for copy_own in (True, False):
        for rank, rows in enumerate(run_world([3], _exchanged, None, copy_own)):
            expected = [[10.0 * other + rank] * 3 for other in range(3)]
            expected[rank] = expected[rank] if copy_own else [-1.0] * 3
            assert rows == expected


def test_ranks_that_are_not_among_them_are_left_out() -> None:
    first, absent, last = run_world([3], _exchanged, [0, 2], True)
    assert absent is None
    assert first == [[0.0] * 3, [20.0] * 3]
    assert last == [[2.0] * 3, [22.0] * 3]


def _gathered(world: World, in_place: bool) -> list[list[float]]:
    transport = world.through_sockets([0]).transport(0, "gather")
    assert transport is not None
    received = torch.full((world.size, 2), -1.0)
    row = received[world.rank] if in_place else torch.empty(2)
    row.fill_(world.rank)
    for work in transport.all_gather(received, row):
        work.wait()
    return received.tolist()


def test_a_gather_has_the_rows_in_order_also_when_the_own_one_is_in_place() -> None:
    for in_place in (False, True):
        for rows in run_world([3], _gathered, in_place):
            assert rows == [[0.0] * 2, [1.0] * 2, [2.0] * 2]
