"""Every legal cut trains like the plain all-reduce: the same sums, the same bytes as the formula, equal replicas."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partition_toy import STEPS, Toy, adamw, batches, one_step, plan_of, train, weights
from thinwire.comm.world import World
from thinwire.partition.engine import shard
from thinwire.partition.pieces import Piece
from thinwire.partition.replicated import replicate
from thinwire.partition.report import predicted_bytes
from worlds import run_world


def legal_cuts(levels: int) -> Iterator[tuple[int, int, int]]:
    for lp, lg, lo in itertools.product(range(-1, levels), repeat=3):
        if lp <= lg <= lo:
            yield lp, lg, lo


def _all_cuts(world: World, accumulate: int) -> dict[tuple[int, int, int], Any]:
    out = {}
    world.ledger.drain()
    cuts = list(legal_cuts(len(world.cluster.levels)))
    for cut, keep in [(cut, False) for cut in cuts] + [(cut, True) for cut in cuts if cut[0] >= 0 and accumulate > 1]:
        engine = shard(Toy(), plan_of(world, cut, accumulate, keep_gathered=keep), world)
        train(engine, world, accumulate, steps=1)  # the first step also agrees on an order
        world.ledger.drain()
        engine = shard(Toy(), plan_of(world, cut, accumulate, keep_gathered=keep), world)
        seen = train(engine, world, accumulate)
        sent = world.ledger.drain().sent_bytes()
        predicted = predicted_bytes(engine)
        for level, purposes in predicted.items():
            for purpose, count in purposes.items():
                assert sent[level][purpose] == STEPS * count, (
                    cut,
                    keep,
                    level,
                    purpose,
                    sent[level][purpose],
                    STEPS * count,
                )
            assert set(sent[level]) <= {*purposes, "control"}, (cut, sent)
        assert keep is False or out[cut] == (seen, weights(engine)), cut
        out[cut] = (seen, weights(engine))
    twin = replicate(Toy(), plan_of(world, (-1, -1, -1), accumulate), world)
    out["twin"] = (train(twin, world, accumulate), weights(twin))  # type: ignore[index]
    return out


@pytest.mark.parametrize("levels", [(2,), (2, 2), (2, 1), (1, 2)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_cut_sends_the_formulas_bytes_and_trains_like_the_twin(levels: tuple[int, ...], accumulate: int) -> None:
    results = run_world(levels, _all_cuts, accumulate, sockets=(0, 1) if accumulate == 3 else ())
    for result in results:
        seen, digest = result["twin"]
        for cut, (got, got_digest) in result.items():
            if accumulate == 1 or (cut != "twin" and cut[1] == -1):
                assert (got, got_digest) == (seen, digest), cut
            assert torch.allclose(torch.tensor(got), torch.tensor(seen), rtol=1e-5), cut
    for cut in results[0]:
        assert len({result[cut][1] for result in results}) == 1, f"replicas differ under {cut}"


@pytest.mark.slow
@pytest.mark.parametrize("levels", [(2, 2, 2), (2, 4)])
def test_every_cut_of_eight_ranks_sends_the_formulas_bytes_and_trains_like_the_twin(levels: tuple[int, ...]) -> None:
    for result in run_world(levels, _all_cuts, 1, timeout_s=280, sockets=range(1, len(levels))):
        for cut, got in result.items():
            assert got == result["twin"], cut


def _exact(world: World) -> list[bytes]:
    """Gradients that are small whole numbers: any order of summing gives the same bits, torch's DDP too."""
    digests = []
    for cut in [None, *legal_cuts(len(world.cluster.levels))]:
        module = Toy(exact=True)
        tokens, targets = next(batches(world, 0, 1))
        chosen = F.one_hot(targets, 11).float()
        if cut is None:
            replica = (
                nn.parallel.DistributedDataParallel(module, find_unused_parameters=True) if world.size > 1 else module
            )
            (replica(tokens) * chosen).sum().backward()
            grads = {n: p.grad * world.size for n, p in module.named_parameters() if p.grad is not None}
        else:
            engine = shard(module, plan_of(world, cut), world)
            with engine.micro_batch(last=True):
                (module(tokens) * chosen).sum().backward()
            engine.finish_reduce()
            for part in engine.owned():
                expected = grads.get(part.name, torch.zeros(part.shape)).flatten()
                assert torch.equal(part.grad(), expected[part.offset : part.offset + part.master.numel()]), (
                    cut,
                    part.name,
                )
            engine.dropped()
            engine.drain()
    return digests


