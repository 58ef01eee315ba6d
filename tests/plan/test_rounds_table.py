"""The table of rounds before step 0: what is in each fragment, when it goes and counts, and its bytes, counted by hand."""

from rich.table import Table

from sync_toy import Group
from thinwire.comm.world import World
from thinwire.train.announce import rounds_table
from thinwire.units import show_bytes
from worlds import run_world

BLOCK, HEAD = 13 * 12 + 13 + 12 * 13 + 12, 12 * 5 + 5
SIZES = {**{f"blocks.{i}": BLOCK for i in range(4)}, "head": HEAD}


def _rows(table: Table) -> list[tuple[str, ...]]:
    return list(zip(*(map(str, column.cells) for column in table.columns), strict=True))


def _made(world: World, sync: dict[str, object]) -> tuple[str, list[tuple[str, ...]]]:
    table = rounds_table(Group(world, sync).sync)
    return str(table.title), _rows(table)


def test_every_unit_is_in_one_fragment_that_goes_in_turn_with_its_bytes() -> None:
    sync = {"kind": "streaming_diloco", "inner_steps": 6, "fragments": 2, "delay": 2, "codec": "fp32"}
    for title, rows in run_world([("site", 2)], _made, sync):
        assert title == "2 groups across site: streaming_diloco, every 6 steps (fp32)"
        assert [row[0] for row in rows] == ["0", "1"]
        units = [row[1].split(", ") for row in rows]
        assert sorted(units[0] + units[1]) == sorted(SIZES)
        assert [row[2] for row in rows] == ["3, 5", "6, 8"]
        for names, row in zip(units, rows, strict=True):
            assert row[3] == show_bytes(4 * sum(SIZES[name] for name in names) + 16)


def test_a_group_alone_sends_nothing_and_is_told_what_it_does() -> None:
    title, rows = run_world([("site", 1)], _made, {"inner_steps": 5, "outer_lr": 0.5})[0]
    assert title == "one group, every 5 steps: it agrees with itself (Lookahead, arXiv 1907.08610)"
    assert [row[3] for row in rows] == ["0 B"]
