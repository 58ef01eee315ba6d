"""The step program: what a real step sent is what it says, entry by entry and in its order; folding loses nothing."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from partition_cuts import cuts_of
from partition_toy import adamw, plan_of
from thinwire.comm.world import World
from thinwire.model.spec import ModelSpec
from thinwire.model.transformer import Transformer
from thinwire.parallel.shard.engine import shard
from thinwire.plan.hops import Buffer, Hop, Link, gather_hops, reduce_hops, refresh_hops
from thinwire.plan.operations import ALL, Op, Program, Repeat, Unit
from thinwire.plan.passes import passes
from thinwire.plan.program import Overlap, StepShape, Where, program
from worlds import run_world

SPEC = ModelSpec(vocab_size=48, hidden=16, layers=4, heads=2, kv_heads=1, head_size=8, ffn=32, max_tokens=16)


def _train_step(engine: Any, optimizer: Any, accumulate: int) -> list[str]:
    seen: list[str] = []
    for number in range(accumulate):
        tokens = torch.randint(0, 48, (1, 8), generator=torch.Generator().manual_seed(number))
        with engine.micro_batch(last=number == accumulate - 1):
            engine.module(tokens, tokens).backward()
            engine.timeline.append("end")
        seen += engine.timeline
    engine.finish_reduce()
    engine.grad_norm()
    done = len(engine.timeline)
    optimizer.step()
    return [*seen, *engine.timeline[done:]]


def _real(world: World, tied: bool, accumulate: int, more: dict[str, Any]) -> None:
    """Every partition: the entries of a step's ledger are the program's hops, and what was issued its operations."""
    levels = len(world.cluster.levels)
    for cut in cuts_of(levels):
        for keep in (False, True) if cut[0] >= 0 else (False,):
            torch.manual_seed(0)
            model = Transformer(SPEC.model_copy(update={"tied": tied}))
            engine = shard(model, plan_of(world, cut, accumulate, keep_gathered=keep, **more), world)
            optimizer = adamw(engine)
            world.ledger.drain()
            for step in range(3):
                issued = _train_step(engine, optimizer, accumulate)
                engine.drain()  # new weights are the step's that they were sent in
                entries = world.ledger.drain().entries
                planned = engine.program(step)
                sent = Counter((e.level, e.kind, e.purpose, e.sent_bytes) for e in entries)
                hops = _hops(planned, world, first=step == 0)
                if step == 0:  # units go one by one until their order is known
                    assert _sums(sent) == _sums(hops), (cut, keep)
                    assert not _hops(planned, world, only="agree") - sent, (cut, keep)
                    continue
                assert sent == hops, (cut, keep, step, sent - hops, hops - sent)
                assert issued == _issues(planned), (cut, keep)
                if step == 2:
                    _no_other_program_is_that_step(planned, world, issued, sent)
    if tied:
        return
    digests = {cut: shard(Transformer(SPEC), plan_of(world, cut), world).program().digest for cut in cuts_of(levels)}
    # Weights that are sharded over levels of one member alone are not sharded.
    alone = [all(level.fanout == 1 for level in world.cluster.levels[: depth + 1]) for depth in range(levels)]
    apart = {(-1 if lp >= 0 and alone[lp] else lp, lg, lo) for lp, lg, lo in digests}
    assert len(set(digests.values())) == len(apart)


def _no_other_program_is_that_step(planned: Program, world: World, issued: list[str], sent: "Messages") -> None:
    """One operation less, or two in each other's place, and what was issued and sent is not what the program says."""
    ops = list(planned.classes[0].ops())
    moving = [place for place, op in enumerate(ops) if op.key.role in ("gather", "reduce", "refresh")]
    for place in moving:
        less = _of(planned, [*ops[:place], *ops[place + 1 :]])
        assert _issues(less) != issued
        assert not ops[place].hops or _hops(less, world, first=False) != sent
    for one, other in pairwise(moving):
        if (ops[one].key.role, ops[one].of_units) == (ops[other].key.role, ops[other].of_units):
            continue  # the gather for a forward and the one for the backward after it are the same message
        swapped = list(ops)
        swapped[one], swapped[other] = ops[other], ops[one]
        assert _issues(_of(planned, swapped)) != issued


def _of(planned: Program, ops: list[Op]) -> Program:
    return Program((replace(planned.classes[0], body=tuple(ops)),))


Messages = Counter[tuple[str, str, str, int]]


