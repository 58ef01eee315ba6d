"""Costs conserve, never get worse with better hardware, and have the limits that they must have."""

import dataclasses
import itertools
import math
from typing import Any

import pytest

from thinwire.cluster.cluster import Calibration, Cluster, Device, Level
from thinwire.cluster.hardware import device_preset
from thinwire.comm.world import World
from thinwire.errors import ConfigError, PlanError
from thinwire.model.presets import preset
from thinwire.model.spec import ModelSpec
from thinwire.model.transformer import Transformer
from thinwire.parallel.shard.engine import shard
from thinwire.plan.compression import OuterCodecName
from thinwire.plan.sync import SyncConfig
from thinwire.planner.search import step_time
from thinwire.predict.activations import gradients_bytes
from thinwire.predict.block import all_reduce_s, block_passes, gather_s
from thinwire.predict.candidate import Candidate, CandidateSync, Setting
from thinwire.predict.causes import StepTime
from thinwire.predict.course import StagePasses, end_s
from thinwire.predict.outer_cost import outer_round, rate_for_utilisation
from thinwire.predict.peak_memory import peak_memory, stage_memory
from thinwire.predict.perturbation import Failures, goodput
from thinwire.predict.pipeline import in_flight, kinds, parameters_of
from thinwire.predict.placement import axis_hops, check_device, efficiency, matmul_s, place, rate_of
from thinwire.predict.planned import Sent, planned, sent_bytes
from thinwire.predict.sent import unit_moves
from thinwire.predict.simulate import simulate_step
from thinwire.predict.step import optimizer_s
from thinwire.sync.outer_sync import OuterSync
from thinwire.train.announce import predicted_bytes
from worlds import run_world

SPEC = ModelSpec(vocab_size=320, hidden=48, layers=3, heads=4, kv_heads=2, head_size=12, ffn=100, max_tokens=64)


def cluster(*fanouts: int, rate: float = 1e10, latency: float = 1e-6, device: str = "a100-80g") -> Cluster:
    names = ("node", "cluster", "site")
    levels = [
        Level(name=names[i], fanout=fanout, bytes_per_s=rate / 4**i, latency_s=latency)
        for i, fanout in enumerate(fanouts)
    ]
    return Cluster(device=device_preset(device), levels=tuple(levels))


def setting(*fanouts: int, model: str = "llama-2-7b", sequences: int = 64, **given: Any) -> Setting:
    return Setting(preset(model), cluster(*fanouts, **given), sequences, 2048)


def step_of(given: Setting, candidate: Candidate) -> StepTime:
    return step_time(given, candidate, place(candidate, given.cluster, given.calibration))


CANDIDATES = [
    Candidate(depths=(-1, -1, -1)),
    Candidate(depths=(-1, -1, 1), micro_batch=2, recompute="full"),
    Candidate(depths=(0, 0, 1)),
    Candidate(depths=(1, 1, 1), recompute="full"),
    Candidate(depths=(0, 1, 1), weights=(None, "int8"), grads=(None, "int4")),
    Candidate(tensor=4, depths=(-1, -1, 1)),
    Candidate(tensor=2, pipeline=4, depths=(-1, -1, 1), recompute="full"),
    Candidate(tensor=2, pipeline=2, chunks=2, pipeline_outside=False, depths=(-1, -1, 1)),
    Candidate(context=2, depths=(1, 1, 1)),
    Candidate(depths=(0, 0, 0), sync=CandidateSync(1, 32, 4, 2, "int4")),
]


def test_axes_fall_onto_levels_and_share_links() -> None:
    given = cluster(8, 4, rate=8e9)
    axes = place(Candidate(tensor=2, pipeline=4), given, Calibration(inner_link_efficiency=1, outer_link_efficiency=1))
    assert [(hop.level, hop.fanout) for hop in axes.tensor] == [(0, 2)]
    assert [(hop.level, hop.fanout) for hop in axes.data] == [(0, 4)]
    assert [(hop.level, hop.fanout, hop.alone) for hop in axes.pipeline] == [(1, 4, 1.0)]
    inside = place(Candidate(tensor=2, pipeline=4, pipeline_outside=False), given, Calibration(outer_link_efficiency=1))
    assert [(hop.level, hop.fanout) for hop in inside.pipeline] == [(0, 4)]
    assert inside.data[0].bytes_per_s == 2e9 / 8  # eight ranks share a node's link


