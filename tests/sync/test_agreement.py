"""What groups agree on, what they send and keep: the invariants I7, I8, I10, aggregates and memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sync_toy import SITES, Group, Stack
from thinwire.comm.codecs.codec import make_codec
from thinwire.comm.world import World
from thinwire.plan.compression import returned_as, wire_bytes
from thinwire.plan.rounds import chunk_elements, exchange_bytes
from worlds import run_world

CODECS = ["fp32", "bf16", "int8", "int4", "int4-hadamard", "e3m0", "topk"]


def _agreement(world: World, sync: dict[str, Any], cut: tuple[str, str, str]) -> tuple[list[list[int]], list[Any], int]:
    """Hashes of the outer state after every step, what was sent, what the formula says."""
    group = Group(world, sync, cut=cut)
    world.ledger.drain()
    states, expected = [], 0
    for _ in range(10):
        group.train(1)
        states.append(group.state())
    group.sync.settle()
    sent = sum(e.sent_bytes for e in world.ledger.drain().entries if e.purpose.startswith("outer-"))
    for exchange in group.sync.schedule.table(10):
        fragment = group.sync.fragments[exchange.fragment]
        expected += exchange_bytes(
            fragment.numel, groups=group.sync.sync.groups, codec=group.sync.sync.codec, block=128
        )
    return states, [sent], expected


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "levels", [pytest.param([("site", 2)], marks=pytest.mark.slow), [("node", 2), ("site", 2)], [("site", 3)]]
)
def test_i7_i8_all_groups_hold_the_same_outer_state_and_send_the_formulas_bytes(levels: Any, codec: str) -> None:
    sync = {"kind": "streaming_diloco", "inner_steps": 4, "fragments": 3, "delay": 2, "codec": codec}
    cut = ("node", "node", "node") if len(levels) == 2 else ("replica", "replica", "replica")
    results = run_world(levels, _agreement, sync, cut)
    per_group = len(results) // levels[-1][1]
    for rank, (states, sent, expected) in enumerate(results):
        assert states == results[rank % per_group][0]
        assert len({tuple(state) for state in states}) > 3
        assert sent == [expected]


def _moved(world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """What this group changed in one round sent as e3m0, and by how much the outer weights moved."""
    group = Group(world, {"inner_steps": 2, "codec": "e3m0", "outer_lr": 1.0, "outer_momentum": 0.0})
    changes, (fragment,) = group.changes(), group.sync.fragments
    before = fragment.weights.clone()
    group.train(2)
    return changes[0], before - fragment.weights


def _coded(codec: str, chunks: torch.Tensor) -> torch.Tensor:
    """(chunks, n) as they are once they have travelled."""
    coder = make_codec(codec)
    return torch.stack([coder.decode(coder.encode(x), len(x), x.dtype) for x in chunks])


def test_of_three_groups_the_mean_of_what_was_sent_as_e3m0_comes_back_as_int4() -> None:
    results = run_world([("site", 3)], _moved)
    n = len(results[0][0])
    chunk = chunk_elements(n, 3, 128)
    contributions = [F.pad(change, (0, 3 * chunk - n)).view(3, chunk) for change, _ in results]
    mean = sum(_coded("e3m0", contribution) for contribution in contributions) / 3
    for _, moved in results:
        assert torch.allclose(moved, _coded("int4", mean).view(-1)[:n], atol=1e-6)
        assert not torch.allclose(moved, _coded("e3m0", mean).view(-1)[:n], atol=1e-3)


@given(n=st.integers(1, 5000), block=st.sampled_from([64, 128, 256]), codec=st.sampled_from(CODECS))
def test_what_comes_back_takes_as_many_bytes_as_what_was_sent(n: int, block: int, codec: str) -> None:
    sent, returned = (wire_bytes(name, n, block=block, element_bytes=4) for name in (codec, returned_as(codec)))
    assert sent == returned


def _second_hops(world: World, delay: int | None) -> list[int]:
    """Steps after which an exchange was on its last hop and not applied yet."""
    group = Group(world, {"kind": "streaming_diloco", "fragments": 1, "inner_steps": 6, "delay": delay})
    seen = []
    for _ in range(12):
        group.train(1)
        if any(not pending.due for pending in group.sync.pending):
            seen.append(group.sync.step)
    group.sync.settle()
    return seen


def test_of_three_groups_the_second_hop_travels_behind_a_step_unless_the_delay_is_one() -> None:
    assert run_world([("site", 3)], _second_hops, None) == [[7]] * 3  # sent after 6, applied after 8; 12's is settled
    assert run_world([("site", 3)], _second_hops, 1) == [[]] * 3
    assert run_world([("site", 3)], _second_hops, 5) == [[9, 10]] * 3


def _feedback_sums(world: World, how: str) -> float:
    """Largest |sum of sent + residual - sum of changes| over the elements."""
    group = Group(world, {"inner_steps": 1, "codec": how, "error_feedback": True, "mix": 0.0})
    fragment = group.sync.fragments[0]
    given, sent = torch.zeros(fragment.numel, dtype=torch.float64), torch.zeros(fragment.numel, dtype=torch.float64)
    plain_change, plain_send = fragment.change, group.sync._send

    def change() -> torch.Tensor:
        out = plain_change()
        given.add_(out)
        return out

    def send(key: Any) -> None:
        plain_send(key)
        sent.add_(group.sync._pending[-1].own)

    fragment.change, group.sync._send = change, send  # type: ignore[method-assign]
    group.train(8)
    assert fragment.residual is not None
    assert fragment.residual.abs().max() > 0
    return float((sent + fragment.residual - given).abs().max())


@pytest.mark.parametrize("codec", ["int4", "e3m0", "topk"])
def test_i10_what_is_sent_and_the_residual_add_up_to_the_changes(codec: str) -> None:
    assert all(gap < 1e-6 for gap in run_world(SITES, _feedback_sums, codec))


def _aggregated(world: World, how: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """What this group changed in one round, by how much the outer weights moved, what was sent."""
    group = Group(world, {"inner_steps": 2, "aggregate": how, "outer_lr": 1.0, "outer_momentum": 0.0})
    changes, (fragment,) = group.changes(), group.sync.fragments
    before = fragment.weights.clone()
    world.ledger.drain()
    group.train(2, tokens=1.0 + world.rank)
    sent = sum(e.sent_bytes for e in world.ledger.drain().entries if e.purpose.startswith("outer-"))
    return changes[0], before - fragment.weights, sent


def test_every_aggregate_of_real_groups_is_that_of_their_changes_and_costs_the_same_bytes() -> None:
    bytes_sent = set()
    for how in ("mean", "tokens", "median", "trimmed"):
        results = run_world([("site", 3)], _aggregated, how)
        parts = torch.stack([change for change, _, _ in results])
        middle = parts.median(dim=0).values
        weights = torch.tensor([1.0, 2.0, 3.0] if how == "tokens" else [1.0, 1.0, 1.0])[:, None]
        expected = middle if how in ("median", "trimmed") else (parts * weights).sum(0) / weights.sum()
        for _, moved, sent in results:
            assert torch.allclose(moved, expected, atol=1e-6), how
            bytes_sent.add(sent)
        assert (parts[0] - expected).abs().max() > 1e-3
    assert len(bytes_sent) == 1


def _held(world: World, feedback: bool) -> tuple[int, int]:
    sync = {"inner_steps": 3, "fragments": 2, "codec": "int8", "error_feedback": feedback}
    group = Group(world, sync, cut=("replica", "node", "node"))
    kept = [
        tensor for f in group.sync.fragments for tensor in (f.weights, f.momentum, f.residual) if tensor is not None
    ]
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == group.sync.held_bytes()
    return group.sync.held_bytes(), sum(p.numel() for p in Stack().parameters())


@pytest.mark.parametrize(("feedback", "each"), [(False, 8), (True, 12)])
def test_a_group_holds_8_bytes_a_parameter_over_its_ranks_and_4_more_with_error_feedback(
    feedback: bool, each: int
) -> None:
    held = run_world([("node", 2), ("site", 2)], _held, feedback)
    for first, second in (held[:2], held[2:]):
        assert first[0] + second[0] == each * first[1]
        assert abs(first[0] - second[0]) < 0.05 * first[0]
