"""The tables before the first step and after the last one: every number in them, counted by hand."""

from typing import Any

import pytest
import torch
from rich.table import Table

from partition_toy import Toy, plan_of
from thinwire.comm.world import World
from thinwire.parallel.shard.engine import Sharded, shard
from thinwire.train.announce import Uncompressed, compare, idle_codecs, plan_table, predicted_bytes, uncompressed
from thinwire.units import show_bytes
from worlds import cluster_of


def sharded(cut: tuple[int, int, int], **more: Any) -> Sharded:
    """The toy as rank 0 of 2 x 2 would cut it. No other rank is needed: nothing is sent."""
    world = World(0, 4, 0, cluster_of((2, 2)), torch.device("cpu"))
    return shard(Toy(), plan_of(world, cut, **more), world)


def rows(table: Table) -> list[tuple[str, ...]]:
    return list(zip(*(map(str, column.cells) for column in table.columns), strict=True))


def test_the_table_before_the_first_step_has_the_bytes_of_every_state_and_hop() -> None:
    """Seven buffers of 256 numbers (4 ranks, blocks of 64), six of them trained; root and embedding are gathered once."""
    made = plan_table(sharded((0, 0, 1), compression={"grads": {"cluster": "int8"}, "block": 64}))
    assert made.title == "plan (node; node; cluster)"
    assert rows(made) == [
        ("params", "node", "1.75 KiB"),  # 7 x (128 - 64) x 4: the masters lie in them
        ("grads", "node", "3 KiB"),  # 6 x 128 x 4
        ("optimizer", "cluster", "4.75 KiB"),  # 7 x 64 x 4 of masters, 6 x 64 x 8 of moments
        ("P-gather a step", "node", "5.50 KiB"),  # (3 + 2 x 4) x 128 x 4
        ("G-reduce a step", "node", "3 KiB"),  # 6 x 128 x 4
        ("P-refresh a step", "cluster", "1.50 KiB"),  # 6 x 64 x 4
        ("G-reduce a step", "cluster (int8)", "396 B"),  # 6 x (64 + 2)
    ]


def test_masters_that_are_the_weights_are_said_to_be_them() -> None:
    assert rows(plan_table(sharded((0, 0, 0))))[0] == ("params", "node", "they are the fp32 masters")


def test_the_table_after_the_run_sets_what_was_counted_beside_the_formula() -> None:
    predicted = {"node": {"P-gather": 5120, "G-reduce": 10240}, "cluster": {"P-refresh": 1000}}
    measured = {"node": {"P-gather": 5120, "control": 24}, "cluster": {"P-refresh": 999}}
    assert rows(compare(predicted, measured)) == [
        ("node", "P-gather", "5 KiB", "5 KiB"),
        ("node", "G-reduce", "10 KiB", "0 B"),
        ("node", "control", "-", "24 B"),
        ("cluster", "P-refresh", "1000 B", "999 B"),
    ]


def test_what_low_rank_sums_as_it_is_is_counted_and_told() -> None:
    """Rank 0's halves: 13 x 6 of each block's 88, five rows of the embedding's 34; norm and root have no matrix."""
    toy = sharded((0, 0, 1), compression={"grads": {"cluster": "lowrank"}, "rank": 1, "rank_from": 0})
    assert uncompressed(toy) == {"cluster": Uncompressed("lowrank", 3 * 10 + 4 + 6 + 4, 3 * 88 + 34 + 6 + 4)}
    assert rows(plan_table(toy))[-1] == ("not compressed", "cluster (lowrank)", "44 of 308 numbers")


def test_steps_that_are_summed_whole_before_low_rank_begins_are_told() -> None:
    """They send what the same cut sends without any codec."""
    compression = {"grads": {"cluster": "lowrank"}, "rank": 1}
    plain = predicted_bytes(sharded((0, 0, 1)))["cluster"]["G-reduce"]
    said = [
        row for row in rows(plan_table(sharded((0, 0, 1), compression=compression))) if row[0].startswith("gradients")
    ]
    assert said == [("gradients, first 2 steps", "cluster (whole)", show_bytes(plain))]
    assert not any(
        row[0].startswith("gradients")
        for row in rows(plan_table(sharded((0, 0, 1), compression={**compression, "rank_from": 0})))
    )


def test_a_rank_that_no_matrix_gains_by_leaves_everything_uncoded() -> None:
    left = uncompressed(sharded((0, 0, 1), compression={"grads": {"cluster": "lowrank"}, "rank": 1000}))["cluster"]
    assert left.numbers == left.of == 308


@pytest.mark.parametrize(
    ("cut", "compression", "idle"),
    [
        ((0, 0, 0), {"weights": {"cluster": "int8"}}, {"weights.cluster": "int8"}),
        ((0, 0, 0), {"weights": {"cluster": "fp32"}}, {}),
        ((-1, -1, 1), {"weights": {"node": "int8", "cluster": "int8"}}, {}),
        ((0, 0, 1), {"weights": {"cluster": "int8"}, "grads": {"node": "bf16", "cluster": "int4"}}, {}),
        ((-1, -1, -1), {"weights": {"node": "bf16"}, "grads": {"node": "bf16"}}, {"weights.node": "bf16"}),
    ],
)
def test_codecs_with_nothing_to_code_are_told(
    cut: tuple[int, int, int], compression: dict[str, Any], idle: dict[str, str]
) -> None:
    toy = sharded(cut, compression=compression)
    assert idle_codecs(toy) == idle
    assert [row for row in rows(plan_table(toy)) if row[0] == "nothing to compress"] == [
        ("nothing to compress", f"{where} ({codec})", "-") for where, codec in idle.items()
    ]