@pytest.mark.parametrize("levels", [(2,), (2, 2)])
def test_exactly_representable_gradients_are_torch_ddps_bit_for_bit(levels: tuple[int, ...]) -> None:
    run_world(levels, _exact, sockets=(1,))


def _variants(world: World) -> dict[str, Any]:
    """Settings that must not change a bit against the same cut without them."""
    cut = (0, 1, 1)
    out: dict[str, Any] = {}
    for name, more in (
        ("plain", {}),
        ("kept", {"keep_gathered": True}),
        ("fp32 named", {"wire": {"grads": {"cluster": "fp32"}}}),
    ):
        engine = shard(Toy(), plan_of(world, cut, **more), world)
        out[name] = (train(engine, world, 1), weights(engine))
        assert not any(flat.gathered for unit in engine.units for flat in unit.flats)
    engine = shard(Toy(), plan_of(world, cut), world, units=["blocks.0", "blocks.2"])
    out["other units"] = (train(engine, world, 1), weights(engine))
    module = Toy()
    for block in module.blocks:
        _recompute_inside(block)
    engine = shard(module, plan_of(world, cut), world)
    out["recomputed"] = (train(engine, world, 1), weights(engine))
    module = Toy()
    plain = module.forward
    module.forward = lambda tokens: _recompute_outside(module, tokens)  # type: ignore[method-assign]
    engine = shard(module, plan_of(world, cut), world)
    out["recomputed around units"] = (train(engine, world, 1), weights(engine))
    assert plain is not None
    module = Toy()
    for block in module.blocks:
        block.forward = torch.compile(block.forward, backend="eager")  # type: ignore[method-assign]
    engine = shard(module, plan_of(world, cut), world)
    out["compiled"] = (train(engine, world, 1), weights(engine))
    return out


def _recompute_inside(block: nn.Module) -> None:
    from torch.utils.checkpoint import checkpoint

    plain = block.forward
    block.forward = lambda x: checkpoint(plain, x, use_reentrant=False)  # type: ignore[method-assign]