@pytest.mark.parametrize(("size", "stride"), [(12, 1), (16, 3)])
def test_an_axis_that_cuts_a_level_askew_is_refused(size: int, stride: int) -> None:
    with pytest.raises(PlanError, match="does not divide level"):
        axis_hops("tensor", size, stride, cluster(8, 6), Calibration())


def test_a_level_without_figures_is_one_sentence() -> None:
    bare = Cluster(device=device_preset("h100"), levels=(Level(name="node", fanout=2),))
    with pytest.raises(ConfigError, match="level 'node' has no bytes_per_s, which planning needs"):
        place(Candidate(), bare, Calibration())
    with pytest.raises(ConfigError, match="device 'cpu' has no peak_flops_per_s"):
        check_device(Device())


def test_hierarchy_sends_what_a_flat_ring_sends_and_latency_is_counted_per_hop() -> None:
    flat = Calibration(inner_link_efficiency=1, outer_link_efficiency=1)
    one = axis_hops("data", 8, 1, cluster(8, rate=1e9, latency=1e-3), flat)
    assert gather_s(8e9, one) == pytest.approx(7.0 + 7e-3)
    assert all_reduce_s(8e9, one) == pytest.approx(14.0 + 14e-3)
    assert all_reduce_s(8.0, one) == pytest.approx(6e-3, rel=1e-3)  # a tree: log2(8) hops each way
    two = axis_hops("data", 8, 1, cluster(2, 4, rate=1e9, latency=0), flat)
    assert gather_s(8e9, two) == pytest.approx(4.0 + 3.0 * 8)  # the link is a quarter as fast, and two ranks share it


def test_matmuls_approach_the_calibrated_peak_and_never_pass_it() -> None:
    given = setting(2)
    assert efficiency(1e9, 1e9, 1e9, given.calibration) == pytest.approx(given.calibration.matmul_efficiency, rel=1e-5)
    shapes = [2.0**k for k in range(4, 16)]
    values = [efficiency(n, n, n, given.calibration) for n in shapes]
    assert values == sorted(values)
    big, peak = 65536.0, given.cluster.device.peak_flops_per_s
    assert peak is not None
    assert matmul_s(big, big, big, given) > 2 * big**3 / peak
    thin = matmul_s(1.0, 8192.0, 8192.0, given)
    assert thin > 2 * 8192**2 / 2.039e12  # one row reads the whole matrix: memory sets the time


@pytest.mark.parametrize(("layers", "stages"), [(96, 8), (126, 16), (5, 4), (7, 7), (4, 1), (9, 2)])
def test_stages_hold_every_block_and_every_parameter_once(layers: int, stages: int) -> None:
    dealt = kinds(layers, stages)
    assert sum(item.many for item in dealt) == stages
    assert sum(item.many * item.kind.blocks for item in dealt) == layers
    assert dealt[0].kind.first
    assert dealt[-1].kind.last
    spec = preset("llama-2-7b").model_copy(update={"layers": layers})
    given = Setting(spec, cluster(1), 1, 2048)
    held = 0.0
    for item in dealt:
        sizes = parameters_of(given, item.kind, 1)
        held += item.many * (item.kind.blocks * sizes["block"] + sum(v for k, v in sizes.items() if k != "block"))
    assert held == spec.parameters


def test_bubbles_are_the_published_ones() -> None:
    def stage(seconds: float, chunks: int = 1) -> StagePasses:
        ahead, back = seconds / 3 / chunks, 2 * seconds / 3 / chunks
        return StagePasses((ahead,) * chunks, (back,) * chunks, (0.0,) * chunks)

    assert end_s([stage(1.0)] * 8, micro_batches=32, send_s=0) == pytest.approx(32 + 7.0)
    assert end_s([stage(1.0, 4)] * 8, micro_batches=32, send_s=0) == pytest.approx(32 + 7.0 / 4)
    assert end_s([*[stage(1.0)] * 7, stage(1.5)], micro_batches=10, send_s=0) == pytest.approx(7 * 1.0 + 10 * 1.5)
    assert [in_flight(i, 4, 8, 1) for i in range(4)] == [4, 3, 2, 1]
    assert in_flight(0, 4, 8, 2) == pytest.approx(4 * (1 + 3 / 8) + 0.0, abs=0.5)


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_causes_add_up_and_are_never_negative(candidate: Candidate) -> None:
    got = step_of(setting(8, 4), candidate)
    parts = dataclasses.asdict(got)
    hidden = parts.pop("hidden_s")
    assert all(value >= -1e-12 for value in (*parts.values(), hidden)), parts
    assert got.total == pytest.approx(sum(parts.values()))
    assert got.total > 0


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_more_bandwidth_is_never_slower_and_without_latency_tends_to_compute(candidate: Candidate) -> None:
    totals = [step_of(setting(8, 4, rate=rate, latency=0), candidate).total for rate in (1e8, 1e9, 1e10, 1e11, 1e14)]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(totals)), totals
    endless = step_of(setting(8, 4, rate=1e18, latency=0), candidate)
    assert endless.total == pytest.approx(endless.compute_s + endless.bubble_s + endless.optimizer_s, rel=0.02)