def _hops(planned: Program, world: World, *, first: bool = True, only: str = "") -> Messages:
    """What a training loop of one's own sends, without the sums of tokens: (level, algorithm, purpose, bytes)."""
    found = Messages()
    for op in planned.classes[0].ops():
        if op.key.role != "tokens" and (first or op.when.every) and only in ("", op.key.role):
            found.update((world.level_name(hop.level), hop.algorithm, hop.purpose, hop.sent_bytes) for hop in op.hops)
    return found


def _sums(messages: Messages) -> dict[tuple[str, str], int]:
    """(level, purpose) -> bytes, small sums left out."""
    found: dict[tuple[str, str], int] = {}
    for (level, _, purpose, sent_bytes), many in messages.items():
        if purpose != "control":
            found[level, purpose] = found.get((level, purpose), 0) + many * sent_bytes
    return found


def _issues(planned: Program) -> list[str]:
    """As the engine's timeline has it."""
    units, found, micro_batch = planned.classes[0].units, list[str](), 0
    for op in planned.classes[0].ops():
        if op.key.role == "refresh" or op.key.micro_batch > micro_batch:
            found += ["end"] * (found.count("end") <= micro_batch)
            micro_batch = max(micro_batch, op.key.micro_batch)
        if op.key.role in ("gather", "reduce", "refresh"):
            found.append(f"{op.key.role} {' + '.join(units[number].name for number in op.of_units)}")
    return found


COMPRESSED = {"compression": {"weights": {"cluster": "int8"}, "grads": {"cluster": "int4"}, "block": 64}}


@pytest.mark.parametrize(
    ("levels", "tied", "accumulate", "more"),
    [
        ((2,), False, 2, {}),
        ((2,), False, 2, {"bucket_bytes": None}),
        ((2, 2), True, 1, COMPRESSED),
        pytest.param((2, 2), False, 2, COMPRESSED | {"bucket_bytes": 9000}, marks=pytest.mark.slow),
        pytest.param((2, 2, 2), True, 2, {"bucket_bytes": 20000}, marks=pytest.mark.slow),
        pytest.param((2, 2), False, 3, {}, marks=pytest.mark.slow),
        pytest.param((1, 4), False, 2, COMPRESSED, marks=pytest.mark.slow),
        pytest.param((2, 2, 2), True, 2, {}, marks=pytest.mark.slow),
    ],
)
def test_a_real_step_sends_the_programs_messages_in_its_order(
    levels: tuple[int, ...], tied: bool, accumulate: int, more: dict[str, Any]
) -> None:
    run_world(levels, _real, tied, accumulate, more, sockets=range(1, len(levels)), timeout_s=280)


# -- without ranks -----------------------------------------------------------------------------------------------------

FANOUTS = (2, 3, 4)
LINKS = tuple(Link(level, fanout) for level, fanout in enumerate(FANOUTS))


def buffer(numel: int = 24 * 64, cut: tuple[int, int, int] = (0, 1, 2), **more: Any) -> Buffer:
    return Buffer(numel, *cut, (None,) * 3, (None,) * 3, weight_bytes=2, **more)


@pytest.mark.parametrize("cut", list(cuts_of(3)))
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_bytes_are_those_of_the_closed_formula(cut: tuple[int, int, int], micro_batches: int) -> None:
    """docs/partition.md's table: N elements, b_w = 2, b_g = 4, M micro-batches."""
    made = program(
        StepShape(micro_batches, lp=cut[0], lo=cut[2]), [[[Unit("block", (buffer(cut=cut),))]]], Where(LINKS)
    )
    shards = 1
    for level, fanout in enumerate(FANOUTS):
        shards *= fanout
        part = 24 * 64 * (fanout - 1) // shards
        gathers = 2 * micro_batches if level <= cut[0] else 0
        updates = 1 if cut[0] < level <= cut[2] else 0
        reductions = micro_batches if level <= cut[1] else 1
        returns = 1 if level > cut[2] else 0
        expected = (gathers + updates) * 2 * part + (reductions + returns) * 4 * part
        sent = made.sent_bytes()[level]
        assert sum(count for purpose, count in sent.items() if purpose != "control") == expected


def _pipeline(stages: int, chunks: int, micro_batches: int, blocks: int, **more: Any) -> Program:
    block = Unit("block", (buffer(),))
    units = [[[block] * blocks for _ in range(chunks)] for _ in range(stages)]
    units[0][0].insert(0, Unit("embedding", (buffer(48 * 64),), resident=bool(more.pop("resident", False))))
    units[-1][-1].append(Unit("head", (buffer(72 * 64),)))
    where = Where(LINKS, Hop(2, "p2p", "pipeline", 64, None, 128), overlap=more.pop("overlap", Overlap()))
    return program(StepShape(micro_batches, stages=stages, chunks=chunks, lp=0, lo=2, **more), units, where)