def _recompute_outside(module: Any, tokens: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    x = module.embedding(tokens)
    for block in module.blocks:
        x = x + checkpoint(block, x, use_reentrant=False)
    return module.head(module.norm(x)) * module.scale * module.frozen.sum()


def test_units_keeping_recompute_and_compile_change_no_bit() -> None:
    for result in run_world((2, 2), _variants):
        for name, got in result.items():
            assert got == result["plain"], name


def _delayed(world: World, delay_every: int) -> Any:
    """The same training with one rank late at every n-th collective."""
    import time

    from thinwire.comm import handle

    plain, calls = handle.Handle.wait, itertools.count()

    def wait(self: Any) -> float:
        if delay_every and (next(calls) + world.rank) % delay_every == 0:
            time.sleep(0.01)
        return plain(self)

    handle.Handle.wait = wait  # type: ignore[method-assign]
    try:
        engine = shard(Toy(), plan_of(world, (0, 1, 1), 2), world)
        return train(engine, world, 2), weights(engine), engine.timeline
    finally:
        handle.Handle.wait = plain  # type: ignore[method-assign]


def test_late_collectives_change_nothing_and_all_ranks_issue_in_the_same_order() -> None:
    runs = [run_world((2, 2), _delayed, every) for every in (0, 3, 5)]
    for ranks in zip(*runs, strict=True):
        assert all(result == ranks[0] for result in ranks)
    timelines = [result[2] for result in runs[0]]
    assert timelines[0] == timelines[1] == timelines[2] == timelines[3]
    assert any(line.startswith("reduce") for line in timelines[0])


def _edits(world: World, cut: tuple[int, int, int]) -> None:
    """Writes from outside reach every copy: through pieces under any cut, in place where weights are replicated."""
    engine = shard(Toy(), plan_of(world, cut), world)
    train(engine, world, 1, steps=1)
    for piece in engine.for_load():
        piece.tensor.fill_(0.25)
    engine.loaded()
    with engine.full_parameters():
        assert all(bool((p == 0.25).all()) for p in engine.module.parameters())
    if cut[0] < 0:
        with torch.no_grad():
            engine.module.head.weight.fill_(0.5)  # type: ignore[union-attr]
        engine.drain()
        for piece in engine.for_load():
            assert bool((piece.tensor == (0.5 if "embedding" in piece.name else 0.25)).all()), piece.name


@pytest.mark.parametrize("cut", [(-1, -1, -1), (-1, -1, 1), (0, 0, 1), (1, 1, 1)])
def test_a_write_to_the_weights_makes_every_copy_stale(cut: tuple[int, int, int]) -> None:
    run_world((2, 2), _edits, cut)


def _gathered(world: World, pieces: list[Piece]) -> dict[str, Tensor]:
    """The logical tensors of which every rank wrote some pieces."""
    whole: dict[str, Tensor] = {}
    for piece in pieces:
        size = torch.Size(piece.shape).numel()
        end = piece.offset + piece.tensor.numel()
        whole.setdefault(piece.name, torch.zeros(size))[piece.offset : end] = piece.tensor
    merged: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(merged, whole)
    names = sorted({name for part in merged for name in part})
    return {name: sum(part[name] for part in merged if name in part) for name in names}


def _filled(pieces: list[Piece], saved: dict[str, Tensor]) -> None:
    for piece in pieces:
        piece.tensor.copy_(saved[piece.name][piece.offset : piece.offset + piece.tensor.numel()])


def _cross_load(world: World) -> None:
    """State saved under one cut, loaded under another (also one that has trained), gives the identical next step."""
    cuts = [(-1, -1, -1), (-1, -1, 1), (-1, 1, 1), (0, 0, 0), (0, 0, 1), (1, 1, 1)]
    fresh = {cut: shard(Toy(), plan_of(world, cut), world) for cut in cuts}
    loading = {cut: (engine, adamw(engine)) for cut, engine in fresh.items()}
    for cut in cuts:
        engine = shard(Toy(), plan_of(world, cut), world)
        optimizer = adamw(engine)
        one_step(engine, optimizer, world, 0)
        saved = _gathered(world, [*engine.for_save(), *optimizer.for_save()])
        reference = one_step(engine, optimizer, world, 1)
        for other, (engine, optimizer) in loading.items():
            _filled([*engine.for_load(), *optimizer.for_load()], saved)
            engine.loaded()
            optimizer.loaded(1)
            assert one_step(engine, optimizer, world, 1) == reference, (cut, other)


def test_what_one_cut_saved_any_other_goes_on_with_identically() -> None:
    run_world((2, 2), _cross_load)


LOSSY = {
    "int4": {"grads": {"cluster": "int4"}, "error_feedback": True},
    "int4, stochastic": {"grads": {"cluster": "int4"}, "error_feedback": True, "rounding": "stochastic"},
    "bf16": {"grads": {"cluster": "bf16"}, "error_feedback": True},
    "lowrank": {"grads": {"cluster": "lowrank"}, "rank": 1, "rank_from": 0},
}


def _carries(world: World, wire: dict[str, Any]) -> None:
    """Saved after two steps and resumed under each cut, what error feedback carries goes on as if never stopped."""
    cuts = [(0, 0, 1), (-1, 0, 1), (-1, -1, 1)]
    engine = shard(Toy(), plan_of(world, cuts[0], wire=wire), world)
    optimizer = adamw(engine)
    for step in range(2):
        one_step(engine, optimizer, world, step)
    carried = _gathered(world, engine.carried_for_save())
    saved = carried | _gathered(world, [*engine.for_save(), *optimizer.for_save()])
    on = [one_step(engine, optimizer, world, step) for step in (2, 3)]
    assert any(name.startswith("carried/residual/1/") for name in carried)
    assert all(value.abs().max() > 0 for name, value in carried.items() if name.endswith("0.0.weight"))
    for cut in cuts:
        engine = shard(Toy(), plan_of(world, cut, wire=wire), world)
        optimizer = adamw(engine)
        again = engine.carried_for_load(saved)
        _filled([*engine.for_load(), *optimizer.for_load(), *again], saved)
        engine.loaded()
        optimizer.loaded(2)
        assert [one_step(engine, optimizer, world, step) for step in (2, 3)] == on, cut


@pytest.mark.parametrize("wire", LOSSY.values(), ids=LOSSY)
def test_what_error_feedback_carries_is_saved_and_goes_on_bit_for_bit(wire: dict[str, Any]) -> None:
    run_world((2, 2), _carries, wire)


def _regrouped(world: World) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the residuals of four members as they were put in, as two members carry them on), summed over all members."""
    wire = {"grads": {"cluster": "int4"}, "error_feedback": True}
    names = [name for name, parameter in Toy().named_parameters() if parameter.requires_grad]
    shapes = {name: parameter.numel() for name, parameter in Toy().named_parameters()}
    saved = {
        f"carried/residual/{member}/{name}": torch.arange(shapes[name]) * 10.0**member
        for member in range(4)
        for name in names
    }
    engine = shard(Toy(), plan_of(world, (0, 0, 1), wire=wire), world)
    _filled(engine.carried_for_load(saved), saved)
    engine.loaded()
    now = _gathered(world, engine.carried_for_save())
    return _over_members(saved), _over_members(now)


def _over_members(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for name, value in tensors.items():
        parameter = name.split("/", 3)[3]
        total[parameter] = total.get(parameter, torch.zeros_like(value)) + value
    return total


def test_fewer_members_carry_on_all_that_was_not_sent() -> None:
    for before, after in run_world((2, 2), _regrouped):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def _evaluates(world: World) -> None:
    """Forwards without backward, between steps and before the first one."""
    for cut in ((0, 0, 1), (1, 1, 1), (-1, -1, 1)):
        engine = shard(Toy(), plan_of(world, cut), world)
        twin = replicate(Toy(), plan_of(world, cut), world)
        tokens = next(batches(world, 0, 1))[0]
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(engine.module(tokens), twin.module(tokens))
            assert all(unit.gathering is None for unit in engine.units)
            train(engine, world, 1, steps=1)
            train(twin, world, 1, steps=1)


def test_evaluation_between_steps_sees_the_newest_weights_and_leaves_nothing_gathered() -> None:
    run_world((2, 2), _evaluates)


def _skip(world: World) -> None:
    engine = shard(Toy(), plan_of(world, (0, 0, 1), wire={"grads": {"cluster": "int4"}, "error_feedback": True}), world)
    optimizer = adamw(engine)
    one_step(engine, optimizer, world, 0)
    before = weights(engine)
    residuals = [piece.tensor.clone() for piece in engine.carried_for_save()]
    assert residuals or world.rank % 2 == 1, "the toy fits into the first half of its padded buffers"
    tokens, targets = next(batches(world, 1, 1))
    with engine.micro_batch(last=True):
        F.cross_entropy(engine.module(tokens).view(-1, 11), targets.view(-1)).backward()
    engine.finish_reduce()
    optimizer.skip()
    engine.drain()
    assert optimizer.updates == 1
    assert weights(engine) == before
    after = [piece.tensor for piece in engine.carried_for_save()]
    assert all(torch.equal(a, b) for a, b in zip(residuals, after, strict=True))


def test_a_skipped_step_advances_nothing() -> None:
    run_world((2, 2), _skip)


def _abandoned(world: World) -> None:
    """One or two micro-batches of a step that is given up, their reductions still in flight, leave no trace."""
    for cut in [(-1, -1, -1), (-1, -1, 1), (0, 0, 0), (0, 0, 1), (1, 1, 1)]:
        plain = shard(Toy(), plan_of(world, cut), world)
        expected = one_step(plain, adamw(plain), world, 0)
        for given_up in (1, 2):
            engine = shard(Toy(), plan_of(world, cut), world)
            optimizer = adamw(engine)
            for tokens, targets in batches(world, 1, given_up):
                with engine.micro_batch(last=False):
                    F.cross_entropy(engine.module(tokens).view(-1, 11), targets.view(-1)).backward()
            optimizer.skip()
            assert one_step(engine, optimizer, world, 0) == expected, (cut, given_up)


def test_a_step_given_up_half_way_leaves_no_trace() -> None:
    run_world((2, 2), _abandoned)


def _states(world: World, cut: tuple[int, int, int], dtype: str) -> tuple[float, float]:
    """(bytes of all states that this rank holds between steps, the formula's)."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    elements = sum(parameter.numel() for parameter in module.parameters())
    engine = shard(module, plan_of(world, cut, compute_dtype=dtype), world)
    optimizer = adamw(engine)
    with engine.micro_batch(last=True):
        module(torch.ones(2, 64).to(next(iter(engine.units[0].flats))._compute)).float().sum().backward()
    engine.finish_reduce()
    optimizer.step()
    engine.drain()
    tensors = [
        t for unit in engine.units for flat in unit.flats for t in (flat.weights, flat.grads, flat.master, flat._whole)
    ]
    assert optimizer._optimizer is not None
    tensors += [t for state in optimizer._optimizer.state.values() for t in state.values()]
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.untyped_storage().nbytes()
    }
    sizes = [1, *(world.cluster.ranks_within(level) for level in range(len(world.cluster.levels)))]
    p, g, o = (sizes[depth + 1] for depth in cut)
    width = 2 if dtype == "bf16" else 4
    inside = 4 / o if width == 4 else 0  # the masters lie in the weights then
    return sum(held.values()), elements * (width / p - inside + 4 / g + 12 / o)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("cut", [(-1, -1, -1), (-1, -1, 1), (0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)])