def test_a_faster_device_is_never_slower_and_recompute_costs_a_forward() -> None:
    assert step_of(setting(8, device="h100"), Candidate()).total < step_of(setting(8), Candidate()).total
    given = setting(1)
    axes = place(Candidate(), given.cluster, given.calibration)
    plain = block_passes(given, Candidate(), axes)
    again = block_passes(given, Candidate(recompute="full"), axes)
    assert again.backward.total == pytest.approx(plain.backward.total + plain.forward.total)


def test_work_equals_the_models_flops_at_a_flat_efficiency() -> None:
    flat = Calibration(matmul_efficiency=1.0, matmul_half=0.0, launch_s=0.0)
    base = setting(4, sequences=8)
    given = Setting(base.spec, base.cluster, 8, 2048, calibration=flat)
    got = step_of(given, Candidate(micro_batch=2))
    peak = given.cluster.device.peak_flops_per_s
    assert peak is not None
    assert got.matmul_s == pytest.approx(
        2 * 2048 * given.spec.model_flops_per_token(2048, causal=True) / peak, rel=1e-6
    )


def test_memory_falls_with_every_cut_and_depends_on_the_stage() -> None:
    given = setting(8, 4, model="llama-2-7b")
    totals = []
    for depths in [(-1, -1, -1), (-1, -1, 0), (-1, -1, 1), (0, 0, 1), (0, 1, 1), (1, 1, 1)]:
        candidate = Candidate(depths=depths, recompute="full")
        totals.append(peak_memory(given, candidate, place(candidate, given.cluster, given.calibration)))
    states = [memory.params + memory.grads + memory.optimizer for memory in totals]
    assert states == sorted(states, reverse=True)
    assert states[0] == pytest.approx(18 * given.spec.parameters)
    assert states[-1] == pytest.approx(18 * given.spec.parameters / 32)
    piped = Candidate(pipeline=4, depths=(-1, -1, 1))
    axes = place(piped, given.cluster, given.calibration)
    stages = [stage_memory(given, piped, axes, each) for each in kinds(given.spec.layers, 4)]
    assert stages[0].activations > stages[-1].activations
    assert stages[0].live == gradients_bytes(given, piped) < stages[-1].live


def test_outer_state_is_cut_over_the_whole_group_and_lies_in_host_memory() -> None:
    """8 bytes a parameter over the K = 32 ranks of a group, 12 with error feedback; one fragment of it on a GPU."""
    given = setting(8, 4, 2)
    psi = given.spec.parameters
    for sync, each in (
        (CandidateSync(2, 100, fragments=4), 8),
        (CandidateSync(2, 100, fragments=4, error_feedback=True), 12),
    ):
        for depths in [(-1, -1, -1), (1, 1, 1)]:
            candidate = Candidate(depths=depths, recompute="full", sync=sync)
            memory = peak_memory(given, candidate, place(candidate, given.cluster, given.calibration))
            assert memory.host == pytest.approx(each * psi / 32)
            assert memory.outer == pytest.approx(8 * psi / 32 / 4)
    device = given.cluster.device.model_copy(update={"kind": "cpu"})
    on_cpu = dataclasses.replace(given, cluster=given.cluster.model_copy(update={"device": device}))
    memory = peak_memory(on_cpu, candidate, place(candidate, on_cpu.cluster, on_cpu.calibration))
    assert memory.outer == memory.host == pytest.approx(12 * psi / 32)


