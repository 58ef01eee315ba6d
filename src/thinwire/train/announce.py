"""The table before step 0: where each state lives, and what the plan will send; after the run, what it did send."""

from rich.table import Table

from thinwire.partition.engine import Sharded
from thinwire.partition.report import held_bytes, idle_codecs, predicted_bytes, uncoded
from thinwire.sync.outer_sync import OuterSync
from thinwire.units import show_bytes


def plan_table(sharded: Sharded, sync: OuterSync | None = None) -> Table:
    """state -> level -> bytes on this rank; level -> purpose -> bytes per step by the formula; what codecs leave out."""
    partition, held = sharded.plan.partition, held_bytes(sharded)
    table = Table("what", "where", "bytes on rank 0", title=f"plan {partition}", title_justify="left")
    for state in ("params", "grads", "optimizer"):
        shown = show_bytes(held[state]) if held[state] else "they are the fp32 masters"
        table.add_row(state, getattr(partition, state), shown)
    if sync is not None:
        table.add_row("outer weights and momentum", "host memory", show_bytes(sync.held_bytes()))
    table.add_section()
    for level, purposes in predicted_bytes(sharded).items():
        for purpose, count in purposes.items():
            codec = _codec(sharded, level, purpose)
            table.add_row(f"{purpose} a step", f"{level}{codec}", show_bytes(count))
    first = sharded.plan.wire.whole_steps
    for level, purposes in predicted_bytes(sharded, 0).items() if first else ():
        whole = sum(count for purpose, count in purposes.items() if purpose.startswith("G-"))
        if sharded.plan.wire.grads.get(level) == "lowrank":
            table.add_row(f"gradients, first {first} steps", f"{level} (whole)", show_bytes(whole))
    table.add_section()
    for level, left in uncoded(sharded).items():
        table.add_row("not coded", f"{level} ({left.codec})", f"{left.numbers:,} of {left.of:,} numbers")
    for where, codec in idle_codecs(sharded).items():
        table.add_row("nothing to code", f"{where} ({codec})", "-")
    return table


def rounds_table(sync: OuterSync) -> Table:
    """What worker groups agree on when, and the bytes of each exchange by the formula."""
    point, ours = sync.sync, sync.world.rank
    title = f"{point.groups} groups across {point.level}: {point.kind}, every {point.inner_steps} steps ({point.codec})"
    table = Table("fragment", "units", "first sent, applied after step", f"bytes of rank {ours} a round", title=title)
    table.title_justify = "left"
    if point.groups == 1:
        table.title = f"one group, every {point.inner_steps} steps: it agrees with itself (Lookahead, arXiv 1907.08610)"
    for first in sync.schedule.table(point.inner_steps):
        fragment = sync.fragments[first.fragment]
        units = ", ".join(dict.fromkeys(share.unit_name for share in fragment.shares))
        sent = sync.bytes_of(first.fragment)
        table.add_row(str(first.fragment), units, f"{first.send}, {first.apply}", show_bytes(sent))
    return table


def _codec(sharded: Sharded, level: str, purpose: str) -> str:
    side = sharded.plan.wire.weights if purpose.startswith("P-") else sharded.plan.wire.grads
    return f" ({side[level]})" if level in side else ""


def compare(predicted: dict[str, dict[str, int]], measured: dict[str, dict[str, int]]) -> Table:
    """Predicted bytes beside what the ledger counted; `control` and other purposes are shown too."""
    table = Table("level", "purpose", "predicted", "measured", title="bytes sent by rank 0", title_justify="left")
    for level in dict.fromkeys([*predicted, *measured]):
        of_level, counted = predicted.get(level, {}), measured.get(level, {})
        for purpose in dict.fromkeys([*of_level, *counted]):
            said = show_bytes(of_level[purpose]) if purpose in of_level else "-"
            table.add_row(level, purpose, said, show_bytes(counted.get(purpose, 0)))
    return table