SHAPES = [
    (stages, chunks, micro_batches, blocks)
    for stages in (1, 2, 3, 4)
    for chunks in ((1, 2, 3) if stages > 1 else (1,))
    for micro_batches in (1, 2, stages, 3 * stages, 24)
    for blocks in (1, 2, 5)
    if chunks == 1 or micro_batches % stages == 0
]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folded_program_unfolds_to_every_pass_and_waits_for_nothing_that_never_comes(
    shape: tuple[int, int, int, int],
) -> None:
    stages, chunks, micro_batches, _ = shape
    for more in ({}, {"keep_gathered": True, "resident": True}, {"overlap": Overlap(False, False, False)}):
        made = _pipeline(*shape, **more)  # type: ignore[arg-type]
        every = {op.key for each in made.classes for op in each.ops()}
        for number, each in enumerate(made.classes):
            assert len({op.key for op in each.ops()}) == sum(1 for _ in each.ops()), "two operations of one name"
            offsets, computed, came = _offsets(stages, chunks, shape[3], number), [], set[Any]()
            for op in each.ops():
                for key in op.after:
                    here = key.stage in (-1, number) and key.step == 0 and ALL not in (key.unit, key.micro_batch)
                    assert key in came if here else key._replace(step=0) in every or ALL in key, (number, op, key)
                came.add(op.key)
                if op.kind == "compute":
                    chunk = max(c for c, offset in enumerate(offsets) if offset <= op.key.unit)
                    computed.append((op.key.phase == "forward", op.key.micro_batch, chunk, op.key.unit))
            order = [(p.forward, p.micro_batch, p.chunk) for p in passes(number, stages, micro_batches, chunks)]
            assert list(dict.fromkeys(each[:3] for each in computed)) == order
            units = len(each.units)
            assert len(computed) == 2 * micro_batches * units
            for forward in (True, False):
                one = [each[3] for each in computed if each[0] == forward and each[1] == 0]
                assert sorted(one) == list(range(units))
                for chunk in range(chunks):
                    within = [each[3] for each in computed if each[:3] == (forward, 0, chunk)]
                    assert within == sorted(within, reverse=not forward)


def _offsets(stages: int, chunks: int, blocks: int, stage: int) -> list[int]:
    first = blocks + (stage == 0)
    return [0, *(first + blocks * more for more in range(chunks - 1))]


def test_a_large_models_program_is_small_and_counts_what_it_unfolds_to() -> None:
    made = _pipeline(4, 2, 512, 16)
    for number, each in enumerate(made.classes):
        assert _size(each.body) < 500
        sent = Counter[tuple[int, str]]()
        for op in each.ops():
            if op.when.every == 1:
                for hop in op.hops:
                    sent[hop.level, hop.purpose] += hop.sent_bytes
        counted = made.sent_bytes(number)
        assert {(level, purpose): n for level, of in counted.items() for purpose, n in of.items()} == dict(sent)


def _size(body: tuple[Op | Repeat, ...]) -> int:
    return sum(_size(item.body) if isinstance(item, Repeat) else 1 for item in body)


def test_what_happens_in_some_steps_is_counted_in_those() -> None:
    where = Where(LINKS, voters=Link(2, 4))
    made = program(StepShape(lp=0, lo=2), [[[Unit("block", (buffer(),))]]], where)
    plain, voting = (made.sent_bytes(first=step)[2]["control"] for step in (8, 9))
    assert voting == plain + 4 * 3
    assert made.sent_bytes(first=7, steps=23)[2]["control"] == 23 * plain + 3 * 12
    begun = made.sent_bytes(first=5, start=5)[2]["control"]
    assert begun == plain + 2 * 8 * 3 and made.sent_bytes(first=6, start=5)[2]["control"] == plain


def test_messages_of_low_rank_take_the_place_of_a_level_sum() -> None:
    exact, low = buffer(cut=(-1, -1, 1)), buffer(cut=(-1, -1, 1), low_rank=(2, (10, 3)))
    whole, small = (list(reduce_hops(each, LINKS, last=True)) for each in (exact, low))
    assert [(hop.level, hop.algorithm, hop.elements) for hop in small[2:]] == [
        (2, "reduce_scatter", 3), (2, "all_gather", 3), (2, "reduce_scatter", 1), (2, "all_gather", 1)
    ]  # fmt: skip
    assert whole[:2] == small[:2] and sum(hop.sent_bytes for hop in small[2:]) == 4 * 3 * 8
    assert not list(gather_hops(low, LINKS)) and len(list(refresh_hops(low, LINKS))) == 2