def test_fits_is_not_said_of_what_five_percent_more_would_break() -> None:
    candidate = Candidate(depths=(1, 1, 1), recompute="full")
    given = setting(8, 4)
    memory = peak_memory(given, candidate, place(candidate, given.cluster, given.calibration))
    assert memory.fits(memory.total * 1.051)
    assert not memory.fits(memory.total * 1.049)
    low, high = memory.interval
    assert low < memory.total < high


def test_an_outer_round_stalls_only_for_what_overlap_does_not_hide() -> None:
    given = setting(8, 4, 2, rate=1e9)
    plain, streaming = CandidateSync(2, 100), CandidateSync(2, 100, fragments=10, overlap_steps=5)
    whole, part = outer_round(given, plain, 1.0), outer_round(given, streaming, 1.0)
    assert part.sent_bytes == pytest.approx(whole.sent_bytes / 10, rel=1e-6)
    assert whole.stall_s == whole.travel_s
    assert part.stall_s == pytest.approx(max(0.0, part.travel_s - 5.0))
    rate = rate_for_utilisation(0.9, parameters=1e9, groups=2, step_s=1.0, sync=plain)
    travel = 2e9 / rate
    assert 100 / (100 + travel) == pytest.approx(0.9)
    assert rate_for_utilisation(0.99, parameters=1e9, groups=2, step_s=1.0, sync=None) > 50 * rate


def test_goodput_is_youngs_optimum_and_islands_lose_less() -> None:
    given = Failures(rank_mtbf_s=3e9, checkpoint_s=60, restart_s=600)
    whole = goodput(given, 10_000)
    assert whole.interval_s == pytest.approx(math.sqrt(2 * 60 * 3e5))
    for factor in (0.5, 2.0):
        interval = whole.interval_s * factor
        assert 1 - (60 / interval + interval / 6e5 + 600 / 3e5) < whole.share
    assert goodput(given, 10_000, islands=10).share > whole.share


def _engine_bytes(world: World, depths: tuple[int, int, int], coded: bool, tied: bool) -> dict[str, dict[str, int]]:
    given = _cpu_setting(tuple(level.fanout for level in world.cluster.levels), tied=tied)
    candidate = _coded(Candidate(depths=depths, micro_batch=1), coded)
    return predicted_bytes(shard(Transformer(given.spec), candidate.to_plan(given), world))


def _coded(candidate: Candidate, coded: bool) -> Candidate:
    return dataclasses.replace(candidate, weights=(None, "int8"), grads=(None, "int4")) if coded else candidate


def _cpu_setting(fanouts: tuple[int, ...], *, tied: bool = False) -> Setting:
    return Setting(SPEC.model_copy(update={"tied": tied}), cluster(*fanouts), 8, 32, compute_dtype="fp32")