def test_states_take_the_formulas_memory(cut: tuple[int, int, int], dtype: str) -> None:
    for held, formula in run_world((2, 2), _states, cut, dtype):
        assert held == pytest.approx(formula, rel=0.05)


def _memory(world: World, blocks: int) -> tuple[int, int]:
    """(most bytes of whole weights at once in forward and backward, bytes of one block's)."""
    torch.manual_seed(0)
    module = nn.Module()
    module.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(blocks))  # type: ignore[assignment]

    def forward(x: Tensor) -> Tensor:
        for block in module.blocks:  # type: ignore[union-attr]
            x = block(x)
        return x

    module.forward = forward  # type: ignore[method-assign]
    engine = shard(module, plan_of(world, (0, 0, 0)), world)
    seen = [0]

    def watch(*_: Any) -> None:
        seen.append(sum(flat._whole.untyped_storage().nbytes() for unit in engine.units for flat in unit.flats))

    for unit in engine.units:
        unit.entries[0].register_forward_hook(watch)
        unit.entries[0].register_full_backward_hook(watch)
    for step in range(2):
        with engine.micro_batch(last=step == 1):
            module(torch.ones(2, 64, requires_grad=True)).sum().backward()
    engine.finish_reduce()
    engine.dropped()
    return max(seen), 4 * engine.units[0].flats[0].layout.numel


@pytest.mark.parametrize("blocks", [3, 9])
def test_at_most_two_units_are_whole_at_once_at_any_depth(blocks: int) -> None:
    for most, one in run_world(2, _memory, blocks):
        assert most == 2 * one