@pytest.mark.parametrize("depths", [(-1, -1, -1), (-1, -1, 1), (0, 0, 1), (0, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize(("coded", "tied"), [(False, False), (True, False), (False, True)])
def test_bytes_of_the_data_axis_are_the_engines(depths: tuple[int, int, int], coded: bool, tied: bool) -> None:
    engine = run_world((2, 2), _engine_bytes, depths, coded, tied)[0]
    given = _cpu_setting((2, 2), tied=tied)
    candidate = _coded(Candidate(depths=depths), coded)
    sent = states_bytes(given, candidate)
    names = given.cluster.level_names
    assert {names[level]: purposes for level, purposes in sorted(sent.items())} == engine


def states_bytes(given: Setting, candidate: Candidate) -> dict[int, dict[str, int]]:
    """level -> purpose -> bytes a step, small sums left out."""
    sent = planned(given, candidate, place(candidate, given.cluster, given.calibration)).sent_bytes()
    plain = {level: {name: n for name, n in sent[level].items() if name != "control"} for level in sent}
    return {level: purposes for level, purposes in plain.items() if purposes}


Rounds = tuple[tuple[int, int, int], int, int, OuterCodecName]
"""Depths, the level across which groups synchronise, fragments, codec."""


def _of_rounds(rounds: Rounds) -> Candidate:
    depths, level, fragments, codec = rounds
    return Candidate(depths=depths, sync=CandidateSync(level, 8, fragments, 2, codec))


def _round_bytes(world: World, rounds: Rounds) -> dict[str, dict[str, int]]:
    """level -> purpose -> bytes of H steps that only synchronise."""
    return _candidates_round_bytes(world, _of_rounds(rounds))


def _candidates_round_bytes(world: World, candidate: Candidate) -> dict[str, dict[str, int]]:
    given = _cpu_setting(tuple(level.fanout for level in world.cluster.levels))
    plan = candidate.to_plan(given)
    assert plan.sync is not None
    engine = shard(Transformer(given.spec), plan.of_group(), world.inside(plan.levels_in_group))
    sync = OuterSync(engine, plan.sync, world)
    for step in range(1, 9):
        sync.after(step)
    sync.drain()
    engine.drain()
    sent = {
        level: {purpose: count for purpose, count in purposes.items() if purpose.startswith("outer-")}
        for level, purposes in world.ledger.drain().sent_bytes().items()
    }
    return {level: purposes for level, purposes in sent.items() if purposes}


Summed = tuple[int, int, int]
"""The levels across which groups synchronise and inside which they add up, fragments."""


def _of_sums(sums: Summed, fanouts: tuple[int, ...]) -> Candidate:
    level, inside, fragments = sums
    given = _cpu_setting(fanouts)
    names = given.cluster.level_names
    config = SyncConfig(
        level=names[level],
        sum_inside=names[inside],
        inner_steps=8,
        fragments=fragments,
        codec="int4",
        staleness_bound=2,
    )
    rounds = config.resolve([(each.name, each.fanout) for each in given.cluster.levels])
    return Candidate(sync=CandidateSync.of(rounds, level, given.spec.layers))


@pytest.mark.parametrize(
    ("fanouts", "sums"),
    [((2, 2), (0, 0, 3)), ((2, 4), (0, 0, 1)), ((2, 2, 2), (1, 1, 2)), ((2, 2, 2), (0, 1, 1)), ((2, 2, 2), (0, 0, 1))],
)
def test_bytes_of_sums_are_those_of_a_run(fanouts: tuple[int, ...], sums: Summed) -> None:
    candidate, given = _of_sums(sums, fanouts), _cpu_setting(fanouts)
    made = run_world(fanouts, _candidates_round_bytes, candidate)[0]
    sent = sent_bytes(given, candidate, place(candidate, given.cluster, given.calibration))
    assert {level: pytest.approx(purposes, rel=1e-12) for level, purposes in _eight_steps(sent).items()} == made


def test_a_round_of_sums_sends_across_what_as_many_groups_as_places_would() -> None:
    given = setting(2, 2, 2, rate=1e9)
    names = given.cluster.level_names
    rounds = SyncConfig(level=names[0], sum_inside=names[1], inner_steps=8, codec="int8").resolve(
        [(each.name, each.fanout) for each in given.cluster.levels]
    )
    summed, few = CandidateSync.of(rounds, 0, 1), CandidateSync(2, 8, codec="int8")
    assert summed.groups(given.cluster) == 8
    assert outer_round(given, summed, 1.0).sent_bytes == outer_round(given, few, 1.0).sent_bytes
    inside_s = 2 * 4 * given.parameters * 3 / 4 / rate_of(given.cluster, 1, given.calibration)
    travel_s = outer_round(given, few, 1.0).travel_s
    assert outer_round(given, summed, 1.0).travel_s == pytest.approx(travel_s + inside_s)


@pytest.mark.parametrize("fanouts", [(2, 2), (1, 4), (1, 2, 2)])
@pytest.mark.parametrize(
    "rounds", [((-1, -1, -1), 1, 1, "fp32"), ((-1, -1, 0), 1, 3, "e3m0"), ((0, 0, 0), 1, 2, "topk")]
)
def test_bytes_of_rounds_are_those_of_a_run(fanouts: tuple[int, ...], rounds: Rounds) -> None:
    made = run_world(fanouts, _round_bytes, rounds)[0]
    given, candidate = _cpu_setting(fanouts), _of_rounds(rounds)
    sent = sent_bytes(given, candidate, place(candidate, given.cluster, given.calibration))
    assert {level: pytest.approx(purposes, rel=1e-12) for level, purposes in _eight_steps(sent).items()} == made


def _eight_steps(sent: Sent) -> dict[str, dict[str, float]]:
    """level -> purpose -> bytes of rounds in eight steps."""
    found = {
        level: {purpose: 8 * count for purpose, count in purposes.items() if purpose.startswith("outer-")}
        for level, purposes in sent.items()
    }
    return {level: purposes for level, purposes in found.items() if purposes}


@pytest.mark.parametrize("depths", [(-1, -1, -1), (-1, -1, 0), (0, 0, 0)])
@pytest.mark.parametrize("keep_gathered", [False, True])
def test_what_ranks_must_carry_themselves_is_never_hidden(depths: tuple[int, int, int], keep_gathered: bool) -> None:
    if keep_gathered and depths[0] < 0:
        return
    free = setting(4, model="llama-3m", sequences=32, rate=4e9)
    candidate = Candidate(depths=depths, micro_batch=2, keep_gathered=keep_gathered)
    level = free.cluster.levels[0].model_copy(update={"behind": 0.0})
    bound = dataclasses.replace(free, cluster=free.cluster.model_copy(update={"levels": (level,)}))
    fast = bound.cluster.levels[0].model_copy(update={"bytes_per_s": 1e30, "latency_s": 0.0})
    silent = dataclasses.replace(bound, cluster=bound.cluster.model_copy(update={"levels": (fast,)}))
    axes = place(candidate, bound.cluster, bound.calibration)
    sent = sum(states_bytes(bound, candidate)[0].values()) / axes.data[0].bytes_per_s
    longer = step_of(bound, candidate).total - step_of(silent, candidate).total
    assert longer >= sent * (1 - 1e-6)  # and latencies besides
    assert step_of(free, candidate).total < step_of(bound, candidate).total
    assert simulate_step(bound, candidate, axes).step_s == pytest.approx(step_of(bound, candidate).total, rel=1e-3)


def test_ranks_that_wait_for_each_other_lose_time_once_wherever_compute_stops() -> None:
    plain = setting(2, model="llama-3m", sequences=4)
    level = plain.cluster.levels[0].model_copy(update={"behind": 0.0})
    cluster_ = plain.cluster.model_copy(update={"levels": (level,)})

    def lost(depths: tuple[int, int, int], **more: Any) -> tuple[float, ...]:
        found = []
        for calibration in (Calibration(meeting_s=1.0), Calibration()):
            given = dataclasses.replace(plain, cluster=cluster_, calibration=calibration)
            candidate = Candidate(depths=depths, micro_batch=1, **more)
            moves = unit_moves(1024, given, candidate, place(candidate, cluster_, calibration).states)
            found.append((moves.own_forward_s, moves.own_backward_s, moves.own_once_s))
        return tuple(round(waiting - none, 6) for waiting, none in zip(*found, strict=True))

    assert lost((-1, -1, -1)) == (0, 0, 1)  # the last backward
    assert lost((-1, -1, 0)) == (0, 0, 2)  # and the first forward's new weights
    assert lost((0, 0, 0)) == (1, 1, 0)
    assert lost((0, 0, 0), keep_gathered=True) == (0, 1, 1)


def test_a_measured_codec_and_optimizer_take_what_was_measured() -> None:
    plain = setting(2, model="llama-3m", sequences=4)
    measured = Calibration(coding_s={"int8": (1e-6, 2e-6)}, optimizer_s=1e-6, collect_s=1e-6)
    given = dataclasses.replace(plain, calibration=measured)
    axes = place(Candidate(), given.cluster, measured)
    coded = Candidate(depths=(-1, -1, 0), weights=("int8",), grads=("int8",), micro_batch=2)
    exact = Candidate(depths=(-1, -1, 0), micro_batch=2)
    moves, reference = (unit_moves(1024, given, each, axes.states) for each in (coded, exact))
    # A reduce-scatter codes and decodes all numbers; a gather codes its half of them and decodes all.
    assert moves.own_once_s - reference.own_once_s == pytest.approx(1024 * (1e-6 + 2e-6 + 0.5e-6 + 2e-6))
    assert reference.own_backward_s == pytest.approx(1024e-6)
    assert optimizer_s(given, 1000, axes) == pytest.approx(1e-3 + optimizer_s(given, 0, axes))


def test_axes_the_trainer_does_not_run_are_named_and_counted() -> None:
    given = setting(8, 4)
    candidate = Candidate(tensor=4, pipeline=2, depths=(-1, -1, 1))
    assert candidate.not_run_yet == ("tensor", "pipeline")
    assert not candidate.runnable
    sent = sent_bytes(given, candidate, place(candidate, given.cluster, given.calibration))
    moved = 2048 * given.spec.hidden * 2
    assert sent["node"]["tensor"] == pytest.approx(2 * moved * 4 * 16 * 3 / 4 * candidate.accumulate(given))
    assert Candidate(depths=(0, 0, 1)).runnable
